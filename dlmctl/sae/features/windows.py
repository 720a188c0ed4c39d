"""The windows of text that are kept of each feature while a corpus goes by.

    top        around its strongest activations
    weighted   around activations drawn with probability proportional to them, without those
               documents whose windows are in `top` (Efraimidis and Spirakis 2006: the largest
               u^(1/activation), u uniform)
    inactive   around tokens drawn at random, where it is active on no token of the window

No two windows of a kind come from one document. Random numbers are a function of the seed, the
feature, the document and the position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.noise import key_tensor, stream_key, uniform
from dlmctl.records.errors import UsageError
from dlmctl.sae.features.active import Active
from dlmctl.sae.features.reservoir import Fill, Reservoir

Kind = Literal["top", "weighted", "inactive"]

POOL = 1024
"""Random windows in which those are looked for where a feature is not active."""
LONGEST = 2**20
"""More tokens than a document has."""


@dataclass(frozen=True)
class Plan:
    """How many windows of each kind are kept of a feature."""

    top: int = 12
    weighted: int = 7
    inactive: int = 10
    radius: int = 10
    """Tokens on either side of the middle one."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top < 1 or min(self.weighted, self.inactive, self.radius) < 0:
            raise UsageError("at least one top window is kept, and no number of them is below 0")


class Window(NamedTuple):
    """A stretch of a document; the lists have an entry for each token."""

    document: dict[str, Any]
    """`id` of its record and, where there is one, `sample`."""
    position: int
    """Of the middle token, in the document."""
    middle: int
    """Of the middle token, in the lists."""
    level: float
    """t."""
    ids: list[int]
    hidden: list[bool]
    activations: list[float]
    """0 on tokens that were not looked at."""


class Windows:
    """Windows of S features, `latents` [S]."""

    def __init__(self, latents: Tensor, plan: Plan) -> None:
        numbers: list[int] = latents.tolist()
        self._plan = plan
        self._offsets = torch.arange(-plan.radius, plan.radius + 1)
        self._top = Reservoir(len(numbers), plan.top)
        # Those whose documents are in `top` are left out at the end: there must be others.
        self._weighted = Reservoir(len(numbers), plan.weighted + plan.top)
        self._pool = Reservoir(1, POOL)
        self._weighted_keys = key_tensor([stream_key(plan.seed, "weighted", f) for f in numbers])
        self._inactive_keys = key_tensor([stream_key(plan.seed, "inactive", f) for f in numbers])
        self._documents: dict[int, dict[str, Any]] = {}
        self._limit = 1000

    def add(self, active: Active) -> None:
        """Take what a batch has."""
        for document in active.batch.documents:
            names = ("id", "sample")
            known = {name: document.record[name] for name in names if name in document.record}
            self._documents[document.number] = known or {"id": document.number}
        row, position = active.row[active.token], active.column[active.token]
        number = active.numbers[row]
        fill = self._fill(active)
        self._top.offer(active.slot, active.value, number, fill)
        noise = uniform(self._weighted_keys[active.slot], number * LONGEST + position)
        score = noise.log() / active.value.double().clamp(min=1e-30)
        self._weighted.offer(active.slot, score, number, fill)
        number = active.numbers[active.row]
        key = key_tensor([stream_key(self._plan.seed, "pool")])
        score = uniform(key, number * LONGEST + active.column)
        self._pool.offer(torch.zeros_like(number), score, number, self._fill_pool(active))
        self._forget()

    def of(self, slot: int) -> dict[Kind, list[Window]]:
        """The windows of a feature, each kind in its order."""
        top = self._top.places(slot)
        taken = {int(self._top.number[place]) for place in top}
        others = [
            place
            for place in self._weighted.places(slot)
            if int(self._weighted.number[place]) not in taken
        ]
        return {
            "top": [_window(self._top, place, self._documents) for place in top],
            "weighted": [
                _window(self._weighted, place, self._documents)
                for place in others[: self._plan.weighted]
            ],
            "inactive": list(self._inactive(slot)),
        }

    def _inactive(self, slot: int) -> Iterator[Window]:
        count = len(self._pool.places(0))
        if not count:
            return
        quiet = (~self._pool.content["active"][:count, slot]).nonzero().squeeze(1)
        noise = uniform(self._inactive_keys[slot], self._pool.number[quiet])
        for place in quiet[noise.argsort(stable=True)][: self._plan.inactive].tolist():
            yield _window(self._pool, place, self._documents)

    def _fill(self, active: Active) -> Fill:
        def fill(taken: Tensor) -> dict[str, Tensor]:
            content, token = self._texts(active, active.token[taken])
            return {**content, "activations": active.at(active.slot[taken][:, None], token)}

        return fill

    def _fill_pool(self, active: Active) -> Fill:
        def fill(taken: Tensor) -> dict[str, Tensor]:
            content, token = self._texts(active, taken)
            none = active.slots.new_full((1, active.slots.shape[1]), active.size)
            slots = torch.cat([active.slots, none])[token]  # token -1 is the last row
            some = torch.zeros(len(taken), active.size + 1, dtype=torch.bool)
            some.scatter_(1, slots.flatten(1), True)
            return {**content, "active": some[:, :-1]}

        return fill

    def _texts(self, active: Active, middle: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What stands around tokens [C], and the numbers [C, width] of the tokens there, or -1."""
        batch, row = active.batch, active.row[middle][:, None]
        column = active.column[middle][:, None] + self._offsets
        within = (column >= 0) & (column < batch.valid.sum(dim=1)[row])
        column = column.clamp(0, batch.ids.shape[1] - 1)
        content = {
            "position": active.column[middle],
            "level": batch.level[row[:, 0]],
            "ids": batch.ids[row, column].where(within, torch.tensor(-1)).int(),
            "hidden": batch.masked[row, column] & within,
        }
        return content, active.index[row, column].where(within, torch.tensor(-1))

    def _forget(self) -> None:
        """Names of documents of which nothing is kept any more."""
        if len(self._documents) < self._limit:
            return
        kept = [r.number for r in (self._top, self._weighted, self._pool)]
        numbers = torch.cat(kept).unique().tolist()
        self._documents = {n: self._documents[n] for n in numbers if n >= 0}
        self._limit = 2 * len(self._documents) + 1000


def _window(reservoir: Reservoir, place: int, documents: dict[int, dict[str, Any]]) -> Window:
    content = {name: tensor[place] for name, tensor in reservoir.content.items()}
    there = content["ids"] >= 0
    activations = content.get("activations", torch.zeros(len(there)))
    return Window(
        documents[int(reservoir.number[place])],
        int(content["position"]),
        int(there[: len(there) // 2].sum()),
        float(content["level"]),
        content["ids"][there].tolist(),
        content["hidden"][there].tolist(),
        activations[there].tolist(),
    )
