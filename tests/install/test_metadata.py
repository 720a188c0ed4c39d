"""What the installed package says of itself, and the readme that an index shows."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from dlmctl import __version__

ROOT = Path(__file__).parents[2]


def test_the_citation_has_the_version_of_the_package() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.+)$", text, re.MULTILINE) == [__version__]


def test_the_readme_of_the_index_keeps_only_links_with_an_address() -> None:
    without_relative_links = runpy.run_path(str(ROOT / "setup.py"))["without_relative_links"]
    before = "a [page](docs/a.md#b), [top](#top), [paper](https://example.org/x)\n\n"
    picture = "![curves](examples/a.svg)\n\n"
    after = "a page, top, [paper](https://example.org/x)\n\n"
    assert without_relative_links(before + picture + "    ls [a](b)\n") == after + "    ls a\n"
    readme = without_relative_links((ROOT / "README.md").read_text())
    assert re.findall(r"\]\((?!https://)", readme) == []
    assert "https://arxiv.org/abs/2605.10218" in readme
