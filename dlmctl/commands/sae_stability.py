"""`dlmctl sae-stability`: options and wiring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
from dlmctl.commands.sae_eval import Insert, Scope, split_paths
from dlmctl.commands.tables import write_rows

COLUMNS = ("layer", "k", "positions", "base_fve", "tuned_fve", "jaccard", "code_cosine")


def command(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="SAE… [CORPUS…]",
            help="Folders of autoencoders of the base model, or directories of such; and JSONL "
            "files: none, or -, is standard input.",
        ),
    ],
    tuned: Annotated[
        str, typer.Option("--tuned", metavar="MODEL", help="The model after more training.")
    ],
    model: OwnModel = None,
    tuned_saes: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIRECTORY",
            help="Autoencoders trained on the tuned model: decoders are matched with those of like "
            "layer, K and positions.",
        ),
    ] = None,
    scope: Scope = "all",
    insert: Insert = True,
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
    """Measure whether a model's sparse autoencoders still fit it after more training.

    Base and tuned model see the same tokens under the same masks, cut and masked as those were that
    the autoencoders were trained on, where no option says otherwise. Writes a record for each
    autoencoder: the measures of 'dlmctl sae-eval' on both, and how alike the codes are.

    Example:

    dlmctl sae-stability saes/ corpus.jsonl -m builtin:puzzles --tuned runs/a
    """
    from dlmctl.models.loading import load_policy
    from dlmctl.sae.evaluation.evaluate import place
    from dlmctl.sae.evaluation.stability import stability
    from dlmctl.sae.formats.folders import read_saes

    folders, files = split_paths(paths)
    found = read_saes(folders)
    plan = own_plan(found, level, context, pack, hide_prompt, per_batch, seed)
    base, after = (load_policy(m, device, dtype) for m in (own_model(found, model), tuned))
    saes = [place(name, saved, base) for name, saved in found.items()]
    tuned_found = read_saes(tuned_saes) if tuned_saes else {}
    others = [place(name, saved, after) for name, saved in tuned_found.items()]
    total = None if plan.pack else input_lines(files).times(1 / batch_size)
    batches = corpus_batches(files, base, plan, batch_size, on_error)
    batches = counted(batches, "batches", quiet, total)
    rows = stability(base, after, batches, saes, scope, insert, plan.about, others)
    more = ("base_delta_mask", "tuned_delta_mask") if insert else ()
    write_rows(rows, (*COLUMNS, *more, *(("matched",) if others else ())), json)
