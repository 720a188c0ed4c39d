"""The stage `advantage`, and what `update` takes of the advantages that it wrote."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from dlmctl.records.errors import DataError
from dlmctl.records.groups import without_errors
from dlmctl.records.jsonl import Record, field
from dlmctl.rl.advantages import Normalization, advantages
from dlmctl.rl.batches import whole_batches

SETTINGS = "advantage_settings"
"""The field that says how an advantage was made."""


def advantage(records: Iterable[Record], normalization: Normalization) -> Iterator[Record]:
    """Add `advantage` and how it was made; records with an `error` pass in their places.

    One group is in memory at a time, or for `scale="batch"` those that `update` takes a step on.
    """
    prompts = normalization.prompts_per_step if normalization.scale == "batch" else 1
    for batch, _ in whole_batches(records, prompts, cut_rounds=True):
        sound = list(without_errors(batch))
        for group, values in zip(sound, from_rewards(sound, normalization), strict=True):
            for record, value in zip(group, values, strict=True):
                record["advantage"], record[SETTINGS] = value, normalization.settings()
        yield from chain.from_iterable(batch)


def from_rewards(
    groups: Sequence[Sequence[Record]], normalization: Normalization
) -> list[list[float]]:
    """Advantages of the groups of a batch; raises DataError if a record has no reward."""
    hint = "'dlmctl verify' writes it"
    rewards = [[float(field(r, "reward", (int, float), hint)) for r in group] for group in groups]
    return advantages(rewards, normalization)


def consistent(records: Iterable[Record], normalization: Normalization) -> Iterator[Record]:
    """The records, if the advantages that they have were made as `normalization` makes them.

    An advantage that does not say how it was made, of another tool, is taken, and that is said.

    Raises:
        DataError: an advantage was made with other settings, or some records have one and others
            have none.
    """
    wanted, first, told = normalization.settings(), None, False
    for record in records:
        if "error" in record:
            yield record
            continue
        first = first or record
        has = "advantage" in record
        if has != ("advantage" in first):
            this, other = ("an", "none") if has else ("no", "one")
            raise DataError(
                f"the record has {this} 'advantage', and {first.where} has {other}: 'dlmctl "
                "advantage' writes it to all",
                record.where,
            )
        settings = record.get(SETTINGS) if has else wanted
        if settings is None and not told:
            told = True
            print(
                f"dlmctl: {record.where}: the advantage does not say how it was made, and is taken "
                "as it is; --baseline and --scale change nothing",
                file=sys.stderr,
            )
        elif settings not in (None, wanted):
            raise DataError(
                f"its advantage was made with {_options(settings)}, and this run takes "
                f"{_options(wanted)}: give the options that it was made with, or make it again "
                f"with 'dlmctl advantage {_options(wanted)}'",
                record.where,
            )
        yield record


def _options(settings: Any) -> str:
    """Settings as they are given on the command line."""
    if not isinstance(settings, dict):
        return f"{SETTINGS} {settings}"
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
