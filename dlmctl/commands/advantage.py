"""`dlmctl advantage`: the stage that turns rewards into advantages."""

from __future__ import annotations

from typing import Annotated, get_args

from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.progress import counted
from dlmctl.records.errors import UsageError
from dlmctl.records.groups import BatchEnds
from dlmctl.records.jsonl import write_records
from dlmctl.records.resume import Resume, Rule
from dlmctl.records.shards import parse_shard, read_shard
from dlmctl.settings import Knob
from dlmctl.settings.algorithms import Reinforcement
from dlmctl.settings.compute import Compute
from dlmctl.settings.layout import Tags
from dlmctl.settings.objective import Advantages
from dlmctl.settings.srpo import Contrast, Credit
from dlmctl.settings.streams import Files, Stage


def command(
    files: Files = None,
    algo: Annotated[
        Reinforcement,
        Knob(
            "Algorithm of 'dlmctl update' that the advantages are for: "
            f"{', '.join(get_args(Reinforcement))}. It sets the defaults of --baseline and "
            "--scale. srpo also gives each token a weight, by its role: it implements the "
            "mechanism described in the abstract of arXiv 2605.07274; form and constants are ours.",
            metavar="ALGO",
        ),
    ] = "rspo",
    advantages: Advantages = Advantages(),
    model: Annotated[
        str | None,
        Knob(
            "Policy that the signals are taken from, for --algo srpo.",
            "-m",
            "--model",
            metavar="MODEL",
            shown_default="the model that the records were sampled from",
        ),
    ] = None,
    any_policy: Annotated[
        bool,
        Knob(
            "Take the signals from the weights of --model, whatever weights the records were "
            "sampled from, instead of refusing them.",
            "--any-policy/--own-policy",
        ),
    ] = False,
    tags: Tags = Tags(),
    contrast: Contrast = Contrast(),
    credit: Credit = Credit(),
    compute: Compute = Compute(),
    stage: Stage = Stage(),
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

    dlmctl rollout --follow runs/vlm -m Qwen/Qwen2.5-VL-3B-Instruct --task shapes
    --temperature 1 --rounds 40 | dlmctl verify | dlmctl advantage --algo srpo |
    dlmctl update --algo srpo -o runs/vlm
    """
    from dlmctl.rl.advantage_stage import advantage
    from dlmctl.rl.advantages import Normalization

    normalization = Normalization.of(algo, advantages)
    if stage.shard is not None and normalization.scale == "batch":
        raise UsageError(
            "--scale batch goes by the steps of the whole input, and a shard is a part of it: "
            "leave one out"
        )
    partial = Resume(stage.output, stage.resume)
    if partial.done:
        return
    shard = parse_shard(stage.shard)
    total = input_lines(files).times(1 / shard.count if shard else 1)
    records = advantage(read_shard(files or [], shard, stage.on_error), normalization)
    # Advantages are quick to make again, of the whole input if need be; not so the weights.
    rule = Rule(frozenset())
    if algo == "srpo":
        ends = BatchEnds(compute.batch_size)
        rule = Rule(
            frozenset({"roles", "signal", "weights", "credit"}),
            skips=stage.on_error == "skip",
            begins=lambda record, _: ends.begins(record),
        )
    records = partial.rest(records, rule)
    if algo == "srpo":
        from dlmctl.rl.credit_stage import BehaviorPolicy, credited

        policy = BehaviorPolicy(model, compute.device, compute.dtype, any_policy)
        records = credited(
            records, policy, contrast, credit, tags, compute.batch_size, stage.on_error
        )
    shown = counted(records, "records", stage.quiet, total, partial.lines)
    write_records(shown, stage.output, partial)
