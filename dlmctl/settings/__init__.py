"""Every knob of the program, declared once: its type, default, bounds and help in one place.

A settings class is a frozen dataclass whose fields are made by `knob`. A subcommand takes one as a
parameter; `dlmctl.options` makes command-line options of its fields, and the body receives it
filled in. The parameter's default is an object of the class, and a command whose default differs
says so there: `compute: Compute = Compute(batch_size=64)`. `PANEL` of a class is the heading in the
help of all its fields that have none of their own.

A knob that stands alone is an annotation, `Seed = Annotated[int, Knob("…", "--seed")]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args


@dataclass(frozen=True, init=False)
class Knob:
    """What the command line says of a value, apart from its type and default."""

    help: str
    flags: tuple[str, ...]
    """Names on the command line; none: that of the field, as --batch-size of batch_size."""
    metavar: str | None = None
    panel: str | None = None
    """Heading in the help."""
    minimum: float | None = None
    maximum: float | None = None
    shown_default: str | bool = True
    """What help says of the default; False says nothing."""
    env: bool = False
    """DLMCTL_NAME in the environment sets it, NAME being that of the long flag."""
    argument: bool = False
    """It has no flag, but a place on the command line."""
    presets: Mapping[str, Mapping[str, Any]] | None = None
    """Defaults of the command's other options, by field, under each value of this one."""

    def __init__(self, help: str, *flags: str, **about: Any) -> None:
        unknown = about.keys() - {known.name for known in dataclasses.fields(Knob)}
        if unknown:
            raise TypeError(f"a knob has no {', '.join(sorted(unknown))}")
        for name, value in {"help": help, "flags": flags, **about}.items():
            object.__setattr__(self, name, value)

    def flag(self, name: str) -> str:
        """The long name on the command line of a field called `name`."""
        long = next((flag for flag in self.flags if flag.startswith("--")), f"--{name}")
        return long.split("/")[0].replace("_", "-")


def knob(default: Any, help: str, *flags: str, **about: Any) -> Any:
    """A field of a settings class; `about` is as in `Knob`."""
    return field(default=default, metadata={"knob": Knob(help, *flags, **about)})


def same(default: Any, annotation: Any) -> Any:
    """A field of a settings class with the knob of an annotation such as `Seed`."""
    [declared] = get_args(annotation)[1:]
    return field(default=default, metadata={"knob": declared})


def same_field(default: Any, settings: type[Any], name: str) -> Any:
    """A field of a settings class with the knob of another class's field."""
    [declared] = [known for known in dataclasses.fields(settings) if known.name == name]
    return field(default=default, metadata={"knob": knob_of(declared, settings)})


def knob_of(declared: dataclasses.Field[Any], settings: type[Any]) -> Knob:
    """What `knob` declared of a field of a settings class, under the heading of the class."""
    knob: Knob = declared.metadata["knob"]
    panel = knob.panel or getattr(settings, "PANEL", None)
    return dataclasses.replace(knob, panel=panel)


class Shown(dict[str, str]):
    """What the help of one command says of the defaults of a settings class, by field:

    corpus: Annotated[Corpus, Shown(context="the autoencoder's own, else 2048")]
    """


class Without(tuple[str, ...]):
    """Fields of a settings class that one command has no options for.

    They keep the values of the parameter's default:
    sampler: Annotated[Sampler, Without("cache", "refresh")] = Sampler()
    """

    def __new__(cls, *fields: str) -> Without:
        return super().__new__(cls, fields)


def only(settings: type[Any], *names: str) -> Without:
    """All fields of a settings class but these, for a command that has options for few of them."""
    return Without(
        *(known.name for known in dataclasses.fields(settings) if known.name not in names)
    )
