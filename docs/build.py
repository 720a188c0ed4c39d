"""The documentation as a site:  python docs/build.py [DIRECTORY]

Pages are the Markdown files of the tree. Those of the subcommands are made from what the manual
pages are made from, those of the modules from their docstrings. Needs `pip install -e '.[docs]'`
and no network. A warning of Sphinx is an error: a link that leads nowhere, a page without a title.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from dlmctl.cli import SUBCOMMANDS, functions

ROOT = Path(__file__).parents[1]
PARTS = {
    "Begin": [
        "README.md",
        "docs/install.md",
        "examples/README.md",
        "docs/faq.md",
        "docs/glossary.md",
    ],
    "Do": [
        "docs/howto-train.md",
        "docs/howto-evaluate.md",
        "docs/howto-steer.md",
        "docs/howto-memorized.md",
    ],
    "Papers": [
        "docs/paper-rspo.md",
        "docs/paper-srpo.md",
        "docs/paper-dlmscope.md",
        "docs/paper-memorization.md",
    ],
    "Subjects": [
        "docs/rl.md",
        "docs/models.md",
        "docs/images.md",
        "docs/sae.md",
        "docs/distill.md",
        "docs/reliability.md",
        "docs/measurements.md",
    ],
    "From elsewhere": ["docs/migrate.md", "docs/compare.md"],
    "Project": ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"],
}
"""Headings of the side bar, and the pages under each; a page under docs/ has to be in one."""

LINK = re.compile(r"(?<!`)(!?\[[^\]]*\])\(([^()\s]+)\)")
MARKS = re.compile(r"([\\*_<>\[\]#$|~])")


def write_sources(target: Path) -> None:
    """What Sphinx reads, in a directory laid out like the tree.

    Raises:
        ValueError: a page is in no part of the side bar.
    """
    examples = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "examples").glob("*/README.md"))
    parts = {**PARTS, "Examples": examples}
    listed = [name for names in parts.values() for name in names]
    if missing := {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")} - {*listed}:
        raise ValueError(f"no part of docs/build.py has {', '.join(sorted(missing))}")
    for name in listed:
        text = _with_links((ROOT / name).read_text(), (ROOT / name).parent, target)
        _write(target / name, text)
    commands, modules = {}, {}
    for row in SUBCOMMANDS:
        for name, function in functions(row).items():
            commands[f"commands/{name.replace(' ', '-')}.md"] = _command_page(name, function)
    for folder in sorted(p for p in (ROOT / "dlmctl").iterdir() if (p / "__init__.py").exists()):
        modules[f"modules/{folder.name}.md"] = _modules_page(folder)
    for name, text in {**commands, **modules}.items():
        _write(target / name, text)
    lists = {**parts, "Commands": list(commands), "Python": list(modules)}
    _write(target / "index.md", "\n".join(_index(lists)))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _index(parts: dict[str, list[str]]) -> Iterator[str]:
    yield "# dlmctl\n\nPost-training of diffusion language models as Unix pipes:"
    yield "[the first steps](README.md).\n"
    for caption, names in parts.items():
        yield f":::{{toctree}}\n:caption: {caption}\n:maxdepth: 1\n"
        yield from (name.removesuffix(".md") for name in names)
        yield ":::\n"


def _with_links(text: str, folder: Path, target: Path) -> str:
    """The page; what it links to and is no page of its own goes along, as a file to download."""

    def followed(match: re.Match[str]) -> str:
        label, name = match[1], match[2]
        if re.match(r"[a-z]+:|#", name):
            return match[0]
        place, mark, anchor = name.partition("#")
        path = (folder / place).resolve()
        if path.is_dir():
            if not (path / "README.md").exists():
                return label[1:-1]
            return f"{label}({place.rstrip('/')}/README.md{mark}{anchor})"
        if path.suffix != ".md" and path.exists():
            copy = target / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        return match[0]

    return LINK.sub(followed, text)


def _escaped(text: str) -> str:
    """Markdown that shows a help text as it stands, with its `code`."""
    pieces = text.split("`")
    return "`".join(x if n % 2 else MARKS.sub(r"\\\1", x) for n, x in enumerate(pieces))


def _command_page(name: str, function: object) -> str:
    manual = _manual()
    summary, paragraphs, examples = manual.divided(inspect.getdoc(function) or "")
    lines = [f"# dlmctl {name}", _escaped(summary)]
    lines += [_escaped(" ".join(block.split())) for block in paragraphs]
    if examples:
        lines.append("## Examples")
        lines += [_literal(manual.as_typed(block)) for block in examples]
    lines.append("## Arguments and options")
    for parameter in manual.parameters(function):
        lines += [f"`{manual.flags(parameter)}`\n: {_escaped(manual.description(parameter))}"]
    return "\n\n".join(lines) + "\n"


def _manual() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "man" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _literal(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.split("\n"))


def _modules_page(folder: Path) -> str:
    lines = [f"# dlmctl.{folder.name}"]
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text())
        if not (text := ast.get_docstring(tree)):
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        lines += [f"## {_escaped(name)}", _literal(text)]
        for node in tree.body:
            lines += _member(node, "")
    return "\n\n".join(lines) + "\n"


def _member(node: ast.stmt, prefix: str) -> list[str]:
    """A public function or class that has a docstring, and the public methods of a class."""
    if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
        return []
    text = ast.get_docstring(node)
    if not text:
        return []
    name = f"{prefix}{node.name}"
    if isinstance(node, ast.ClassDef):
        methods = [line for inner in node.body for line in _member(inner, f"{name}.")]
        return [f"**class {_escaped(name)}**", _literal(text), *methods]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return [f"`{name}({ast.unparse(node.args)}){returns}`", _literal(text)]


def main(arguments: list[str]) -> int:
    try:
        from sphinx.cmd.build import main as sphinx
    except ImportError:
        print("the site needs: pip install -e '.[docs]'", file=sys.stderr)
        return 69
    out = arguments[0] if arguments else str(ROOT / "build" / "site")
    with tempfile.TemporaryDirectory() as directory:
        write_sources(Path(directory))
        code = sphinx(["-W", "--keep-going", "-n", "-q", "-c", str(ROOT / "docs"), directory, out])
    if not code:
        print(f"{out}/index.html")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
