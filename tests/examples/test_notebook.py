"""The notebook runs from the first cell to the last, at small size and without its installation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from command_lines import dlmctl_commands, parse
from conftest import shell
from pages import ROOT
from preload import dlmctl_script

SIZES = {"ROUNDS": "1", "PROMPTS": "1", "TESTS": "2"}


def _code() -> list[str]:
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())
    cells: list[dict[str, Any]] = notebook["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def _small(source: str) -> str:
    lines = source.split("\n")
    return "\n".join(
        f"%env {name}={SIZES.get(name, value)}" if line.startswith("%env ") else line
        for line in lines
        for name, _, value in [line.removeprefix("%env ").partition("=")]
    )


def _lines(source: str) -> str:
    """The shell of a cell, without the line that says that it is."""
    return source.partition("\n")[2]


def _installs(source: str) -> bool:
    return "pip install" in source


def test_the_first_command_installs_and_the_sizes_are_small_here() -> None:
    code = _code()
    assert [n for n, source in enumerate(code) if _installs(source)] == [1]
    assert SIZES.keys() <= {
        line[5:].partition("=")[0] for s in code for line in s.split("\n") if line[:5] == "%env "
    }


def test_its_commands_are_known() -> None:
    commands = [c for s in _code() if s.startswith("%%bash") for c in dlmctl_commands(_lines(s))]
    assert len(commands) > 10
    for arguments in commands:
        parse(arguments)


def test_its_shell_cells_run_in_order(tmp_path: Path) -> None:
    """What a notebook does, without Jupyter: the cells of Python show files that are there."""
    variables = dict(SIZES)
    for source in _code():
        if source.startswith("%%bash") and not _installs(source):
            done = shell(f"set -e\n{_lines(source)}", tmp_path, more=variables)
            assert done.returncode == 0, f"{source}\n{done.stderr}"
    for name in ("curves.png", "tokens.html", "before.jsonl", "after.jsonl"):
        assert (tmp_path / name).stat().st_size, name
        assert any(name in source for source in _code())


def test_jupyter_runs_it(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = [nbformat.v4.new_code_cell(_small(s)) for s in _code() if not _installs(s)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    path = os.pathsep.join([str(dlmctl_script().parent), os.environ["PATH"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        nbclient.NotebookClient(
            notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
    kinds = {kind for cell in cells for out in cell.outputs for kind in out.get("data", {})}
    assert {"image/png", "text/html"} <= kinds
