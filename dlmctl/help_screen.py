"""The help of a subcommand, in two columns that fit a terminal of 80 characters.

Typer's boxes have separate columns for names, short names, opposites and types, which leaves 18
characters per line to say what an option does, and cuts long names.
"""

from __future__ import annotations

import os
import re
import sys
from textwrap import fill
from typing import Any

import typer
from typer.core import TyperCommand

NAMES = 24
"""Characters of the first column; longer names have a line of their own."""
WIDEST = 100
"""Most characters of a line, on any terminal."""
EXAMPLES = ("Example:", "Examples:")
"""Paragraphs that examples follow, up to the end of a help text."""
_WORD = r"""(?:'[^']*'|"[^"]*"|\S)+"""
WORD = re.compile(rf"-[\w-]+ (?![-|&]){_WORD}|{_WORD}")
"""A word of a shell line; an option and its value are one word."""
KINDS = {"int": "N", "float": "X", "str": "TEXT", "list[str]": ""}
"""Type to the placeholder of its values."""


class TwoColumns(TyperCommand):
    """A subcommand whose options are under the headings of their panels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "rich_markup_mode": None})
        self.context_settings.setdefault("max_content_width", WIDEST)

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write what the subcommand does."""
        examples = False
        for paragraph in (self.help or "").split("\n\n"):
            form = _command if examples else _filled
            formatter.write(f"\n{form(paragraph, formatter.width, '  ')}\n")
            examples |= paragraph in EXAMPLES

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, names in bold on a terminal."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            row = parameter.get_help_record(ctx)
            if row is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                panel = getattr(parameter, "rich_help_panel", None) or usual
                panels.setdefault(panel, []).append((_names(row[0]), row[1]))
        for heading, rows in panels.items():
            if rows:
                formatter.write(f"\n{_bold(heading + ':')}\n")
            for names, text in rows:
                formatter.write(_row(names, text, formatter.width))


def _row(names: str, text: str, width: int) -> str:
    """An option: its names, and what it does, next to them or below."""
    column = NAMES + 4
    lines = _filled(text, width, column * " ").strip()
    if len(names) > NAMES:
        return f"  {_bold(names)}\n{column * ' '}{lines}\n"
    return f"  {_bold(names)}{(column - 2 - len(names)) * ' '}{lines}\n"


def _names(text: str) -> str:
    """-n, --samples N: a placeholder instead of the type that typer writes."""
    return re.sub(r"<(int|float|str|list\[str\])( range)?>", lambda m: KINDS[m[1]], text).strip()


def _filled(text: str, width: int, indent: str) -> str:
    """Text broken between words; the name of an option is one word."""
    return fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _command(text: str, width: int, indent: str) -> str:
    """Shell lines to copy: broken between words, and not within quotes."""
    most = width - len(" \\")
    words: list[str] = []
    for word in WORD.findall(text):
        too_long = word.startswith("-") and len(2 * indent + word) > most
        words += word.split(" ", 1) if too_long else [word]
    lines, line = list[str](), indent + words[0]
    for word in words[1:]:
        if len(line) + len(word) < most:
            line += f" {word}"
        else:
            lines.append(line if line.endswith(("|", "&&", ";")) else f"{line} \\")
            line = 2 * indent + word
    return "\n".join([*lines, line])


def _bold(text: str) -> str:
    dumb = os.environ.get("TERM", "dumb") == "dumb"
    return text if dumb or not sys.stdout.isatty() else typer.style(text, bold=True)
