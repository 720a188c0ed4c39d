"""Completions on a terminal: a background for each token by its number, or marks in plain text.

Blue is below the neutral value, orange above, by the places of `token_scale`. Without colour (a
pipe, NO_COLOR, a dumb terminal), tokens at least half-way out are in brackets, {+above+} and
[-below-], as in word-diffs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from dlmctl.report.completions import Completion, facts, title
from dlmctl.report.page import shortened, shown, shown_lines
from dlmctl.report.token_scale import Scale, fitted

LEVELS = (0.2, 0.5, 0.8)
"""How far out a token must be for the first, second and third background."""
ABOVE = ("#875f00", "#af5f00", "#d75f00")
BELOW = ("#5f5f87", "#005faf", "#005fff")
"""From the 256 colours that most terminals have. White is readable on all of them, and they grow
stronger on dark and on light terminals alike."""
FAR = LEVELS[1]
BRACKETS = {-1: ("[-", "-]"), 0: ("", ""), 1: ("{+", "+}")}
EXTREMES = 4
PROMPT = 240
"""Most characters of a prompt."""


def completion_lines(items: Iterable[Completion], console: Console) -> Iterator[str]:
    """The text for each completion, with the codes of the console's terminal.

    Neighbours with the same prompt show it once.
    """
    coloured = console.color_system is not None and not console.no_color
    before = None
    for item in items:
        with console.capture() as capture:
            head = " · ".join([title(item.record), *facts(item.record)])
            console.print(Text(shown(head), style="bold"))
            if item.error:
                console.print(Text(shown(item.error)))
            else:
                if item.prompt != before:
                    short = shortened(shown_lines(item.prompt), PROMPT)
                    console.print(Text(f"prompt: {short}", style="italic"))
                before = item.prompt
                for text in _body(item, coloured):
                    console.print(text)
            console.print()
        yield capture.get()


def _body(item: Completion, coloured: bool) -> Iterator[Text]:
    scale = fitted(item.by, item.values)
    places = [0.0 if value is None else scale.place(value) for value in item.values]
    text = _coloured(item.texts, places) if coloured else Text(_marked(item.texts, places))
    if item.left_out:
        text.append(f" … and {item.left_out} after the end", style="dim")
    yield text
    yield _legend(item.by, scale, coloured)
    if not scale.names:
        yield from _extremes(item.texts, item.values)


def _coloured(texts: Sequence[str], places: Sequence[float]) -> Text:
    return Text.assemble(
        *((shown_lines(text), _style(place)) for text, place in zip(texts, places, strict=True))
    )


def _style(place: float) -> str:
    level = sum(abs(place) >= least for least in LEVELS)
    return f"#ffffff on {(ABOVE if place > 0 else BELOW)[level - 1]}" if level else ""


def _marked(texts: Sequence[str], places: Sequence[float]) -> str:
    """The text; neighbours that are far out on the same side share their brackets."""
    marked = ""
    for side, run in groupby(zip(texts, places, strict=True), key=lambda pair: _side(pair[1])):
        inside = "".join(shown_lines(text) for text, _ in run)
        # White space at the ends stays outside, so that brackets touch what they mark.
        core = inside.strip(" \n") or inside
        opening, closing = BRACKETS[side]
        marked += inside.replace(core, f"{opening}{core}{closing}", 1)
    return marked


def _side(place: float) -> int:
    return (place >= FAR) - (place <= -FAR)


def _legend(by: str, scale: Scale, coloured: bool) -> Text:
    legend = Text(f"{shown(by)}: {scale.summary()}")
    for label, place in scale.steps():
        if coloured:
            legend.append(" ").append(f"\u00a0{label}\u00a0", style=_style(place))
        elif scale.names or abs(place) == FAR:
            opening, closing = BRACKETS[_side(place)]
            limit = "" if scale.names else "from " if place > 0 else "up to "
            legend.append(f"  {opening}{limit}{label}{closing}")
    return legend


def _extremes(texts: Sequence[str], values: Sequence[float | None]) -> Iterator[Text]:
    """The tokens with the largest and the smallest numbers, and their positions."""
    order = sorted(
        (number for number, value in enumerate(values) if value is not None),
        key=lambda number: values[number],  # type: ignore[arg-type, return-value]
    )
    count = min(EXTREMES, len(order) // 2)
    for name, chosen in (("largest", order[::-1][:count]), ("smallest", order[:count])):
        entries = (f"{values[n]:.4g} '{shown(texts[n])}' @{n}" for n in chosen)
        if chosen:
            yield Text(f"{name:>8}: {'  '.join(entries)}", style="dim")
