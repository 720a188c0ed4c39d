"""The order of the folders: each imports only from those below it; and names of test files."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dlmctl

PACKAGE = Path(dlmctl.__file__).parent

LAYERS = [
    {"records"},
    {"settings"},
    {"tasks"},
    {"verifiers", "report"},
    {"models.families"},
    {"models"},
    {"train", "engines"},
    {"diffusion"},
    {"rl.objectives", "rl.srpo"},
    {"rl"},
    {"sae"},
    {"sae.formats"},
    {"sae.training"},
    {"sae.evaluation"},
    {"sae.features"},
    {"sae.steering"},
    {"sae.order"},
    {"distill"},
    {"memorization.images", "memorization.text", "memorization.theory"},
    {"plan"},
    {"bench"},
    {"commands"},
]
"""From the ground up. Folders of one layer do not import each other."""

HEIGHT = {folder: height for height, layer in enumerate(LAYERS) for folder in layer}


def folder_of(module: str) -> str:
    """The folder of a module: `rl.objectives` of dlmctl.rl.objectives.rspo."""
    parts = module.split(".")[1:]
    return max((".".join(parts[:n]) for n in (1, 2) if ".".join(parts[:n]) in HEIGHT), key=len)


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """Modules of this package that a file imports, anywhere in it, and the lines."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("dlmctl."):
                yield name, node.lineno


def test_every_folder_stands_in_the_order() -> None:
    found = {
        ".".join(file.relative_to(PACKAGE).parent.parts)
        for file in PACKAGE.rglob("*.py")
        if file.name != "__init__.py"
    }
    assert found - {""} == set(HEIGHT)


def test_no_folder_imports_upward_or_sideways() -> None:
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if len(parts) == 1 or file.name == "__init__.py":
            continue  # the program itself is on top of all
        own = folder_of(".".join(("dlmctl", *parts)))
        for module, line in imports(file):
            if module.count(".") == 1 and not (PACKAGE / module.split(".")[1]).is_dir():
                wrong.append(f"{file}:{line} imports {module}")  # such as dlmctl.cli
                continue
            other = folder_of(module)
            if other != own and HEIGHT[other] >= HEIGHT[own]:
                wrong.append(f"{file}:{line}: {own} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_two_files_of_tests_share_a_name() -> None:
    """pytest imports them by name alone, and fails on the second."""
    names = Counter(file.name for file in Path(__file__).parent.rglob("*.py"))
    assert not [name for name, count in names.items() if count > 1 and name != "conftest.py"]
