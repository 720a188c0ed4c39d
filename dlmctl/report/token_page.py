"""Completions as one page of HTML: tokens shaded by a number, prompts, images, rewards.

The page has one scale for each field of numbers, so that completions can be compared. Neighbours
with the same prompt and images show them once.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from dlmctl.records.files import write_file
from dlmctl.report.completions import Completion, facts, reward, title
from dlmctl.report.page import render
from dlmctl.report.pictures import pictures
from dlmctl.report.token_scale import fitted

SHORT = 300
"""Characters of a prompt that is shown whole; a longer one is folded."""


def write_page(items: Iterable[Completion], path: Path) -> None:
    """Write the page; raises CannotCreateError."""
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
    html = render(
        "tokens.html",
        "tokens",
        f"Completions by {' and '.join(scales) or 'nothing'}",
        {"completions": len(rows), "tokens": sum(len(item.texts) for item in rows)},
        (title, facts, reward),
        rows=rows,
        cards=cards,
        scales=scales,
        short=SHORT,
    )
    write_file(path, html.encode())
