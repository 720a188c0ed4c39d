"""Manual pages from the same text as `--help`:  python man/generate.py

Writes man/dlmctl.1 and one page for each subcommand; a test compares them with what stands here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo

from dlmctl.cli import SUBCOMMANDS, dlmctl, functions

HERE = Path(__file__).parent
EXIT_CODES = {
    "0": "Success; also when the reader of the pipe has seen enough.",
    "1": "A limit was missed (stats --fail-under or --fail-worse), or an unforeseen error.",
    "2": "The command line does not make sense.",
    "65": "A record or file cannot be used; the message names file and line.",
    "66": "An input or a model is not there.",
    "69": "A device or an optional package is missing, and the message says what installs it; or "
    "the device has not enough memory.",
    "73": "An output cannot be created.",
    "74": "Writing failed, for example on a full disk.",
    "75": "Something that may pass, as a hub that does not answer, or another process that writes "
    "the same file or trains in the same directory.",
    "130": "Ended by Ctrl-C, as a shell sees it; 143 by SIGTERM.",
}


class Parameter(NamedTuple):
    """A parameter of a subcommand's function."""

    name: str
    kind: Any
    info: Any
    default: Any
    many: bool


def pages() -> dict[str, str]:
    """File name to text of every page."""
    made = {"dlmctl.1": _main_page()}
    for name in SUBCOMMANDS:
        for full_name, function in functions(name).items():
            made[f"dlmctl-{full_name.replace(' ', '-')}.1"] = _page(full_name, function)
    return made


def _main_page() -> str:
    summary, body, examples = _parts(inspect.getdoc(dlmctl) or "")
    lines = [_head("dlmctl"), ".SH NAME", rf"dlmctl \- {_plain(summary)}", ".SH SYNOPSIS"]
    lines += [r".B dlmctl", r"\fISUBCOMMAND\fR [\fIOPTIONS\fR] [\fIFILE\fR]...", ".SH DESCRIPTION"]
    lines += [*body, *examples, ".SH SUBCOMMANDS"]
    for name, row in SUBCOMMANDS.items():
        names = ", ".join(rf"\fB{_roff(page)}\fR(1)" for page in _page_names(name))
        lines += [".TP", names, _roff(row.summary)]
    lines += [".SH OPTIONS", ".TP", r"\fB\-\-version\fR", "Show the version."]
    lines += [".TP", r"\fB\-\-install\-completion\fR", "Install completion for the current shell."]
    lines += [".TP", r"\fB\-\-show\-completion\fR", "Show it, to be installed by hand."]
    lines += [".TP", r"\fB\-h\fR, \fB\-\-help\fR", "Show help."]
    return _finish(lines, [page for name in SUBCOMMANDS for page in _page_names(name)])


def _page_names(name: str) -> list[str]:
    return [f"dlmctl-{full_name.replace(' ', '-')}" for full_name in functions(name)]


def _page(name: str, function: Callable[..., None]) -> str:
    summary, body, examples = _parts(inspect.getdoc(function) or "")
    options = parameters(function)
    arguments = [p for p in options if isinstance(p.info, ArgumentInfo)]
    usage = " ".join(_roff(_metavar(p)) for p in arguments)
    page = f"dlmctl-{name.replace(' ', '-')}"
    lines = [_head(page), ".SH NAME", rf"{_roff(page)} \- {_plain(summary)}"]
    lines += [".SH SYNOPSIS", rf".B dlmctl {_roff(name)}", rf"[\fIOPTIONS\fR] {usage}"]
    lines += [".SH DESCRIPTION", *body]
    if arguments:
        lines.append(".SH ARGUMENTS")
        for parameter in arguments:
            lines += [".TP", rf"\fI{_roff(_metavar(parameter))}\fR", _roff(description(parameter))]
    lines.append(".SH OPTIONS")
    for parameter in options:
        if parameter not in arguments:
            lines += [".TP", _flags(parameter), _roff(description(parameter))]
    lines += [".TP", r"\fB\-h\fR, \fB\-\-help\fR", "Show help."]
    if examples:
        lines += [".SH EXAMPLES", *examples]
    others = [other for n in SUBCOMMANDS for other in _page_names(n) if other != page]
    return _finish(lines, ["dlmctl", *others])


def parameters(function: Callable[..., None]) -> list[Parameter]:
    """The arguments and options of a subcommand as its signature has them."""
    hints = get_type_hints(function, include_extras=True)
    made = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, info = get_args(hints[name])
        alternatives = [t for t in get_args(kind) if t is not type(None)]
        if get_origin(kind) in (UnionType, Union):
            kind = alternatives[0]
        many = get_origin(kind) is list
        kind = get_args(kind)[0] if many else kind
        made.append(Parameter(name, kind, info, parameter.default, many))
    return made


