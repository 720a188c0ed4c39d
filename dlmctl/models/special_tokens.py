"""The tokenizer of a checkpoint, and which of its tokens mask, end a text or fill it up."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dlmctl.models.architecture import Architecture
from dlmctl.models.families import HOW_TO_READ
from dlmctl.records.errors import DataError, reason_of
from dlmctl.records.files import read_json


def load_tokenizer(directory: Path, arch: Architecture) -> Any:
    """The tokenizer of a checkpoint; raises DataError if it cannot be loaded."""
    try:
        if (directory / "tokenizer.json").exists():
            return PreTrainedTokenizerFast.from_pretrained(directory)
        if arch.family.tokenizer_class is not None:
            return getattr(transformers, arch.family.tokenizer_class).from_pretrained(directory)
        # With trust_remote_code=None it asks on the terminal whether to run the checkpoint's code.
        return AutoTokenizer.from_pretrained(directory, config=arch.config, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = reason_of(error)
        raise DataError(f"{directory}: its tokenizer cannot be loaded ({reason})") from None


class SpecialTokens(NamedTuple):
    """Fields of `Policy` with the same names."""

    mask_id: int | None
    eos_id: int | None
    pad_id: int
    other_ends: frozenset[int]
    turn_ends: frozenset[int]


def special_tokens(name: str, arch: Architecture, tokenizer: Any, directory: Path) -> SpecialTokens:
    """What config.json, generation_config.json and the tokenizer say; no weights are needed.

    Raises:
        DataError: there is no mask token, it is beyond the vocabulary, or the model may be a
            diffusion model that is read from left to right.
    """
    family, vocab_size = arch.family, arch.config.get_text_config().vocab_size
    # 1. The mask token.
    mask_id = arch.mask_id if arch.mask_id is not None else tokenizer.mask_token_id
    if not family.diffusion:
        if arch.doubtful and mask_id is not None:
            raise DataError(
                f"{name} brings its own code and its tokenizer has a mask token: if it is a "
                f"diffusion model, {HOW_TO_READ}; if not, write family=ar"
            )
        mask_id = None
    elif mask_id is None:
        raise DataError(
            f"{name} has no mask token: neither config.json (mask_token_id) nor its tokenizer; "
            "say which one it is with --mask-id"
        )
    elif mask_id >= vocab_size:
        raise DataError(f"the mask token {mask_id} of {name} is beyond its {vocab_size} tokens")
    # 2. The tokens that end a completion or a turn.
    ends = _end_ids(directory, arch)
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        eos_id = ends[0] if ends else None
    if eos_id is None and family.fallback_end is not None:
        eos_id = getattr(tokenizer, f"{family.fallback_end}_id")
    pad_id = tokenizer.pad_token_id
    turn_ends = {tokenizer.get_vocab().get(token) for token in family.turn_ends}
    return SpecialTokens(
        mask_id,
        eos_id,
        pad_id=pad_id if pad_id is not None else (eos_id or 0),
        other_ends=frozenset(ends) - {eos_id},
        turn_ends=frozenset(turn_ends - {None}),
    )


def _end_ids(directory: Path, arch: Architecture) -> list[int]:
    """Tokens that end a completion, from generation_config.json, else from config.json.

    Raises:
        DataError: they are not token ids.
    """
    where = directory / "generation_config.json"
    stated = read_json(where).get("eos_token_id") if where.exists() else None
    if stated is None:
        where = directory / "config.json"
        stated = getattr(arch.config.get_text_config(), "eos_token_id", None)
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise DataError("eos_token_id is neither a token id nor a list of token ids", str(where))
    return ids
