"""Tokenizers for small models.

One token per character of an alphabet, per byte, per word, or per frequent sequence of bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS, MASK = "<pad>", "<eos>", "<mask>"
SPECIAL = [PAD, EOS, MASK]
PUZZLE_ALPHABET = "0123456789+-*/(),:="
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""Stands for the space before a word, so that decoding restores the text exactly."""


def character_tokenizer(alphabet: str = PUZZLE_ALPHABET) -> PreTrainedTokenizerFast:
    """One token per character; ids 0, 1, 2 are padding, end-of-sequence and mask."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *dict.fromkeys(alphabet)])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrapped(tokenizer)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8; ids 0, 1, 2 are padding, end-of-sequence and mask."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer)


def bpe_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte pair encoding of the texts (Sennrich et al. 2016) with at most `size` tokens.

    Tokens are sequences of bytes that occur together within a word and the space before it, so that
    every text has ids. Ids 0, 1, 2 are padding, end-of-sequence and mask, the next 256 the bytes.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer)


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark of the texts; the most frequent have the lowest ids.

    The token of a word includes the space before it, even for the first word of a text. A
    punctuation mark has a token with the space and one without, since a text can begin with any.
    Ids 0, 1, 2 are padding, end-of-sequence and mask.
    """
    splitting = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(SPACE, "always", split=False),
            pre_tokenizers.Split(
                tokenizers.Regex(rf"{SPACE}?(\w+|[^\w{SPACE}])|{SPACE}"), "isolated"
            ),
        ]
    )
    counts = Counter(word for text in texts for word, _ in splitting.pre_tokenize_str(text))
    words = [word for word, _ in counts.most_common()]
    marks = dict.fromkeys(w[-1] for w in words if w != SPACE and not re.search(r"\w", w))
    both = [form for mark in marks for form in (mark, SPACE + mark)]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys([*SPECIAL, *words, *both]))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = splitting
    tokenizer.decoder = decoders.Metaspace(SPACE, "always")
    return _wrapped(tokenizer)


def _wrapped(tokenizer: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )
