"""`dlmctl sae-eval`: options and wiring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dlmctl.commands.corpora import (
    Level,
    OwnContext,
    OwnHidePrompt,
    OwnModel,
    OwnPack,
    PerBatch,
    Sequences,
    corpus_batches,
    own_model,
    own_plan,
)
from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.options import Device, Dtype, Json, OnErrorOption, Quiet, Seed
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import write_rows
from dlmctl.records.errors import UsageError

Scope = Annotated[
    Literal["all", "matching"],
    typer.Option(
        help="Where an autoencoder stands in for the activations: at all positions, as published, "
        "or at those that it was trained on."
    ),
]
Insert = Annotated[
    bool,
    typer.Option(
        "--insert/--no-insert",
        help="Take the loss on insertion too: a pass of the model for each autoencoder.",
    ),
]
COLUMNS = ("layer", "k", "positions", "fve", "nmse", "cos", "l0", "dead")


def command(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="SAE… [CORPUS…]",
            help="Folders of autoencoders, or directories of such; and JSONL files as 'dlmctl "
            "sae-train' takes them: none, or -, is standard input.",
        ),
    ],
    model: OwnModel = None,
    layer: Annotated[
        int | None,
        typer.Option(min=0, show_default="as its folder says", help="Block that it is for."),
    ] = None,
    scope: Scope = "all",
    insert: Insert = True,
    logit_shift: Annotated[
        Literal["auto", "0", "1"],
        typer.Option(
            help="Where the logits of a token are: at the token (0), at the one before it (1), or "
            "as the model's family has it. The published script took 0 for Dream, too."
        ),
    ] = "auto",
    level: Level = None,
    per_batch: PerBatch = None,
    context: OwnContext = None,
    pack: OwnPack = None,
    hide_prompt: OwnHidePrompt = None,
    batch_size: Sequences = 8,
    seed: Seed = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure how well sparse autoencoders give activations back, and the loss on insertion.

    Writes a record for each: the variance explained by three definitions and without tokens of
    massive norm, NMSE, cosine, L0, dead latents; and the change of the loss of hidden and of
    visible tokens while the autoencoder stands in for the activations, each with a standard error
    over texts (delta_mask_se and so on). The corpus is cut and masked as that was which they were
    trained on, where no option says otherwise.

    Examples:

    dlmctl sae-eval saes/ -m GSAI-ML/LLaDA-8B-Base heldout.jsonl

    dlmctl sae-eval saes/ corpus.jsonl | dlmctl stats --by layer
    """
    import dataclasses

    from dlmctl.models.loading import load_policy
    from dlmctl.sae.evaluation.evaluate import evaluate, place
    from dlmctl.sae.formats.folders import read_saes

    folders, files = split_paths(paths)
    found = read_saes(folders)
    plan = own_plan(found, level, context, pack, hide_prompt, per_batch, seed)
    policy = load_policy(own_model(found, model), device, dtype)
    saes = [place(name, saved, policy, layer) for name, saved in found.items()]
    total = None if plan.pack else input_lines(files).times(1 / batch_size)
    batches = corpus_batches(files, policy, plan, batch_size, on_error)
    if logit_shift != "auto":
        policy = dataclasses.replace(policy, shift=int(logit_shift))
    shown = counted(batches, "batches", quiet, total)
    rows = evaluate(policy, shown, saes, scope, insert, plan.about)
    deltas = ("delta_mask", "delta_unmask") if insert else ()
    more = [name for delta in deltas for name in (delta, f"{delta}_se")]
    write_rows(rows, (*COLUMNS, *more), json)


def split_paths(paths: list[str]) -> tuple[list[Path], list[str]]:
    """Directories, which hold autoencoders, and files of a corpus; there must be a directory."""
    folders = [Path(path) for path in paths if Path(path).is_dir()]
    if not folders:
        raise UsageError(f"{paths[0]} is no folder of an autoencoder")
    return folders, [path for path in paths if not Path(path).is_dir()]
