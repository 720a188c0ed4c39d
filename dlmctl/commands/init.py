"""`dlmctl init`: options and wiring."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from dlmctl.commands.options import Seed
from dlmctl.records.files import check_free


def command(
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="Where the model is written.")
    ],
    family: Annotated[
        Literal["llada", "dream", "a2d", "mlm", "ar"],
        typer.Option(
            help="llada: bidirectional Llama; dream: bidirectional Qwen2, logits shifted; a2d: "
            "bidirectional Qwen3; mlm: BERT; ar: Llama, left to right."
        ),
    ] = "llada",
    tokenizer: Annotated[
        Literal["char", "byte"],
        typer.Option(help="A token for each character of --alphabet, or for each byte."),
    ] = "char",
    alphabet: Annotated[
        str,
        typer.Option(help="Characters of the char tokenizer; the default is what puzzles need."),
    ] = "0123456789+-*/(),:=",
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

    Example:

    dlmctl init runs/new --family llada --hidden-size 64 --layers 4 --gen-length 16
    """
    from dlmctl.models.small import make_policy, save_new
    from dlmctl.models.tokenizers import byte_tokenizer, character_tokenizer

    made = byte_tokenizer() if tokenizer == "byte" else character_tokenizer(alphabet)
    given = {"gen_length": gen_length, "block_length": block_length, "steps": steps}
    sampling = {name: value for name, value in given.items() if value is not None}
    policy = make_policy(
        family, made, hidden_size, layers, heads, intermediate_size, sampling, seed
    )
    check_free(directory)
    save_new(policy, directory, original_naming)
    count = sum(p.numel() for p in policy.model.parameters())
    print(f"dlmctl: {directory}: {family}, {count:,} parameters", file=sys.stderr)
