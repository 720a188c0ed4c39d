"""`dlmctl score-elbo`: options and wiring of the stage."""

from __future__ import annotations

from typing import Annotated

import typer

from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.options import (
    BatchSize,
    Device,
    Dtype,
    Files,
    MaskBlock,
    OnErrorOption,
    Output,
    Quiet,
    ResumeOption,
    Seed,
    ShardOption,
)
from dlmctl.commands.progress import counted
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import write_records
from dlmctl.records.resume import Resume, Rule
from dlmctl.records.shards import parse_shard, read_shard
from dlmctl.settings.masks import Law
from dlmctl.settings.models import Prompting, Reading


def command(
    files: Files = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "-m",
            "--model",
            metavar="[LABEL=]MODEL",
            help="A model to score under, and the label of its score (default label: policy); "
            "may be given more than once. Default: builtin:puzzles.",
        ),
    ] = None,
    reading: Reading = Reading(),
    prompting: Prompting = Prompting(),
    masks: Annotated[
        Law,
        typer.Option(
            help="Mask law. Unbiased for the ELBO: independent t ~ U(0,1); a uniform number of "
            "masks with weight L/l; complementary pairs, which score every token once, with levels "
            "spread evenly over the samples of a prompt; stratified, such pairs with levels spread "
            "over the masks of a completion, too. Others: quadrature, at Gauss nodes in t; block, "
            "one block in part and those behind it whole; full, everything masked."
        ),
    ] = "stratified",
    samples: Annotated[
        int, typer.Option("-k", "--masks-per-sample", min=1, help="Masks for each completion.")
    ] = 4,
    prompt_mask: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Probability that a token of the prompt is masked as well; for block also a token "
            "of the blocks before.",
        ),
    ] = 0.0,
    mask_block: MaskBlock = None,
    until_eos: Annotated[
        bool,
        typer.Option(
            "--until-eos/--all-tokens",
            help="Score tokens up to the first end-of-sequence, or the whole completion.",
        ),
    ] = False,
    shard: ShardOption = None,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    output: Output = "-",
    resume: ResumeOption = False,
) -> None:
    """Score completions under models, in nats.

    Writes `elbo.LABEL` for each model: an estimate of the evidence lower bound of the completion
    with its standard error, or the exact log-likelihood for an autoregressive model. Masks depend
    on the seed, the record's id and sample, and nothing else: another process scores the same ones.

    Example:

    dlmctl score-elbo -m policy=runs/a -m reference=builtin:puzzles -k 8 verified.jsonl
    """
    from dlmctl.diffusion.scoring import MaskPlan, made_by, score
    from dlmctl.models.loading import load_policy

    named = dict(_labelled(text) for text in model or ["builtin:puzzles"])
    if len(named) < len(model or [""]):
        raise UsageError("two models have the same label: write --model LABEL=MODEL")
    part = parse_shard(shard)
    total = input_lines(files).times(1 / part.count if part else 1)
    source = read_shard(files or [], part, on_error)
    going = Resume(output, resume)
    if going.done:
        return
    policies = {
        label: load_policy(reading.name(name), device, dtype, prompting)
        for label, name in named.items()
    }
    plan = MaskPlan(masks, samples, seed, until_eos, prompt_mask, mask_block)
    rule = Rule(
        frozenset({"elbo"}),
        skips=on_error == "skip",
        begins=lambda _, made: made.lines % batch_size == 0,
        made_by={"elbo": {label: made_by(policy, plan) for label, policy in policies.items()}},
    )
    rest = going.rest(source, rule)
    records = score(rest, policies, plan, batch_size, on_error)
    write_records(counted(records, "records", quiet, total, going.lines), output, going)


def _labelled(text: str) -> tuple[str, str]:
    label, found, name = text.partition("=")
    return (label, name) if found else ("policy", text)
