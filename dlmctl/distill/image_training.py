"""Training runs of teachers and students, and their directory.

    RUN/step-000128/      a model, at steps that are spaced by a constant factor
    RUN/latest            link to the newest of them
    RUN/metrics.jsonl
    RUN/state/latest      link to what a killed run goes on from; gone when the run is done

The batch and the noise of a step are a function of the seed and the step, so that a run that goes
on is the one that was never stopped, bit for bit. Training is in float32.

Under torchrun every rank has the whole network, which is small, and the averages and the optimizer
of its own: each draws the noise of the whole batch, takes the gradient of its part of the rows, and
gradients are summed, so that all take the same step. The first writes.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dlmctl.diffusion.noise import stream_key
from dlmctl.distill.card import image_card
from dlmctl.distill.image_checkpoints import ModelConfig, checkpoint_name, save_model
from dlmctl.records.errors import CannotCreateError, UsageError
from dlmctl.records.files import (
    append_line,
    make_directory,
    publish_directory,
    publish_link,
    read_json,
    remove_directory,
    remove_partials,
)
from dlmctl.records.interrupts import standing
from dlmctl.records.jsonl import dump
from dlmctl.records.locks import Lock, hold_run
from dlmctl.settings.optimizer import Schedule
from dlmctl.train.card import write_card
from dlmctl.train.distributed import agreed, from_first, is_first, own_part, sum_up
from dlmctl.train.optimizer import apply_step, learning_rate

Loss = Callable[[nn.Module, nn.Module, Tensor, int, torch.Generator, slice], Tensor]
"""From the network, the target network (the network itself where there is none), a batch, the step,
a generator on the CPU and some rows of the batch to their part of the loss."""


@dataclass(frozen=True)
class Recipe:
    """The optimization of a run."""

    steps: int
    batch_size: int
    rate: float
    optimizer: Literal["adam", "radam"] = "adam"
    warmup: int = 0
    schedule: Schedule = "constant"
    max_norm: float = 1.0
    ema: float = 0.999
    """Of the weights that are saved, rising to this from 0.1 as (1 + step) / (10 + step); 0 saves
    those of the last step."""
    checkpoints: int = 8
    first: int = 100
    """Step of the first checkpoint."""
    seed: int = 0

    def checkpoint_steps(self) -> list[int]:
        """The steps with a checkpoint: from `first` to the last by a constant factor."""
        if self.checkpoints == 1 or self.first >= self.steps:
            return [self.steps]
        factor = (self.steps / self.first) ** (1 / (self.checkpoints - 1))
        between = {round(self.first * factor**n) for n in range(self.checkpoints - 1)}
        return sorted(between | {self.steps})


def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * network, in place."""
    with torch.no_grad():
        for mean, value in zip(average.parameters(), network.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)


