"""`dlmctl plan`: options and wiring."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from dlmctl.commands.tables import print_table
from dlmctl.records.jsonl import write_records
from dlmctl.settings import only
from dlmctl.settings.masks import Masks
from dlmctl.settings.objective import Algo, Constants
from dlmctl.settings.plan import Machine, Options, Run, Step
from dlmctl.settings.sampler import SAMPLED, Sampler
from dlmctl.settings.streams import Json
from dlmctl.settings.training import Learning

BYTES = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "moments",
    "reference": "reference",
    "gathered": "gathered",
    "cache": "cache",
    "activations": "activations",
    "logits": "logits",
    "total": "total at once",
    "gather": "gather in a step",
    "scatter": "scatter in a step",
}
OTHERS = {
    "fits": "fits",
    "flops": "PFLOP",
    "seconds": "seconds",
    "tokens_per_second": "tokens per second",
    "hours": "hours",
    "cost": "cost",
}
PLANNED_SAMPLER = only(
    Sampler, "gen_length", "block_length", "steps", "temperature", "top_p", "top_k", "cfg_scale",
    "schedule", "remasking", "confidence_of", "threshold", "cache", "refresh", "refresh_below",
)  # fmt: skip


def command(
    options: Options = Options(),
    algo: Algo = "rspo",
    constants: Annotated[Constants, only(Constants, "beta")] = Constants(),
    learning: Annotated[Learning, only(Learning, "inner")] = Learning(),
    masks: Annotated[Masks, only(Masks, "law", "samples", "shrink")] = Masks(),
    step: Step = Step(),
    sampler: Annotated[Sampler, PLANNED_SAMPLER] = SAMPLED,
    machine: Machine = Machine(),
    run: Run = Run(),
    json: Json = False,
) -> None:
    """Say what a training run needs, from config.json alone.

    Takes the options of 'dlmctl rollout' and 'dlmctl update' and writes a record for each stage
    that has the model on the device, and one for the whole step. Bytes of each device, by part:
    weights; gradients; moments of the optimizer; reference, which a run with an adapter does not
    need; gathered, the most weights and gradients that FSDP2 moves at a time; cache, keys and
    values; activations; logits of the scored positions. total is the most that is there at once.
    With --gpu-memory: whether it fits, and changes that would make it fit. flops are those of all
    devices together; gather and scatter are the bytes that a device receives. One device has all
    stages at once, as in a pipe; several have them in turn.

    Everything is computed: bytes by following the passes of this code without values, operations by
    formula. Seconds are operations divided by the measured speed of one device, plus traffic
    divided by --bandwidth, as if neither hid the other, for completions of full length, sampled in
    --steps, or a step for each token; what --threshold saves and --refresh-below adds is not
    counted. --measured takes the speeds from 'dlmctl bench gpu', which may have measured a model of
    another shape, but of about that size. For small
    models on the CPU the bytes were within a twentieth of what was resident; nothing was measured
    on GPUs.

    Examples:

    dlmctl plan -m GSAI-ML/LLaDA-8B-Instruct --lora-rank 128 --gradient-checkpointing
    --gen-length 256 --steps 128 -n 6 --batch-size 4 --gpu-memory 80G

    dlmctl plan -m config.json --gpus 8 --gpu-memory 80G --bandwidth 200 --tflops 300

    dlmctl plan -m config.json --cache dual --measured measured.jsonl
    """
    from dlmctl.plan.measured import with_measured
    from dlmctl.plan.requirements import plan, work_of

    work = work_of(options, algo, constants, learning.inner, masks, step, sampler)
    device = None
    if machine.measured is not None:
        machine, device = with_measured(machine, options, work)
    rows = list(plan(options, work, machine))
    if device is not None:
        rows[-1]["measured_on"] = device
    if run.total_steps is not None and "seconds" in rows[-1]:
        rows[-1]["hours"] = rows[-1]["seconds"] * run.total_steps / 3600
        if run.price is not None:
            rows[-1]["cost"] = rows[-1]["hours"] * options.gpus * run.price
    if json or not sys.stdout.isatty():
        write_records(rows)
        return
    _table(rows)
    for change in rows[-1].get("changes", []):
        print(f"would fit: {change}")


def _table(rows: Sequence[Mapping[str, Any]]) -> None:
    """A column for each stage."""
    headings = {**BYTES, **OTHERS}
    names = [name for name in headings if any(row.get(name) not in (None, 0) for row in rows)]
    lines = [
        {"": headings[name], **{row["stage"]: _cell(row, name) for row in rows}} for name in names
    ]
    print_table(lines, {"": "", **{row["stage"]: row["stage"] for row in rows}})


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if name == "fits":
        return "yes" if value else "no"
    if name == "flops":
        return f"{value / 1e15:.4g}"
    if name not in BYTES:
        return f"{value:.4g}"
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.2f} MB"
