"""Names of the model families, one for each file of `dlmctl/models/families/`.

The files are read and not imported, so that help needs no torch. The first line of a file, that of
its docstring, says what the family is. A line `VARIANTS = (...)`, if there is one, names the models
that `dlmctl init` makes of the family; otherwise it makes one, under the family's name.
"""

from __future__ import annotations

import ast
import functools
import pkgutil
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

FOLDER = Path(__file__).parent.parent / "models" / "families"


class Declared(NamedTuple):
    """What the file of a family says without being imported."""

    summary: str
    variants: tuple[str, ...]


@functools.cache
def declared_families() -> dict[str, Declared]:
    """Every family by its name, which is that of its file with - for _."""
    families = {}
    for module in pkgutil.iter_modules([str(FOLDER)]):
        text = (FOLDER / f"{module.name}.py").read_text(encoding="utf-8")
        name, summary = module.name.replace("_", "-"), text.partition("\n")[0].strip('". ')
        variants = re.search(r"^VARIANTS = (.+)$", text, re.MULTILINE)
        families[name] = Declared(summary, ast.literal_eval(variants[1]) if variants else (name,))
    return families


def family_of_variant(variant: str) -> str:
    """The family of a model that `dlmctl init` makes."""
    return next(name for name, family in declared_families().items() if variant in family.variants)


def summaries() -> str:
    """A sentence for each family, for help texts."""
    return " ".join(f"{name}: {family.summary}." for name, family in declared_families().items())


def variant_summaries() -> str:
    """The same for the models that `dlmctl init` makes."""
    families = declared_families().values()
    return " ".join(f"{', '.join(family.variants)}: {family.summary}." for family in families)


if TYPE_CHECKING:
    Family = str
    Variant = str
else:
    Family = Literal[tuple(declared_families())]
    """Name of a family."""
    Variant = Literal[tuple(v for family in declared_families().values() for v in family.variants)]
    """Name of a model that `dlmctl init` makes."""
