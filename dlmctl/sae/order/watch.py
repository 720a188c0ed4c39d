"""What `sae-order` records of the completions that are sampled in one order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlmctl.diffusion.canvas import Canvas, Masked
from dlmctl.diffusion.noise import random_bits
from dlmctl.diffusion.proposals import propose
from dlmctl.diffusion.sampling import Request
from dlmctl.models.policy import Policy
from dlmctl.sae.order.feature_change import Ledger, progress
from dlmctl.sae.order.feature_watch import Dictionary, FeatureWatch, Look
from dlmctl.sae.order.signals import Pool
from dlmctl.settings.sampler import EosRule

STEPS = 20
"""Bins of the share decided, over which features are counted."""

SIGNALS = (
    "confidence",
    "stability",
    "shared",
    "top_activation",
    "activation_norm",
    "reconstruction_error",
    "progress",
)
"""p of the token that the model finds likeliest; Jaccard similarity with the step before; features
in common with it; the strongest feature's activation; |x|; |x - xhat| / |x|; and the share of the
completion that is decided, which is no signal but a clock to compare with. Where all positions have
K active features, shared and stability rank alike."""


class FeatureCounts:
    """C_t(f): at how many positions of a completion feature f is active in step t, on average."""

    def __init__(self, features: int, device: torch.device) -> None:
        self._counts = torch.zeros(STEPS * features, dtype=torch.float64, device=device)
        self._steps = torch.zeros(STEPS, dtype=torch.float64, device=device)

    def add(self, active: Tensor, masked: Tensor) -> None:
        """Steps of R completions: features int64 [R, G, K], -1 for none, and what is masked."""
        part = progress(masked, STEPS)
        features = len(self._counts) // STEPS
        places = (part[:, None, None] * features + active)[active >= 0]
        self._counts.index_add_(0, places, torch.ones_like(places, dtype=torch.float64))
        self._steps.index_add_(0, part, torch.ones_like(part, dtype=torch.float64))

    def scores(self, other: FeatureCounts) -> Tensor:
        """sum_t |C_t(f) - C'_t(f)| float64 [F], over the t that both have seen."""
        both = (self._steps > 0) & (other._steps > 0)
        return (self._means(both) - other._means(both)).abs().sum(dim=0)

    def _means(self, steps: Tensor) -> Tensor:
        return self._counts.view(STEPS, -1)[steps] / self._steps[steps][:, None]


class OrderWatch(FeatureWatch):
    """Records a report of each completion and dictionary, and what is pooled over completions.

    Where the record of a request has `tokens.truth`, the ids of the right completion and None where
    any will do, each proposal for a masked position of the block under way is pooled with its
    signals, from the second step of a completion on.
    """

    def __init__(self, policy: Policy, dictionaries: Sequence[Dictionary]) -> None:
        super().__init__(policy, dictionaries)
        self.reports: dict[int, list[dict[str, Any]]] = {}
        """Of completions that are done, by the number of their request; a row per dictionary."""
        self.counts = [FeatureCounts(one.sae.d_sae, policy.device) for one in dictionaries]
        self.pools = [Pool() for _ in dictionaries]

    def start(self, canvas: Canvas) -> None:
        super().start(canvas)
        shape = len(canvas.owner), canvas.settings.gen_length
        self._ledgers = [Ledger(*shape, canvas.device) for _ in self.dictionaries]
        self._truth = torch.full(shape, -1, device=canvas.device)
        numbers = torch.zeros(*shape, dtype=torch.float64, device=canvas.device)
        self._signals: list[dict[str, Tensor]] = [
            {name: numbers.clone() for name in SIGNALS[1:]} for _ in self.dictionaries
        ]

    def begin(self, slot: int, request: Request) -> None:
        for ledger in self._ledgers:
            ledger.reset(slot)
        record: Mapping[str, Any] = {} if request.record is None else request.record
        truth = ((record.get("tokens") or {}).get("truth") or [])[: self._truth.shape[1]]
        self._truth[slot] = -1
        known = [-1 if token is None else token for token in truth]
        self._truth[slot, : len(known)] = self.canvas.tensor(known)

    def saw(self, number: int, look: Look) -> None:
        self._ledgers[number].add(look.slots, look.change)
        self.counts[number].add(look.active, look.masked)
        if not bool((self._truth[look.slots] >= 0).any()):
            return
        sae, shape = self.dictionaries[number].sae, look.masked.shape
        norm = look.x.norm(dim=1)
        error = (look.x - sae.decode(look.codes)).norm(dim=1) / norm.clamp(min=1e-30)
        for name, value in {
            "stability": look.change.similarity,
            "shared": look.shared,
            "top_activation": look.codes.values.amax(dim=1),
            "activation_norm": norm,
            "reconstruction_error": error,
            "progress": (~look.masked).double().mean(dim=1, keepdim=True).expand(shape),
        }.items():
            self._signals[number][name][look.slots] = value.double().view(shape)

    def weigh(self, masked: Masked, states: Sequence[Tensor], sure: Tensor) -> Tensor:
        canvas = self.canvas
        truth = self._truth[masked.slot, masked.completion]
        later = canvas.tensor(canvas.nfe)[masked.slot] > 0
        [chosen] = ((truth >= 0) & later).nonzero(as_tuple=True)
        if len(chosen):
            slot, place = masked.slot[chosen], masked.completion[chosen]
            token, confidence = self._likeliest([part[chosen] for part in states], slot)
            steps = canvas.numbered_steps(range(len(canvas.owner)))[slot]
            common = {
                "unit": random_bits(canvas.keys[slot], steps),
                "step": steps,
                "right": token == truth[chosen],
                "confidence": confidence,
            }
            for pool, signals in zip(self.pools, self._signals, strict=True):
                pool.offer(common | {name: found[slot, place] for name, found in signals.items()})
        return super().weigh(masked, states, sure)

    def _likeliest(self, states: Sequence[Tensor], keys: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their p, whatever the order goes by; nothing is drawn, so that any keys do."""
        settings = self.canvas.settings
        eos: EosRule = "never" if settings.eos == "never" else "normal"
        greedy = dataclasses.replace(settings, temperature=0.0, remasking="low_confidence", eos=eos)
        return propose(self.policy, states, keys, greedy)

    def end(self, slot: int) -> None:
        number = self.canvas.owner[slot]
        assert number is not None
        self.reports[number] = [
            dictionary.note() | ledger.report(slot)
            for dictionary, ledger in zip(self.dictionaries, self._ledgers, strict=True)
        ]
