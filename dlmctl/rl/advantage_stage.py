"""The stage `advantage`: whole groups in, the same records with `advantage` out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dlmctl.records.groups import groups
from dlmctl.records.jsonl import Record, field
from dlmctl.rl.advantages import Baseline, Scale, advantages


def advantage(records: Iterable[Record], baseline: Baseline, scale: Scale) -> Iterator[Record]:
    """Add `advantage`; one group is in memory at a time, or all of them for `scale="batch"`."""
    if scale == "batch":
        yield from _batch(list(groups(records)), baseline, scale)
    else:
        for group in groups(records):
            yield from _batch([group], baseline, scale)


def _batch(batch: list[list[Record]], baseline: Baseline, scale: Scale) -> Iterator[Record]:
    hint = "'dlmctl verify' writes it"
    rewards = [[float(field(r, "reward", (int, float), hint)) for r in group] for group in batch]
    for group, values in zip(batch, advantages(rewards, baseline, scale), strict=True):
        for record, value in zip(group, values, strict=True):
            record["advantage"] = value
            yield record
