"""Options of the commands that run a model over a corpus under the forward masking process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

import typer

from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import OnError, Record, read_records

if TYPE_CHECKING:
    from dlmctl.models.policy import Policy
    from dlmctl.sae.corpus import Batch, Corruption, Document
    from dlmctl.sae.formats.folders import SavedSae

PositionKind = Literal["mask", "unmask", "all", "clean"]

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


def position_kinds(text: str) -> list[PositionKind]:
    """The kinds of a list like mask,unmask; raises UsageError for an unknown one."""
    known, kinds = get_args(PositionKind), list(dict.fromkeys(text.split(",")))
    for kind in kinds:
        if kind not in known:
            raise UsageError(f"--positions {text}: '{kind}' is none of {', '.join(known)}")
    return kinds  # type: ignore[return-value]


def layer_numbers(text: str) -> list[int]:
    """The numbers of a list like 1,5,10; raises UsageError where one is none."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--layers {text} is not a list of layers such as 1,5,10")
    return list(dict.fromkeys(int(part) for part in parts))


def level_range(text: str) -> tuple[float, float]:
    """Least and greatest level of 0.3 or of 0.05-0.5; raises UsageError otherwise."""
    first, _, last = text.partition("-")
    try:
        return float(first), float(last or first)
    except ValueError:
        raise UsageError(f"--t {text} is neither a number nor a range such as 0.05-0.5") from None


def own_model(saved: Mapping[str, SavedSae], model: str | None) -> str:
    """The model that is given, else the one that the autoencoders name.

    Raises:
        UsageError: they name several.
    """
    from dlmctl.sae.formats.folders import trained_with

    return model or str(trained_with(saved, "model_name", "builtin:puzzles", "--model"))


class CorpusPlan(NamedTuple):
    """How a corpus is cut into sequences, and masked."""

    law: Corruption
    context: int
    pack: bool
    hide_prompt: bool

    @property
    def about(self) -> dict[str, Any]:
        """As it stands in a record."""
        return {"t": [self.law.t_min, self.law.t_max], **self.cut}

    @property
    def cut(self) -> dict[str, Any]:
        """The same without the masks."""
        return {"context": self.context, "pack": self.pack, "hide_prompt": self.hide_prompt}


def own_plan(
    saved: Mapping[str, SavedSae],
    level: str | None,
    context: int | None,
    pack: bool | None,
    hide_prompt: bool | None,
    per_batch: bool | None = None,
    seed: int = 0,
) -> CorpusPlan:
    """What is given, else what the autoencoders were trained on, by their folders' names.

    Whether the level was drawn for a batch is not taken from them: of a token it is the same law.

    Raises:
        UsageError: the autoencoders differ in what is not given.
        DataError: a folder says something else than a number, or than true or false.
    """
    from dlmctl.sae.corpus import Corruption
    from dlmctl.sae.formats.folders import trained_with

    def own(given: Any, name: str, default: Any, option: str) -> Any:
        return trained_with(saved, name, default, option) if given is None else given

    low, high = level_range(level) if level else (None, None)
    t = own(low, "dlm_t_min", 0.0, "--t"), own(high, "dlm_t_max", 1.0, "--t")
    size = own(context, "context_size", 2048, "--context")
    if size < 2:
        raise UsageError(f"the autoencoders were trained on a context of {size}: give --context")
    return CorpusPlan(
        Corruption(*t, bool(per_batch), seed),
        size,
        own(pack, "dlm_pack", False, "--pack or --no-pack"),
        own(hide_prompt, "dlm_hide_prompt", False, "--hide-prompt or --keep-prompt"),
    )


def corpus_batches(
    files: Sequence[str],
    policy: Policy,
    plan: CorpusPlan,
    batch_size: int,
    on_error: OnError = "fail",
) -> Iterator[Batch]:
    """Batches of a corpus."""
    from dlmctl.sae.corpus import corrupted_batches

    windows = corpus_windows(files, policy, **plan.cut, batch_size=batch_size, on_error=on_error)
    return corrupted_batches(windows, policy, plan.law)


def corpus_windows(
    files: Sequence[str],
    policy: Policy,
    context: int,
    pack: bool,
    hide_prompt: bool,
    batch_size: int,
    on_error: OnError = "fail",
    repeat: bool = False,
) -> Iterator[list[Document]]:
    """The documents of each batch; with `repeat` again and again, unless it is a stream."""
    from dlmctl.sae.corpus import documents, packed, together

    def records() -> Iterator[Record]:
        found = False
        for record in read_records(files, on_error):
            found = True
            yield record
        while found and repeat and files and "-" not in files:
            yield from read_records(files, on_error)

    stream = documents(records(), policy, context, hide_prompt, on_error)
    if pack:
        stream = packed(stream, policy, context)
    yield from together(stream, batch_size)
