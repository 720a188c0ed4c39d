"""`dlmctl init`: options and wiring."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from dlmctl.records.errors import UsageError
from dlmctl.records.files import check_free
from dlmctl.records.jsonl import read_records
from dlmctl.settings import Knob
from dlmctl.settings.compute import Seed
from dlmctl.settings.small import SmallModel, SmallTokenizer


def command(
    directory: Annotated[
        Path, Knob("Where the model is written.", metavar="DIRECTORY", argument=True)
    ],
    model: SmallModel = SmallModel(),
    tokenizer: SmallTokenizer = SmallTokenizer(),
    original_naming: Annotated[
        bool,
        Knob(
            "Write weights and config.json as the authors of LLaDA and Dream name them.",
            "--original-naming/--stock-naming",
        ),
    ] = False,
    seed: Seed = 0,
) -> None:
    """Make a small new model of any family.

    Writes a Hugging Face directory with random weights, to be trained with 'dlmctl update --algo
    sft' or used in tests.

    Examples:

    dlmctl init runs/new --family llada --hidden-size 64 --layers 4 --gen-length 16

    dlmctl prompts concepts -n 20000 | dlmctl init runs/new --tokenizer word --vocabulary -
    """
    from dlmctl.models.saving import save_new
    from dlmctl.models.small import make_policy

    check_free(directory)
    policy = make_policy(model, _tokenizer(tokenizer), seed)
    save_new(policy, directory, original_naming)
    count = sum(p.numel() for p in policy.model.parameters())
    print(f"dlmctl: {directory}: {model.family}, {count:,} parameters", file=sys.stderr)


def _tokenizer(settings: SmallTokenizer) -> Any:
    from dlmctl.models.tokenizers import byte_tokenizer, character_tokenizer, word_tokenizer

    if settings.vocabulary is None:
        is_byte = settings.tokenizer == "byte"
        return byte_tokenizer() if is_byte else character_tokenizer(settings.alphabet)
    tokenizer = word_tokenizer(_texts(settings.vocabulary))
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UsageError(
            f"--vocabulary {settings.vocabulary} has no words: no 'prompt', 'completion', 'text' "
            "or 'messages' in its records"
        )
    return tokenizer


def _texts(file: str) -> Iterator[str]:
    for record in read_records([file]):
        messages = record.get("messages")
        contents = [m.get("content") for m in messages or [] if isinstance(m, dict)]
        for text in (*(record.get(n) for n in ("prompt", "completion", "text")), *contents):
            if isinstance(text, str):
                yield text
