"""`dlmctl update`: options and wiring of the stage."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Literal

import typer

from dlmctl.commands.options import BatchSize, Device, Dtype, Files, OnErrorOption, Quiet, Seed
from dlmctl.commands.progress import counted
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record, read_records, write_records

OBJECTIVE, MASKS, OPTIMIZER, ADAPTER = "Objective", "Masks", "Optimizer", "Adapter and memory"


def command(
    files: Files = None,
    algo: Annotated[
        Literal["rspo", "reinforce", "sft"],
        typer.Option(
            help="rspo: residual feedback towards a target log-ratio; reinforce: the same with "
            "lambda 0; sft: masked cross-entropy on the given completions.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = "rspo",
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            envvar="DLMCTL_MODEL",
            show_default="the model that the records were sampled from",
            help="Model to begin from, which is also the reference; a run that exists goes on "
            "from its own checkpoint.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="RUN",
            show_default="the next free runs/ALGO-N",
            help="Directory of the run: checkpoints, the link 'latest', metrics.jsonl.",
        ),
    ] = None,
    strength: Annotated[
        float,
        typer.Option(
            "--lambda",
            min=0.0,
            help="Feedback coefficient of RSPO; the target of the log-ratio is advantage/lambda.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = 0.01,
    score_norm: Annotated[
        Literal["sequence", "token"],
        typer.Option(
            help="Score of a completion: its ELBO, or the ELBO per token. One lambda of `token` "
            "is length times one of `sequence`. The paper could not be read on this; the default "
            "is ours.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = "sequence",
    center: Annotated[
        Literal["batch", "prompt"],
        typer.Option(help="Where the mean of the log-ratios is taken.", rich_help_panel=OBJECTIVE),
    ] = "batch",
    baseline: Annotated[
        Literal["mean", "loo", "none"],
        typer.Option(
            help="Advantages of records that bear none: as in 'dlmctl advantage'.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = "mean",
    scale: Annotated[
        Literal["none", "group", "batch"],
        typer.Option(
            help="Standard deviation that those advantages are divided by.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = "none",
    prompts_per_step: Annotated[
        int,
        typer.Option(
            min=1,
            help="Prompts (groups) in an optimizer step; for sft, completions.",
            rich_help_panel=OPTIMIZER,
        ),
    ] = 32,
    masks: Annotated[
        Literal["independent", "uniform", "complementary"],
        typer.Option(help="Mask law, as in 'dlmctl score-elbo'.", rich_help_panel=MASKS),
    ] = "complementary",
    samples: Annotated[
        int,
        typer.Option(
            "-k",
            "--masks-per-sample",
            min=1,
            help="Masks for each completion.",
            rich_help_panel=MASKS,
        ),
    ] = 2,
    until_eos: Annotated[
        bool,
        typer.Option(
            "--until-eos/--all-tokens",
            help="Score tokens up to the first end-of-sequence, or the whole completion.",
            rich_help_panel=MASKS,
        ),
    ] = False,
    fill_to: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="off",
            help="For sft: fill completions with end-of-sequence to so many tokens.",
            rich_help_panel=MASKS,
        ),
    ] = None,
    rate: Annotated[
        float, typer.Option("--lr", min=0.0, help="Learning rate.", rich_help_panel=OPTIMIZER)
    ] = 3e-6,
    warmup: Annotated[
        int, typer.Option(min=0, help="Steps of linear warm-up.", rich_help_panel=OPTIMIZER)
    ] = 0,
    schedule: Annotated[
        Literal["constant", "cosine"],
        typer.Option(
            help="Learning rate after warm-up; cosine needs --total-steps.",
            rich_help_panel=OPTIMIZER,
        ),
    ] = "constant",
    total_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="off",
            help="Where the cosine ends.",
            rich_help_panel=OPTIMIZER,
        ),
    ] = None,
    beta1: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="AdamW's first decay.", rich_help_panel=OPTIMIZER),
    ] = 0.9,
    beta2: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="AdamW's second decay.", rich_help_panel=OPTIMIZER),
    ] = 0.99,
    weight_decay: Annotated[
        float,
        typer.Option(min=0.0, help="Decoupled, on matrices.", rich_help_panel=OPTIMIZER),
    ] = 0.1,
    max_norm: Annotated[
        float,
        typer.Option(
            "--grad-norm",
            min=0.0,
            help="Clip the gradient to this norm; 0 does not.",
            rich_help_panel=OPTIMIZER,
        ),
    ] = 0.2,
    lora_rank: Annotated[
        int,
        typer.Option(
            min=0,
            help="Train a LoRA adapter of this rank (128 in the literature); 0 trains all weights.",
            rich_help_panel=ADAPTER,
        ),
    ] = 0,
    lora_alpha: Annotated[
        float, typer.Option(min=0.0, help="Scale of the adapter.", rich_help_panel=ADAPTER)
    ] = 64.0,
    lora_dropout: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Dropout in the adapter.", rich_help_panel=ADAPTER),
    ] = 0.0,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Recompute activations in the backward pass: less memory, a third more time.",
            rich_help_panel=ADAPTER,
        ),
    ] = False,
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps between checkpoints within a round.")
    ] = 100,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints that stay.")] = 2,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
) -> None:
    """Train a model on the records and save a checkpoint.

    Takes one optimizer step for every --prompts-per-step groups and writes one metrics record for
    each to standard output and to RUN/metrics.jsonl. RUN/latest is a Hugging Face directory that
    every --model takes. The same command goes on where the run was.

    What the records lack is computed: advantages from rewards, scores of policy and reference.

    Examples:

    dlmctl rollout | dlmctl verify | dlmctl update --algo rspo -o runs/a

    dlmctl prompts sudoku -n 100000 --completions | dlmctl update --algo sft -m new -o runs/base
    """
    from dlmctl.diffusion.scoring import MaskPlan
    from dlmctl.rl.policy_gradient import Objective
    from dlmctl.rl.update import update_policy, update_supervised
    from dlmctl.training.run import Adapter, Optimization, open_run

    if schedule == "cosine" and total_steps is None:
        raise UsageError("--schedule cosine needs --total-steps")
    records, sampled_from = _first_model(read_records(files or [], on_error))
    directory = output or _next_run(algo)
    print(f"dlmctl: writing {directory}", file=sys.stderr)
    run = open_run(
        directory,
        model or sampled_from or "builtin:puzzles",
        algo,
        Optimization(rate, (beta1, beta2), weight_decay, max_norm, warmup, schedule, total_steps),
        Adapter(lora_rank, lora_alpha, lora_dropout),
        device,
        dtype,
        gradient_checkpointing,
        seed,
    )
    plan = MaskPlan(masks, samples, seed, until_eos)
    if algo == "sft":
        metrics = update_supervised(
            records, run, plan, prompts_per_step, batch_size, fill_to, save_every, keep
        )
    else:
        objective = Objective(algo, strength, score_norm, center, baseline, scale, plan)
        metrics = update_policy(
            records, run, objective, prompts_per_step, batch_size, save_every, keep
        )
    write_records(counted(metrics, "steps", quiet))


def _first_model(records: Iterator[Record]) -> tuple[Iterator[Record], str | None]:
    """The same records, and the model that the first of them was sampled from."""
    first = next(records, None)
    if first is None:
        raise UsageError("no records came in; nothing to train on")
    return chain([first], records), (first.get("rollout") or {}).get("model")


def _next_run(algo: str) -> Path:
    """The first of runs/ALGO-1, runs/ALGO-2, … that is not there."""
    return next(p for n in count(1) if not (p := Path("runs") / f"{algo}-{n}").exists())
