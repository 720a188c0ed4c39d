"""`dlmctl init`: options and wiring."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

from dlmctl.records.errors import UsageError
from dlmctl.records.files import check_free
from dlmctl.records.jsonl import read_records
from dlmctl.settings import Knob, knob_of
from dlmctl.settings.adapted import Adapted
from dlmctl.settings.compute import Seed
from dlmctl.settings.small import SAMPLING, SmallModel, SmallTokenizer


def command(
    directory: Annotated[
        Path, Knob("Where the model is written.", metavar="DIRECTORY", argument=True)
    ],
    model: SmallModel = SmallModel(),
    tokenizer: SmallTokenizer = SmallTokenizer(),
    adapted: Adapted = Adapted(),
    original_naming: Annotated[
        bool,
        Knob(
            "Write weights and config.json as the authors of LLaDA and Dream name them.",
            "--original-naming/--stock-naming",
        ),
    ] = False,
    seed: Seed = 0,
) -> None:
    """Make a small new model of any family, or one from another model.

    Writes a Hugging Face directory with random weights, to be trained with 'dlmctl update --algo
    sft' or used in tests.

    With --from it has the weights, tokenizer and chat template of MODEL, a mask token, and
    attention in both directions; layers with a sliding window keep it, to both sides. It writes
    nonsense until 'dlmctl update --algo sft' has taught it to denoise. The weights are those of
    MODEL bit for bit; only a mask token that MODEL was not trained with has an embedding of its
    own, the mean of the others. MODEL is refused if it denoises already, or if some of its layers
    read from left to right only, as recurrent ones do.

    With --from and --latents it is the masked diffusion model MODEL with further mask tokens, in
    float32, for 'dlmctl distill masked'.

    Examples:

    dlmctl init runs/new --family llada --hidden-size 64 --layers 4 --gen-length 16

    dlmctl prompts concepts -n 20000 | dlmctl init runs/new --tokenizer word --vocabulary -

    dlmctl init models/a2d --from Qwen/Qwen3-0.6B && dlmctl update --algo sft -m models/a2d
    --lr 1e-4 --anneal-attention 100 -o runs/base corpus.jsonl

    dlmctl init runs/mixture --from runs/base --latents 16
    """
    check_free(directory)
    if adapted.source is not None:
        _check_unused(model, tokenizer, original_naming)
        if adapted.latents > 1:
            _add_latents(adapted, model.sampling, seed, directory)
        else:
            _adapt(adapted, model.sampling, directory)
        return
    from dlmctl.models.saving import save_new
    from dlmctl.models.small import make_policy

    policy = make_policy(model, _tokenizer(tokenizer), seed)
    save_new(policy, directory, original_naming)
    count = sum(p.numel() for p in policy.model.parameters())
    print(f"dlmctl: {directory}: {model.family}, {count:,} parameters", file=sys.stderr)


def _check_unused(model: SmallModel, tokenizer: SmallTokenizer, original_naming: bool) -> None:
    """Raise UsageError for options of a new model, which --from leaves without a meaning."""
    chosen = [
        knob_of(field, type(settings)).flag(field.name)
        for settings in (model, tokenizer)
        for field in fields(settings)
        if field.name not in SAMPLING and getattr(settings, field.name) != field.default
    ]
    if chosen or original_naming:
        option = (*chosen, "--original-naming")[0]
        raise UsageError(f"{option} is for a new model; with --from the model is as MODEL is")


def _adapt(settings: Adapted, sampling: dict[str, int], directory: Path) -> None:
    from dlmctl.models.adaptation import adapt

    made = adapt(settings, sampling, directory)
    token = f"{made.mask.text} (id {made.mask.number}, {'known' if made.mask.known else 'new'})"
    print(
        f"dlmctl: {directory}: {made.family} of {made.source_class}, {made.parameters:,} "
        f"parameters, mask token {token} with an embedding that is {made.row}, shift "
        f"{settings.shift}",
        file=sys.stderr,
    )


def _add_latents(settings: Adapted, sampling: dict[str, int], seed: int, directory: Path) -> None:
    from dlmctl.models.latent_masks import with_latent_masks
    from dlmctl.models.loading import load_policy
    from dlmctl.models.saving import save_new

    policy = load_policy(settings.source or "", "cpu", "float32")
    policy = with_latent_masks(policy, settings.latents, seed)
    policy = replace(policy, sampling={**policy.sampling, **sampling})
    save_new(policy, directory, original=False)
    print(
        f"dlmctl: {directory}: {settings.source} with {settings.latents} mask tokens",
        file=sys.stderr,
    )


def _tokenizer(settings: SmallTokenizer) -> Any:
    from dlmctl.models import tokenizers

    if settings.vocabulary is None:
        if settings.tokenizer == "byte":
            return tokenizers.byte_tokenizer()
        return tokenizers.character_tokenizer(settings.alphabet)
    texts = _texts(settings.vocabulary)
    if settings.tokenizer == "bpe":
        return tokenizers.bpe_tokenizer(texts, settings.vocabulary_size or 4096)
    tokenizer = tokenizers.word_tokenizer(texts)
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
