"""Command-line options out of settings classes.

    def command(files: Files = None, prompting: Prompting = Prompting()) -> None: ...

`with_options` gives Typer a function that has an option for each field of `Prompting` in the place
of the parameter, and calls the command with the object.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from dlmctl.settings import knob_of


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with options in the place of its settings; one without any is as it was."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {
        name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)
    }
    if not groups:
        return command
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _options(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, kind in groups.items():
            fields = [field.name for field in dataclasses.fields(kind)]
            given[name] = kind(**{field: given.pop(field) for field in fields})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options(kind: Any) -> list[inspect.Parameter]:
    """A parameter with its option for each field of a settings class."""
    types = get_type_hints(kind)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=field.default,
            annotation=Annotated[types[field.name], _option(field)],
        )
        for field in dataclasses.fields(kind)
    ]


def _option(field: dataclasses.Field[Any]) -> Any:
    about = knob_of(field)
    return typer.Option(
        *about.flags,
        help=about.help,
        metavar=about.metavar,
        rich_help_panel=about.panel,
        min=about.minimum,
        max=about.maximum,
        show_default=about.shown_default,
        envvar=f"DLMCTL_{field.name.upper()}",
    )
