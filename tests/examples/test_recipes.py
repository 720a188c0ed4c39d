"""The recipes under examples/: every target is there, every command that is in them is known."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from command_lines import dlmctl_commands, parse
from pages import ROOT, of_readmes

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
MAKEFILES = sorted((ROOT / "examples").glob("*/Makefile"))
SCRIPTS = [
    path
    for path in sorted((ROOT / "examples").rglob("*"))
    if path.suffix in (".sh", ".sbatch") or path.name == "crontab"
]
HOLD_OPTIONS = {"sample": "-n 1", "scopes": "all"}
"""Variables of the scripts, and options or choices such as they hold."""


def _make(folder: Path, *arguments: str) -> str:
    """What make would run, all of it, whatever is there."""
    line = ["make", "-n", "-B", "--no-print-directory", "RUNS=runs/none", *arguments]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _kinds(text: str) -> list[list[str]]:
    """The dlmctl commands, of those that differ in numbers alone the first."""
    found: dict[str, list[str]] = {}
    for arguments in dlmctl_commands(text):
        found.setdefault(re.sub(r"\d+", "1", " ".join(arguments)), arguments)
    return list(found.values())


@pytest.mark.parametrize("makefile", MAKEFILES, ids=lambda path: path.parent.name)
def test_the_commands_of_every_target_are_known(makefile: Path) -> None:
    phony = re.findall(r"^\.PHONY: (.*)$", makefile.read_text(), re.MULTILINE)
    targets = sorted({name for line in phony for name in line.split()} - {"table"})
    commands = _kinds(_make(makefile.parent, *targets))
    assert commands
    for arguments in commands:
        parse(arguments)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_commands_of_every_script_are_known(script: Path) -> None:
    text = script.read_text()
    for variable, options in HOLD_OPTIONS.items():
        text = re.sub(rf"\${variable}\b", options, text)
    for arguments in dlmctl_commands(text):
        parse(arguments)


def test_the_lines_of_make_in_the_pages_name_targets_that_there_are() -> None:
    calls = [
        (example.page, re.split(r"\s{3,}", line)[0])  # what it does may stand behind
        for example in of_readmes()
        for line in re.findall(r"\bmake( [^&\n]*)?", example.text.replace("\\\n", ""))
    ]
    assert len(calls) > 5
    for page, call in calls:
        _make(ROOT if "-C examples/" in call else (ROOT / page).parent, *shlex.split(call))


def test_the_calls_of_make_in_prose_name_targets_that_there_are() -> None:
    calls = {
        (path.parent, call)
        for path in sorted((ROOT / "examples").glob("*/README.md"))
        for call in re.findall(r"`make( [^`]*)?`", path.read_text())
    }
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        named = re.findall(r"`make( [^`]*)?` in\s\[?`([^`]*)`", page.read_text())
        calls |= {(ROOT / folder, call) for call, folder in named}
    assert len(calls) > 8
    for folder, call in sorted(calls):
        _make(folder, *call.split())
