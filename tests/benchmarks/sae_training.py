"""Top-K autoencoders trained here, by SAELens and by sparsify, on the same activations by turns.

    pip install sae-lens eai-sparsify
    OMP_NUM_THREADS=1 python tests/benchmarks/sae_training.py -k 50 -k 160

Each takes its own training step, with its own first weights, loss and scale of the activations;
Adam, its rate and the steps of warm-up are the same. Writes a record for each, with tokens per
second by the median step, the ratio to ours, and the variance left unexplained (fvu) in activations
that none was trained on. What is not installed is left out, and said.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, Protocol

import torch
import typer
from sae import planted_activations
from torch import Tensor

from dlmctl.records.jsonl import write_records
from dlmctl.sae.training.trainer import SaeTrainer, fit
from dlmctl.settings.sae import SaeRecipe

RATE = 3e-4


class Trained(Protocol):
    """An autoencoder under training."""

    def train_step(self, x: Tensor) -> Any:
        """Train on activations [N, d]."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """[N, d] of [N, d]."""


class Ours:
    def __init__(self, recipe: SaeRecipe, k: int, first: Tensor) -> None:
        self.trainer = SaeTrainer(recipe, first.shape[1], k, 0, "cpu")
        self.trainer.begin(first)
        self.train_step = self.trainer.train_step

    def reconstruct(self, x: Tensor) -> Tensor:
        made: Tensor = self.trainer.saved({}).sae(x)
        return made


class SaeLens:
    """Its SAETrainer, with codes dense or as sparse tensors."""

    def __init__(self, recipe: SaeRecipe, k: int, first: Tensor, sparse: bool) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(0)
        config = TopKTrainingSAEConfig(
            d_in=first.shape[1],
            d_sae=recipe.latents,
            k=k,
            use_sparse_activations=sparse,
            # By its default it is on, and sparse codes have no backward pass with it on the CPU.
            rescale_acts_by_decoder_norm=not sparse,
        )
        settings = SAETrainerConfig(
            total_training_samples=recipe.tokens,
            train_batch_size_samples=recipe.batch_size,
            lr=RATE,
            lr_end=0.0,
            lr_warm_up_steps=recipe.steps // 10,
            lr_decay_steps=recipe.steps // 5,
        )
        self.trainer: Any = SAETrainer(settings, TopKTrainingSAE(config), iter(()))

    def train_step(self, x: Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        made: Tensor = self.trainer.sae(x)
        return made


class Sparsify:
    """What its Trainer does with the activations of a batch, with --optimizer adam."""

    def __init__(self, recipe: SaeRecipe, k: int, first: Tensor) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # it says there what it has not got
            from sparsify import SparseCoder, SparseCoderConfig
        from transformers import get_linear_schedule_with_warmup

        torch.manual_seed(0)
        self.sae: Any = SparseCoder(
            first.shape[1], SparseCoderConfig(num_latents=recipe.latents, k=k), dtype=torch.float32
        )
        self.sae.b_dec.data = first.mean(dim=0)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=RATE)
        self.schedule = get_linear_schedule_with_warmup(
            self.optimizer, recipe.steps // 10, recipe.steps
        )
        self.unused = torch.zeros(recipe.latents, dtype=torch.long)

    def train_step(self, x: Tensor) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(x)
        out.fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.unused += len(x)
        self.unused[out.latent_indices.flatten()] = 0

    def reconstruct(self, x: Tensor) -> Tensor:
        self.sae.set_decoder_norm_to_unit_norm()
        made: Tensor = self.sae(x).sae_out
        return made


def ways(recipe: SaeRecipe, k: int, first: Tensor) -> dict[str, Callable[[], Trained]]:
    """What is installed, by name."""
    found: dict[str, Callable[[], Trained]] = {"dlmctl": lambda: Ours(recipe, k, first)}
    if importlib.util.find_spec("sae_lens"):
        found["saelens"] = lambda: SaeLens(recipe, k, first, False)
        found["saelens, sparse activations"] = lambda: SaeLens(recipe, k, first, True)
    else:
        print("sae-lens is not installed: left out", file=sys.stderr)
    if importlib.util.find_spec("sparsify"):
        found["sparsify"] = lambda: Sparsify(recipe, k, first)
    else:
        print("eai-sparsify is not installed: left out", file=sys.stderr)
    return found


def compare(k: int, width: int, latents: int, size: int, steps: int) -> list[dict[str, Any]]:
    """A record for each way; the first step is not timed."""
    *data, held_out = planted_activations(width, size, steps + 1, 0, torch.device("cpu"))
    recipe = SaeRecipe(latents, size, size * steps, rate=RATE, dead_after=10_000_000)
    trained = {name: make() for name, make in ways(recipe, k, data[0]).items()}
    seconds: dict[str, list[float]] = {name: [] for name in trained}
    for x in data:
        for name, way in trained.items():
            begun = time.perf_counter()
            way.train_step(x)
            seconds[name].append(time.perf_counter() - begun)
    speeds = {name: size / statistics.median(found[1:]) for name, found in seconds.items()}
    rows = []
    for name, way in trained.items():
        with torch.no_grad():
            missed = way.reconstruct(held_out) - held_out
        rows.append(
            {
                "library": name,
                "k": k,
                "steps": steps,
                "tokens_per_second": speeds[name],
                "ours_is_faster_by": speeds["dlmctl"] / speeds[name],
                "fvu": fit(held_out, missed)["fvu"],
            }
        )
    return rows


def main(
    ks: Annotated[list[int], typer.Option("-k")],
    width: int = 768,
    latents: int = 16_384,
    sae_batch_size: int = 2048,
    steps: int = 10,
) -> None:
    """Compare what is installed."""
    torch.set_num_threads(1)
    for k in ks:
        write_records(iter(compare(k, width, latents, sae_batch_size, steps)))


if __name__ == "__main__":
    typer.run(main)
