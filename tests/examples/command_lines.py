"""The commands within lines of shell, found without running them.

A reader for the shell that the pages and Makefiles use: words, quotes, pipes, lists, redirections,
loops, substitutions. What only the shell knows is taken for a plain word: `$(( … ))` is 1, as is a
variable that no `for` names.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import typer

from dlmctl.cli import app

ENDS = frozenset("|&;()\n")
KEYWORDS = frozenset(("do", "then", "else", "{", "!", "if", "while", "done", "fi", "}"))
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


def simple_commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command, redirections and what they name among them."""
    text = re.sub(r"\\\n", " ", text)
    text = re.sub(r"(?m)(^|\s)#.*$", r"\1", text)
    text, substituted = _substitutions(text)
    for inner in substituted:
        yield from simple_commands(inner)
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    known = dict(re.findall(r"\bfor (\w+) in ([^\s;]+)", text))
    text = re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda m: known.get(m[1] or m[2], "1"), text)
    text = re.sub(r"(?<!\S)2>", ">", text)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;()<>\n")
    lexer.whitespace = " \t\r"
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    for word in lexer:
        if set(word) <= ENDS:
            yield from [words] if words else []
            words = []
        elif words or not (word in KEYWORDS or ASSIGNMENT.match(word)):
            words.append(word)
    yield from [words] if words else []


def _substitutions(text: str) -> tuple[str, list[str]]:
    """The text with 1 in place of each `$( … )` and `<( … )`, and what stood in them."""
    inner = []
    while match := re.search(r"[$<]\(", text):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        within = text[match.end() : end - 1]
        if not text.startswith("$((", match.start()):
            inner.append(within)
        text = text[: match.start()] + _printed(within) + text[end:]
    return text, inner


def _printed(command: str) -> str:
    """What a substitution stands for: of printf its format, else 1."""
    words = command.split("'")
    return words[1].replace("%s", "1") if words[0].startswith("printf") else "1"


def dlmctl_commands(text: str) -> Iterator[list[str]]:
    """The arguments of each `dlmctl`, also where xargs, torchrun or time starts it."""
    for words in simple_commands(text):
        if "dlmctl" in words:
            yield _without_redirections(words[words.index("dlmctl") + 1 :])


def _without_redirections(words: list[str]) -> list[str]:
    marks = [bool(word) and set(word) <= set("<>&") for word in words]
    named = [False, *marks]  # what follows a mark
    return [w for w, mark, name in zip(words, marks, named, strict=False) if not mark and not name]


def redirected(text: str) -> Iterator[str]:
    """What follows `>` or `>>`."""
    for words in simple_commands(text):
        for word, name in pairwise(words):
            if word in (">", ">>") and name not in ("/dev/null", "&"):
                yield name


def parse(arguments: list[str]) -> Any:
    """The click context of a command line that is not run.

    Raises:
        click.UsageError: there is no such subcommand or option, or a value is of another kind.
    """
    return _parsed(tuple(arguments))


@functools.cache
def _parsed(arguments: tuple[str, ...]) -> Any:
    command = typer.main.get_command(app)
    context = command.make_context("dlmctl", list(arguments))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context


def known_options(arguments: list[str]) -> set[str]:
    """The options of the command that a line begins with; SUBCOMMAND stands for any."""
    names = {"-h", "--help"}
    if arguments[0] == "SUBCOMMAND":
        return names
    return names | {x for p in _command(arguments).params for x in (*p.opts, *p.secondary_opts)}


def texts_of(names: list[str]) -> list[str]:
    """The help of a command and of its options."""
    command = _command(names)
    return [text for x in (command, *command.params) if (text := getattr(x, "help", None))]


def _command(words: list[str]) -> Any:
    """The click command that a line begins with."""
    command = typer.main.get_command(app)
    for word in words:
        if not hasattr(command, "resolve_command"):
            break
        context = command.context_class(command, info_name="dlmctl")
        _, command, _ = command.resolve_command(context, [word])
    return command
