"""The windows of text that are kept of each feature while a corpus goes by.

    top        around its strongest activations
    weighted   around activations drawn with probability proportional to them, from documents
               without a window in `top` (Efraimidis and Spirakis 2006: the largest
               u^(1/activation), u uniform)
    inactive   around tokens drawn at random, if it is active on no token of the window

No two windows of a kind come from one document. Random numbers are a function of the seed, the
feature, the document and the position.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dlmctl.diffusion.noise import key_tensor, stream_key, uniform
from dlmctl.models.token_text import TokenTexts
from dlmctl.sae.features.code_batch import CodeBatch
from dlmctl.sae.features.firing_stats import rounded
from dlmctl.sae.features.reservoir import Reservoir
from dlmctl.settings.features import WindowCounts

Kind = Literal["top", "weighted", "inactive"]

POOL = 1024
"""Random windows from which those are drawn in which a feature is not active."""
LONGEST = 2**20
"""More tokens than a document has."""


class Windows:
    """Windows of S features, `latents` int64 [S]."""

    def __init__(self, latents: Tensor, counts: WindowCounts, seed: int) -> None:
        def keys(kind: Kind) -> Tensor:  # [S]
            return key_tensor([stream_key(seed, kind, feature) for feature in latents.tolist()])

        self._counts = counts
        self._offsets = torch.arange(-counts.radius, counts.radius + 1)  # [W]
        self._top = Reservoir(len(latents), counts.top)
        # Documents with a window in `top` are left out at the end: keep enough others.
        self._weighted = Reservoir(len(latents), counts.weighted + counts.top)
        self._pool = Reservoir(1, POOL)
        self._weighted_keys, self._inactive_keys = keys("weighted"), keys("inactive")
        self._pool_key = key_tensor([stream_key(seed, "pool")])
        self._documents: dict[int, dict[str, Any]] = {}
        self._limit = 1000

    def add(self, codes: CodeBatch) -> None:
        """Offer the tokens of a batch to the reservoirs."""
        # 1. Names of the documents.
        for document in codes.batch.documents:
            names = ("id", "sample")
            known = {name: document.record[name] for name in names if name in document.record}
            self._documents[document.number] = known or {"id": document.number}

        # 2. Windows around active tokens, [P].
        def around_active(taken: Tensor) -> dict[str, Tensor]:
            content, token = self._texts(codes, codes.token[taken])
            return {**content, "activations": codes.activations(codes.slot[taken][:, None], token)}

        row, position = codes.row[codes.token], codes.column[codes.token]
        number = codes.numbers[row]
        self._top.offer(codes.slot, codes.value, number, around_active)
        noise = uniform(self._weighted_keys[codes.slot], number * LONGEST + position)
        score = noise.log() / codes.value.double().clamp(min=1e-30)
        self._weighted.offer(codes.slot, score, number, around_active)

        # 3. Windows around any token, [N], with the features that are active in them.
        def around_any(taken: Tensor) -> dict[str, Tensor]:
            content, token = self._texts(codes, taken)
            none = codes.slots.new_full((1, codes.slots.shape[1]), codes.size)
            slots = torch.cat([codes.slots, none])[token]  # [C, W, K]; token -1 is the last row
            active = torch.zeros(len(taken), codes.size + 1, dtype=torch.bool)
            active.scatter_(1, slots.flatten(1), True)
            return {**content, "active": active[:, :-1]}  # [C, S]

        number = codes.numbers[codes.row]
        score = uniform(self._pool_key, number * LONGEST + codes.column)
        self._pool.offer(torch.zeros_like(number), score, number, around_any)
        self._forget()

    def of(self, slot: int, texts: TokenTexts) -> dict[Kind, list[dict[str, Any]]]:
        """The windows of a feature as a record has them, each kind in its order.

        A window has the `id` and, if there is one, the `sample` of its document; the `position` of
        its middle token in the document and its index `middle` in the lists; the level `t`; and
        the lists `tokens`, `masked` and `activations`, 0 on tokens that are not encoded.
        """
        top = self._top.places(slot)
        used = set(self._top.number[top].tolist())
        weighted = self._weighted.places(slot)
        weighted = [p for p in weighted if int(self._weighted.number[p]) not in used]
        pooled = len(self._pool.places(0))
        inactive: list[int] = []
        if pooled:
            quiet = (~self._pool.content["active"][:pooled, slot]).nonzero().squeeze(1)
            noise = uniform(self._inactive_keys[slot], self._pool.number[quiet])
            inactive = quiet[noise.argsort(stable=True)].tolist()

        def windows(reservoir: Reservoir, places: list[int]) -> list[dict[str, Any]]:
            return [self._window(reservoir, place, texts) for place in places]

        return {
            "top": windows(self._top, top),
            "weighted": windows(self._weighted, weighted[: self._counts.weighted]),
            "inactive": windows(self._pool, inactive[: self._counts.inactive]),
        }

    def _texts(self, codes: CodeBatch, middle: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The windows around tokens [C], and the numbers [C, W] of their tokens, -1 for none."""
        batch, row = codes.batch, codes.row[middle][:, None]  # [C, 1]
        column = codes.column[middle][:, None] + self._offsets  # [C, W]
        within = (column >= 0) & (column < batch.valid.sum(dim=1)[row])
        column = column.clamp(0, batch.ids.shape[1] - 1)
        content = {
            "position": codes.column[middle],
            "level": batch.level[row[:, 0]],
            "ids": batch.ids[row, column].where(within, torch.tensor(-1)).int(),
            "masked": batch.masked[row, column] & within,
        }
        return content, codes.index[row, column].where(within, torch.tensor(-1))

    def _window(self, reservoir: Reservoir, place: int, texts: TokenTexts) -> dict[str, Any]:
        content = {name: tensor[place] for name, tensor in reservoir.content.items()}
        within = content["ids"] >= 0  # [W]
        activations = content.get("activations", torch.zeros(len(within)))
        return {
            **self._documents[int(reservoir.number[place])],
            "position": int(content["position"]),
            "middle": int(within[: len(within) // 2].sum()),
            "t": rounded(float(content["level"])),
            "tokens": texts.row(content["ids"][within].tolist()),
            "masked": content["masked"][within].tolist(),
            "activations": [rounded(value) for value in activations[within].tolist()],
        }

    def _forget(self) -> None:
        """Drop the names of documents of which no window is kept any more."""
        if len(self._documents) < self._limit:
            return
        kept = [r.number for r in (self._top, self._weighted, self._pool)]
        numbers = torch.cat(kept).unique().tolist()
        self._documents = {n: self._documents[n] for n in numbers if n >= 0}
        self._limit = 2 * len(self._documents) + 1000
