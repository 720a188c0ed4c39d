"""`dlmctl init`: options and wiring."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from dlmctl.commands.options import Seed
from dlmctl.records.errors import UsageError
from dlmctl.records.files import check_free
from dlmctl.records.jsonl import read_records


def command(
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="Where the model is written.")
    ],
    family: Annotated[
        Literal["llada", "dream", "a2d", "mlm", "ar", "qwen2.5-vl", "qwen3-vl", "llava"],
        typer.Option(
            help="llada: bidirectional Llama; dream: bidirectional Qwen2, logits shifted; a2d: "
            "bidirectional Qwen3; mlm: BERT; ar: Llama, left to right; qwen2.5-vl, qwen3-vl, "
            "llava: vision-language models, left to right, both halves of the given sizes."
        ),
    ] = "llada",
    tokenizer: Annotated[
        Literal["char", "byte", "word"],
        typer.Option(
            help="A token for each character of --alphabet, for each byte, or for each word and "
            "punctuation mark of --vocabulary."
        ),
    ] = "char",
    alphabet: Annotated[
        str,
        typer.Option(help="Characters of the char tokenizer; the default is what puzzles need."),
    ] = "0123456789+-*/(),:=",
    vocabulary: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default="none",
            help="For the word tokenizer: JSONL whose `prompt`, `completion`, `text` and "
            "`messages` hold every word that the model is to know; - is standard input.",
        ),
    ] = None,
    hidden_size: Annotated[int, typer.Option(min=2, help="Width of the model.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Number of layers.")] = 2,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 4,
    intermediate_size: Annotated[
        int | None,
        typer.Option(min=1, show_default="8/3 of --hidden-size", help="Width of the MLPs."),
    ] = None,
    gen_length: Annotated[
        int | None,
        typer.Option(
            min=1, show_default="none", help="The model's own default for rollout --gen-length."
        ),
    ] = None,
    block_length: Annotated[
        int | None,
        typer.Option(min=1, show_default="none", help="The same for --block-length."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, show_default="none", help="The same for --steps.")
    ] = None,
    original_naming: Annotated[
        bool,
        typer.Option(
            "--original-naming/--stock-naming",
            help="Write weights and config.json as the authors of LLaDA and Dream name them.",
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
    from dlmctl.models.small import make_policy, save_new

    check_free(directory)
    made = _tokenizer(tokenizer, alphabet, vocabulary)
    given = {"gen_length": gen_length, "block_length": block_length, "steps": steps}
    sampling = {name: value for name, value in given.items() if value is not None}
    sizes = (hidden_size, layers, heads, intermediate_size, sampling, seed)
    if family in ("qwen2.5-vl", "qwen3-vl", "llava"):
        from dlmctl.models.small_vision import make_vision_policy

        policy = make_vision_policy(family, made, *sizes)
    else:
        policy = make_policy(cast(Any, family), made, *sizes)
    save_new(policy, directory, original_naming)
    count = sum(p.numel() for p in policy.model.parameters())
    print(f"dlmctl: {directory}: {family}, {count:,} parameters", file=sys.stderr)


def _tokenizer(kind: str, alphabet: str, vocabulary: str | None) -> Any:
    from dlmctl.models.tokenizers import byte_tokenizer, character_tokenizer, word_tokenizer

    if (vocabulary is not None) != (kind == "word"):
        raise UsageError("--tokenizer word and --vocabulary FILE go together")
    if vocabulary is None:
        return byte_tokenizer() if kind == "byte" else character_tokenizer(alphabet)
    made = word_tokenizer(_texts(vocabulary))
    if len(made) <= len(made.all_special_ids):
        raise UsageError(
            f"--vocabulary {vocabulary} has no words: no 'prompt', 'completion', 'text' or "
            "'messages' in its records"
        )
    return made


def _texts(file: str) -> Iterator[str]:
    for record in read_records([file]):
        messages = record.get("messages")
        contents = [m.get("content") for m in messages or [] if isinstance(m, dict)]
        for text in (*(record.get(n) for n in ("prompt", "completion", "text")), *contents):
            if isinstance(text, str):
                yield text
