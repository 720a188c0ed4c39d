"""Scores that records have, as `score-elbo` wrote them, where a step can use them.

A step uses them if they were made by the weights and under the masks that it would score with
itself; else it scores again, and says so once for each reason.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlmctl.diffusion.scoring import MaskPlan, masks_by
from dlmctl.models.policy import Policy
from dlmctl.records.jsonl import Record, object_field
from dlmctl.train.distributed import is_first


def recorded_difference(
    records: Sequence[Record], policy: Policy, reference: str, plan: MaskPlan
) -> Tensor | None:
    """Score `policy` less score `reference` of every record: float64 [N, K], in nats.

    None if a record lacks them, or they are not those of this policy, of the reference with this
    revision, and of the masks of this plan.
    """
    scores = {
        label: [_entry(record, label) for record in records] for label in ("policy", "reference")
    }
    if not any(entry for entries in scores.values() for entry in entries):
        return None
    masks = masks_by(policy, plan)
    for label, revision in (("policy", policy.revision), ("reference", reference)):
        for entry in scores[label]:
            if reason := _unusable(entry, revision, masks):
                _say(label, reason)
                return None
    for own, other in zip(*scores.values(), strict=True):
        if own.get("tokens") != other.get("tokens"):
            counts = f"of {own.get('tokens')} and of {other.get('tokens')} tokens"
            _say("reference", f"they are not of the tokens of 'policy', {counts}")
            return None
    tables = {
        label: _table([entry["samples"] for entry in entries]) for label, entries in scores.items()
    }
    return tables["policy"] - tables["reference"]


def _table(rows: Sequence[Sequence[float]]) -> Tensor:
    """float64 [N, K] of as many lists; where one has fewer than K numbers its mean stays."""
    most = max(map(len, rows))
    table = torch.zeros(len(rows), most, dtype=torch.float64)
    for row, numbers in zip(table, rows, strict=True):
        row[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64) * most / len(numbers)
    return table


def _entry(record: Record, label: str) -> dict[str, Any]:
    entry = object_field(record, "elbo").get(label)
    return entry if isinstance(entry, dict) else {}


def _unusable(entry: Mapping[str, Any], revision: str, masks: Any) -> str:
    """Why a step cannot use a score; nothing if it can."""
    if not entry.get("samples"):
        return "some records lack them"
    if entry.get("masks") != masks:
        return (
            f"they were made under other masks, {_differences(entry.get('masks'), masks)}; give "
            "'score-elbo' and 'update' the same options"
        )
    if entry.get("revision") != revision:
        return "they were made by other weights; each step changes those of the policy"
    return ""


def _differences(found: Any, wanted: Any) -> str:
    if not isinstance(found, Mapping) or not isinstance(wanted, Mapping):
        return f"{found} instead of {wanted}"
    names = [name for name in wanted if found.get(name) != wanted[name]]
    return ", ".join(f"{name} {found.get(name)} instead of {wanted[name]}" for name in names)


@functools.cache
def _say(label: str, reason: str) -> None:
    if is_first():
        print(
            f"dlmctl: scores '{label}' of the records are not used ({reason}): policy and "
            "reference are scored again",
            file=sys.stderr,
        )
