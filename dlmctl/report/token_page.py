"""Completions as one page of HTML: tokens shaded by a number, prompts, images, rewards.

The page has one scale for each field of numbers, so that completions can be compared. Neighbours
with the same prompt and images have them once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count, groupby
from pathlib import Path

from dlmctl.records.files import write_file
from dlmctl.report.completions import Completion, facts, reward, title
from dlmctl.report.page import escaped, escaped_lines, page, shortened, token
from dlmctl.report.pictures import Picture, pictures
from dlmctl.report.token_scale import Scale, fitted

SHORT = 300
"""Characters of a prompt that stand open; a longer one is folded."""
CONTROLS = (
    '<input id="search" type="search" placeholder="Search" '
    'title="An id, a prompt, a completion" aria-label="Search">'
    '<input id="least" type="number" step="any" placeholder="reward ≥" aria-label="Least reward">'
    '<input id="most" type="number" step="any" placeholder="≤" aria-label="Largest reward">'
)


def write_page(items: Iterable[Completion], path: Path) -> None:
    """Write the page; raises CannotCreateError."""
    shown = list(items)
    scales = {
        by: fitted(by, (v for item in shown if item.by == by for v in item.values))
        for by in dict.fromkeys(item.by for item in shown if not item.error)
    }
    numbers = count()
    cards = [
        _group(prompt, images, list(members), scales, numbers)
        for (prompt, images), members in groupby(shown, lambda i: (i.prompt, pictures(i.record)))
    ]
    rows = [_row(item, number) for number, item in enumerate(shown)]
    head = {"completions": len(shown), "tokens": sum(len(item.texts) for item in shown)}
    legend = "".join(_legend(by, scale) for by, scale in scales.items())
    heading = f"Completions by {' and '.join(scales) or 'nothing'}"
    write_file(path, page("tokens", heading, head, CONTROLS, rows, cards, legend).encode())


def _legend(by: str, scale: Scale) -> str:
    steps = "".join(_shaded(label, "", place) for label, place in scale.steps())
    return (
        f'<p class="legend">{escaped(by)} <span class="text">{steps}</span> {scale.summary()}</p>'
    )


def _row(item: Completion, number: int) -> str:
    value = reward(item.record)
    return (
        f'<li data-reward="{"" if value is None else value}"><a href="#c{number}">'
        f"<b>{number}</b> <i>{'' if value is None else f'{value:.4g}'}</i> "
        f"<span>{escaped(title(item.record))}</span></a></li>\n"
    )


def _group(
    prompt: str,
    images: Sequence[Picture],
    members: Sequence[Completion],
    scales: Mapping[str, Scale],
    numbers: Iterable[int],
) -> str:
    """A prompt with its images, and the completions of it."""
    articles = "".join(
        _article(item, scales.get(item.by), number)
        for item, number in zip(members, numbers, strict=False)
    )
    return f"<section>{_prompt(prompt)}{_images(images)}{articles}</section>\n"


def _prompt(prompt: str) -> str:
    if not prompt:
        return ""
    whole = f'<div class="prompt">{escaped_lines(prompt)}</div>'
    if len(prompt) <= SHORT:
        return whole
    first = escaped(shortened(prompt, SHORT))
    return f"<details><summary><span>{first}</span></summary>{whole}</details>"


def _images(images: Sequence[Picture]) -> str:
    drawn = "".join(
        f'<img src="{image.uri}" alt="{escaped(image.name)}" '
        f'title="{escaped(image.name)}" tabindex="0">'
        if image.uri
        else f"<span>{escaped(image.name)}: {escaped(image.why)}</span>"
        for image in images
    )
    return f'<div class="images">{drawn}</div>' if drawn else ""


def _article(item: Completion, scale: Scale | None, number: int) -> str:
    head = (
        f'<article id="c{number}"><h2><a href="#c{number}">{escaped(title(item.record))}</a></h2>'
        f'<p class="numbers">{escaped(" · ".join(facts(item.record)))}</p>'
    )
    if item.error or scale is None:
        return f"{head}<p>{escaped(item.error)}</p></article>"
    pairs = zip(item.texts, item.values, strict=True)
    body = "".join(
        _shaded(text, f"{place}: {scale.says(value)}", 0.0 if value is None else scale.place(value))
        for place, (text, value) in enumerate(pairs)
    )
    after = f" <i>… and {item.left_out} after the end</i>" if item.left_out else ""
    return f'{head}<div class="text">{body}{after}</div></article>'


def _shaded(text: str, title: str, place: float) -> str:
    kinds = ["low"] if place < 0 else []
    return token(escaped_lines(text), title, abs(place) if place else None, kinds)
