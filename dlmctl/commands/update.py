"""`dlmctl update`: options and wiring of the stage."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from dlmctl.commands.corpora import level_range
from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.mask_options import (
    FillTo,
    Level,
    Masks,
    MasksPerSample,
    PromptMask,
    UntilEos,
)
from dlmctl.commands.objective_options import (
    Algo,
    BaselineOption,
    Beta,
    Center,
    Clip,
    ClipHigh,
    DropZeroAdvantage,
    DualClip,
    Inner,
    LossType,
    MaxLength,
    Omega,
    Psi,
    ResidualMasks,
    ScaleOption,
    ScoreNorm,
    Strength,
)
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
    ScheduleOption,
    TotalSteps,
    Warmup,
    WeightDecay,
)
from dlmctl.commands.options import (
    BatchSize,
    Device,
    Dtype,
    Files,
    MaskBlock,
    OnErrorOption,
    Quiet,
    Seed,
)
from dlmctl.commands.ranks import on_every_rank, write_metrics
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.groups import group_size
from dlmctl.records.jsonl import Record, object_field, read_records
from dlmctl.records.locks import Lock, hold_run
from dlmctl.settings.algorithms import PROMPTS_PER_STEP, RECIPES, check_kind, constants
from dlmctl.settings.models import Prompting, Reading


@on_every_rank
def command(
    files: Files = None,
    algo: Algo = "rspo",
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
    reading: Reading = Reading(),
    prompting: Prompting = Prompting(),
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
    strength: Strength = None,
    score_norm: ScoreNorm = None,
    center: Center = None,
    residual_masks: ResidualMasks = None,
    loss_type: LossType = None,
    clip: Clip = None,
    clip_high: ClipHigh = None,
    dual_clip: DualClip = None,
    beta: Beta = None,
    psi: Psi = None,
    omega: Omega = None,
    max_length: MaxLength = None,
    inner: Inner = None,
    baseline: BaselineOption = None,
    scale: ScaleOption = None,
    drop_zero_adv: DropZeroAdvantage = False,
    prompts_per_step: Annotated[
        int,
        typer.Option(
            min=1,
            help="Prompts (groups) in an optimizer step; for sft, completions.",
            rich_help_panel=OPTIMIZER,
        ),
    ] = PROMPTS_PER_STEP,
    masks: Masks = None,
    level: Level = None,
    samples: MasksPerSample = None,
    prompt_mask: PromptMask = None,
    mask_block: MaskBlock = None,
    until_eos: UntilEos = None,
    fill_to: FillTo = None,
    rate: Rate = 3e-6,
    warmup: Warmup = 0,
    schedule: ScheduleOption = "constant",
    total_steps: TotalSteps = None,
    beta1: Beta1 = 0.9,
    beta2: Beta2 = 0.99,
    weight_decay: WeightDecay = 0.1,
    max_norm: MaxNorm = 0.2,
    lora_rank: LoraRank = 0,
    lora_alpha: LoraAlpha = 64.0,
    lora_dropout: LoraDropout = 0.0,
    gradient_checkpointing: GradientCheckpointing = False,
    any_policy: Annotated[
        bool,
        typer.Option(
            "--any-policy/--own-policy",
            help="Train on records of 'rollout --follow' whatever weights they were sampled from, "
            "instead of refusing those that this run did not have.",
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
    resume: ResumeInput = False,
) -> None:
    """Train a model on the records and save a checkpoint.

    Takes one optimizer step for every --prompts-per-step groups and writes one metrics record for
    each to standard output and to RUN/metrics.jsonl. RUN/latest is a Hugging Face directory that
    every --model takes. The same command goes on where the run was; with --resume also in the
    input.

    What the records lack is computed: advantages from rewards, scores of policy and reference.
    Scores of 'dlmctl score-elbo' are used if they are of these weights and masks. Advantages that
    'dlmctl advantage' made with other --baseline or --scale are refused.

    diffu-grpo, espo, gdsd, grpo and srpo take ratios to the weights that the completions were
    sampled from: those that this run had then, a copy of which stays in main memory while a round
    has further batches, the reference, or the model that the records name, if it still has these
    weights. For grpo and srpo the log-probabilities are enough that 'dlmctl rollout' recorded of an
    autoregressive model. Completions that do not say where they are from count as sampled from the
    weights before the step.

    On several GPUs, or CPUs, weights, gradients and the optimizer's moments are spread over the
    processes by FSDP2, each of which computes its share of every step: the steps, and the files,
    are those of one process, and a run can go on with more or fewer. --batch-size is that of each.
    Not with dropout.

    Examples:

    dlmctl rollout | dlmctl verify | dlmctl update --algo rspo -o runs/a

    dlmctl init runs/new && dlmctl prompts sudoku -n 100000 --completions |
    dlmctl update --algo sft -m runs/new -o runs/base

    dlmctl update --algo grpo --loss-type dr_grpo --max-length 512 --clip-high 0.28 verified.jsonl

    torchrun --nproc-per-node 8 -m dlmctl update -m GSAI-ML/LLaDA-8B-Instruct -o runs/b
    verified.jsonl
    """
    from dlmctl.diffusion.scoring import MaskPlan
    from dlmctl.rl.advantage_stage import consistent
    from dlmctl.rl.advantages import Normalization
    from dlmctl.rl.batches import of_one_model
    from dlmctl.rl.objectives.table import make_objective
    from dlmctl.rl.policy_gradient import Batching
    from dlmctl.rl.update import update_policy, update_supervised
    from dlmctl.train.distributed import from_first
    from dlmctl.train.lora import Adapter
    from dlmctl.train.run import Optimization, next_run, open_run

    if schedule == "cosine" and total_steps is None:
        raise UsageError("--schedule cosine needs --total-steps")
    levels = level_range(level) if level else (0.0, 1.0)
    if level and algo != "sft":
        raise UsageError("--t is for --algo sft: other objectives need the whole bound")
    if not 0 <= levels[0] <= levels[1] <= 1 or not levels[1]:
        raise UsageError(f"--t {level} is not a range of shares between 0 and 1")
    rewarded = {
        "--inner": inner,
        "--baseline": baseline,
        "--scale": scale,
        "--drop-zero-adv": drop_zero_adv or None,
    }
    for option, value in rewarded.items():
        if algo == "sft" and value is not None:
            raise UsageError(f"{option} means nothing to --algo sft, which has no rewards")
    if algo != "sft" and fill_to is not None:
        raise UsageError(f"--fill-to is for --algo sft: the completions of {algo} are as sampled")
    given = {
        "strength": strength,
        "score_norm": score_norm,
        "center": center,
        "residual_masks": residual_masks,
        "loss_type": loss_type,
        "clip": clip,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "beta": beta,
        "psi": psi,
        "omega": omega,
        "max_length": max_length,
    }
    settings = constants(algo, **given)
    objective = None if algo == "sft" else make_objective(algo, **given)
    recipe = RECIPES[algo]
    normalization = Normalization.of(algo, baseline, scale, prompts_per_step)
    lines = input_lines(files)
    group: int | None = None
    passes = inner or recipe.inner
    records: Iterator[Record] = iter(())
    _lock: Lock | None = None

    def begin() -> tuple[str | None, str]:
        nonlocal records, group, _lock
        directory = output or next_run(algo)
        # Refused before the first record, which may be long in coming; kept until the run has it.
        _lock = hold_run(directory) if directory.is_dir() else None
        records, first = _with_first(read_records(files or [], on_error))
        group = 1 if algo == "sft" else group_size(first)
        sampled_from = object_field(first, "rollout").get("model")
        if not isinstance(sampled_from, str | None):
            raise DataError("field 'rollout.model' is not the name of a model", first.where)
        print(f"dlmctl: writing {directory}", file=sys.stderr)
        return sampled_from, str(directory)

    sampled_from, directory = from_first(begin)
    run = open_run(
        Path(directory),
        reading.of(model),
        algo,
        Optimization(rate, (beta1, beta2), weight_decay, max_norm, warmup, schedule, total_steps),
        Adapter(lora_rank, lora_alpha, lora_dropout),
        device,
        dtype,
        gradient_checkpointing,
        seed,
        sampled_from or "builtin:puzzles",
        prompting,
    )
    check_kind(algo, run.policy.diffusion, run.policy.name)
    rest = run.untrained(records) if resume else records
    if rest is None:
        return
    if model is None and not run.progress.step:
        rest = of_one_model(rest, sampled_from)
    plan = MaskPlan(
        masks or ("independent" if level else recipe.law),
        samples or recipe.samples,
        seed,
        recipe.until_eos if until_eos is None else until_eos,
        recipe.prompt_mask if prompt_mask is None else prompt_mask,
        mask_block,
        levels=levels,
    )
    run.about = {
        "seed": seed,
        "masks": plan.law,
        "masks per sample": plan.samples,
        "prompt mask": plan.prompt_mask,
        "until eos": plan.until_eos,
        "prompts per step": prompts_per_step,
        **{name: value for name, value in settings.items() if value is not None},
    }
    if objective is None:
        metrics = update_supervised(
            rest, run, plan, prompts_per_step, batch_size, fill_to, save_every, keep
        )
    else:
        run.about |= {"inner steps": passes, **normalization.settings()}
        batching = Batching(
            plan, normalization, passes, drop_zero_adv, residual_masks == "independent"
        )
        metrics = update_policy(
            consistent(rest, normalization), run, objective, batching, prompts_per_step, batch_size,
            save_every, keep, any_policy,
        )  # fmt: skip
    total = lines.times(passes / (group * prompts_per_step)) if group and group > 0 else None
    write_metrics(metrics, quiet, run.standing, total, run.progress.step if resume else 0)


def _with_first(records: Iterator[Record]) -> tuple[Iterator[Record], Record]:
    """The same records, and the first of them that is not an error from before `rollout`."""
    errors: list[Record] = []
    for record in records:
        if "error" not in record or "rollout" in record:
            return chain(errors, [record], records), record
        errors.append(record)
    raise UsageError("no records came in; nothing to train on")
