"""`dlmctl memo-eval membership`: options and wiring."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from dlmctl.commands.options import (
    BatchSize,
    Device,
    Dtype,
    Json,
    Model,
    OnErrorOption,
    Quiet,
    Seed,
    kept_in,
)
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import write_rows
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record, read_records, write_records
from dlmctl.settings.models import Prompting, Reading

if TYPE_CHECKING:
    from torch import Tensor

    from dlmctl.diffusion.scoring import MaskPlan
    from dlmctl.models.policy import Policy

COLUMNS = ("method", "members", "others", "auc", "tpr_at_0.1", "tpr_at_0.01", "tpr_at_0.001")


def command(
    members: Annotated[
        Path, typer.Option(metavar="FILE", help="Texts that the model was trained on.")
    ],
    others: Annotated[
        Path, typer.Option(metavar="FILE", help="Texts of the same kind that it was not.")
    ],
    model: Model = "builtin:puzzles",
    reading: Reading = Reading(),
    prompting: Prompting = Prompting(),
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            show_default="none",
            help="A model that has seen neither: the one that training began with, or one trained "
            "without the members. ratio and sama need it.",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="METHODS",
            show_default="loss,zlib; with a reference ratio and sama too",
            help="loss, ratio (to the reference), zlib (by compressed length), sama (hidden tokens "
            "of growing masks against the reference); several with commas.",
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option("-k", "--masks-per-sample", min=2, help="Masks of an ELBO; an even number."),
    ] = 8,
    sama_steps: Annotated[int, typer.Option(min=1, help="Masks of sama.")] = 4,
    sama_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a subset of sama.")] = 8,
    resamples: Annotated[
        int, typer.Option("--bootstrap", min=1, help="Resamples for the interval.")
    ] = 1000,
    curve: Annotated[
        Path | None,
        typer.Option(
            "--curve",
            metavar="FILE",
            show_default="off",
            help="The ROC curves, too: records of method, fpr, tpr and threshold.",
        ),
    ] = None,
    json: Json = False,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
) -> None:
    """How well it can be told which texts a language model was trained on.

    Scores texts of both files and writes a row for each method: the area under the ROC curve with a
    bootstrap interval of 95 %, and the share of members found at false positive rates of 10, 1 and
    0.1 %. Compare a student and its teacher with the same reference.

    Examples:

    dlmctl memo-eval membership -m runs/a --reference builtin:puzzles --members seen.jsonl
    --others unseen.jsonl

    dlmctl memo-eval membership -m runs/a --members seen.jsonl --others unseen.jsonl --curve c.jsonl

    dlmctl plot c.jsonl -x fpr --log-x -y tpr --log-y --by method -o roc.png
    """
    from dlmctl.diffusion.scoring import MaskPlan, scorable
    from dlmctl.memorization.text.membership import NEED_REFERENCE, Method, roc_curve, separation
    from dlmctl.models.loading import load_policy

    known = get_args(Method)
    chosen = (methods or ("loss,ratio,zlib,sama" if reference else "loss,zlib")).split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise UsageError(f"--method {unknown[0]} is not one of {', '.join(known)}")
    if reference is None and (needs := [name for name in chosen if name in NEED_REFERENCE]):
        raise UsageError(f"--method {needs[0]} needs a --reference")
    faulty = kept_in(None, on_error)
    files = [list(read_records([str(path)], faulty)) for path in (members, others)]
    policy = load_policy(reading.name(model), device, dtype, prompting)
    beside = load_policy(reference, device, dtype, prompting) if reference else None
    plan = MaskPlan(samples=samples, seed=seed)
    readers = [policy, *([beside] if beside and "ratio" in chosen else [])]
    records = [scorable(rows, readers, plan, faulty) for rows in files]
    for path, rows in zip((members, others), records, strict=True):
        if not rows:
            raise UsageError(f"{path} holds no texts that can be scored")
    every, count = [*chain(*records)], len(records[0])
    shown = counted(chosen, "methods", quiet, len(chosen))
    scores = _scores(shown, policy, beside, every, plan, sama_steps, sama_tokens, batch_size)
    if curve is not None:
        source = {"model": policy.name, "revision": policy.revision}
        points = (
            {"method": name, **source, **point}
            for name, found in scores.items()
            for point in roc_curve(found[:count], found[count:])
        )
        write_records(points, str(curve))

    def row(name: str, found: Tensor) -> dict[str, Any]:
        about: dict[str, Any] = {"method": name, "model": policy.name}
        about |= {"revision": policy.revision}
        about |= {"reference": reference if name in NEED_REFERENCE else None}
        sizes = {"members": count, "others": len(every) - count}
        return {**about, **sizes, **separation(found[:count], found[count:], resamples, seed)}

    write_rows((row(name, found) for name, found in scores.items()), COLUMNS, json)


def _scores(
    methods: Iterable[str],
    policy: Policy,
    reference: Policy | None,
    records: list[Record],
    plan: MaskPlan,
    steps: int,
    tokens: int,
    batch_size: int,
) -> dict[str, Tensor]:
    """The scores of all texts by method, float64 [N] each."""
    import torch

    from dlmctl.diffusion.scoring import example_of
    from dlmctl.memorization.text.membership import Sama, compressed_size, likelihoods, sama_scores

    completions = [example_of(record, policy, plan).completion for record in records]
    lengths = torch.tensor([len(ids) for ids in completions], dtype=torch.float64)
    own = likelihoods(policy, records, plan, batch_size)
    made: dict[str, Tensor] = {}
    for name in methods:
        if name == "loss":
            made[name] = own / lengths
        elif name == "zlib":
            sizes = [compressed_size(policy.decode(ids)) for ids in completions]
            made[name] = own / torch.tensor(sizes, dtype=torch.float64)
        elif name == "ratio" and reference is not None:
            made[name] = (own - likelihoods(reference, records, plan, batch_size)) / lengths
        elif reference is not None:
            own_plan = Sama(steps, tokens=tokens, seed=plan.seed)
            made[name] = sama_scores(policy, reference, records, own_plan, batch_size)
    return made