def _head(name: str) -> str:
    return rf'.TH "{_roff(name.upper())}" "1" "" "dlmctl" "dlmctl manual"'


def _finish(lines: list[str], others: list[str]) -> str:
    lines.append(".SH EXIT STATUS")
    for code, meaning in EXIT_CODES.items():
        lines += [".TP", rf"\fB{code}\fR", _roff(meaning)]
    lines += [".SH SEE ALSO", ",\n".join(rf"\fB{_roff(name)}\fR(1)" for name in others)]
    return "\n".join(lines) + "\n"


def _parts(text: str) -> tuple[str, list[str], list[str]]:
    """Summary, paragraphs, and examples of a help text."""
    summary, paragraphs, commands = divided(text)
    body = [line for block in paragraphs for line in (".PP", _roff(" ".join(block.split())))]
    typed = [_roff(as_typed(block)) for block in commands]
    examples = [line for text in typed for line in (".PP", ".nf", text, ".fi")]
    return summary, body[1:], examples


def divided(text: str) -> tuple[str, list[str], list[str]]:
    """Summary, paragraphs and examples of a help text, each as it stands there."""
    blocks = [block.strip() for block in re.split(r"\n\s*\n", text.strip())]
    paragraphs: list[str] = []
    examples: list[str] = []
    in_examples = False
    for block in blocks[1:]:
        if block in ("Example:", "Examples:"):
            in_examples = True
        elif in_examples or block.startswith("dlmctl "):
            examples.append(block)
        else:
            paragraphs.append(block)
    return blocks[0], paragraphs, examples


def as_typed(example: str) -> str:
    """A command of several lines as a shell takes it, as `--help` joins them."""
    lines = [line.strip() for line in example.split("\n")]
    ended = [x if x.endswith(("|", "&&", ";")) else f"{x} \\" for x in lines[:-1]]
    return "\n    ".join([*ended, lines[-1]])


def _metavar(parameter: Parameter) -> str:
    name = parameter.info.metavar or parameter.name.upper()
    name = name if parameter.default is inspect.Parameter.empty else f"[{name}]"
    return f"{name}..." if parameter.many else name


def _names(parameter: Parameter) -> list[str]:
    # Within Annotated, Typer keeps the first of the names as `default`.
    declared = [parameter.info.default, *(parameter.info.param_decls or ())]
    given = [n for names in declared if isinstance(names, str) for n in names.split("/")]
    return given or ["--" + parameter.name.replace("_", "-")]


def _flags(parameter: Parameter) -> str:
    names = ", ".join(rf"\fB{_roff(n)}\fR" for n in _names(parameter))
    return names if parameter.kind is bool else rf"{names} \fI{_roff(_value(parameter))}\fR"


def _value(parameter: Parameter) -> str:
    if parameter.info.metavar:
        return str(parameter.info.metavar)
    if get_origin(parameter.kind) is Literal:
        return "|".join(get_args(parameter.kind))
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(parameter.kind, "TEXT")


def flags(parameter: Parameter) -> str:
    """What is typed, without marks of roff: an option's names and value, or an argument."""
    if isinstance(parameter.info, ArgumentInfo):
        return _metavar(parameter)
    names = ", ".join(_names(parameter))
    return names if parameter.kind is bool else f"{names} {_value(parameter)}"


def description(parameter: Parameter) -> str:
    """Help, default and environment variable, without marks of roff."""
    info, text = parameter.info, [parameter.info.help or ""]
    if isinstance(info.show_default, str):
        text.append(f"Default: {info.show_default}.")
    elif parameter.kind is bool and len(_names(parameter)) > 1:
        if info.show_default:
            text.append(f"Default: {_names(parameter)[0 if parameter.default else -1]}.")
    elif not any(parameter.default is x for x in (None, "", False, inspect.Parameter.empty)):
        text.append(f"Default: {parameter.default}.")
    if info.envvar:
        text.append(f"Environment: {info.envvar}.")
    return " ".join(part for part in text if part)


def _plain(summary: str) -> str:
    return _roff(summary.rstrip("."))


def _roff(text: str) -> str:
    escaped = text.replace("\\", r"\e").replace("-", r"\-")
    escaped = "".join(c if c.isascii() else rf"\[u{ord(c):04X}]" for c in escaped)
    return "\n".join(rf"\&{x}" if x.startswith((".", "'")) else x for x in escaped.split("\n"))


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text)
