"""`dlmctl sae-probe`: options and wiring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlmctl.commands.options import (
    BatchSize,
    Device,
    Dtype,
    Files,
    Json,
    Model,
    OnErrorOption,
    Quiet,
    Seed,
)
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import write_rows
from dlmctl.records.jsonl import each, read_records

COLUMNS = ("sae", "method", "concept", "value", "feature", "auroc", "clear")


def command(
    sae: Annotated[
        list[Path],
        typer.Option(
            "--sae",
            metavar="DIRECTORY",
            help="Folder of an autoencoder, or of many; repeatable. Its metadata says which layer "
            "and which positions it is for.",
        ),
    ],
    files: Files = None,
    model: Model = "builtin:puzzles",
    t_min: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Least share of the tokens that is hidden.")
    ] = 0.05,
    t_max: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Greatest; each text draws its own.")
    ] = 0.5,
    context: Annotated[int, typer.Option(min=2, help="Tokens that a text is cut to.")] = 2048,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
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

    dlmctl prompts concepts --split test -n 1000 | dlmctl sae-probe --sae saes -m runs/concepts
    """
    from dlmctl.models.blocks import check_layers
    from dlmctl.models.loading import load_policy
    from dlmctl.sae.corpus import Corruption, documents
    from dlmctl.sae.folders import find_saes, read_sae
    from dlmctl.sae.probe import place_of, probe
    from dlmctl.sae.sentences import collect, labelled

    law = Corruption(t_min, t_max, seed=seed)
    saes = {str(path): read_sae(path) for path in find_saes(sae)}
    places = [place_of(saved, name) for name, saved in saes.items()]
    policy = load_policy(model, device, dtype)
    check_layers(policy, [layer for layer, _ in places])
    records = each(read_records(files or [], on_error), labelled, on_error)
    stream = documents(counted(records, "texts", quiet), policy, context, on_error=on_error)
    found = collect(stream, policy, list(dict.fromkeys(places)), law, batch_size)
    write_rows(probe(saes, places, found, seed, policy.device), COLUMNS, json)
