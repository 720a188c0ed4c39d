"""`dlmctl sae-activations`: options and wiring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlmctl.commands.corpora import (
    Context,
    Corpus,
    HidePrompt,
    Layers,
    Level,
    Pack,
    PerBatch,
    PositionsOption,
    Sequences,
    corpus_batches,
    layer_numbers,
    level_range,
    position_kinds,
)
from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.options import Device, Dtype, Model, OnErrorOption, Quiet, Seed
from dlmctl.commands.progress import counted
from dlmctl.records.files import check_free, make_directory
from dlmctl.records.jsonl import write_records


def command(
    corpus: Corpus = None,
    directory: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="DIRECTORY", help="Where the activations go."),
    ] = Path("activations"),
    model: Model = "builtin:puzzles",
    layers: Layers = None,
    positions: PositionsOption = None,
    level: Level = None,
    per_batch: PerBatch = None,
    context: Context = 2048,
    pack: Pack = None,
    hide_prompt: HidePrompt = False,
    batch_size: Sequences = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
) -> None:
    """Store activations of a model over a corpus.

    Writes a file block-000000.safetensors for each batch, with the activations of all layers and
    positions from one pass, and activations.json. 'dlmctl sae-train' reads the directory in place
    of a corpus, so that several trainings need one run of the model. Writes a record for each
    block to standard output.

    Examples:

    dlmctl sae-activations corpus.jsonl -m GSAI-ML/LLaDA-8B-Base --layers 1,6,11 -o acts

    dlmctl sae-train acts -k 50,160 -o saes
    """
    from dlmctl.models.loading import load_policy
    from dlmctl.sae.activations import check_keys, source_metadata, store_activations
    from dlmctl.sae.corpus import CorpusPlan, Corruption

    chosen, kinds = layer_numbers(layers or "0"), position_kinds(positions or "mask")
    law = Corruption(*level_range(level or "0-1"), bool(per_batch), seed)
    plan = CorpusPlan(law, context, bool(pack), hide_prompt)
    check_free(directory)
    policy = load_policy(model, device, dtype)
    check_keys(policy, chosen, kinds)
    make_directory(directory)
    total = None if pack else input_lines(corpus).times(1 / batch_size)
    batches = corpus_batches(corpus or [], policy, plan, batch_size, on_error)
    about = {
        **source_metadata(policy, law),
        "context_size": context,
        "dlm_pack": plan.pack,
        "dlm_hide_prompt": hide_prompt,
    }
    records = store_activations(policy, batches, chosen, kinds, about, directory)
    write_records(counted(records, "batches", quiet, total))
