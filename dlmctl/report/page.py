"""Pages of HTML, each one file that needs no other, to be browsed, sent, kept: what they share.

Tokens and fields are text of unknown origin. Everything that a template of `assets/pages` writes is
escaped unless it is Markup; characters that are invisible or that would reverse the line are
written as their numbers; and a page forbids itself all loading by its Content-Security-Policy.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent.parent / "assets" / "pages"
SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Categories of Unicode: control, format, surrogate, private, unassigned, line, paragraph."""


def visible(text: str, kept: str = "") -> str:
    """A text with what is invisible, or means something to a terminal, as signs and numbers.

    Args:
        kept: characters that stay as they are.
    """
    return "".join(c if c in kept else SIGNS.get(c) or _numbered(c) for c in text)


def _numbered(char: str) -> str:
    return f"\\u{ord(char):04x}" if unicodedata.category(char) in UNSEEN else char


def shown(text: str) -> str:
    """A text with all of it visible, on a terminal too; not yet escaped."""
    clear = visible(text)
    # A combining mark at the beginning would sit on the token before.
    combining = clear and unicodedata.category(clear[0]).startswith("M")
    return "◌" + clear if combining else clear


def shown_lines(text: str) -> str:
    """The same, with a line break behind the sign for one."""
    return "↵\n".join(map(shown, text.split("\n")))


def shortened(text: str, limit: int) -> str:
    """The beginning of a text in one line, cut at `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit].rstrip()} …"


def escaped(value: Any) -> str:
    """A value as visible text, escaped for a page."""
    return escape(shown(str(value)))


def token(text: str, title: str, shade: float | None = None, kinds: Sequence[str] = ()) -> str:
    """A token as an element.

    Args:
        text: escaped.
        title: escaped; appears when the token is pointed at.
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
) -> str:
    """A whole page: facts on top, an index with controls next to the cards.

    Args:
        name: of its style sheet and script.
        title, facts: not yet escaped.
        controls, rows, cards: HTML; a row is an `li`.
    """
    from markupsafe import Markup

    items, sections = map(Markup, rows), map(Markup, cards)
    html = {"controls": Markup(controls), "rows": [*items], "cards": [*sections]}
    return render("page.html", name, title, facts, (), **html)


def render(
    template: str,
    name: str,
    title: str,
    facts: Mapping[str, Any],
    filters: Sequence[Callable[..., Any]] = (),
    **values: Any,
) -> str:
    """A template of `assets/pages` that is, or extends, page.html.

    Args:
        name: of its style sheet and script.
        filters: functions that the template uses as filters under their names.
        values: what the template reads, text not yet escaped.
    """
    from markupsafe import Markup

    environment = _environment()
    environment.filters.update({function.__name__: function for function in filters})
    style = (ASSETS / "page.css").read_text() + (ASSETS / f"{name}.css").read_text()
    script = (ASSETS / f"{name}.js").read_text()
    html: str = environment.get_template(template).render(
        title=title, facts=facts, style=Markup(style), script=Markup(script), **values
    )
    return html


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(escaped(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["lines"] = lambda text: Markup(escape(shown_lines(text)))
    environment.filters["shortened"] = shortened
    return environment
