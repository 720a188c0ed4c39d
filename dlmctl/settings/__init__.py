"""Every knob of the program, declared once: its type, default, bounds and help in one field.

A settings class is a frozen dataclass whose fields are made by `knob`. A subcommand takes one as a
parameter, `dlmctl.options` makes command-line options of its fields, and the body receives it
filled in.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Knob:
    """What the command line says of a field beside its type and default."""

    help: str
    flags: tuple[str, ...] = ()
    """Names on the command line; none: that of the field."""
    metavar: str | None = None
    panel: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    shown_default: str | bool = True
    """What help says of the default; False says nothing."""


def knob(default: Any, help: str, *flags: str, **about: Any) -> Any:
    """A field of a settings class; `about` is as in `Knob`."""
    return field(default=default, metadata={"knob": Knob(help, flags, **about)})


def knob_of(declared: dataclasses.Field[Any]) -> Knob:
    """What `knob` declared of a field."""
    found: Knob = declared.metadata["knob"]
    return found
