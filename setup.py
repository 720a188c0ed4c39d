"""The readme that an index shows; everything else is declared in pyproject.toml.

An index cannot follow links into the source tree. Of `[text](docs/page.md)` only the text is kept,
and pictures of the tree are left out.
"""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent / "README.md"
RELATIVE = r"\((?![a-z]+:)[^()\s]+\)"
PICTURE = re.compile(rf"^!\[[^\]]*\]{RELATIVE}\n\n", re.MULTILINE)
LINK = re.compile(rf"\[([^\]]*)\]{RELATIVE}")


def without_relative_links(text: str) -> str:
    """Markdown in which only links that have an address are links."""
    return LINK.sub(r"\1", PICTURE.sub("", text))


if __name__ == "__main__":
    from setuptools import setup

    setup(
        long_description=without_relative_links(README.read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
    )
