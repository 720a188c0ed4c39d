"""Command-line options out of settings.

    def command(files: Files = None, sampler: Sampler = Sampler(), seed: Seed = 0) -> None: ...

`with_options` gives Typer a function that has, in the place of `sampler`, an option for each field
of `Sampler`, and calls the command with the object. `Files` and `Seed` are annotated with a `Knob`
and become one option each.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from dlmctl.settings import Knob, Shown, Without, knob_of


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with options in the place of its settings."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[Any, dict[str, Any], list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind, *notes = _unpacked(hints[parameter.name])
        if dataclasses.is_dataclass(kind):
            shown = next((note for note in notes if isinstance(note, Shown)), Shown())
            left_out = next((note for note in notes if isinstance(note, Without)), Without())
            defaults = kind if parameter.default is parameter.empty else parameter.default
            options = list(_options(kind, defaults, shown, left_out))
            fixed = {field: getattr(defaults, field) for field in left_out}
            groups[parameter.name] = kind, fixed, [option.name for option in options]
            parameters += options
        else:
            parameters.append(_option(parameter.name, kind, parameter.default, notes))
    if len({parameter.name for parameter in parameters}) < len(parameters):
        raise TypeError(f"two settings of {command.__module__} have a field of one name")

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, (kind, fixed, fields) in groups.items():
            given[name] = kind(**fixed, **{field: given.pop(field) for field in fields})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _unpacked(hint: Any) -> list[Any]:
    """The type of an annotation and its notes.

    Where the default is None, `get_type_hints` of Python 3.10 puts an Optional around them.
    """
    if get_origin(hint) is Union:
        hint = next((kind for kind in get_args(hint) if get_origin(kind) is Annotated), hint)
    return [*get_args(hint)] if get_origin(hint) is Annotated else [hint]


def _options(
    kind: Any, defaults: Any, shown: Mapping[str, str], left_out: Without
) -> Iterator[inspect.Parameter]:
    """A parameter with its option for each field of a settings class.

    Args:
        defaults: an object of the class, or the class itself for the defaults of its fields.
        shown: what help says of defaults in place of what the knobs say.
        left_out: fields without an option; nor have those that no `knob` declares.
    """
    types = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in left_out or "knob" not in field.metadata:
            continue
        declared = knob_of(field, kind)
        if field.name in shown:
            declared = dataclasses.replace(declared, shown_default=shown[field.name])
        default = getattr(defaults, field.name, inspect.Parameter.empty)
        yield _option(field.name, types[field.name], default, [declared])


def _option(name: str, kind: Any, default: Any, notes: list[Any]) -> inspect.Parameter:
    """A parameter whose `Knob`, if it has one, has become an option of Typer."""
    made = [_typer_info(name, note) if isinstance(note, Knob) else note for note in notes]
    annotation = Annotated[(kind, *made)] if made else kind
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _typer_info(name: str, declared: Knob) -> Any:
    about: dict[str, Any] = {
        "help": declared.help,
        "metavar": declared.metavar,
        "rich_help_panel": declared.panel,
        "min": declared.minimum,
        "max": declared.maximum,
        "show_default": declared.shown_default,
    }
    variable = "DLMCTL_" + declared.flag(name).strip("-").upper().replace("-", "_")
    about["envvar"] = variable if declared.env else None
    if declared.argument:
        return typer.Argument(**about)
    if declared.presets:
        about |= {"is_eager": True, "callback": _preset(declared.presets)}
    return typer.Option(*declared.flags, **about)


def _preset(presets: Mapping[str, Mapping[str, Any]]) -> Callable[..., Any]:
    """Callback of an option whose value decides what others are by default."""

    def apply(context: typer.Context, value: str) -> str:
        context.default_map = dict(presets[value])
        return value

    return apply
