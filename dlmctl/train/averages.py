"""Exponential moving averages of weights, which checkpoints have in place of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dlmctl.train.sharding import like

WEIGHTS = "weights."
"""Before the names of the weights themselves, in what a run resumes from."""


def move_average(average: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights, in place; on CUDA in one kernel."""
    get_ema_multi_avg_fn(decay)(list(average), list(weights), None)


def decay_at(step: int, decay: float) -> float:
    """The decay at this step: smaller at first, so that the first weights soon count for little."""
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """The average of some parameters, which begins with their values."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._parameters = parameters
        self._values = {name: weight.detach().clone() for name, weight in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights that this step left."""
        weights = [weight.detach() for weight in self._parameters.values()]
        move_average(list(self._values.values()), weights, decay_at(step, self.decay))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[dict[str, Tensor]]:
        """Within the block the parameters have the average; gives the weights, by name."""
        self._swap()
        try:
            yield {WEIGHTS + name: value for name, value in self._values.items()}
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._parameters.items():
            value = self._values[name]
            held = weight.detach().clone()
            weight.copy_(value)
            value.copy_(held)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back the weights that `in_place` gave, whole and on the CPU; the average stays."""
        for name, weight in self._parameters.items():
            weight.copy_(like(tensors[WEIGHTS + name], weight))
