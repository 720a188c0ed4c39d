"""The features of completions while they are sampled, and an order of decoding that goes by them.

In every step the codes of all positions of the completion are compared with those of the step
before, which is all that is kept of it. A pass must go over whole sequences: no cache. The
activations of a position are those where its token stands, also for a model whose logits stand at
the token before.

The order `sae` is an experiment of this package, and not in the paper: the confidence of a masked
position is p(token) * s, s the Jaccard similarity of its active features with those of the step
before, averaged over the dictionaries; in the first step of a completion it is p(token).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.canvas import Canvas, Masked
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.diffusion.watching import Watch
from dlmctl.models.blocks import Edit, check_layers, edited_blocks
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record
from dlmctl.sae.fitting import check_width, computing_dtype
from dlmctl.sae.formats.folders import read_sae
from dlmctl.sae.order.feature_change import Change, jaccard
from dlmctl.sae.topk import Codes, TopKSae

CODE_SIZE = 1 << 26
"""Numbers in the codes that are made at a time."""


class Dictionary(NamedTuple):
    """An autoencoder and where it looks."""

    name: str
    layer: int
    sae: TopKSae

    def note(self) -> dict[str, Any]:
        """As it stands in a record."""
        return {"sae": self.name, "layer": self.layer}


class Look(NamedTuple):
    """What a dictionary sees of the completions of R rows of G tokens in a pass."""

    slots: Tensor
    """int64 [R]."""
    masked: Tensor
    """bool [R, G]."""
    x: Tensor
    """[R * G, d]."""
    codes: Codes
    """Of x."""
    active: Tensor
    """int64 [R, G, K], features; -1 in place of those that are not active."""
    change: Change
    shared: Tensor
    """int64 [R, G], features active in the step before too."""


def read_dictionaries(texts: Sequence[str], policy: Policy) -> list[Dictionary]:
    """`SAE[@LAYER]`, on the device of the policy.

    Raises:
        MissingInputError, DataError: one cannot be read.
        UsageError: it does not fit the policy, or does not say which layer it is of.
    """
    found: list[Dictionary] = []
    for text in texts:
        parts = re.fullmatch(r"(.*?)(?:@(\d+))?", text, re.DOTALL)
        assert parts is not None
        name, number = parts.groups()
        saved = read_sae(Path(name))
        layer = saved.metadata.get("dlm_layer") if number is None else int(number)
        if not isinstance(layer, int):
            raise UsageError(
                f"{name} does not say which layer it is of (dlm_layer): write --sae {name}@LAYER"
            )
        check_layers(policy, [layer])
        check_width(name, saved.sae, policy)
        sae = saved.sae.requires_grad_(False)
        sae = sae.to(policy.device, computing_dtype(policy))
        found.append(Dictionary(name, layer, sae))
    if len({(one.name, one.layer) for one in found}) < len(found):
        raise UsageError("--sae names an autoencoder twice")
    return found


def check_watchable(policy: Policy, settings: SamplerConfig, what: str) -> None:
    """Raise UsageError where features cannot be followed; `what` is what asks for them."""
    if not policy.diffusion:
        raise UsageError(f"{what} means nothing to {policy.name}, an autoregressive model")
    if settings.cache != "none":
        raise UsageError(
            f"{what} looks at the whole completion in each step, which --cache leaves out: leave "
            "out --cache"
        )
    if settings.compile:
        raise UsageError(f"{what} and --compile do not go together: leave one out")


class _Memory(NamedTuple):
    """What is kept for each of S slots, of one dictionary."""

    active: Tensor
    """int64 [S, G, K]."""
    top: Tensor
    """int64 [S, G]."""
    masked: Tensor
    """bool [S, G]."""
    similarity: Tensor
    """float64 [S, G], of the newest step with the one before; 1 in the first."""


class FeatureWatch(Watch):
    """Follows the features of dictionaries while completions are sampled."""

    def __init__(self, policy: Policy, dictionaries: Sequence[Dictionary]) -> None:
        self.policy, self.dictionaries = policy, dictionaries
        self._rows: dict[int, Sequence[int]] = {}

    def around(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records of `rollout`, sampled under this watch."""
        notes = [dictionary.note() for dictionary in self.dictionaries]
        with edited_blocks(self.policy, self.edits()):
            for record in records:
                if "error" not in record:
                    record["rollout"] |= {"remasking": self.canvas.settings.remasking, "sae": notes}
                yield record

    def start(self, canvas: Canvas) -> None:
        super().start(canvas)
        slots, length, device = len(canvas.owner), canvas.settings.gen_length, canvas.device
        empty = torch.full((slots, length), -1, device=device)
        self._memories = [
            _Memory(
                empty[..., None].repeat(1, 1, dictionary.sae.k),
                empty.clone(),
                empty < 0,
                torch.ones(slots, length, dtype=torch.float64, device=device),
            )
            for dictionary in self.dictionaries
        ]

    def aim(self, rows: Sequence[int]) -> None:
        self._rows = {dictionary.layer: rows for dictionary in self.dictionaries}

    def weigh(self, masked: Masked, states: Sequence[Tensor], sure: Tensor) -> Tensor:
        if self.canvas.settings.remasking != "sae":
            return sure
        # Below 0 is what --eos late puts last.
        return torch.where(sure < 0, sure, sure * self.signal(masked))

    def signal(self, masked: Masked) -> Tensor:
        """float64 [N], what the order `sae` multiplies the confidence of masked positions with."""
        found = [memory.similarity[masked.slot, masked.completion] for memory in self._memories]
        return torch.stack(found).mean(dim=0)

    def edits(self) -> dict[int, Edit]:
        """Edits that change nothing."""
        return {layer: self._edit(layer) for layer in {one.layer for one in self.dictionaries}}

    def _edit(self, layer: int) -> Edit:
        def edit(output: Tensor, ids: Tensor) -> Tensor:
            # What comes unannounced has been seen.
            rows = self._rows.pop(layer, None)
            if rows is not None:
                for number, dictionary in enumerate(self.dictionaries):
                    if dictionary.layer == layer:
                        self.saw(number, self._look(number, rows, output, ids))
            return output

        return edit

    def _look(self, number: int, rows: Sequence[int], output: Tensor, ids: Tensor) -> Look:
        canvas, sae = self.canvas, self.dictionaries[number].sae
        starts = canvas.tensor([canvas.starts[slot] for slot in rows])
        columns = starts[:, None] + torch.arange(canvas.settings.gen_length, device=ids.device)
        row = torch.arange(len(rows), device=ids.device)[:, None]
        x = output[row, columns].flatten(0, 1).to(sae.W_enc.dtype)
        parts = [sae.encode(part) for part in x.split(max(1, CODE_SIZE // sae.d_sae))]
        codes = Codes(*map(torch.cat, zip(*parts, strict=True)))
        active = codes.indices.where(codes.values > 0, -1)
        top = active.gather(1, codes.values.argmax(dim=1, keepdim=True)).view_as(columns)
        active = active.view(*columns.shape, -1)
        masked = ids[row, columns] == self.policy.mask_id
        known = canvas.tensor([canvas.nfe[slot] for slot in rows]) > 0
        slots, memory = canvas.tensor(rows), self._memories[number]
        similarity, shared = jaccard(active, memory.active[slots])
        similarity = similarity.where(known[:, None], 1.0)
        change = Change(similarity, top == memory.top[slots], masked, memory.masked[slots], known)
        for kept, new in zip(memory, (active, top, masked, similarity), strict=True):
            kept[slots] = new
        return Look(slots, masked, x, codes, active, change, shared)

    def saw(self, number: int, look: Look) -> None:
        """What the dictionary of this number saw in a pass."""
