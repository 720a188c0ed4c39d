"""`dlmctl distill masked`: options and wiring."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.mask_options import FillTo
from dlmctl.commands.optimizer_options import (
    OPTIMIZER,
    Beta1,
    Beta2,
    GradientCheckpointing,
    LoraAlpha,
    LoraDropout,
    LoraRank,
    MaxNorm,
    Rate,
    ResumeInput,
    Warmup,
    WeightDecay,
)
from dlmctl.commands.options import BatchSize, Device, Dtype, Files, OnErrorOption, Quiet, Seed
from dlmctl.commands.ranks import on_every_rank, write_metrics
from dlmctl.records.jsonl import read_records
from dlmctl.settings.models import Prompting, Reading

CONSISTENCY = "Consistency"


@on_every_rank
def command(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="RUN", help="Directory of the run.")
    ],
    files: Files = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            "--teacher",
            metavar="MODEL",
            envvar="DLMCTL_MODEL",
            show_default="builtin:puzzles",
            help="The teacher, from whose weights the student begins.",
        ),
    ] = None,
    reading: Reading = Reading(),
    prompting: Prompting = Prompting(),
    order: Annotated[
        Literal["random", "trajectory"],
        typer.Option(
            help="Which tokens are hidden longest: random ones, or those that 'dlmctl rollout' "
            "decided last.",
            rich_help_panel=CONSISTENCY,
        ),
    ] = "random",
    divergence: Annotated[
        Literal["kl-fwd", "kl-bwd"],
        typer.Option(
            help="KL from target to student, or from student to target.",
            rich_help_panel=CONSISTENCY,
        ),
    ] = "kl-fwd",
    decided: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens between the two levels in the first round; each round has twice as many "
            "as the one before.",
            rich_help_panel=CONSISTENCY,
        ),
    ] = 1,
    rounds: Annotated[
        int,
        typer.Option(
            min=1,
            help="Rounds. The target of the first is the teacher, afterwards the student as it was "
            "when the round began.",
            rich_help_panel=CONSISTENCY,
        ),
    ] = 3,
    steps_per_round: Annotated[
        int, typer.Option(min=1, help="Steps of a round.", rich_help_panel=CONSISTENCY)
    ] = 500,
    until_eos: Annotated[
        bool,
        typer.Option(
            "--until-eos/--all-tokens",
            help="Tokens up to the first end-of-sequence, or the whole completion.",
            rich_help_panel=CONSISTENCY,
        ),
    ] = False,
    records_per_step: Annotated[
        int,
        typer.Option(min=1, help="Completions in a step.", rich_help_panel=OPTIMIZER),
    ] = 32,
    fill_to: FillTo = None,
    rate: Rate = 3e-6,
    warmup: Warmup = 0,
    beta1: Beta1 = 0.9,
    beta2: Beta2 = 0.99,
    weight_decay: WeightDecay = 0.1,
    max_norm: MaxNorm = 0.2,
    lora_rank: LoraRank = 0,
    lora_alpha: LoraAlpha = 64.0,
    lora_dropout: LoraDropout = 0.0,
    gradient_checkpointing: GradientCheckpointing = False,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints that stay.")] = 2,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    resume: ResumeInput = False,
) -> None:
    """A diffusion language model of few steps, by masked consistency.

    The student sees a completion with many tokens hidden and learns what the target predicts once
    some of them are decided; those themselves it learns from the completion. Completions of a data
    set anchor it in the data; completions that the teacher sampled make it learn from the teacher
    alone. Takes a step for every --records-per-step completions, and writes one metrics record for
    each to standard output and to RUN/metrics.jsonl. RUN/latest is a model that every --model
    takes. The same command goes on where the run was, with --resume also in the input; for several
    processes under torchrun see 'dlmctl update'.

    Examples:

    dlmctl prompts sudoku -n 48000 --completions | dlmctl distill masked --lr 3e-4 -o runs/few

    dlmctl prompts sudoku -n 48000 | dlmctl rollout -n 1 --temperature 0 |
    dlmctl distill masked --order trajectory --lr 3e-4 -o runs/few
    """
    from dlmctl.distill.masked_lm import ALGO, MaskedConsistency, distill_masked
    from dlmctl.train.distributed import is_first
    from dlmctl.train.lora import Adapter
    from dlmctl.train.run import Optimizer, open_run

    lines = input_lines(files)
    records = read_records(files or [], on_error)
    if is_first():
        print(f"dlmctl: writing {output}", file=sys.stderr)
    run = open_run(
        output,
        reading.of(teacher),
        ALGO,
        Optimizer(rate, warmup, "constant", None, beta1, beta2, weight_decay, max_norm),
        Adapter(lora_rank, lora_alpha, lora_dropout),
        device,
        dtype,
        gradient_checkpointing,
        seed,
        prompting=prompting,
    )
    rest = run.untrained(records) if resume else records
    if rest is None:
        return
    if resume and run.progress.step >= rounds * steps_per_round:
        print(f"dlmctl: {output} is trained already", file=sys.stderr)
        return
    plan = MaskedConsistency(order, divergence, decided, rounds, steps_per_round, until_eos, seed)
    run.about = {**asdict(plan), "records per step": records_per_step, "fill to": fill_to}
    metrics = distill_masked(rest, run, plan, records_per_step, batch_size, fill_to, keep)
    before = run.progress.step if resume else 0
    most = rounds * steps_per_round - run.progress.step + before
    total = lines.times(1 / records_per_step, most)
    write_metrics(metrics, quiet, run.standing, total, before)
