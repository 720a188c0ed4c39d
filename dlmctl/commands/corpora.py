"""Options of the commands that run a model over a corpus under the forward masking process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import OnError
from dlmctl.settings.corpus import (
    AS_TRAINED,
)
from dlmctl.settings.corpus import (
    Corpus as CorpusSettings,
)
from dlmctl.settings.corpus import (
    layer_numbers as layer_numbers,
)
from dlmctl.settings.corpus import (
    level_range as level_range,
)
from dlmctl.settings.corpus import (
    position_kinds as position_kinds,
)

if TYPE_CHECKING:
    from dlmctl.models.policy import Policy
    from dlmctl.sae.corpus import CorpusPlan, MaskedBatch
    from dlmctl.sae.formats.folders import SavedSae

Corpus = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CORPUS",
        help="JSONL files of records with 'text', 'tokens', or 'prompt' and 'completion'; none, or "
        "-, is standard input.",
    ),
]
OwnModel = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        envvar="DLMCTL_MODEL",
        show_default="the autoencoder's own",
        help="Hub name, directory or checkpoint; builtin:puzzles is the model that comes along.",
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        metavar="L,…",
        show_default="0, or all that are stored",
        help="Blocks whose output is taken (the residual stream), counted from 0.",
    ),
]
PositionsOption = Annotated[
    str | None,
    typer.Option(
        metavar="KIND,…",
        show_default="mask, or all that are stored",
        help="Tokens whose activations are taken: mask, the hidden ones; unmask, the visible ones; "
        "all, both; clean, those of text of which nothing is hidden. Never a first token.",
    ),
]
Level = Annotated[
    str | None,
    typer.Option(
        "--t",
        metavar="T or T-T",
        show_default="0-1; the autoencoder's own where there is one",
        help="Level of the masks: a token is hidden with probability t, drawn within this range.",
    ),
]
PerBatch = Annotated[
    bool | None,
    typer.Option(
        "--level-per-batch/--level-per-sequence",
        show_default="per sequence",
        help="Draw t once for a batch, or for each sequence.",
    ),
]


def _context(shown: str | bool) -> Any:
    text = "Most tokens of a sequence; what is longer is cut."
    return typer.Option("--context", min=2, show_default=shown, help=text)


def _pack(shown: str) -> Any:
    text = "Join documents by end-of-sequence and cut them into sequences of --context tokens."
    return typer.Option("--pack/--no-pack", show_default=shown, help=text)


def _hide_prompt(shown: str | bool) -> Any:
    text = "Whether the tokens of a record's 'prompt' may be hidden like others."
    return typer.Option("--hide-prompt/--keep-prompt", show_default=shown, help=text)


OWN = "the autoencoder's own, else "
Context = Annotated[int, _context(True)]
Pack = Annotated[bool | None, _pack("no-pack")]
HidePrompt = Annotated[bool, _hide_prompt(True)]
OwnContext = Annotated[int | None, _context(f"{OWN}2048")]
OwnPack = Annotated[bool | None, _pack(f"{OWN}no-pack")]
OwnHidePrompt = Annotated[bool | None, _hide_prompt(f"{OWN}keep-prompt")]
Sequences = Annotated[
    int,
    typer.Option("-b", "--batch-size", min=1, help="Sequences per forward pass of the model."),
]


def own_model(saved: Mapping[str, SavedSae], model: str | None) -> str:
    """The model that is given, else the one that the autoencoders were trained on.

    Raises:
        UsageError: they were trained on several.
    """
    from dlmctl.sae.formats.folders import trained_with

    return model or str(trained_with(saved, "model_name", "builtin:puzzles", "--model"))


def corpus_plan(
    corpus: CorpusSettings = AS_TRAINED, seed: int = 0, saved: Mapping[str, SavedSae] = {}
) -> CorpusPlan:
    """The settings of a corpus; what is None is as the autoencoders say, by their folders' names.

    Whether the level was drawn per batch is not taken from them: for a single token it is the same
    distribution.

    Raises:
        UsageError: the autoencoders disagree on what is None.
        DataError: a folder has a value of the wrong type.
    """
    from dlmctl.sae.corpus import CorpusPlan, MaskLaw
    from dlmctl.sae.formats.folders import trained_with

    def own(given: Any, name: str, default: Any, option: str) -> Any:
        if given is not None:
            return given
        return trained_with(saved, name, default, option) if saved else default

    low, high = level_range(corpus.level) if corpus.level else (None, None)
    t = own(low, "dlm_t_min", 0.0, "--t"), own(high, "dlm_t_max", 1.0, "--t")
    context = own(corpus.context, "context_size", 2048, "--context")
    if context < 2:
        raise UsageError(f"the autoencoders were trained on a context of {context}: give --context")
    return CorpusPlan(
        MaskLaw(*t, bool(corpus.per_batch), seed),
        context,
        own(corpus.pack, "dlm_pack", False, "--pack or --no-pack"),
        own(corpus.hide_prompt, "dlm_hide_prompt", False, "--hide-prompt or --keep-prompt"),
    )


def own_plan(
    saved: Mapping[str, SavedSae],
    level: str | None,
    context: int | None,
    pack: bool | None,
    hide_prompt: bool | None,
    per_batch: bool | None = None,
    seed: int = 0,
) -> CorpusPlan:
    """`corpus_plan`, as commands call it that have no settings yet."""
    return corpus_plan(CorpusSettings(level, context, per_batch, pack, hide_prompt), seed, saved)


def corpus_batches(
    files: Sequence[str],
    policy: Policy,
    plan: CorpusPlan,
    batch_size: int,
    on_error: OnError = "fail",
) -> Iterator[MaskedBatch]:
    """Batches of a corpus."""
    from dlmctl.sae.corpus import mask_batches, read_windows

    return mask_batches(read_windows(files, policy, plan, batch_size, on_error), policy, plan.law)
