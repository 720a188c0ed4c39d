"""Autoencoders on disk, in the layouts of three libraries.

    saelens               cfg.json, sae_weights.safetensors, sparsity.safetensors
    dictionary_learning   config.json, ae.pt            (the released SAEs of DLM-Scope)
    sparsify              cfg.json, sae.safetensors

Our layout is that of SAELens. What the others fold into their weights, or leave to a switch, is
folded when a folder is read, so that an autoencoder means the same whatever it came from. A new
layout is a module with a reader and a writer, and a row of `LAYOUTS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dlmctl.records.errors import DataError, MissingInputError, UsageError
from dlmctl.records.files import publish_directory
from dlmctl.sae.formats.dictionary_learning import (
    read_dictionary_learning,
    write_dictionary_learning,
)
from dlmctl.sae.formats.parts import SavedSae
from dlmctl.sae.formats.saelens import read_saelens, write_saelens
from dlmctl.sae.formats.sparsify import read_sparsify, write_sparsify
from dlmctl.settings.sae import Layout
from dlmctl.train.card import Card, write_card


def layout_of(directory: Path) -> Layout:
    """The library whose folder it is; raises MissingInputError if it is none."""
    for layout, row in LAYOUTS.items():
        if (directory / row.weights).exists():
            return layout
    raise MissingInputError(f"{directory} is no autoencoder: it has none of {_weight_files()}")


def find_saes(directories: Sequence[Path]) -> list[Path]:
    """The autoencoders among these folders and in the folders under them, in natural order.

    Raises:
        MissingInputError: a directory has none.
    """
    found: list[Path] = []
    for directory in directories:
        if any((directory / row.weights).exists() for row in LAYOUTS.values()):
            found.append(directory)
            continue
        under = {path.parent for row in LAYOUTS.values() for path in directory.rglob(row.weights)}
        # A folder that is being written has a name that begins with a dot.
        whole = [p for p in under if not any(x[0] == "." for x in p.relative_to(directory).parts)]
        if not whole:
            raise MissingInputError(
                f"{directory} holds no autoencoder: there is none of {_weight_files()}"
            )
        found += sorted(whole, key=_natural_order)
    return found


def read_saes(directories: Sequence[Path]) -> dict[str, SavedSae]:
    """All of `find_saes`, by their folders' names."""
    return {str(folder): read_sae(folder) for folder in find_saes(directories)}


def trained_with(saved: Mapping[str, SavedSae], name: str, default: Any, option: str) -> Any:
    """The value that the metadata of all autoencoders agree on.

    Args:
        saved: autoencoders by their folders.
        name: of the metadata.
        default: value of a folder that does not say; its type is the type of the value.
        option: command-line option that decides it instead, for the messages.

    Raises:
        UsageError: they differ.
        DataError: one has a value of another type.
    """
    folders: dict[Any, str] = {}
    for folder, one in saved.items():
        value = one.metadata.get(name)
        value = default if value is None else value
        # For Python True is an int, and 1 is no float; here it is the other way round.
        kind = (float, int) if isinstance(default, float) else type(default)
        if not isinstance(value, kind) or isinstance(value, bool) != isinstance(default, bool):
            wanted = type(default).__name__
            raise DataError(f"'{name}' is {value!r}, expected {wanted}: give {option}", folder)
        folders.setdefault(value, folder)
    if len(folders) > 1:
        (first, here), (second, there) = list(folders.items())[:2]
        raise UsageError(
            f"the autoencoders were trained with another {name}: {here} with {first}, {there} "
            f"with {second}: give {option}, or take each kind by itself"
        )
    return next(iter(folders))


def read_sae(directory: Path) -> SavedSae:
    """An autoencoder in any of the layouts, in float32.

    Raises:
        MissingInputError: the folder is none of them.
        DataError: a file is broken, or it is another kind of autoencoder.
    """
    return LAYOUTS[layout_of(directory)].read(directory)


def write_sae(
    saved: SavedSae, directory: Path, layout: Layout = "saelens", card: Card | None = None
) -> None:
    """Write a folder that the library loads; it appears whole or not at all."""

    def fill(beside: Path) -> None:
        LAYOUTS[layout].write(saved, beside)
        if card is not None:
            write_card(beside, card)

    publish_directory(directory, fill)


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """layer5-k50 before layer10-k50."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _weight_files() -> str:
    return ", ".join(f"{row.weights} ({layout})" for layout, row in LAYOUTS.items())


class _Row(NamedTuple):
    weights: str
    """File by which a folder is recognised."""
    read: Callable[[Path], SavedSae]
    write: Callable[[SavedSae, Path], None]


LAYOUTS: dict[Layout, _Row] = {
    "saelens": _Row("sae_weights.safetensors", read_saelens, write_saelens),
    "dictionary_learning": _Row("ae.pt", read_dictionary_learning, write_dictionary_learning),
    "sparsify": _Row("sae.safetensors", read_sparsify, write_sparsify),
}
