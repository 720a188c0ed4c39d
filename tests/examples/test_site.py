"""The documentation site: its pages, its links, and that Sphinx builds it without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import known_options
from pages import ROOT, help_texts, module_at, readmes

TOP = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")


def _slug(heading: str) -> str:
    """The anchor that GitHub and MyST give a heading."""
    text = LINK.sub("", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def _anchors(path: Path) -> set[str]:
    lines = [x for x in path.read_text().split("\n") if re.match(r"#{1,4} ", x)]
    return {_slug(line.lstrip("#")) for line in lines}


@pytest.mark.parametrize(
    "path", [*readmes(), *TOP], ids=lambda path: str(path.relative_to(ROOT)).replace("/", ".")
)
def test_the_links_of_the_page_lead_somewhere(path: Path) -> None:
    prose = "\n".join(x for x in path.read_text().split("\n") if not x.startswith("    "))
    for link in LINK.findall(re.sub(r"`[^`]*`", "", prose)):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.exists(), f"{path.name}: {link}"
        if anchor:
            assert anchor in _anchors(target), f"{path.name}: {link}"


def test_every_page_and_every_subcommand_is_in_the_side_bar(tmp_path: Path) -> None:
    module_at(ROOT / "docs" / "build.py").write_sources(tmp_path)
    index = (tmp_path / "index.md").read_text().split("\n")
    for path in [*readmes(), *TOP]:
        assert str(path.relative_to(ROOT).with_suffix("")) in index
    for page, _ in help_texts():
        if " " in page:
            assert f"commands/{page.split(' ', 1)[1].replace(' ', '-')}" in index


def test_the_options_in_the_tables_of_the_page_for_migrants_are_ours() -> None:
    known = {x for page, _ in help_texts() for x in known_options(page.split()[1:] or ["stats"])}
    rows = re.findall(r"^\|.*\| (.*) \|$", (ROOT / "docs/migrate.md").read_text(), re.MULTILINE)
    used = {x for row in rows for x in re.findall(r"(?<=[` ])--?[a-z][\w-]*", row)}
    assert len(used) > 40
    assert used <= known


def test_a_page_that_the_side_bar_lacks_is_named(tmp_path: Path) -> None:
    builder = module_at(ROOT / "docs" / "build.py")
    builder.PARTS["Papers"].remove("docs/paper-rspo.md")
    with pytest.raises(ValueError, match=r"docs/paper-rspo\.md"):
        builder.write_sources(tmp_path)


def test_sphinx_builds_the_site_without_a_warning(tmp_path: Path) -> None:
    for name in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(name)
    line = [sys.executable, str(ROOT / "docs" / "build.py"), str(tmp_path / "site")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "commands" / "update.html").read_text()
    assert "--prompts-per-step" in page
    for html in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link)[^>]*(?:src|href)=.(https?://[^ >]*)", html.read_text()
        )
        assert not loaded, f"{html.name} loads {loaded}"
