"""The examples of help texts, manual pages, READMEs and benchmarks do what they say.

Each is run in a shell as it is printed, but for sizes (reductions.py), where the files and models
that it names are (world.py).
"""

from __future__ import annotations

import fcntl
import inspect
import os
import re
import shutil
from pathlib import Path

import pytest
from command_lines import dlmctl_commands, known_options, parse, redirected, texts_of
from conftest import shell
from pages import (
    ROOT,
    Example,
    as_typed,
    divided,
    help_texts,
    of_benchmarks,
    of_help_texts,
    of_readmes,
    readmes,
)
from reductions import EXIT_CODES, NOT_RUN, PATTERN, REDUCTIONS, STANDS_FOR, entry, reduced
from typer.testing import CliRunner
from world import World, make_world

from dlmctl.cli import app
from dlmctl.commands import distill_cd

EXAMPLES = [*of_help_texts(), *of_readmes(), *of_benchmarks()]
RUN = [example for example in EXAMPLES if not entry(NOT_RUN, example.text)]
WRITTEN = (
    "output", "directory", "target", "html", "plot", "rows", "gallery", "summary", "curve",
    "novelty", "judge_prompts", "junit",
)  # fmt: skip
"""Parameters that name what is written."""


def _name(example: Example) -> str:
    return f"{example.page} {example.number}".replace(" ", "-").replace("/", ".")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Made once, also by several workers."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "world"
    with (directory.parent / "world.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "done").exists():
            shutil.rmtree(directory, ignore_errors=True)  # of a worker that failed
            make_world(directory)
            (directory / "done").touch()
    return World.within(directory)


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize("example", RUN, ids=_name)
def test_the_example_runs_as_it_is_printed(example: Example, world: World, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(world.files, here, symlinks=True, copy_function=_copy)
    if example.page.startswith("examples/"):
        _add_recipe((ROOT / example.page).parent, here)
    for name, other in entry(STANDS_FOR, example.text, {}).items():
        _remove(here / name)
        (here / other).rename(here / name)
    text = reduced(example.text)
    outputs = [path for name in _outputs(text) for path in _paths(here, name)]
    for path in outputs:
        _remove(path)
    done = shell(f"set -e\n{text}", here, more=world.environment())
    assert done.returncode == entry(EXIT_CODES, text, 0), f"{text}\n{done.stderr}"
    for name in _outputs(text):
        written = [p for path in _paths(here, name) for p in (path, *path.rglob("*"))]
        assert any(p.is_file() and p.stat().st_size for p in written), f"{text}\n{name} is empty"
    assert outputs or done.stdout, f"{text}\nwrites nothing"


def _add_recipe(folder: Path, here: Path) -> None:
    """What stands beside a README, and the folders that its Makefile calls for scripts."""
    files = [file for file in folder.iterdir() if file.is_file()]
    for file in files:
        shutil.copy2(file, here)
    for script in (ROOT / "examples").glob("*/*.py"):
        target = here.parent / script.parent.name
        target.mkdir(exist_ok=True)
        shutil.copy2(script, target)


def _copy(source: str, target: str) -> None:
    """Weights are replaced and never written into, so that a link is a copy."""
    (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)


def _outputs(text: str) -> list[str]:
    """What the commands of an example are to write."""
    names = list(redirected(text))
    for arguments in dlmctl_commands(text):
        given = parse(arguments).params
        names += [str(given[key]) for key in WRITTEN if given.get(key) is not None]
    return [name for name in names if name not in ("-", "None")]


def _paths(here: Path, name: str) -> list[Path]:
    return list(here.glob(re.sub(r"\{\w*\}", "*", name))) if "{" in name else [here / name]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("example", EXAMPLES, ids=_name)
def test_the_commands_of_the_example_are_known(example: Example) -> None:
    for arguments in dlmctl_commands(example.text):
        parse(arguments)


def test_every_reduction_and_exception_is_used() -> None:
    texts = [example.text for example in EXAMPLES]
    used = {match[1] for text in texts for match in PATTERN.finditer(text)}
    assert REDUCTIONS.keys() == used
    for table in (STANDS_FOR, EXIT_CODES, NOT_RUN):
        assert {key for key in table if any(key in text for text in texts)} == table.keys()


@pytest.mark.parametrize(("page", "function"), list(help_texts()))
def test_every_help_text_has_an_example_of_its_command(page: str, function) -> None:
    shown = {
        parse(arguments).command_path
        for text in divided(function)[2]
        for arguments in dlmctl_commands(as_typed(text))
    }
    assert page in shown if " " in page else shown


@pytest.mark.parametrize("columns", ["60", "80", "100"])
def test_help_shows_the_examples_as_a_shell_takes_them(columns: str) -> None:
    for page, function in help_texts():
        done = CliRunner().invoke(app, [*page.split()[1:], "--help"], env={"COLUMNS": columns})
        shown = " ".join(done.stdout.replace("\\\n", "").split())
        for text in divided(function)[2]:
            assert f" {' '.join(text.split())} " in f"{shown} ", page


def test_the_steps_that_examples_ask_for_have_checkpoints() -> None:
    training = inspect.signature(distill_cd.command).parameters["training"].default
    asked = [int(n) for e in EXAMPLES for n in re.findall(r"--at (\d+)", e.text)]
    assert asked
    assert set(asked) <= set(training.checkpoint_steps())


LIKE_A_COMMAND = re.compile(r"^\s*(\$ |dlmctl |torchrun |```)|(\||&&) *dlmctl ", re.MULTILINE)


@pytest.mark.parametrize(("page", "function"), list(help_texts()))
def test_no_command_of_a_help_text_is_outside_its_examples(page: str, function) -> None:
    _, paragraphs, examples = divided(function)
    for paragraph in paragraphs:
        assert not LIKE_A_COMMAND.search(re.sub(r"'[^']*'", "", paragraph)), paragraph
    for text in examples:
        assert list(dlmctl_commands(text)), f"no command: {text}"


@pytest.mark.parametrize("path", readmes(), ids=lambda path: path.parent.name)
def test_no_command_of_a_readme_is_outside_an_indented_block(path: Path) -> None:
    prose = "\n".join(x for x in path.read_text().split("\n") if not x.startswith("    "))
    assert not LIKE_A_COMMAND.search(re.sub(r"`[^`]+`", "", prose))
    assert "\t" not in prose


def test_the_commands_that_prose_names_are_known() -> None:
    texts = [path.read_text() for path in readmes()]
    named = {m for t in texts for m in re.findall(r"(?<!`)`(dlmctl [^`]+)`(?!`)", t)}
    texts = [text for page, _ in help_texts() for text in texts_of(page.split()[1:])]
    named |= {m for t in texts for m in re.findall(r"'(dlmctl [^']+)'", t)}
    assert len(named) > 30
    for text in named:
        for arguments in dlmctl_commands(" ".join(text.split())):
            unknown = {x for x in arguments if x.startswith("-")} - known_options(arguments)
            assert not unknown, text
