"""`dlmctl sae-train`: options and wiring."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    corpus_windows,
    layer_numbers,
    level_range,
    position_kinds,
)
from dlmctl.commands.options import Device, Dtype, Model, Quiet, Seed
from dlmctl.commands.ranks import on_every_rank, write_metrics
from dlmctl.records.errors import UsageError
from dlmctl.records.locks import Lock, hold_run
from dlmctl.settings.models import Reading
from dlmctl.settings.parsing import byte_count, whole_numbers

if TYPE_CHECKING:
    from dlmctl.sae.corpus import Document
    from dlmctl.sae.training.sources import Source

PROFILES: dict[str, dict[str, Any]] = {
    "corrected": {
        "level": "0-1",
        "per_batch": False,
        "pack": False,
        "aux": "straight",
        "fitted_encoder": True,
    },
    "paper": {
        "level": "0.05-0.5",
        "per_batch": True,
        "pack": True,
        "aux": "rectified",
        "fitted_encoder": False,
    },
}


@on_every_rank
def command(
    corpus: Corpus = None,
    directory: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="DIRECTORY", help="Where the autoencoders go."),
    ] = Path("saes"),
    model: Model = "builtin:puzzles",
    reading: Reading = Reading(),
    layers: Layers = None,
    ks: Annotated[
        str, typer.Option("-k", metavar="K,…", help="Latents that are active for a token.")
    ] = "50",
    positions: PositionsOption = None,
    profile: Annotated[
        Literal["corrected", "paper"],
        typer.Option(
            help="paper: as DLM-Scope was trained: --t 0.05-0.5 --level-per-batch --pack "
            "--aux rectified, and the encoder at the decoder's length first. Options that are "
            "given come first."
        ),
    ] = "corrected",
    latents: Annotated[int, typer.Option(min=1, help="Size of a dictionary.")] = 16_384,
    tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Activations that each autoencoder is trained on. A corpus in files is read again "
            "until they are had, masked anew.",
        ),
    ] = 150_000_000,
    sae_batch: Annotated[
        int, typer.Option("--sae-batch-size", min=1, help="Activations in a step.")
    ] = 2048,
    rate: Annotated[float, typer.Option("--lr", min=0.0, help="Learning rate of Adam.")] = 3e-4,
    warmup: Annotated[
        int, typer.Option(min=0, help="Steps of linear warm-up, at most a tenth of all.")
    ] = 1000,
    decay_from: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of the steps after which the rate falls to 0."),
    ] = 0.8,
    grad_norm: Annotated[
        float, typer.Option(min=0.0, help="Gradients are clipped to this norm; 0 is off.")
    ] = 1.0,
    aux: Annotated[
        Literal["straight", "input", "pre", "rectified"] | None,
        typer.Option(
            show_default="straight",
            help="How dead latents learn to explain the error: behind the ReLU, with the gradient "
            "passed straight through it; input: the same, but of the input, where a run is too "
            "short to bring them back by the error; by their pre-activations as they are "
            "(SAELens); or rectified, as published, where they get hardly any gradient.",
        ),
    ] = None,
    aux_weight: Annotated[float, typer.Option(min=0.0, help="Weight of that loss; 0 is off.")] = 1
    / 32,
    dead_after: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="a fifteenth of --tokens, 10M of 150M",
            help="Activations after which a latent that was not active counts as dead.",
        ),
    ] = None,
    k_start: Annotated[
        int | None,
        typer.Option(
            min=1, show_default="off", help="K at the beginning, that falls to -k linearly."
        ),
    ] = None,
    k_anneal: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the steps over which it falls.")
    ] = 0.1,
    drop_norms: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            show_default="off",
            help="Leave out activations whose norm is above so many times the median.",
        ),
    ] = None,
    level: Level = None,
    per_batch: PerBatch = None,
    context: Context = 2048,
    pack: Pack = None,
    hide_prompt: HidePrompt = False,
    batch_size: Sequences = 8,
    buffer: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Shuffle buffer of each layer and kind of positions, such as 512M or 2G.",
        ),
    ] = "256M",
    log_every: Annotated[
        int, typer.Option(min=1, help="Steps between the records of an autoencoder.")
    ] = 100,
    save_minutes: Annotated[
        float, typer.Option(min=0.0, help="Minutes between states that a killed run goes on from.")
    ] = 10.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Train Top-K sparse autoencoders on activations of a model.

    One pass of the model feeds all of them: each layer, kind of positions and K is one, in a folder
    such as layer5-k50-mask that SAELens loads. In place of a corpus a directory of 'dlmctl
    sae-activations' may be given. Writes metrics to standard output and DIRECTORY/metrics.jsonl.
    The same command goes on with a run that was killed.

    Under torchrun the batches of the corpus and the autoencoders are divided among the processes.
    Each autoencoder is trained by one of them, with its optimizer and its shuffle buffer; the model
    is spread over all by FSDP2, as in 'dlmctl update'. What comes out is that of one process, and a
    run can go on with more or fewer.

    Examples:

    dlmctl sae-train corpus.jsonl -m GSAI-ML/LLaDA-8B-Base --layers 1,6,11,16,26,30 -k 50,160
    --positions mask,unmask -o saes

    dlmctl prompts sudoku -n 20000 --completions | dlmctl sae-train --layers 1,3 -k 8 --latents 512
    --tokens 200000 -o saes

    torchrun --nproc-per-node 8 -m dlmctl sae-train corpus.jsonl -m GSAI-ML/LLaDA-8B-Base
    --layers 1,6,11,16,26,30 -k 50,160 --positions mask,unmask -o saes
    """
    from dlmctl.sae.training.division import divided
    from dlmctl.sae.training.run import SaeRun, finished, folder_name
    from dlmctl.sae.training.stream import Stream
    from dlmctl.sae.training.trainer import Recipe
    from dlmctl.train.distributed import from_first, size

    preset = PROFILES[profile]
    numbers = list(dict.fromkeys(whole_numbers("-k", ks)))
    if max([*numbers, k_start or 1]) > latents:
        raise UsageError(f"-k {ks} is more than the {latents} --latents")
    recipe = Recipe(
        latents=latents,
        batch_size=sae_batch,
        tokens=tokens,
        rate=rate,
        warmup=warmup,
        decay_from=decay_from,
        max_norm=grad_norm,
        aux_weight=aux_weight,
        dead_after=dead_after or max(1, tokens // 15),
        aux=aux or preset["aux"],
        fitted_encoder=preset["fitted_encoder"],
        k_start=k_start,
        k_anneal=k_anneal,
        seed=seed,
    )
    given = {"level": level, "per_batch": per_batch, "pack": pack}
    law = {name: preset[name] if value is None else value for name, value in given.items()}
    _lock: Lock | None = None

    def begin() -> None:
        nonlocal _lock
        # Refused before the model is loaded; kept until the run has it too.
        _lock = hold_run(directory) if directory.is_dir() else None

    from_first(begin)
    source = _source(
        corpus or [],
        reading.name(model),
        layers,
        positions,
        law,
        context,
        hide_prompt,
        batch_size,
        seed,
        device,
        dtype,
    )
    settings = {
        **vars(recipe),
        **source.settings,
        "k": numbers,
        "drop_norms": drop_norms,
        "buffer": buffer,
        "keys": [str(key) for key in source.keys],
    }
    names = [folder_name(key, k) for key in source.keys for k in numbers]
    if from_first(lambda: finished(directory, names)):
        _say(f"{directory} has all of these autoencoders")
        return
    if len(names) < size():
        _say(f"{len(names)} autoencoders on {size()} processes: the others train none")
    room, owners = byte_count("--buffer", buffer), divided(source.keys, numbers)
    streams = [
        Stream(key, numbers, recipe, source.width, room, drop_norms, source.device, owners[key])
        for key in source.keys
    ]
    run = SaeRun(directory, streams, settings, source.metadata, source.device)
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


def _say(line: str) -> None:
    from dlmctl.train.distributed import is_first

    if is_first():
        print(f"dlmctl: {line}", file=sys.stderr)


def _source(
    corpus: list[str],
    model: str,
    layers: str | None,
    positions: str | None,
    law: Mapping[str, Any],
    context: int,
    hide_prompt: bool,
    batch_size: int,
    seed: int,
    device: str,
    dtype: str,
) -> Source:
    """Stored activations where the corpus is a directory, else those of the model."""
    from dlmctl.models.loading import load_policy, resolve_device
    from dlmctl.sae.corpus import Corruption
    from dlmctl.sae.training.sources import ModelSource, StoredSource
    from dlmctl.train.distributed import size
    from dlmctl.train.sharding import shard

    kinds = position_kinds(positions) if positions else None
    chosen = layer_numbers(layers) if layers else None
    if len(corpus) == 1 and Path(corpus[0]).is_dir():
        return StoredSource(Path(corpus[0]), chosen, kinds, resolve_device(device))
    masks = Corruption(*level_range(law["level"]), law["per_batch"], seed)
    policy = load_policy(model, device, dtype)
    if size() > 1:
        shard(policy)

    def windows() -> Iterator[list[Document]]:
        return corpus_windows(
            corpus, policy, context, law["pack"], hide_prompt, batch_size, repeat=True
        )

    about = {"context": context, "pack": law["pack"], "hide_prompt": hide_prompt}
    return ModelSource(policy, windows, chosen or [0], kinds or ["mask"], masks, about)
