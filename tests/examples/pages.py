"""The examples of every page as they are printed: help texts, manual pages, docs/, READMEs, and
the benchmarks that are scripts."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from dlmctl.cli import SUBCOMMANDS, dlmctl, functions

ROOT = Path(__file__).parents[2]


class Example(NamedTuple):
    """One or several commands that stand together."""

    page: str
    """`dlmctl NAME` of a help text, or the path of a Markdown page or a script."""
    number: int
    """Among those of the page, from 1."""
    text: str
    """Lines of shell, as a reader copies them."""


def module_at(path: Path) -> ModuleType:
    """A program of the tree that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = module_at(ROOT / "man" / "generate.py")


def help_texts() -> Iterator[tuple[str, Callable[..., None]]]:
    """Names as they are typed, and the functions whose docstrings are the help texts."""
    yield "dlmctl", dlmctl
    for row in SUBCOMMANDS:
        for name, function in functions(row).items():
            yield f"dlmctl {name}", function


def divided(function: Callable[..., None]) -> tuple[str, list[str], list[str]]:
    """Summary, paragraphs and examples, as the manual pages divide the text."""
    summary, paragraphs, examples = GENERATOR.divided(inspect.getdoc(function) or "")
    return summary, paragraphs, examples


def as_typed(example: str) -> str:
    """An example of a help text as the manual page prints it."""
    text: str = GENERATOR.as_typed(example)
    return text


def of_help_texts() -> list[Example]:
    """The examples of the help texts, in the form of the manual pages."""
    return [
        Example(page, number, as_typed(text))
        for page, function in help_texts()
        for number, text in enumerate(divided(function)[2], start=1)
    ]


def readmes() -> list[Path]:
    """README.md, the pages under docs/, and the READMEs of the examples."""
    folder = ROOT / "examples"
    top = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [*top, folder / "README.md", *sorted(folder.glob("*/README.md"))]


def of_readmes() -> list[Example]:
    """The indented blocks of the Markdown pages."""
    return [
        Example(str(path.relative_to(ROOT)), number, text)
        for path in readmes()
        for number, text in enumerate(indented(path.read_text()), start=1)
    ]


def of_benchmarks() -> list[Example]:
    """The calls of themselves that scripts in tests/benchmarks have in their docstrings."""
    examples = []
    for path in sorted((ROOT / "tests" / "benchmarks").glob("*.py")):
        name = str(path.relative_to(ROOT))
        blocks = indented(ast.get_docstring(ast.parse(path.read_text())) or "")
        calls = [block for block in blocks if f"python {name}" in block]
        examples += [Example(name, number, text) for number, text in enumerate(calls, start=1)]
    return examples


def indented(text: str) -> list[str]:
    """Blocks of a Markdown text that are indented by four columns."""
    blocks = re.split(r"\n\s*\n", text)
    return ["\n".join(x[4:] for x in b.strip("\n").split("\n")) for b in blocks if _is_code(b)]


def _is_code(block: str) -> bool:
    return all(line.startswith("    ") for line in block.strip("\n").split("\n"))
