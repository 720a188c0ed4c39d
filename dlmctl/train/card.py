"""Model cards: the README.md of a checkpoint, as the Hugging Face hub shows it.

A card tells what was trained and how, the metrics of the last step, and how to load the result. It
contains no times, and no paths of the machine except those that the run was given, so that the same
run writes the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
CARD = "README.md"
DIRECTORY = "DIRECTORY"
"""Placeholder for the path of a checkpoint, which a card does not know."""

CLOCK = ("seconds", "tokens_per_second", "peak_memory_mb")
"""Metrics that differ from one run of the same command to the next."""
COUNTERS = ("algo", "run", "step", "round", "prompts", "completions", "skipped", "applied")
"""Metrics that a card has elsewhere, or that say nothing about the model."""


@dataclass(frozen=True)
class Card:
    """The contents of a card."""

    title: str
    summary: str
    """One paragraph."""
    library: str
    """The library that loads it, as the hub names it."""
    base: str | None = None
    """The model that the training began with, or was for: a hub name or a path."""
    tags: Sequence[str] = ()
    pipeline: str | None = None
    """The task that it is for, as the hub names it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    usage: Sequence[tuple[str, str]] = ()
    """(language, code) each."""


def card_text(card: Card) -> str:
    """A card in Markdown with a YAML header; the licence is unknown, and left to the owner."""
    base = base_model(card.base) if card.base else None
    header: dict[str, Any] = {
        "library_name": card.library,
        **({"pipeline_tag": card.pipeline} if card.pipeline else {}),
        **({"base_model": base} if base else {}),
        "tags": ["dlmctl", *card.tags],
    }
    parts = [
        # JSON values are YAML, too.
        "\n".join(["---", *(f"{name}: {json.dumps(v)}" for name, v in header.items()), "---"]),
        f"# {card.title}",
        card.summary,
        *_table("Training", "option", card.settings),
        *_table("Metrics of the last step", "measure", card.metrics),
        "## Use",
        *(f"```{language}\n{code}\n```" for language, code in card.usage),
    ]
    return "\n\n".join(parts) + "\n"


def write_card(directory: Path, card: Card) -> None:
    """Write the card into a directory that is being filled."""
    (directory / CARD).write_text(card_text(card), encoding="utf-8")


def base_model(name: str) -> str | None:
    """The hub model that a chain of runs began with; None if it began with another model."""
    seen = set()
    while name not in seen:
        seen.add(name)
        about = Path(name) / "dlmctl.json"
        try:
            name = str(orjson.loads(about.read_bytes())["reference"])
        except (OSError, KeyError, TypeError, ValueError):
            break
    is_hub = HUB_NAME.fullmatch(name) is not None and not Path(name).exists()
    return name.split("@")[0] if is_hub else None


def last_metrics(log: Path, **of: Any) -> dict[str, Any]:
    """The last record of a run's metrics with these values; empty if there is none."""
    try:
        lines = log.read_bytes().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(record, dict) and all(record.get(k) == v for k, v in of.items()):
            return record
    return {}


def told_metrics(record: Mapping[str, Any], leave_out: Iterable[str] = ()) -> dict[str, float]:
    """The numbers of a metrics record that belong in a card."""
    unwanted = {*CLOCK, *COUNTERS, *leave_out}
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in unwanted
    }


def _table(heading: str, column: str, values: Mapping[str, Any]) -> list[str]:
    """A heading and a table of the values that are not empty; nothing without any."""
    rows = [
        f"| {name} | {_shown(value).replace('|', chr(92) + '|')} |"
        for name, value in values.items()
        if value is not None and value != ""
    ]
    if not rows:
        return []
    return [f"## {heading}", "\n".join([f"| {column} | value |", "| --- | --- |", *rows])]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(part) for part in value)
    return str(value).replace("\n", " ")
