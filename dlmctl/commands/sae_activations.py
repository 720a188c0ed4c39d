"""`dlmctl sae-activations`: options and wiring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from dlmctl.commands.corpora import corpus_batches, corpus_plan
from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.progress import counted
from dlmctl.records.files import check_free, make_directory
from dlmctl.records.jsonl import write_records
from dlmctl.settings import Knob, Shown
from dlmctl.settings.compute import Device, Model, Seed
from dlmctl.settings.corpus import Activations, Corpus, CorpusFiles, Sequences
from dlmctl.settings.streams import OnErrorOption, Quiet


def command(
    files: CorpusFiles = None,
    directory: Annotated[
        Path, Knob("Where the activations go.", "-o", "--output", metavar="DIRECTORY")
    ] = Path("activations"),
    model: Model = "builtin:puzzles",
    activations: Annotated[Activations, Shown(layers="0", positions="mask")] = Activations(),
    corpus: Corpus = Corpus(),
    sequences: Sequences = 8,
    seed: Seed = 0,
    device: Device = Device(),
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
) -> None:
    """Store activations of a model over a corpus.

    Writes a file block-000000.safetensors for each batch, with the activations of all layers and
    positions from one forward pass, and activations.json. 'dlmctl sae-train' reads the directory in
    place of a corpus, so that several trainings need only one run of the model. Writes a record for
    each block to standard output.

    Examples:

    dlmctl sae-activations corpus.jsonl -m GSAI-ML/LLaDA-8B-Base --layers 1,6,11 -o acts

    dlmctl sae-train acts -k 50,160 -o saes
    """
    from dlmctl.models.loading import load_policy
    from dlmctl.sae.activations import check_keys, source_metadata, store_activations

    layers, kinds = activations.layer_numbers or [0], activations.kinds or ["mask"]
    plan = corpus_plan(corpus, seed)
    check_free(directory)
    policy = load_policy(model, device.device, device.dtype)
    check_keys(policy, layers, kinds)
    make_directory(directory)
    total = None if plan.pack else input_lines(files).times(1 / sequences)
    batches = corpus_batches(files or [], policy, plan, sequences, on_error)
    about = source_metadata(policy, plan)
    records = store_activations(policy, batches, layers, kinds, about, directory)
    write_records(counted(records, "batches", quiet, total))
