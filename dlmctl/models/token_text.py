"""The text of single tokens, such that tokens in a row spell the text that they encode."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from dlmctl.models.architecture import architecture
from dlmctl.models.loading import TOKENIZER_FILES, config_file
from dlmctl.models.special_tokens import load_tokenizer
from dlmctl.records.files import read_json

PART = "\ufffd"
"""What a decoder writes for an incomplete character."""


def tokenizer_of_model(name: str) -> Any:
    """The tokenizer of a model, by its name; its weights are neither read nor downloaded.

    Raises:
        MissingInputError: there is no such model.
        DataError: it has no usable tokenizer.
        TryAgainError: the hub does not answer.
    """
    config, reading = config_file(name, TOKENIZER_FILES)  # an adapter has its base's tokenizer
    return load_tokenizer(config.parent, architecture(read_json(config), str(config), reading))


def texts_of_model(name: str) -> TokenTexts:
    """The texts of the tokens of a model, by its name; raises what `tokenizer_of_model` does."""
    return TokenTexts(tokenizer_of_model(name))


class TokenTexts:
    """The text of each token of a tokenizer's vocabulary.

    A token is decoded after another one, which keeps the space before a word, whether it belongs to
    the token (SentencePiece) or goes between tokens (WordPiece).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._size = 1 + max(tokenizer.get_vocab().values())
        self._known: dict[int, str] = {}
        plain = (i for i in range(self._size) if self._alone(i).strip().isalnum())
        self._anchor = next(plain, None)

    def __call__(self, token: int) -> str:
        """Its text; `#ID` if it has none."""
        if token not in self._known:
            self._known[token] = self._text(token) or f"#{token}"
        return self._known[token]

    def row(self, tokens: Sequence[int]) -> list[str]:
        """The texts of neighbouring tokens, which joined are the text that the tokens encode.

        A character that is split among tokens belongs to the last of them; the others are empty.
        """
        texts = [self(token) for token in tokens]
        for broken, run in groupby(range(len(tokens)), lambda i: PART in texts[i]):
            positions = list(run)
            assigned = 0  # characters of the run that already belong to a token
            for position in positions if broken else []:
                spelt = str(self._tokenizer.decode(list(tokens[positions[0] : position + 1])))
                complete = spelt if position == positions[-1] else spelt.rstrip(PART)
                texts[position] = complete[assigned:]
                assigned = max(assigned, len(complete))
        return texts

    def _text(self, token: int) -> str:
        if token >= self._size:
            return ""
        if self._anchor is not None:
            before = self._alone(self._anchor)
            both = str(self._tokenizer.decode([self._anchor, token]))
            if both.startswith(before):
                return both[len(before) :]
        return self._alone(token)

    def _alone(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))
