"""Completions as one page of HTML: tokens shaded by a number, prompts, images, rewards.

The page has one scale for each field of numbers, so that completions can be compared. Neighbours
with the same prompt and images show them once.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from dlmctl.records.errors import UserFacingError
from dlmctl.records.files import read_json, write_file
from dlmctl.report.completions import Completion, facts, reward, title
from dlmctl.report.page import render
from dlmctl.report.pictures import pictures
from dlmctl.report.svg_curves import figures
from dlmctl.report.token_scale import fitted
from dlmctl.report.watched_run import WatchedRun

SHORT = 300
"""Characters of a prompt that is shown whole; a longer one is folded."""


def write_page(items: Iterable[Completion], path: Path, run: WatchedRun | None = None) -> None:
    """Write the page; raises CannotCreateError.

    Args:
        run: whose completions they are; its curves are on the page too.
    """
    rows = list(items)
    scales = {
        by: fitted(by, (v for item in rows if item.by == by for v in item.values))
        for by in dict.fromkeys(item.by for item in rows if not item.error)
    }
    cards = [
        (prompt, images, list(members))
        for (prompt, images), members in groupby(
            enumerate(rows), lambda row: (row[1].prompt, pictures(row[1].record))
        )
    ]
    about: dict[str, Any] = {
        "completions": len(rows),
        "tokens": sum(len(item.texts) for item in rows),
    }
    heading = f"Completions by {' and '.join(scales) or 'nothing'}"
    if run is not None:
        heading = f"Run {run.directory.resolve().name}"
        about = {"training": run.kind, "step": f"{run.step:,.0f}", **_trained(run)}
        about["completions shown"] = len(rows)
    html = render(
        "tokens.html",
        "tokens",
        heading,
        about,
        (title, facts, reward),
        rows=rows,
        cards=cards,
        scales=scales,
        short=SHORT,
        curves=figures(run.series) if run is not None else [],
    )
    write_file(path, html.encode())


def _trained(run: WatchedRun) -> dict[str, Any]:
    """What the newest checkpoint of a language model says of it."""
    try:
        known = read_json(run.directory / "latest" / "dlmctl.json")
    except UserFacingError:
        return {}
    names = {"reference": "began with", "round": "rounds", "completions": "completions trained on"}
    return {title: known[name] for name, title in names.items() if known.get(name)}
