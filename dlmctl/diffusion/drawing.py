"""An answer on a terminal, drawn while it is sampled.

Each token appears when it is decided, in the colour of its step, in the place of a mask. Lines in
which everything up to their end is decided leave the part that is redrawn, so that an answer may be
longer than the screen.
"""

from __future__ import annotations

import contextlib
import re
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, takewhile
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from torch import Tensor

from dlmctl.diffusion.callback import SamplerCallback
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.policy import Policy
from dlmctl.models.token_text import PART, TokenTexts
from dlmctl.records.jsonl import Record
from dlmctl.report.page import visible

MASK = "░"
JOINERS = "\u200c\u200d"
"""Format characters that change no line: between letters of Persian, within emoji."""
COLOURS = ("#5f87ff", "#875fff", "#af5fd7", "#d75faf", "#d75f5f", "#d75f00", "#d78700")
"""From the first step to the last. As in `view` blue is low and orange high; from the 256 colours
that most terminals have, to be read on black and on white."""
FRAME_S = 0.04
"""Seconds between two drawings at least, lest the terminal be what takes time."""
WIDE = "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uff60"
"""Characters between which a line may break without a space."""
WORD = re.compile(rf"[{WIDE}{MASK}]\s*|[^\s{WIDE}{MASK}]+\s*|\s+")


