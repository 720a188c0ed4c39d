"""Benchmarks as scripts, with options, help and exit codes like those of `dlmctl`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from dlmctl.cli import HELP_OPTIONS, help_text, with_exit_codes
from dlmctl.help_screen import TwoColumns
from dlmctl.options import with_options


def script(command: Callable[..., None]) -> typer.Typer:
    """The program whose options are the parameters of `command`."""
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, context_settings=HELP_OPTIONS
    )
    name = Path(command.__code__.co_filename).name
    app.command(cls=TwoColumns, help=help_text(command))(
        with_exit_codes(with_options(command), name)
    )
    return app
