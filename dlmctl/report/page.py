"""Pages of HTML that need nothing else, to be browsed, sent, kept: what all of them share.

Tokens and fields are text of unknown origin. Everything that is not ours is escaped, characters
that cannot be seen or that would turn the line around are written as their numbers, and a page
forbids itself all loading by its Content-Security-Policy.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent.parent / "assets" / "pages"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Categories of Unicode: control, format, surrogate, private, unassigned, line, paragraph."""


def shown(text: str) -> str:
    """A text so that all of it can be seen, on a terminal too; not yet escaped."""
    made = "".join(
        SIGNS.get(c) or (f"\\u{ord(c):04x}" if unicodedata.category(c) in UNSEEN else c)
        for c in text
    )
    # A mark on its own would sit on the token before.
    return "◌" + made if made and unicodedata.category(made[0]).startswith("M") else made


def shown_lines(text: str) -> str:
    """The same with a new line behind the sign for one."""
    return "↵\n".join(map(shown, text.split("\n")))


def shortened(text: str, limit: int) -> str:
    """The beginning of a text in one line; words are cut where the limit falls into one."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit].rstrip()} …"


def escaped(value: Any) -> str:
    """What a value says, shown as above and as part of a page."""
    return escape(shown(str(value)))


def escaped_lines(text: str) -> str:
    """A text of several lines as part of a page that keeps them."""
    return escape(shown_lines(text))


def token(text: str, title: str, shade: float | None = None, kinds: Sequence[str] = ()) -> str:
    """A token as an element.

    Args:
        text, title: already escaped; the title is what it says when pointed at.
        shade: strength of its background from 0 to 1; None for no background.
        kinds: classes of the style sheet.
    """
    names = f' class="{" ".join(kinds)}"' if kinds else ""
    strength = "" if shade is None else f' style="--a:{shade:.2f}"'
    return f'<b{names}{strength} title="{title}">{text or "·"}</b>'


def page(
    name: str,
    title: str,
    facts: Mapping[str, Any],
    controls: str,
    rows: Sequence[str],
    cards: Sequence[str],
    legend: str = "",
) -> str:
    """A whole page: facts on top, an index with controls beside the cards.

    Args:
        name: of its style sheet and script among the assets.
        title, facts: not yet escaped.
        controls, rows, cards, legend: as HTML; a row is an `li`.
    """
    style = (ASSETS / "page.css").read_text() + (ASSETS / f"{name}.css").read_text()
    script = (ASSETS / f"{name}.js").read_text()
    terms = "".join(
        f"<div><dt>{escaped(k)}</dt><dd>{escaped(v)}</dd></div>" for k, v in facts.items()
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escaped(title)}</h1><dl>{terms}</dl>{legend}</header>\n"
        f'<nav><div class="controls">{controls}<output id="count">{len(rows)}</output></div>\n'
        f'<ol id="index">\n{"".join(rows)}</ol></nav>\n'
        f'<main id="cards">\n{"".join(cards)}</main>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )
