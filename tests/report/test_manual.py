"""The manual pages stand as the help text makes them, and leave no option out."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from dlmctl.cli import SUBCOMMANDS, functions

MAN = Path(__file__).parents[2] / "man"


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("generate", MAN / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def test_the_pages_are_up_to_date(pages):
    there = {path.name: path.read_text() for path in MAN.glob("*.1")}
    stale = [name for name in pages.keys() | there.keys() if pages.get(name) != there.get(name)]
    assert not stale, f"run  python man/generate.py : {', '.join(sorted(stale))}"


NAMES = [name for row in SUBCOMMANDS for name in functions(row)]


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_the_command_line_is_in_its_page(pages, name):
    from typer.testing import CliRunner

    from dlmctl.cli import app

    text = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200"}).stdout
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    page = pages[f"dlmctl-{name.replace(' ', '-')}.1"].replace(r"\-", "-")
    assert shown
    assert not {option for option in shown if option not in page}


def test_every_option_has_a_help_text():
    for row in SUBCOMMANDS:
        for name, function in functions(row).items():
            hints = inspect.get_annotations(function, eval_str=True)
            for parameter in inspect.signature(function).parameters:
                [info] = hints[parameter].__metadata__
                assert info.help, f"{name}: {parameter}"


def test_the_first_line_of_each_help_is_the_one_in_the_table():
    for row, entry in SUBCOMMANDS.items():
        found = functions(row)
        if row in found:
            assert inspect.getdoc(found[row]).split("\n")[0] == entry.summary
