"""Training runs of teachers and students of images, and their directory.

    RUN/step-000128/          a model, at steps that are spaced by a constant factor
    RUN/latest                link to the newest of them
    RUN/state/step-000130/    what a run that was killed resumes from (train/run_directory)

The batch and the noise of a step are a function of the seed and the step, so that a run that is
resumed is the same, bit for bit, as one that was never stopped. Weights and optimizer are float32;
images that were stored as bytes stay bytes, and a batch at a time becomes float32.

Under torchrun every rank has the whole network, which is small, with its averages and optimizer:
each draws the noise of the whole batch and takes the gradient of its part of the rows; gradients
are summed, so that all take the same step. The first writes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dlmctl.diffusion.noise import stream_key
from dlmctl.distill.card import image_card
from dlmctl.distill.diffusers_networks import DiffusersConfig
from dlmctl.distill.image_checkpoints import ModelConfig, save_model, saved_record
from dlmctl.distill.image_networks import draw_dropout
from dlmctl.distill.image_sets import as_floats, images_hash
from dlmctl.records.errors import CannotCreateError, UsageError
from dlmctl.settings.images import Training
from dlmctl.train.averages import decay_at, move_average
from dlmctl.train.card import write_card
from dlmctl.train.distributed import all_reduce_sums, broadcast, is_first, own_slice, run_on_first
from dlmctl.train.optimizer import (
    apply_step,
    learning_rate,
    optimizer_state,
    restore_optimizer,
)
from dlmctl.train.run_directory import (
    TENSORS,
    RunDirectory,
    as_json,
    checkpoint_name,
    publish_newest,
)

Loss = Callable[[nn.Module, nn.Module, Tensor, int, torch.Generator, slice], Tensor]
"""From the network, the target network (the network itself if there is none), a batch, the step, a
generator on the CPU and some rows of the batch to their part of the loss."""


@dataclass
class ImageProgress:
    """Counters of a run, and what it was begun with."""

    settings: dict[str, Any]
    step: int = 0
    """Steps taken, including those skipped."""
    skipped: int = 0
    """Steps left out because the gradient was not finite."""
    seconds: float = 0.0
    """Of training, in all processes that the run had."""
    sum: float = 0.0
    """Of the losses since the last record."""
    count: int = 0
    """How many they are."""
    log: int = 0
    """Bytes of metrics.jsonl."""


class TrainingRun:
    """A network, its averages and optimizer, and the directory of its run."""

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        network: nn.Module,
        loss: Loss,
        images: Tensor,
        recipe: Training,
        about: Mapping[str, Any],
        target_ema: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Begin a run, or resume the one in the directory.

        Args:
            network: as the run begins.
            images: uint8 or float32 [N, ...], to train on; bytes are as `as_floats` takes them.
            about: of the model, for its configuration; the same if a run is resumed.
            target_ema: decay of the target network; 0 has none.

        Raises:
            UsageError: the run there was begun with other settings, another rank sees other images,
                or the recipe has an option that the network or its inputs cannot have.
            CannotCreateError: there are models, and no state to resume from.
            TryAgainError: another process trains in the directory.
            RankError: one of these, on the other ranks.
        """
        _check_options(recipe, config)
        self.config, self.recipe = config, recipe
        self.loss, self.images = loss, images.to(device)
        self.network = network.to(device).train().requires_grad_(True)
        self.averages: dict[str, tuple[nn.Module, float]] = {}
        for name, decay in (("ema", recipe.ema), ("target", target_ema)):
            if decay:
                average = copy.deepcopy(self.network).eval().requires_grad_(False)
                self.averages[name] = (average, decay)
        self._parameters = dict(self.network.named_parameters())
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(self._parameters.values(), lr=0.0, fused=True)
            if config.kind == "edm"
            else torch.optim.RAdam(self._parameters.values(), lr=0.0)
        )
        about = {**about, "images_hash": images_hash(images), **recipe.recorded()}
        self.about = {**about, "optimizer": "adam" if config.kind == "edm" else "radam"}
        self._measured: dict[str, float] = {}
        self.progress = ImageProgress(as_json({**self.about, "config": asdict(config)}))
        if broadcast(self.progress.settings) != self.progress.settings:
            raise UsageError("this rank sees other images, or another teacher, than the first")
        self.directory = RunDirectory(directory, ImageProgress, in_state=True)
        resumed = self.directory.open(self._check)
        self.progress = resumed or self.progress
        state, model = self.directory.checkpoints, directory / checkpoint_name(recipe.steps)
        trained, unfinished = run_on_first(lambda: (model.exists(), state.exists()))
        self.finished = trained and not unfinished
        """Whether there is nothing left to do."""
        if is_first() and (resumed or not trained):
            self.directory.cut_metrics(self.progress.log)
        if self.directory.checkpoint:
            self._restore(load_file(self.directory.checkpoint / TENSORS))
        elif trained:
            self.progress.step = recipe.steps

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.progress.step

    @property
    def saved_network(self) -> nn.Module:
        """The weights that checkpoints have."""
        return self.averages["ema"][0] if "ema" in self.averages else self.network

    def standing(self) -> str:
        """Where the run is, for those who interrupt it."""
        return self.directory.standing(self.step)

    def train(self, log_every: int, save_seconds: float) -> Generator[dict[str, Any], None, None]:
        """Take the steps that are left.

        Yields a record each `log_every` steps and at the last: the mean loss since the one before,
        rate, norm of the last gradient, steps skipped as not finite, seconds of the run.
        """
        if self.finished:
            return
        progress, began = self.progress, time.monotonic()
        wanted, earlier, saved = set(self.recipe.checkpoint_steps()), progress.seconds, 0.0
        if is_first() and not self.directory.checkpoint:
            self._save_state()  # or a run that dies at its first model could not be resumed
        while self.step < self.recipe.steps:
            rate, norm = self._take_step()
            trained = time.monotonic() - began
            progress.seconds = earlier + trained
            if self.step % log_every == 0 or self.step == self.recipe.steps:
                record = {
                    "step": self.step,
                    "loss": progress.sum / progress.count if progress.count else None,
                    "lr": rate,
                    "grad_norm": norm,
                    "skipped": progress.skipped,
                    "seconds": round(progress.seconds, 3),
                }
                progress.sum, progress.count = 0.0, 0
                self.directory.append(record)
                yield record
            if not is_first():
                continue
            if self.step in wanted:
                self._save_model()
            if self.step in wanted or trained - saved > save_seconds:
                self._save_state()
                saved = trained
        if is_first():
            self.directory.discard_state()

    def _take_step(self) -> tuple[float, float]:
        recipe = self.recipe
        generator = torch.Generator().manual_seed(stream_key(recipe.seed, "step", self.step))
        index = torch.randint(len(self.images), (recipe.batch_size,), generator=generator)
        batch = as_floats(self.images[index.to(self.images.device)])
        if recipe.flip:
            batch = flipped(batch, stream_key(recipe.seed, "flip", self.step))
        target = self.averages["target"][0] if "target" in self.averages else self.network
        own, loss = own_slice(recipe.batch_size), batch.new_zeros(())
        if own.start < own.stop:
            if recipe.dropout:
                draw_dropout(self.network, recipe.dropout, recipe.seed, self.step, own.start)
            with torch.autocast(batch.device.type, torch.bfloat16, recipe.dtype == "bfloat16"):
                loss = self.loss(self.network, target, batch, self.step, generator, own)
            loss.backward()
            loss = loss.detach()
        all_reduce_sums([loss, *self._gradients()])
        rate = learning_rate(self.step, recipe.rate, recipe.warmup, recipe.schedule, recipe.steps)
        norm, applied = apply_step(self.optimizer, self.network.parameters(), rate, recipe.max_norm)
        self.progress.step += 1
        value = float(loss)
        self._measured = {"loss": value, "grad_norm": norm, "lr": rate}
        if not applied:
            self.progress.skipped += 1
            return rate, norm
        self.progress.sum += value
        self.progress.count += 1
        for name, (average, decay) in self.averages.items():
            # The target network always has its decay.
            now = decay_at(self.step, decay) if name == "ema" else decay
            move_average(list(average.parameters()), list(self.network.parameters()), now)
        return rate, norm

    def _gradients(self) -> list[Tensor]:
        """Of all parameters; zeros if this rank has no row."""
        for parameter in self.network.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self.network.parameters() if p.grad is not None]

    def _save_model(self) -> None:
        training = {**self.about, "step": self.step}

        def fill(directory: Path) -> None:
            save_model(directory, self.config, self.saved_network, training)
            write_card(directory, image_card(self.config, training, self._measured))

        publish_newest(self.directory.path / checkpoint_name(self.step), fill)

    def _save_state(self) -> None:
        tensors = self._weights() | optimizer_state(self.optimizer, self._parameters)
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        self.progress.log = self.directory.metrics_size()
        self.directory.save(
            self.step, self.progress, lambda path: save_file(tensors, path / TENSORS)
        )

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._weights().items():
                parameter.copy_(tensors[name])
        restore_optimizer(self.optimizer, self._parameters, tensors)

    def _weights(self) -> dict[str, Tensor]:
        """Of the network and of its averages, by name."""
        networks = {"network": self.network} | {n: a for n, (a, _) in self.averages.items()}
        return {
            f"{kind}.{name}": parameter
            for kind, network in networks.items()
            for name, parameter in network.named_parameters()
        }

    def _check(self, resumed: ImageProgress | None) -> None:
        settings = self.progress.settings
        if resumed is not None:
            self.directory.check_settings(resumed.settings, settings)
            return
        model = self.directory.path / checkpoint_name(self.recipe.steps)
        if model.exists():
            config = saved_record(model)
            training = {k: v for k, v in config.pop("training").items() if k != "step"}
            self.directory.check_settings({**training, "config": config}, settings)
        elif any(self.directory.path.glob("step-*")):
            raise CannotCreateError(
                f"{self.directory} holds another run that is done: choose another -o"
            )


def flipped(images: Tensor, key: int) -> Tensor:
    """Images [N, C, H, W], each mirrored, left to right, with probability 1/2."""
    generator = torch.Generator().manual_seed(key)
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(-1), images)


def _check_options(recipe: Training, config: ModelConfig) -> None:
    network = config.network
    foreign = network if isinstance(network, DiffusersConfig) else None
    if recipe.dropout and (isinstance(network, DiffusersConfig) or network.kind != "unet"):
        raise UsageError("--dropout is for --network unet, and not for networks of diffusers")
    if recipe.flip and foreign and (foreign.autoencoder or foreign.text):
        raise UsageError("--flip is for images: latents are not mirrored as their images are")
    if recipe.flip and len(network.shape) != 3:
        raise UsageError("--flip is for images, not vectors")
