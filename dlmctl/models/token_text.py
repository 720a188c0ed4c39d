"""Tokens one by one as text, so that they read as a text again when they are put in a row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from dlmctl.models.policy import Policy

PART = "\ufffd"
"""What a decoder writes for part of a character."""


class TokenTexts:
    """The text of each token of a policy's vocabulary.

    A token is decoded behind another, which keeps the space before a word where the tokenizer has
    it in the token (SentencePiece) or between tokens (WordPiece).
    """

    def __init__(self, policy: Policy) -> None:
        self._tokenizer = policy.tokenizer
        self._known: dict[int, str] = {}
        plain = (i for i in range(policy.vocab_size) if self._alone(i).strip().isalnum())
        self._anchor = next(plain, None)

    def __call__(self, token: int) -> str:
        """Its text; `#ID` where it has none."""
        if token not in self._known:
            self._known[token] = self._text(token) or f"#{token}"
        return self._known[token]

    def row(self, tokens: Sequence[int]) -> list[str]:
        """The text of each of neighbouring tokens, which together are the text that they spell.

        Where a character is divided among tokens, the last of them has it, and the others nothing.
        """
        texts = [self(token) for token in tokens]
        for broken, run in groupby(range(len(tokens)), lambda i: PART in texts[i]):
            places = list(run)
            given = 0
            for place in places if broken else []:
                spelt = str(self._tokenizer.decode(list(tokens[places[0] : place + 1])))
                whole = spelt if place == places[-1] else spelt.rstrip(PART)
                texts[place] = whole[given:]
                given = max(given, len(whole))
        return texts

    def _text(self, token: int) -> str:
        if self._anchor is not None:
            before = self._alone(self._anchor)
            both = str(self._tokenizer.decode([self._anchor, token]))
            if both.startswith(before):
                return both[len(before) :]
        return self._alone(token)

    def _alone(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))
