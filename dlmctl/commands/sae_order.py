"""`dlmctl sae-order`: options and wiring of the stage."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, Any, get_args

from dlmctl.commands.progress import counted, times
from dlmctl.commands.prompt_source import prompt_records, prompt_total
from dlmctl.commands.tables import print_table, with_error
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import write_records
from dlmctl.settings import Knob, Without
from dlmctl.settings.compute import Compute, Model, Seed
from dlmctl.settings.order import OrderProbe
from dlmctl.settings.rollout import PromptSource
from dlmctl.settings.sampler import Remasking, Sampler
from dlmctl.settings.streams import Files, Json, OnErrorOption, Output, Quiet

MEANS = ("s_pre", "s_pre_last5", "lock_ratio", "jump", "d_post", "flips_post")
SIGNALS = ("signal", "auroc", "auroc_step", "auroc_choice", "used", "right")
SOLVING = ("measure", "correlation", "completions", "solved")
PROBES = ("probe", "auroc_choice", "auroc_gain", "auroc_over_random", "nll", "nll_gain")
SHOWN = 8
"""Features that the table names."""
NOT_HERE = (
    "remasking",
    "cache",
    "refresh",
    "refresh_below",
    "compile",
    "edit_threshold",
    "edit_steps",
)
"""Options of the sampler that the study sets itself, or that do not go with it."""


def command(
    sae: Annotated[
        list[str],
        Knob(
            "Folder of an autoencoder, with LAYER the block (counted from 0) if the folder does "
            "not name it; repeatable.",
            metavar="SAE[@LAYER]",
        ),
    ],
    files: Files = None,
    model: Model = "builtin:puzzles",
    orders: Annotated[
        str,
        Knob(
            "Orders to compare, from those of --remasking of 'dlmctl rollout'; features are "
            "compared with the first. random is the paper's 'origin'; sae is not in the paper.",
            metavar="ORDER,…",
        ),
    ] = "low_confidence,random,margin,entropy",
    truth: Annotated[
        str | None,
        Knob(
            "Field with the one right completion, for instance solution: asks which signals tell "
            "right proposals from wrong ones. Text, or token ids with null where any will do.",
            metavar="FIELD",
            shown_default="none",
        ),
    ] = None,
    probe: OrderProbe = OrderProbe(),
    samples: Annotated[
        int, Knob("Completions for each prompt and order.", "-n", "--samples", minimum=1)
    ] = 1,
    sampler: Annotated[Sampler, Without(*NOT_HERE)] = Sampler(),
    source: Annotated[PromptSource, Without("prompts")] = PromptSource(),
    prompts: Annotated[int, Knob("Prompts taken from --task.", minimum=1)] = 32,
    summary: Annotated[
        str | None,
        Knob(
            "Where the rows over all completions go; - is standard output, if the records go to a "
            "file.",
            metavar="FILE",
            shown_default="none",
        ),
    ] = None,
    seed: Seed = 0,
    compute: Compute = Compute(),
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    json: Json = False,
    output: Output = "-",
) -> None:
    """Follow features while completions are sampled in several orders.

    Reads prompts as rollout does and writes a record for each order, prompt and sample, which
    verify reads and 'stats --by remasking' counts. All orders have the same prompts and the same
    noise. The field `features` of a record has for each autoencoder, measured over the passes in
    which the completion was sampled: s_pre, the mean Jaccard similarity of the active features of a
    position with those of the step before, while it is masked (s_pre_last5: over the last five of
    these steps); lock_ratio, the share of these steps in which the strongest feature stays; jump, 1
    - similarity in the step that sees the token first; d_post, the mean 1 - similarity after that;
    flips_post, changes of the strongest feature after that. Curves have 10 bins of the place in the
    completion, or of the share decided.

    --summary has their means (row: mean); the features' turnover, 1 - similarity with the step
    before, over the share decided (row: turnover); and the 20 features whose number of positions
    differs most from the first order's, summed over 20 bins of the share decided (row: feature). A
    terminal shows part of this instead of the records.

    With --truth it also has the AUROC of signals for "the model's likeliest token here is the right
    one" (row: signal): over all proposals, within a step of all completions, and within a step of
    one completion, which is what an order chooses from. Up to 131072 proposals of an order count,
    and as many completions for the correlation of s_pre, d_post and the others with solving, which
    is to have all tokens of the truth (row: solving).

    --probe trains logistic probes on half of the prompts and tests them on the other half (row:
    probe). They read of each proposal: confidence (p, its log odds, margin, entropy), codes,
    activations, random (codes of random directions, as many and with the same K), and confidence
    with each of these. auroc_choice is the AUROC within a step of a completion, nll the loss in
    nats. What a probe has over confidence is auroc_gain and nll_gain, above 0 if it is better; what
    it has over the same probe with random is auroc_over_random and nll_over_random. The penalty is
    chosen by cross-validation over the prompts of the first half. Errors (_se) are from a bootstrap
    over the prompts of the second half.

    Passes go over whole sequences: there is no --cache here, and no --compile.

    Examples:

    dlmctl sae-order --task sudoku --truth solution --sae saes/layer2-k8-mask

    dlmctl sae-order --task sudoku --truth solution --prompts 400 --sae saes/layer2-k8-mask
    --orders random --probe --summary probed.jsonl -o ordered.jsonl

    dlmctl sae-order --sae saes/layer2-k8-mask --summary orders.jsonl -o ordered.jsonl prompts.jsonl
    && dlmctl plot -x progress -y masked -y decided --by order -o turnover.png orders.jsonl

    dlmctl sae-order --sae saes/layer1-k8-mask --sae saes/layer2-k8-mask --orders entropy,random
    --summary orders.jsonl prompts.jsonl | dlmctl verify | dlmctl stats --by remasking
    """
    from dlmctl.diffusion.sampling import configured
    from dlmctl.models.loading import load_policy
    from dlmctl.sae.order.study import OrderStudy
    from dlmctl.sae.order.tracking import read_tracked_saes

    files, task = files or [], source.task
    if files and task is not None:
        raise UsageError("prompts come from FILE or from --task, not from both")
    if summary == "-" and output == "-":
        raise UsageError("standard output has the records: give --summary a file, or -o one")
    if probe.probe and truth is None:
        raise UsageError("--probe asks which proposals are right: name the field with --truth")
    names = _orders(orders)
    policy = load_policy(model, compute.device, compute.dtype)
    saes = read_tracked_saes(sae, policy)
    kept = probe.probe_proposals if probe.probe else None
    study = OrderStudy(policy, saes, configured(policy, sampler), names, truth, kept)
    total = times(prompt_total(files, task, prompts, None), samples * len(names))
    asked = prompt_records(files, task, prompts, seed, on_error, repeat=False)
    sampled = study.run(asked, samples, seed, compute.batch_size, on_error)
    records = counted(sampled, "completions", quiet, total)
    shown = output == "-" and not json and sys.stdout.isatty()
    if shown:
        for _ in records:
            pass
    else:
        write_records(records, output)
    rows = list(counted(study.summary(), "rows of the summary", quiet, None))
    if shown:
        _show(rows)
    if summary is not None:
        write_records(rows, summary)


def _orders(text: str) -> list[Remasking]:
    known = get_args(Remasking)
    names: list[Remasking] = list(dict.fromkeys(text.split(",")))  # type: ignore[arg-type]
    for name in names:
        if name not in known:
            raise UsageError(f"--orders {text}: no order '{name}'; there are {', '.join(known)}")
    return names


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print tables of the means, the features, the signals, solving and the probes."""
    rows = [{**row, "sae": Path(row["sae"]).name} for row in rows]
    where = ("order", "sae", "layer")
    means = [row for row in rows if row["row"] == "mean"]
    features = _joined(row for row in rows if row["row"] == "feature")
    signals, solving, probes = (
        [row for row in rows if row["row"] == kind] for kind in ("signal", "solving", "probe")
    )
    for part, names in (
        (means, (*where, "completions", *MEANS)),
        (features, (*where, "reference", "features")),
        (signals, (*where, *SIGNALS)),
        (solving, (*where, *SOLVING)),
        (probes, (*where, *PROBES, *(["reason"] if any(r["reason"] for r in probes) else []))),
    ):
        if part:
            print_table(part, {name: name.replace("_", " ") for name in names}, with_error)
            print()


def _joined(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each order and autoencoder, with its features of highest score."""
    joined = []
    for _, group in groupby(rows, lambda row: (row["order"], row["sae"], row["layer"])):
        best = list(islice(group, SHOWN))
        names = [f"{row['feature']} ({row['score']:.3g})" for row in best]
        joined.append({**best[0], "features": ", ".join(names)})
    return joined
