"""Names of the model families, one for each file of `dlmctl/models/families/`.

The files are read and not imported, so that help needs no torch. The first line of a file's
docstring says what the family is. `VARIANTS` at its top level, if it is there, names the models
that `dlmctl init` makes of the family; otherwise it makes one, under the family's name.
"""

from __future__ import annotations

import ast
import functools
import pkgutil
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
        tree = ast.parse((FOLDER / f"{module.name}.py").read_text(encoding="utf-8"))
        summary = (ast.get_docstring(tree) or "").partition("\n")[0].rstrip(".")
        name = module.name.replace("_", "-")
        variants = (
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VARIANTS"
        )
        families[name] = Declared(summary, next(variants, (name,)))
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
