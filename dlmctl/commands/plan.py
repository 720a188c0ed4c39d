"""`dlmctl plan`: options and wiring."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from dlmctl.commands.mask_options import Masks, MasksPerSample
from dlmctl.commands.objective_options import Algo, Beta, Inner
from dlmctl.commands.optimizer_options import GradientCheckpointing, LoraRank
from dlmctl.commands.options import BatchSize, Dtype, Json
from dlmctl.commands.sampling import (
    BlockLength,
    Cache,
    CfgScale,
    GenLength,
    Refresh,
    Steps,
    Temperature,
)
from dlmctl.commands.tables import print_table
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import write_records
from dlmctl.settings.algorithms import PROMPTS_PER_STEP, RECIPES, Constants, check_kind
from dlmctl.settings.parsing import byte_count
from dlmctl.settings.sampler import Sampler

SEEN, RUN, MACHINE = "What a step sees", "The run", "The machine"

BYTES = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "moments",
    "reference": "reference",
    "gathered": "gathered",
    "cache": "cache",
    "activations": "activations",
    "logits": "logits",
    "working": "working",
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


def command(
    model: Annotated[
        str,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            envvar="DLMCTL_MODEL",
            help="Directory, checkpoint or hub name, of which config.json alone is read; or the "
            "path of a config.json.",
        ),
    ] = "builtin:puzzles",
    algo: Algo = "rspo",
    beta: Beta = None,
    inner: Inner = None,
    masks: Masks = None,
    masks_per_sample: MasksPerSample = None,
    prompts_per_step: Annotated[
        int, typer.Option(min=1, help="Prompts (groups) in a step.", rich_help_panel=SEEN)
    ] = PROMPTS_PER_STEP,
    samples: Annotated[
        int,
        typer.Option(
            "-n", "--samples", min=1, help="Completions for each prompt.", rich_help_panel=SEEN
        ),
    ] = 8,
    prompt_length: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt.", rich_help_panel=SEEN)
    ] = 128,
    image_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Tokens that the image of a prompt has beside these; Qwen2.5-VL has one for every "
            "28 x 28 pixels.",
            rich_help_panel=SEEN,
        ),
    ] = 0,
    gen_length: GenLength = None,
    block_length: BlockLength = None,
    steps: Steps = None,
    temperature: Temperature = 0.9,
    cfg_scale: CfgScale = 0.0,
    cache: Cache = "none",
    refresh: Refresh = None,
    lora_rank: LoraRank = 0,
    gradient_checkpointing: GradientCheckpointing = False,
    batch_size: BatchSize = 32,
    rollout_batch_size: Annotated[
        int,
        typer.Option(
            min=1, help="--batch-size of 'dlmctl rollout': sequences under way at a time."
        ),
    ] = 64,
    dtype: Dtype = "auto",
    total_steps: Annotated[
        int | None,
        typer.Option(
            min=1, show_default="off", help="Steps of the whole run.", rich_help_panel=RUN
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            show_default="off",
            help="Of a device for an hour, in any currency.",
            rich_help_panel=RUN,
        ),
    ] = None,
    gpus: Annotated[
        int,
        typer.Option(
            min=1,
            help="Devices: 'update' under torchrun with as many ranks, 'rollout' in as many "
            "--shard.",
            rich_help_panel=MACHINE,
        ),
    ] = 1,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            show_default="unknown",
            help="Memory of a device, as 80G; a tenth of it is left free, for CUDA and "
            "fragmentation.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            show_default="unknown",
            help="10^9 bytes a second that a device receives from the others.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            show_default="unknown",
            help="10^12 operations a second that one device was measured to do.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    tokens_per_second: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            show_default="unknown",
            help="Of 'dlmctl bench rollout' on one device, with these lengths and steps. Without "
            "--tflops it stands for the speed of everything.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Say what a training run needs, from config.json alone.

    Takes the options of 'dlmctl rollout' and 'dlmctl update' and writes a record for each stage
    that has the model on the device, and one for the step that they make. Bytes for each device, by
    part: weights; gradients; moments of the optimizer; reference, which an adapter does without;
    gathered, weights and gradients that FSDP2 moves, at most; cache, keys and values;
    activations; logits of the scored positions; working, what the optimizer's step makes when the
    passes are over. total is what is there at once. With
    --gpu-memory: whether it fits, and changes that would. flops are those of all devices together;
    gather and scatter the bytes that a device receives. One device has all stages at once, as in a
    pipe; several have them in turn.

    Everything is computed: bytes by following the passes of this code without values, operations
    by formula. Seconds are operations by what one device was measured to do, plus traffic by
    --bandwidth, as if neither hid the other; for completions of full length. Of small models on the
    CPU the bytes were within a twentieth of what was resident; on GPUs nothing was measured.

    Examples:

    dlmctl plan -m GSAI-ML/LLaDA-8B-Instruct --lora-rank 128 --gradient-checkpointing
    --gen-length 256 --steps 128 -n 6 --batch-size 4 --gpu-memory 80G

    dlmctl plan -m config.json --gpus 8 --gpu-memory 80G --bandwidth 200 --tflops 300
    """
    import torch

    from dlmctl.diffusion.sampling import configured
    from dlmctl.models.loading import resolve_dtype
    from dlmctl.models.weightless import weightless_policy
    from dlmctl.plan.requirements import Machine, Options, Work, plan
    from dlmctl.rl.credit_stage import credit_passes
    from dlmctl.rl.objectives.table import make_objective
    from dlmctl.rl.policy_gradient import Passes, passes_for

    chosen = resolve_dtype(dtype, torch.device("cuda"))
    policy = weightless_policy(model, chosen)
    if image_tokens and policy.family != "vlm":
        raise UsageError(f"{model} takes no images: leave --image-tokens out")
    Constants(beta=beta).of(algo)
    check_kind(algo, policy.diffusion, model)
    recipe, passes = RECIPES[algo], Passes(0, 0, 1)
    if algo != "sft":
        objective = make_objective(algo, beta=beta)
        sampled = recipe.sampled_old and not policy.diffusion
        passes = passes_for(objective, inner or recipe.inner, sampled)
    whole = not policy.diffusion or (masks or recipe.law) == "full"
    sampler = Sampler(
        gen_length, block_length, steps, temperature, cfg_scale, cache=cache, refresh=refresh
    )
    work = Work(
        prompt_length=prompt_length + image_tokens,
        image_tokens=image_tokens,
        samples=1 if algo == "sft" else samples,
        prompts=prompts_per_step,
        masks=(masks_per_sample or recipe.samples) if policy.diffusion else 1,
        scored=1.0 if whole else 0.5,
        passes=passes,
        contrasts=credit_passes(policy.diffusion) if algo == "srpo" else 0,
        sampling=configured(policy, sampler),
        sampling_batch=0 if algo == "sft" else rollout_batch_size,
    )
    machine = Machine(
        None if gpu_memory is None else byte_count("--gpu-memory", gpu_memory),
        None if bandwidth is None else bandwidth * 1e9,
        None if tflops is None else tflops * 1e12,
        tokens_per_second,
    )
    options = Options(model, chosen, lora_rank, gradient_checkpointing, batch_size, gpus)
    rows = [_whole_run(row, total_steps, price, gpus) for row in plan(options, work, machine)]
    if json or not sys.stdout.isatty():
        write_records(rows)
        return
    _table(rows)
    for change in rows[-1].get("changes", []):
        print(f"would fit: {change}")


def _table(rows: Sequence[Mapping[str, Any]]) -> None:
    """A column for each stage."""
    names = [
        name for name in {**BYTES, **OTHERS} if any(row.get(name) not in (None, 0) for row in rows)
    ]
    lines = [
        {"": {**BYTES, **OTHERS}[name], **{row["stage"]: _cell(row, name) for row in rows}}
        for name in names
    ]
    print_table(lines, {"": "", **{row["stage"]: row["stage"] for row in rows}})


def _whole_run(
    row: dict[str, Any], total_steps: int | None, price: float | None, gpus: int
) -> dict[str, Any]:
    """The record of the step with hours and cost of the run."""
    if row["stage"] != "step" or total_steps is None or "seconds" not in row:
        return row
    hours = row["seconds"] * total_steps / 3600
    cost = {} if price is None else {"cost": hours * gpus * price}
    return {**row, "hours": hours, **cost}


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