def images_hash(images: Tensor) -> str:
    """Identity of a set of images, 16 hex digits."""
    return blake2b(images.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


class TrainingRun:
    """A network, its averages and optimizer, and the directory that they live in."""

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        network: nn.Module,
        loss: Loss,
        images: Tensor,
        recipe: Recipe,
        about: Mapping[str, Any],
        target_ema: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Begin a run, or go on with the one that the directory holds.

        Args:
            network: as the run begins.
            images: float32 [N, ...], to train on.
            about: of the model, for its configuration; the same where a run goes on.
            target_ema: decay of the target network; 0 has none.

        Raises:
            UsageError: the run there was begun with other settings, or another rank sees other
                images.
            CannotCreateError: there are checkpoints, and no state to go on from.
            TryAgainError: another process trains in the directory.
            RankError: one of these, on the other ranks.
        """
        self.lock: Lock | None = None
        self.directory, self.config, self.recipe = directory, config, recipe
        self.loss, self.images = loss, images.to(device)
        self.network = network.to(device).train().requires_grad_(True)
        self.averages: dict[str, tuple[nn.Module, float]] = {}
        for name, decay in (("ema", recipe.ema), ("target", target_ema)):
            if decay:
                average = copy.deepcopy(self.network).eval().requires_grad_(False)
                self.averages[name] = (average, decay)
        parameters = list(self.network.parameters())
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(parameters, lr=0.0, fused=True)
            if recipe.optimizer == "adam"
            else torch.optim.RAdam(parameters, lr=0.0)
        )
        self.about = {**about, "images_hash": images_hash(images), **asdict(recipe)}
        self.settings = json.loads(json.dumps({**self.about, "config": asdict(config)}))
        self.step, self.skipped, self.seconds = 0, 0, 0.0
        self._sum, self._count = 0.0, 0
        self._measured: dict[str, float] = {}
        settings = json.dumps(self.settings)
        if agreed(settings) != settings:
            raise UsageError("this rank sees other images, or another teacher, than the first")
        state, done, self.finished = from_first(self._open)
        """`finished`: whether there is nothing left to do."""
        if state:
            self._restore(self.state / state)
        elif done:
            self.step = recipe.steps

    @property
    def state(self) -> Path:
        """Directory of what a killed run goes on from."""
        return self.directory / "state"

    @property
    def saved_network(self) -> nn.Module:
        """The weights that checkpoints have."""
        return self.averages["ema"][0] if "ema" in self.averages else self.network

    def standing(self) -> str:
        """Where the run is, for those who interrupt it."""
        return standing(self.directory, self.state / "latest", self.step)

    def train(self, log_every: int, save_seconds: float) -> Generator[dict[str, Any], None, None]:
        """Take the steps that are left.

        Yields a record each `log_every` steps and at the last: the mean loss since the one before,
        rate, norm of the last gradient, steps skipped as not finite, seconds of the run.
        """
        if self.finished:
            return
        wanted, began, saved = set(self.recipe.checkpoint_steps()), time.monotonic(), self.seconds
        earlier = self.seconds
        if is_first():
            append_line(self.directory / "metrics.jsonl", b"")  # it is there for the first state
            if not (self.state / "latest").exists():
                self._save_state()  # or a run that dies at its first checkpoint could not go on
        while self.step < self.recipe.steps:
            rate, norm = self._take_step()
            self.seconds = earlier + time.monotonic() - began
            if self.step % log_every == 0 or self.step == self.recipe.steps:
                record = {
                    "step": self.step,
                    "loss": self._sum / self._count if self._count else None,
                    "lr": rate,
                    "grad_norm": norm,
                    "skipped": self.skipped,
                    "seconds": round(self.seconds, 3),
                }
                self._sum, self._count = 0.0, 0
                if is_first():
                    append_line(self.directory / "metrics.jsonl", dump(record))
                yield record
            if not is_first():
                continue
            if self.step in wanted:
                self._save_checkpoint()
            if self.step in wanted or self.seconds - saved > save_seconds:
                self._save_state()
                saved = self.seconds
        if is_first():
            remove_directory(self.state)

    def _take_step(self) -> tuple[float, float]:
        recipe = self.recipe
        generator = torch.Generator().manual_seed(stream_key(recipe.seed, "step", self.step))
        index = torch.randint(len(self.images), (recipe.batch_size,), generator=generator)
        batch = self.images[index.to(self.images.device)]
        target = self.averages["target"][0] if "target" in self.averages else self.network
        own, loss = own_part(recipe.batch_size), batch.new_zeros(())
        if own.start < own.stop:
            loss = self.loss(self.network, target, batch, self.step, generator, own)
            loss.backward()
            loss = loss.detach()
        sum_up([loss, *self._gradients()])
        rate = learning_rate(self.step, recipe.rate, recipe.warmup, recipe.schedule, recipe.steps)
        norm, applied = apply_step(self.optimizer, self.network.parameters(), rate, recipe.max_norm)
        self.step += 1
        value = float(loss)
        self._measured = {"loss": value, "grad_norm": norm, "lr": rate}
        if not applied:
            self.skipped += 1
            return rate, norm
        self._sum += value
        self._count += 1
        for name, (average, decay) in self.averages.items():
            # An average of the whole run at its beginning; a target network follows from the first.
            warm = (1 + self.step) / (10 + self.step) if name == "ema" else 1.0
            update_average(average, self.network, min(decay, warm))
        return rate, norm

    def _gradients(self) -> list[Tensor]:
        """Of all parameters; zeros where this rank has no row."""
        for parameter in self.network.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self.network.parameters() if p.grad is not None]

    def _save_checkpoint(self) -> None:
        target = self.directory / checkpoint_name(self.step)
        training = {**self.about, "step": self.step}

        def fill(directory: Path) -> None:
            save_model(directory, self.config, self.saved_network, training)
            write_card(directory, image_card(self.config, training, self._measured))

        self._publish(target, fill, self.directory / "latest")

    def _save_state(self) -> None:
        target = self.state / checkpoint_name(self.step)
        log = self.directory / "metrics.jsonl"
        counters = {
            "step": self.step,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "sum": self._sum,
            "count": self._count,
            "log": log.stat().st_size,
            "settings": self.settings,
        }

        def fill(directory: Path) -> None:
            save_file(self._tensors(), directory / "training.safetensors")
            (directory / "run.json").write_text(json.dumps(counters, indent=2) + "\n")

        self._publish(target, fill, self.state / "latest")
        for old in self.state.glob("step-*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)

    def _publish(self, target: Path, fill: Callable[[Path], None], link: Path) -> None:
        publish_directory(target, fill)
        publish_link(link, target.name)

    def _tensors(self) -> dict[str, Tensor]:
        """Weights, averages and moments by name."""
        made = {f"network.{name}": p for name, p in self.network.named_parameters()}
        for kind, (average, _) in self.averages.items():
            made |= {f"{kind}.{name}": p for name, p in average.named_parameters()}
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                made[f"optimizer.{key}.{name}"] = value
        return {name: value.detach().cpu().contiguous() for name, value in made.items()}

    def _open(self) -> tuple[str, bool, bool]:
        """Take the directory.

        Returns:
            The name of the state that is there to go on from, if one is; whether the model of the
            last step is there; and whether there is nothing left to do.
        """
        make_directory(self.directory)
        self.lock = hold_run(self.directory)
        remove_partials(self.directory)
        remove_partials(self.state)
        latest = self.state / "latest"
        if (latest / "run.json").exists():
            counters = read_json(latest / "run.json")
            self._check(counters["settings"])
            log = self.directory / "metrics.jsonl"
            if log.exists():
                with log.open("r+b") as file:  # what was logged after the state will be again
                    file.truncate(counters["log"])
            return latest.resolve().name, False, False
        last = self.directory / checkpoint_name(self.recipe.steps)
        if last.exists():
            done = read_json(last / "config.json")
            training = {k: v for k, v in done.pop("training").items() if k != "step"}
            self._check({**training, "config": done})
            return "", True, not self.state.exists()
        if any(self.directory.glob("step-*")):
            raise CannotCreateError(
                f"{self.directory} holds another run that is done: choose another -o"
            )
        (self.directory / "metrics.jsonl").unlink(missing_ok=True)
        return "", False, False

    def _check(self, settings: Mapping[str, Any]) -> None:
        if settings == self.settings:
            return
        changed = [name for name in self.settings if settings.get(name) != self.settings[name]]
        raise UsageError(
            f"{self.directory} holds a run with another {', '.join(changed) or 'setting'}: give "
            "the same options to go on with it, or choose another -o"
        )

    def _restore(self, state: Path) -> None:
        counters = read_json(state / "run.json")
        tensors = load_file(state / "training.safetensors")
        networks = {"network": self.network} | {n: a for n, (a, _) in self.averages.items()}
        with torch.no_grad():
            for kind, network in networks.items():
                for name, parameter in network.named_parameters():
                    parameter.copy_(tensors[f"{kind}.{name}"])
        fused = self.recipe.optimizer == "adam"
        for name, parameter in self.network.named_parameters():
            kept = {
                key: tensors[full].to(parameter.device if fused or key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
                if (full := f"optimizer.{key}.{name}") in tensors
            }
            if kept:
                self.optimizer.state[parameter] = kept
        self.step, self.skipped = counters["step"], counters["skipped"]
        self.seconds = counters["seconds"]
        self._sum, self._count = counters["sum"], counters["count"]