class VisibleCursor(Console):
    """A console that leaves the cursor visible: a killed process could not show it again."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class Part(NamedTuple):
    """A token of an answer that is under way."""

    text: str
    step: int | None
    """When it was decided; None while it is masked."""


class Spelling:
    """The texts of the tokens of answers."""

    def __init__(self, policy: Policy) -> None:
        self._texts, self._ends = TokenTexts(policy.tokenizer), policy.ends
        added = policy.tokenizer.added_tokens_decoder
        self._hidden = {number for number, token in added.items() if token.special}

    def parts(
        self, tokens: Sequence[int], order: Sequence[int | None], fixed: int, final: bool = False
    ) -> tuple[list[Part], int]:
        """Parts up to the first decided end of sequence, and how many of the first will not change.

        Special tokens are left out. A character of which some tokens are masked, or may follow, is
        masked, too.

        Args:
            order: steps of the tokens; None: masked.
            fixed: number of the first tokens that stay if they are decided.
            final: no token follows.
        """
        pairs = list(zip(tokens, order, range(len(tokens)), strict=True))
        inside = list(takewhile(lambda pair: pair[1] is None or pair[0] not in self._ends, pairs))
        final = final or len(inside) < len(pairs)
        pairs = [pair for pair in inside if pair[1] is None or pair[0] not in self._hidden]
        parts: list[Part] = []
        still = 0
        for masked, run in groupby(pairs, key=lambda pair: pair[1] is None):
            ids, steps, places = zip(*run, strict=True)
            texts = [MASK] * len(ids) if masked else self._texts.row(ids)
            whole = len(ids)
            if not masked and parts:
                texts = _begun_before(texts)
            if not masked and (len(parts) + len(ids) < len(pairs) or not final):
                whole, texts = _continued(texts)
            if not masked and not parts:
                still = min(whole, sum(place < fixed for place in places))
            parts += map(Part, texts, steps)
        return parts, still


def _begun_before(texts: list[str]) -> list[str]:
    """Texts of tokens behind a masked one, in which a character may begin."""
    first = next((n for n, text in enumerate(texts) if text), 0)
    clear = texts[first].lstrip(PART)
    return texts if clear == texts[first] else [*texts[:first], MASK + clear, *texts[first + 1 :]]


def _continued(texts: list[str]) -> tuple[int, list[str]]:
    """How many of these texts end in whole characters, and the texts with the others masked."""
    whole = len(texts)
    while whole and (not texts[whole - 1] or texts[whole - 1].endswith(PART)):
        whole -= 1
    return whole, [*texts[:whole], *(text.rstrip(PART) + MASK for text in texts[whole:])]


class Drawing(SamplerCallback):
    """An answer on a terminal, drawn while it is sampled."""

    def __init__(
        self,
        console: Console,
        spelling: Spelling,
        policy: Policy,
        config: SamplerConfig,
        least: float = 0.0,
    ) -> None:
        """Args:
        least: seconds that each step is shown at least.
        """
        self._console, self._spelling, self._least = console, spelling, least
        self._policy, self._config = policy, config
        self._width = console.width  # of the whole answer, or lines would break anew
        self._prefill = Text(for_terminal(policy.prompting.prefill))
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._tokens: list[int] = []
        self._printed, self._newest, self._drawn = 0, -1, float("-inf")
        self._began = time.monotonic()

    def show(self, ask: Callable[[SamplerCallback], Record]) -> None:
        """Draw the answer that `ask` samples with this callback."""
        with _without_echo(), self._live:
            try:
                record = ask(self)
            except KeyboardInterrupt:
                self._live.transient = False  # what was there stays
                raise
        tokens, about = record["tokens"]["completion"], record["rollout"]
        parts, _ = self._spelling.parts(tokens, about["order"], len(tokens), final=True)
        for line in self._lines(parts)[self._printed :]:
            self._console.print(line)
        took = time.monotonic() - self._began
        figures = f"{about['length']} tokens, {about['nfe']} passes, {took:.1f} s"
        self._console.print(Text(figures, style="dim"))

    def on_rows(self, requests: Sequence[int]) -> None:
        if not self._policy.diffusion:
            return
        canvas = self.canvas
        start, length = canvas.starts[0], self._config.gen_length
        inside = slice(start, start + length)
        masked, order = canvas.masked[0, inside].tolist(), canvas.order[0, :length].tolist()
        steps = [None if m else step for m, step in zip(masked, order, strict=True)]
        # Finished blocks are not edited.
        fixed = canvas.window(0)[0] - start if self._config.editing else length
        self._draw(canvas.tokens[0, inside].tolist(), steps, fixed)

    def on_tokens(self, tokens: Tensor) -> None:
        self._tokens += tokens.tolist()
        self._draw(self._tokens, list(range(len(self._tokens))), len(self._tokens))

    def _draw(self, tokens: Sequence[int], order: Sequence[int | None], fixed: int) -> None:
        now = time.monotonic()
        if self._least:
            time.sleep(max(0.0, self._drawn + self._least - now))
        elif now < self._drawn + FRAME_S:
            return
        parts, still = self._spelling.parts(tokens, order, fixed)
        # 1. All lines but the last of what is fixed are as they will be.
        done = self._lines(parts[:still])[:-1]
        for line in done[self._printed :]:
            self._console.print(line)
        self._printed = max(self._printed, len(done))
        # 2. The others, as many as the screen has room for.
        lines = self._lines(parts, self._newest)[self._printed :]
        room = max(1, self._console.height - 4)
        if len(lines) > room:
            lines = [*lines[:room], Text(f"… {len(lines) - room} more lines", style="dim")]
        decided = [step for step in order if step is not None]
        status = f"{len(decided)} of {self._config.gen_length} tokens"
        self._live.update(Group(*lines, Text(status, style="dim")), refresh=True)
        self._newest, self._drawn = max(decided, default=-1), time.monotonic()

    def _lines(self, parts: Sequence[Part], newest: int | None = None) -> list[Text]:
        """Lines of these parts; those that were decided after the step `newest` are bold."""
        text = self._prefill.copy()
        for part in parts:
            text.append(for_terminal(part.text), self._style(part.step, newest))
        return wrapped(text, self._width)

    def _style(self, step: int | None, newest: int | None) -> str:
        if step is None:
            return "dim"
        steps = self._config.gen_length
        if self._policy.diffusion:
            steps = self.canvas.steps_per_block * self._config.blocks
        colour = COLOURS[min(step * len(COLOURS) // steps, len(COLOURS) - 1)]
        return f"bold {colour}" if newest is not None and step > newest else colour


def for_terminal(text: str) -> str:
    """A text in which nothing is left that a terminal would obey."""
    return visible(text.replace("\t", "    "), kept="\n" + JOINERS)


def wrapped(text: Text, width: int) -> list[Text]:
    """Lines of at most `width` cells, broken between words, wide characters and masks.

    If the text grows at its end, all lines but the last stay as they are.
    """
    lines: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        for row in line.divide(_breaks(line.plain, width)):
            row.rstrip()
            lines.append(row)
    return lines


def _breaks(line: str, width: int) -> list[int]:
    """Where a line is broken; a word that is wider than the line is cut."""
    places, used = [], 0
    for word in WORD.finditer(line):
        needed = cell_len(word[0].rstrip())
        if used and used + needed > width:
            places.append(word.start())
            used = 0
        if needed <= width:
            used += cell_len(word[0])
            continue
        for place, char in enumerate(word[0], word.start()):
            if not char.isspace() and used and used + cell_len(char) > width:
                places.append(place)
                used = 0
            used += cell_len(char)
    return places


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
    """Within the block the terminal does not show what is typed, which is read after it."""
    try:
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (OSError, ValueError, termios.error):  # it is none
        yield
        return
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
