"""`dlmctl advantage`: options and wiring of the stage."""

from __future__ import annotations

from typing import Annotated

import typer

from dlmctl.commands.credit_options import (
    Corrupt,
    CorruptProb,
    CorruptScope,
    CorruptSeed,
    CreditBaseline,
    ReasonContrast,
    ReasonSignal,
    SignAware,
    VisualSignal,
    WeightClip,
    WeightLambda,
    WeightMap,
    WeightNorm,
    WeightTau,
    bounds,
)
from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.objective_options import ADVANTAGES, BaselineOption, ScaleOption
from dlmctl.commands.options import (
    BatchSize,
    Device,
    Dtype,
    Files,
    OnErrorOption,
    Output,
    PerceptionTag,
    Quiet,
    ReasoningTag,
    ResumeOption,
    ShardOption,
    tag_names,
)
from dlmctl.commands.progress import counted
from dlmctl.records.errors import UsageError
from dlmctl.records.groups import BatchEnds
from dlmctl.records.jsonl import write_records
from dlmctl.records.resume import Resume, Rule
from dlmctl.records.shards import parse_shard, read_shard
from dlmctl.settings.algorithms import PROMPTS_PER_STEP, Reinforcement
from dlmctl.tasks.layout import TAGS


def command(
    files: Files = None,
    algo: Annotated[
        Reinforcement,
        typer.Option(
            help="Algorithm of 'dlmctl update' that the advantages are for: it says what "
            "--baseline and --scale are by default. srpo also gives each token a weight, by its "
            "role: it implements the mechanism described in the abstract of arXiv 2605.07274; "
            "form and constants are ours."
        ),
    ] = "rspo",
    baseline: BaselineOption = None,
    scale: ScaleOption = None,
    prompts_per_step: Annotated[
        int,
        typer.Option(
            min=1,
            help="For --scale batch: prompts in a step of 'dlmctl update', which are a batch.",
            rich_help_panel=ADVANTAGES,
        ),
    ] = PROMPTS_PER_STEP,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            show_default="the model that the records were sampled from",
            help="Policy that the signals are taken from, for --algo srpo.",
        ),
    ] = None,
    any_policy: Annotated[
        bool,
        typer.Option(
            "--any-policy/--own-policy",
            help="Take the signals from the weights of --model, whatever weights the records were "
            "sampled from, instead of refusing them.",
        ),
    ] = False,
    perception_tag: PerceptionTag = TAGS.perception,
    reasoning_tag: ReasoningTag = TAGS.reasoning,
    visual_signal: VisualSignal = "logratio",
    reason_signal: ReasonSignal = "logratio",
    reason_contrast: ReasonContrast = "drop",
    corrupt: Corrupt = "patch",
    corrupt_prob: CorruptProb = 0.6,
    corrupt_scope: CorruptScope = "prompt",
    corrupt_seed: CorruptSeed = 0,
    credit_baseline: CreditBaseline = "traj-mean",
    weight_map: WeightMap = "exp",
    weight_clip: WeightClip = "0.8,1.2",
    weight_tau: WeightTau = 1.0,
    weight_lambda: WeightLambda = 1.0,
    weight_norm: WeightNorm = "none",
    sign_aware: SignAware = False,
    shard: ShardOption = None,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    output: Output = "-",
    resume: ResumeOption = False,
) -> None:
    """Turn the rewards of a group into advantages, on request token by token.

    Reads records with `reward`, where the samples of a prompt are neighbours, and writes them with
    `advantage`: how much better the sample is than the others of its group. A group of one, and a
    group with equal rewards, has advantage 0. 'dlmctl update' with the same --algo, --baseline and
    --scale computes the same by itself; `advantage_settings` says how it was made, and update
    refuses advantages that were made otherwise.

    --algo srpo adds `weights`, one positive number for each token of the completion: tokens that
    perceive count more where they depend on the image, tokens that reason where they depend on what
    was perceived. `roles` (1 perceives, 2 reasons) and `signal`, in nats, say why. A completion
    without the layout has weights 1.

    The layout is <description>…</description> <think>…</think> \\boxed{…}; an image, or for a
    diffusion model the text that the record names as `evidence` (else its whole prompt), is what is
    perceived. Credit of diffusion models is ours, beyond the paper.

    Example:

    dlmctl rollout --follow runs/vlm -m Qwen/Qwen2.5-VL-3B-Instruct --task shapes |
    dlmctl verify | dlmctl advantage --algo srpo | dlmctl update --algo srpo -o runs/vlm
    """
    from dlmctl.rl.advantage_stage import advantage
    from dlmctl.rl.advantages import Normalization

    normalization = Normalization.of(algo, baseline, scale, prompts_per_step)
    if shard is not None and normalization.scale == "batch":
        raise UsageError(
            "--scale batch goes by the steps of the whole input, and a shard is a part of it: "
            "leave one out"
        )
    going = Resume(output, resume)
    if going.done:
        return
    part = parse_shard(shard)
    total = input_lines(files).times(1 / part.count if part else 1)
    records = advantage(read_shard(files or [], part, on_error), normalization)
    # Advantages are quick to make again, of the whole input if need be; not so the weights.
    rule = Rule(frozenset())
    if algo == "srpo":
        ends = BatchEnds(batch_size)
        rule = Rule(
            frozenset({"roles", "signal", "weights", "credit"}),
            skips=on_error == "skip",
            begins=lambda record, _: ends.begins(record),
        )
    records = going.rest(records, rule)
    if algo == "srpo":
        from dlmctl.rl.credit_stage import BehaviorPolicy, credited
        from dlmctl.rl.srpo.contrast import Contrast
        from dlmctl.rl.srpo.credit import Credit

        records = credited(
            records,
            BehaviorPolicy(model, device, dtype, any_policy),
            Contrast(
                visual_signal,
                reason_signal,
                reason_contrast,
                corrupt,
                corrupt_prob,
                corrupt_scope,
                corrupt_seed,
            ),
            Credit(
                credit_baseline,
                weight_map,
                bounds(weight_clip),
                weight_tau,
                weight_lambda,
                weight_norm == "mean",
                sign_aware,
            ),
            tag_names(perception_tag, reasoning_tag),
            batch_size,
            on_error,
        )
    write_records(counted(records, "records", quiet, total, going.lines), output, going)
