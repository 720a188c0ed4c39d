"""Features of completions while they are sampled, and a decoding order that looks at them.

In every step the codes of all positions of the completion are compared with those of the step
before, and nothing older is kept. A pass must go over whole sequences: no cache. The activations of
a position are those at its own token, also for a model whose logits stand at the token before.

The order `sae` is an experiment of this package and not in the paper: the confidence of a masked
position is p(token) * s, s the Jaccard similarity of its active features with those of the step
before, averaged over the autoencoders; in the first step of a completion it is p(token).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.diffusion.callback import SamplerCallback
from dlmctl.diffusion.canvas import Canvas, Targets
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.blocks import Edit, edited_blocks
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record
from dlmctl.sae.chunks import encoded
from dlmctl.sae.order.feature_change import FeatureChange, jaccard
from dlmctl.sae.steering.sae_at_layer import SaeAtLayer, read_at_layer
from dlmctl.sae.topk import Codes


class StepFeatures(NamedTuple):
    """Features under one autoencoder in one pass, in completions of R rows of G tokens."""

    slots: Tensor
    """int64 [R], the rows of the canvas."""
    masked: Tensor
    """bool [R, G]."""
    x: Tensor
    """Activations [R * G, d]."""
    codes: Codes
    """Of x."""
    active: Tensor
    """int64 [R, G, K], features; -1 in place of those that are not active."""
    change: FeatureChange
    shared: Tensor
    """int64 [R, G], number of features active in the step before too."""


class _LastStep(NamedTuple):
    """What is kept of the last step of each of S slots, for one autoencoder."""

    active: Tensor
    """int64 [S, G, K], K the largest so far."""
    top: Tensor
    """int64 [S, G], the strongest feature."""
    masked: Tensor
    """bool [S, G]."""
    similarity: Tensor
    """float64 [S, G], with the step before; 1 in the first step."""


def read_tracked_saes(texts: Sequence[str], policy: Policy) -> list[SaeAtLayer]:
    """The autoencoders `SAE[@LAYER]`.

    Raises:
        MissingInputError, DataError, UsageError: as `read_at_layer`; or one is named twice.
    """
    saes: list[SaeAtLayer] = []
    for text in texts:
        parts = re.fullmatch(r"(.*?)(?:@(\d+))?", text, re.DOTALL)
        assert parts is not None
        name, layer = parts[1], None if parts[2] is None else int(parts[2])
        saes.append(read_at_layer(name, layer, policy, f"--sae {name}@LAYER"))
    if len({(one.name, one.layer) for one in saes}) < len(saes):
        raise UsageError("--sae names an autoencoder twice")
    return saes


def check_trackable(policy: Policy, sampler: SamplerConfig, what: str) -> None:
    """Raise UsageError if features cannot be tracked; `what` is what asks for them."""
    policy.check_one_mask()
    if not policy.diffusion:
        raise UsageError(f"{what} means nothing to {policy.name}, an autoregressive model")
    if policy.blocks is not None:
        raise UsageError(
            f"{what} looks at the whole completion in each step, and {policy.name} passes over it "
            "block by block"
        )
    if sampler.approximate:
        raise UsageError(
            f"{what} looks at the whole completion in each step, which --cache leaves out: leave "
            "out --cache"
        )
    if sampler.compile:
        raise UsageError(f"{what} and --compile do not go together: leave one out")


class FeatureTracker(SamplerCallback):
    """Compares the features of each step with those of the step before, for each autoencoder."""

    def __init__(self, policy: Policy, saes: Sequence[SaeAtLayer]) -> None:
        self.policy, self.saes = policy, saes
        self._slots: dict[int, Sequence[int]] = {}
        """The slots of the pass under way, by layers that it has not reached."""

    def around(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records of `rollout`, sampled with this callback."""
        saes = [one.fields() for one in self.saes]
        with edited_blocks(self.policy, self.edits()):
            for record in records:
                if "error" not in record:
                    record["rollout"] |= {"remasking": self.canvas.settings.remasking, "sae": saes}
                yield record

    def on_start(self, canvas: Canvas) -> None:
        super().on_start(canvas)
        shape = len(canvas.owner), canvas.settings.gen_length
        none = torch.full(shape, -1, device=canvas.device)
        self._last = [
            _LastStep(
                none[..., None].clone(),
                none.clone(),
                none < 0,
                torch.ones(shape, dtype=torch.float64, device=canvas.device),
            )
            for _ in self.saes
        ]

    def on_pass(self, slots: Sequence[int]) -> None:
        self._slots = {one.layer: slots for one in self.saes}

    def adjust_confidence(
        self, targets: Targets, states: Sequence[Tensor], confidence: Tensor
    ) -> Tensor:
        if self.canvas.settings.remasking != "sae":
            return confidence
        # Confidences below 0 mark what --eos late decides last.
        return torch.where(confidence < 0, confidence, confidence * self.stability(targets))

    def stability(self, targets: Targets) -> Tensor:
        """float64 [N], the factor of the order `sae` for N targets, all masked."""
        parts = [last.similarity[targets.slot, targets.completion] for last in self._last]
        return torch.stack(parts).mean(dim=0)

    def edits(self) -> dict[int, Edit]:
        """Edits of the blocks that change nothing."""
        return {layer: self._edit(layer) for layer in {one.layer for one in self.saes}}

    def _edit(self, layer: int) -> Edit:
        def edit(output: Tensor, ids: Tensor) -> Tensor:
            # The second pass of guidance is not announced: its slots have been popped.
            slots = self._slots.pop(layer, None)
            if slots is not None:
                for number, one in enumerate(self.saes):
                    if one.layer == layer:
                        self.on_features(number, self._features(number, slots, output, ids))
            return output

        return edit

    def _features(
        self, number: int, rows: Sequence[int], output: Tensor, ids: Tensor
    ) -> StepFeatures:
        """Encode block outputs [R, T, d] of a pass over ids [R, T], and compare."""
        canvas, sae, last = self.canvas, self.saes[number].sae, self._last[number]
        slots = canvas.tensor(rows)
        # 1. Codes of the completions.
        starts = canvas.tensor([canvas.starts[slot] for slot in rows])
        columns = starts[:, None] + torch.arange(canvas.settings.gen_length, device=ids.device)
        row = torch.arange(len(rows), device=ids.device)[:, None]  # [R, 1]; columns: [R, G]
        x = output[row, columns].flatten(0, 1).to(sae.W_enc.dtype)  # [R * G, d]
        codes = encoded(sae, x)  # [R * G, K]
        active = codes.indices.where(codes.values > 0, -1)
        top = active.gather(1, codes.values.argmax(dim=1, keepdim=True)).view_as(columns)
        more = active.shape[1] - last.active.shape[2]
        last = self._last[number] = last._replace(active=_widened(last.active, more))
        active = _widened(active.view(*columns.shape, -1), -more)  # [R, G, K]
        # 2. Compared with the step before.
        masked = ids[row, columns] == self.policy.mask_id
        known = canvas.tensor([canvas.nfe[slot] for slot in rows]) > 0  # [R]
        similarity, shared = jaccard(active, last.active[slots])
        similarity = similarity.where(known[:, None], 1.0)
        change = FeatureChange(
            similarity, top == last.top[slots], masked, last.masked[slots], known
        )
        for old, new in zip(last, (active, top, masked, similarity), strict=True):
            old[slots] = new
        return StepFeatures(slots, masked, x, codes, active, change, shared)

    def on_features(self, number: int, features: StepFeatures) -> None:
        """The autoencoder of this number has encoded a pass."""


def _widened(active: Tensor, more: int) -> Tensor:
    """Sets of features with room for `more` of them, if that is above 0."""
    return functional.pad(active, (0, max(0, more)), value=-1)
