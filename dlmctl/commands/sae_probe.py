"""`dlmctl sae-probe`: options and wiring."""

from __future__ import annotations

from typing import Annotated

import typer

from dlmctl.commands.corpora import (
    Level,
    OwnContext,
    OwnModel,
    Sequences,
    own_model,
    own_plan,
)
from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.options import Device, Dtype, Json, OnErrorOption, Quiet, Seed
from dlmctl.commands.progress import counted
from dlmctl.commands.sae_eval import split_paths
from dlmctl.commands.tables import write_rows
from dlmctl.records.jsonl import each, read_records

COLUMNS = ("sae", "method", "concept", "value", "feature", "auroc", "clear")


def command(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="SAE… [CORPUS…]",
            help="Folders of autoencoders, or directories of such; and JSONL files: none, or -, is "
            "standard input.",
        ),
    ],
    model: OwnModel = None,
    level: Level = None,
    context: OwnContext = None,
    seed: Seed = 0,
    batch_size: Sequences = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    on_error: OnErrorOption = "fail",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How well single features tell known concepts.

    Reads records with a text and its `sentences`: a list of objects with `start` and `end`, offsets
    in characters of `text` or `completion`, and a value for each concept, as 'dlmctl prompts
    concepts' writes them.

    A feature's score of a sentence is its largest activation on the tokens of the sentence that the
    autoencoder is for (hidden ones, visible ones, all). For each value the feature with the highest
    AUROC against the other values is chosen on every other text, and `auroc` is that of the rest.
    The same is done with principal directions (pca), coordinates (neurons), each with their
    opposites, and as many random directions as there are latents. `clear` is the share of the
    values above 0.95. Writes a table on a terminal, JSON lines in a pipe.

    Example:

    dlmctl prompts concepts --split test -n 1000 | dlmctl sae-probe saes -m runs/concepts
    """
    from dlmctl.models.loading import load_policy
    from dlmctl.sae.corpus import documents
    from dlmctl.sae.evaluation.evaluate import place
    from dlmctl.sae.evaluation.probe import probe
    from dlmctl.sae.evaluation.sentences import collect, labelled
    from dlmctl.sae.formats.folders import read_saes

    folders, files = split_paths(paths)
    found_saes = read_saes(folders)
    # Offsets of sentences are of one text, so that texts are not packed.
    plan = own_plan(found_saes, level, context, pack=False, hide_prompt=False, seed=seed)
    policy = load_policy(own_model(found_saes, model), device, dtype)
    saes = [place(name, saved, policy) for name, saved in found_saes.items()]
    places = list(dict.fromkeys((placed.layer, placed.positions) for placed in saes))
    total = input_lines(files)
    records = each(read_records(files, on_error), labelled, on_error)
    shown = counted(records, "texts", quiet, total)
    stream = documents(shown, policy, plan.context, on_error=on_error)
    found = collect(stream, policy, places, plan.law, batch_size)
    write_rows(probe(saes, found, seed, policy.device), COLUMNS, json)
