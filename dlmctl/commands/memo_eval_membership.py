"""`dlmctl memo-eval membership`: options and wiring."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dlmctl.commands.progress import counted
from dlmctl.commands.tables import write_rows
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import read_records, write_records
from dlmctl.settings import Knob
from dlmctl.settings.compute import Compute, Model
from dlmctl.settings.memorization import NEED_REFERENCE, Attacks, Bootstrap, Sama
from dlmctl.settings.models import Prompting, Reading
from dlmctl.settings.streams import Json, OnErrorOption, Quiet, kept_in

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = ("method", "members", "others", "auc", "tpr_at_0.1", "tpr_at_0.01", "tpr_at_0.001")


def command(
    members: Annotated[
        Path, Knob("Texts that the model was trained on.", "--members", metavar="FILE")
    ],
    others: Annotated[
        Path, Knob("Texts of the same kind that it was not trained on.", "--others", metavar="FILE")
    ],
    model: Model = "builtin:puzzles",
    reading: Reading = Reading(),
    prompting: Prompting = Prompting(),
    attacks: Attacks = Attacks(),
    sama: Sama = Sama(),
    bootstrap: Bootstrap = Bootstrap(),
    curve: Annotated[
        Path | None,
        Knob(
            "Also write the ROC curves: records of method, fpr, tpr and threshold.",
            "--curve",
            metavar="FILE",
            shown_default="off",
        ),
    ] = None,
    json: Json = False,
    compute: Compute = Compute(),
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
) -> None:
    """Measure how well the texts that a language model was trained on can be identified.

    Scores the texts of both files and writes a row for each method: the area under the ROC curve
    with a bootstrap interval, and the share of members that are identified at false positive rates
    of 10, 1 and 0.1 %. Compare a student and its teacher with the same reference.

    Examples:

    dlmctl memo-eval membership -m runs/a --reference builtin:puzzles --members seen.jsonl
    --others unseen.jsonl

    dlmctl memo-eval membership -m runs/a --members seen.jsonl --others unseen.jsonl --curve c.jsonl

    dlmctl plot c.jsonl -x fpr --log-x -y tpr --log-y --by method -o roc.png
    """
    from dlmctl.diffusion.scoring import MaskPlan, scorable
    from dlmctl.memorization.text.membership import attack_scores, roc_curve, separation
    from dlmctl.models.loading import load_policy

    faulty = kept_in(None, on_error)
    files = [list(read_records([str(path)], faulty)) for path in (members, others)]
    device, dtype = compute.device, compute.dtype
    policy = load_policy(reading.name(model), device, dtype, prompting)
    reference = attacks.reference
    other = load_policy(reference, device, dtype, prompting) if reference else None
    plan = MaskPlan(samples=attacks.samples, seed=bootstrap.seed)
    readers = [policy, *([other] if other and "ratio" in attacks.methods else [])]
    records = [scorable(rows, readers, plan, faulty) for rows in files]
    for path, rows in zip((members, others), records, strict=True):
        if not rows:
            raise UsageError(f"{path} has no texts that can be scored")
    texts, count = [*chain(*records)], len(records[0])
    shown = counted(attacks.methods, "methods", quiet, len(attacks.methods))
    scores = attack_scores(shown, policy, other, texts, plan, sama, compute.batch_size)
    source = {"model": policy.name, "revision": policy.revision}
    if curve is not None:
        points = (
            {"method": name, **source, **point}
            for name, values in scores.items()
            for point in roc_curve(values[:count], values[count:])
        )
        write_records(points, str(curve))

    def row(name: str, values: Tensor) -> dict[str, Any]:
        about = {"reference": reference if name in NEED_REFERENCE else None}
        sizes = {"members": count, "others": len(texts) - count}
        figures = separation(values[:count], values[count:], bootstrap)
        return {"method": name, **source, **about, **sizes, **figures}

    write_rows((row(name, values) for name, values in scores.items()), COLUMNS, json)
