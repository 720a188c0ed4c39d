"""`dlmctl score-elbo`: the stage that scores completions."""

from __future__ import annotations

from typing import Annotated

from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.progress import counted
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import write_records
from dlmctl.records.resume import Resume, Rule
from dlmctl.records.shards import parse_shard, read_shard
from dlmctl.settings import Knob, Shown
from dlmctl.settings.compute import QuantizedCompute, Seed
from dlmctl.settings.masks import Masks
from dlmctl.settings.models import Prompting, Reading
from dlmctl.settings.streams import Files, Stage


def command(
    files: Files = None,
    model: Annotated[
        list[str] | None,
        Knob(
            "A model to score under, and the label of its score (default label: policy); "
            "may be given more than once. Default: builtin:puzzles.",
            "-m",
            "--model",
            metavar="[LABEL=]MODEL",
        ),
    ] = None,
    reading: Reading = Reading(),
    prompting: Prompting = Prompting(),
    masks: Annotated[
        Masks,
        Shown(
            law="stratified",
            samples="4, trajectory and left-to-right all",
            shrink="1",
            prompt_mask="0.0",
            until_eos="all-tokens",
        ),
    ] = Masks(),
    seed: Seed = 0,
    compute: QuantizedCompute = QuantizedCompute(),
    stage: Stage = Stage(),
) -> None:
    """Score completions under models, in nats.

    Writes `elbo.LABEL` for each model: an estimate of the evidence lower bound of the completion
    with its standard error, or the exact log-likelihood for an autoregressive model. Masks depend
    on the seed, the record's id and sample, and nothing else: another process scores the same ones.
    --masks trajectory gives the exact log-likelihood of the steps that 'dlmctl rollout' took,
    --masks left-to-right that of one token after the other, with as many passes.

    Example:

    dlmctl score-elbo -m policy=runs/a -m reference=builtin:puzzles -k 8 verified.jsonl
    """
    from dlmctl.diffusion.scoring import made_by, mask_plan, score
    from dlmctl.models.loading import load_policy

    named = dict(_labelled(text) for text in model or ["builtin:puzzles"])
    if len(named) < len(model or [""]):
        raise UsageError("two models have the same label: write --model LABEL=MODEL")
    shard = parse_shard(stage.shard)
    total = input_lines(files).times(1 / shard.count if shard else 1)
    source = read_shard(files or [], shard, stage.on_error)
    partial = Resume(stage.output, stage.resume)
    if partial.done:
        return
    policies = {
        label: load_policy(
            reading.name(name), compute.device, compute.dtype, prompting, compute.quantize
        )
        for label, name in named.items()
    }
    plan = mask_plan(masks, seed)
    rule = Rule(
        frozenset({"elbo"}),
        skips=stage.on_error == "skip",
        begins=lambda _, made: made.lines % compute.batch_size == 0,
        made_by={"elbo": {label: made_by(policy, plan) for label, policy in policies.items()}},
    )
    rest = partial.rest(source, rule)
    records = score(rest, policies, plan, compute.batch_size, stage.on_error)
    shown = counted(records, "records", stage.quiet, total, partial.lines)
    write_records(shown, stage.output, partial)


def _labelled(text: str) -> tuple[str, str]:
    label, found, name = text.partition("=")
    return (label, name) if found else ("policy", text)
