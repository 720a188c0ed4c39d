"""`dlmctl sae-train`: options and wiring."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dlmctl.commands.corpora import corpus_plan
from dlmctl.commands.ranks import on_every_rank, write_metrics
from dlmctl.commands.tracking import check_trackers, tracked
from dlmctl.records.errors import UsageError
from dlmctl.records.locks import Lock, hold_run
from dlmctl.settings import Knob
from dlmctl.settings.compute import Device, Model
from dlmctl.settings.corpus import Activations, Corpus, CorpusFiles
from dlmctl.settings.models import Reading
from dlmctl.settings.parsing import whole_numbers
from dlmctl.settings.sae import PUBLISHED_ROWS, Feed, Ks, Profile, SaeRecipe
from dlmctl.settings.streams import Quiet
from dlmctl.settings.training import Log

if TYPE_CHECKING:
    from dlmctl.sae.corpus import Document
    from dlmctl.sae.training.sources import Source


@on_every_rank
def command(
    files: CorpusFiles = None,
    directory: Annotated[
        Path, Knob("Where the autoencoders go.", "-o", "--output", metavar="DIRECTORY")
    ] = Path("saes"),
    model: Model = "builtin:puzzles",
    reading: Reading = Reading(),
    activations: Activations = Activations(),
    ks: Ks = "50",
    profile: Profile = "corrected",
    recipe: SaeRecipe = SaeRecipe(),
    corpus: Corpus = Corpus(),
    feed: Feed = Feed(),
    log_every: Annotated[
        int,
        Knob("Steps of an autoencoder from one metrics record to the next.", minimum=1),
    ] = 100,
    save_minutes: Annotated[
        float, Knob("Minutes from one saved state to the next.", minimum=0.0)
    ] = 10.0,
    log: Log = None,
    device: Device = Device(),
    quiet: Quiet = False,
) -> None:
    """Train sparse autoencoders on activations of a model.

    They are Top-K autoencoders or, with --kind, BatchTopK or Matryoshka ones. One forward pass of
    the model feeds all of them. There is an autoencoder for each combination of layer, kind of
    positions and K, in a folder such as layer5-k50-mask that SAELens loads. In place
    of a corpus you can give a directory written by 'dlmctl sae-activations'. Writes metrics to
    standard output and to DIRECTORY/metrics.jsonl. The same command resumes a run that was killed.

    Under torchrun the batches of the corpus and the autoencoders are divided among the processes.
    Each autoencoder is trained by one process, which has its optimizer and its shuffle buffer; the
    model is sharded over all processes by FSDP2, as in 'dlmctl update'. The result is that of a
    single process, and a run can be resumed with more or fewer processes.

    Examples:

    dlmctl sae-train corpus.jsonl -m GSAI-ML/LLaDA-8B-Base --layers 1,6,11,16,26,30 -k 50,160
    --positions mask,unmask -o saes

    dlmctl prompts sudoku -n 20000 --completions | dlmctl sae-train --layers 1,3 -k 8 --latents 512
    --tokens 200000 -o saes

    torchrun --nproc-per-node 8 -m dlmctl sae-train corpus.jsonl -m GSAI-ML/LLaDA-8B-Base
    --layers 1,6,11,16,26,30 -k 50,160 --positions mask,unmask --kind matryoshka -o saes
    """
    from dlmctl.sae.training.buffer import fits_device
    from dlmctl.sae.training.division import divided
    from dlmctl.sae.training.run import SaeRun, finished, folder_name
    from dlmctl.sae.training.stream import Stream
    from dlmctl.train.distributed import rank, run_on_first, world_size

    check_trackers(log)
    numbers = list(dict.fromkeys(whole_numbers("-k", ks)))
    if max([*numbers, recipe.k_start or 1]) > recipe.latents:
        raise UsageError(f"-k {ks} is more than the {recipe.latents} --latents")
    _lock: Lock | None = None

    def begin() -> None:
        nonlocal _lock
        # Refused before the model is loaded; kept until the run has it too.
        _lock = hold_run(directory) if directory.is_dir() else None

    run_on_first(begin)
    source = _source(
        files or [], reading.name(model), activations, corpus, recipe.seed, feed.sequences, device
    )
    owners = divided(source.keys, numbers)
    ranks = [set(owners[key].values()) for key in source.keys]  # each has a buffer
    row_bytes = source.width * source.dtype.itemsize
    rows = run_on_first(lambda: _buffer_rows(directory, feed, row_bytes, sum(map(len, ranks))))
    settings = {
        **vars(recipe),
        **source.settings,
        "k": numbers,
        "drop_norms": feed.drop_norms,
        "buffer": feed.buffer,
        "buffer_rows": rows,
        "keys": [str(key) for key in source.keys],
    }
    names = [folder_name(key, k) for key in source.keys for k in numbers]
    if run_on_first(lambda: finished(directory, names)):
        _say(f"{directory} has all of these autoencoders")
        return
    if len(names) < world_size():
        _say(f"{len(names)} autoencoders on {world_size()} processes: the others train none")
    here = sum(rank() in takers for takers in ranks)
    on_host = not fits_device(here * recipe.buffer_capacity(rows) * row_bytes, source.device)
    common = numbers, recipe, source.width, rows, feed.drop_norms, source.device
    streams = [Stream(key, *common, owners[key], on_host) for key in source.keys]
    run = SaeRun(directory, streams, settings, source.metadata, source.device)
    with tracked(log, directory, settings):
        write_metrics(
            run.train(source.blocks(run.blocks, run.takers), log_every, 60 * save_minutes),
            quiet,
            run.standing,
            run.whole,
            run.steps,
            at=lambda: run.steps,
        )
    for shortfall in run.shortfalls():
        _say(shortfall)
    _say(f"{len(run.finish())} autoencoders in {directory}")


def _buffer_rows(directory: Path, feed: Feed, row_bytes: int, buffers: int) -> int:
    """Rows of each shuffle buffer: what a run that is resumed began with, or as --buffer says.

    Args:
        buffers: number of buffers in all.
    """
    from dlmctl.sae.training.buffer import share_of_memory
    from dlmctl.sae.training.run import begun_with

    begun = begun_with(directory)
    if feed.buffer == begun.get("buffer") and "buffer_rows" in begun:
        return int(begun["buffer_rows"])
    rows = feed.buffer_rows(row_bytes, share_of_memory() // buffers)
    if feed.buffer == "auto" and rows < PUBLISHED_ROWS:
        _say(f"--buffer: {rows:,} rows, which is what the free memory has room for")
    return rows


def _say(line: str) -> None:
    from dlmctl.train.distributed import is_first

    if is_first():
        print(f"dlmctl: {line}", file=sys.stderr)


def _source(
    files: list[str],
    model: str,
    activations: Activations,
    corpus: Corpus,
    seed: int,
    sequences: int,
    device: Device,
) -> Source:
    """Stored activations if a directory is given, else those of the model on the corpus."""
    from dlmctl.models.loading import load_policy, resolve_device
    from dlmctl.sae.corpus import read_documents, together
    from dlmctl.sae.training.sources import ModelSource, StoredSource
    from dlmctl.train.distributed import world_size
    from dlmctl.train.sharding import shard

    layers, kinds = activations.layer_numbers, activations.kinds
    if len(files) == 1 and Path(files[0]).is_dir():
        return StoredSource(Path(files[0]), layers, kinds, resolve_device(device.device))
    plan = corpus_plan(corpus, seed)
    policy = load_policy(model, device.device, device.dtype)
    if world_size() > 1:
        shard(policy)

    def windows() -> Iterator[list[Document]]:
        return together(read_documents(files, policy, plan, repeat=True), sequences)

    return ModelSource(policy, windows, layers or [0], kinds or ["mask"], plan)
