"""`dlmctl distill masked`: options and wiring."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.ranks import on_every_rank, write_metrics
from dlmctl.commands.tracking import check_trackers, tracked
from dlmctl.records.passes import read_passes
from dlmctl.settings import Knob
from dlmctl.settings.compute import Compute
from dlmctl.settings.distill import MaskedConsistency
from dlmctl.settings.masks import Fill
from dlmctl.settings.models import Prompting, Reading
from dlmctl.settings.optimizer import OPTIMIZER, Adapter, GradientCheckpointing, Optimizer
from dlmctl.settings.streams import Files, OnErrorOption, Passes, Quiet
from dlmctl.settings.training import Log, ResumeInput


@on_every_rank
def command(
    output: Annotated[Path, Knob("Directory of the run.", "-o", "--output", metavar="RUN")],
    files: Files = None,
    passes: Passes = Passes(),
    teacher: Annotated[
        str | None,
        Knob(
            "The teacher, with whose weights the student begins.",
            "-m",
            "--model",
            "--teacher",
            metavar="MODEL",
            env=True,
            shown_default="builtin:puzzles",
        ),
    ] = None,
    reading: Reading = Reading(),
    prompting: Prompting = Prompting(),
    plan: MaskedConsistency = MaskedConsistency(),
    records_per_step: Annotated[
        int, Knob("Completions per step.", "--records-per-step", minimum=1, panel=OPTIMIZER)
    ] = 32,
    fill_to: Annotated[
        str | None,
        Knob(
            Fill.HELP,
            "--fill-to",
            metavar=Fill.FORM,
            shown_default="off",
        ),
    ] = None,
    optimizer: Optimizer = Optimizer(),
    adapter: Adapter = Adapter(),
    gradient_checkpointing: GradientCheckpointing = False,
    keep: Annotated[int, Knob("Number of newest checkpoints to keep.", "--keep", minimum=1)] = 2,
    log: Log = None,
    compute: Compute = Compute(),
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    resume: ResumeInput = False,
) -> None:
    """Distil a diffusion language model into one of few steps, by masked consistency.

    The student sees a completion with many masked tokens and learns to predict what the target
    predicts once some of these are decided; the decided tokens themselves it learns from the
    completion. Completions of a data set anchor it in the data; from completions that the teacher
    sampled it learns from the teacher alone. Takes one step per --records-per-step completions, and
    writes a metrics record for each to standard output and to RUN/metrics.jsonl. RUN/latest is a
    model that every --model accepts. The same command resumes the run, and with --resume also the
    input; to use several processes under torchrun, see 'dlmctl update'.

    Examples:

    dlmctl prompts sudoku -n 48000 --completions | dlmctl distill masked --lr 3e-4 -o runs/few

    dlmctl prompts sudoku -n 48000 | dlmctl rollout -n 1 --temperature 0 |
    dlmctl distill masked --order trajectory --lr 3e-4 -o runs/few
    """
    from dlmctl.distill.masked_lm import ALGO, distill_masked
    from dlmctl.train.distributed import is_first
    from dlmctl.train.run import open_run

    check_trackers(log)
    fill = Fill.read(fill_to)
    lines = input_lines(files)
    records = read_passes(files or [], on_error, passes.epochs, passes.shuffle, plan.seed)
    if is_first():
        print(f"dlmctl: writing {output}", file=sys.stderr)
    run = open_run(
        output,
        reading.of(teacher),
        ALGO,
        optimizer,
        adapter,
        compute.device,
        compute.dtype,
        gradient_checkpointing,
        plan.seed,
        prompting=prompting,
    )
    rest = run.untrained(records) if resume else records
    if rest is None:
        return
    steps = plan.rounds * plan.steps_per_round
    if resume and run.progress.step >= steps:
        print(f"dlmctl: {output} is trained already", file=sys.stderr)
        return
    run.about = {**asdict(plan), "records per step": records_per_step, "fill to": fill_to}
    run.about |= passes.recorded()
    metrics = distill_masked(rest, run, plan, records_per_step, compute.batch_size, fill, keep)
    before = run.progress.step if resume else 0
    total = lines.times(passes.epochs / records_per_step, steps - run.progress.step + before)
    with tracked(log, output, run.recorded()):
        write_metrics(metrics, quiet, run.standing, total, before)
