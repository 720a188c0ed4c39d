"""Tokens one by one as text, with tokenizers of four kinds."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlmctl.models.token_text import TokenTexts
from dlmctl.models.tokenizers import byte_tokenizer, character_tokenizer


def made(model: Any, pre_tokenizer: Any, decoder: Any) -> PreTrainedTokenizerFast:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    names = {"pad_token": "[P]", "eos_token": "[E]", "mask_token": "[M]", "unk_token": "[U]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names
    )


def word_pieces() -> PreTrainedTokenizerFast:
    words = ["[P]", "[E]", "[M]", "[U]", "the", "cat", "s", "##s", "##at"]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = models.WordPiece(vocabulary, unk_token="[U]")
    return made(model, pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False))


def sentence_pieces() -> PreTrainedTokenizerFast:
    words = ["[P]", "[E]", "[M]", "[U]", "▁the", "▁cat", "▁s", "s", "at"]
    model = models.Unigram([(word, -float(len(words) - i)) for i, word in enumerate(words)], 3)
    return made(model, pre_tokenizers.Metaspace(), decoders.Metaspace())


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (word_pieces(), " the cats sat"),
        (sentence_pieces(), " the cats sat"),
        (character_tokenizer(), "12+3=15"),
        (byte_tokenizer(), " In <b> one\n row."),
    ],
)
def test_tokens_put_in_a_row_read_as_the_text(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(map(texts, ids)) == text
    assert texts.row(ids) == [texts(i) for i in ids]


def test_a_character_of_several_tokens_is_the_last_ones() -> None:
    tokenizer = byte_tokenizer()
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode("aé漢😀b", add_special_tokens=False)
    assert texts.row(ids) == ["a", "", "é", "", "", "漢", "", "", "", "😀", "b"]
    assert set("".join(texts.row(ids[2:5]))) == {"\ufffd"}  # no whole one among them
    assert "".join(texts.row(ids[1:])) == "é漢😀b"
