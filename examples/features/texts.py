"""Plain text on standard input as records on standard output, each of some whole paragraphs:

    python3 texts.py NAME CHARACTERS < TEXT

Paragraphs are separated by empty lines. Those that together have at most CHARACTERS stand in one
record; a longer one is cut between words. Records begin with the prompt `text:`.
"""

import json
import sys
import textwrap
from collections.abc import Iterable, Iterator

LEAST = 40
"""Characters below which a paragraph is a heading or a rest."""


def paragraphs(lines: Iterable[str], most: int) -> Iterator[str]:
    """Paragraphs of at least LEAST and at most `most` characters, in single-spaced words."""
    waiting: list[str] = []
    for line in [*lines, "\n"]:
        if line.strip():
            waiting.append(line)
            continue
        text = " ".join(" ".join(waiting).split())
        waiting = []
        yield from (part for part in textwrap.wrap(text, most) if len(part) >= LEAST)


def together(parts: Iterable[str], most: int) -> Iterator[str]:
    """Neighbouring paragraphs, joined as long as they fit."""
    text = ""
    for part in parts:
        if text and len(text) + 1 + len(part) > most:
            yield text
            text = ""
        text += " " * bool(text) + part
    if text:
        yield text


name, most = sys.argv[1], int(sys.argv[2])
lines = (line.decode("utf-8", "replace") for line in sys.stdin.buffer)
for number, text in enumerate(together(paragraphs(lines, most), most)):
    row = {"id": f"{name}/{number}", "source": name, "prompt": "text:", "completion": text}
    print(json.dumps(row, ensure_ascii=False))
