"""What `sae-order` records of the completions that are sampled in one order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlmctl.diffusion.canvas import Canvas, Targets
from dlmctl.diffusion.noise import random_bits, stream_key
from dlmctl.diffusion.proposals import predict_tokens
from dlmctl.diffusion.sampling import Request
from dlmctl.models.policy import Policy
from dlmctl.models.sending import sent
from dlmctl.sae.order.feature_change import ChangeStats, progress
from dlmctl.sae.order.signals import ProposalPool
from dlmctl.sae.order.tracking import FeatureTracker, StepFeatures
from dlmctl.sae.steering.sae_at_layer import SaeAtLayer
from dlmctl.settings.sampler import EosRule, Remasking

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
"""p of the token that the model finds likeliest; Jaccard similarity with the step before; number of
features in common with it; the strongest feature's activation; |x|; |x - xhat| / |x|; and the share
of the completion that is decided, which is no signal but a clock to compare with. If all positions
have K active features, shared and stability rank alike."""


MEASURES = ("s_pre", "s_pre_last5", "lock_ratio", "jump", "d_post", "flips_post")
"""Numbers of a completion's report."""


class FeatureCounts:
    """C_t(f): at how many positions of a completion feature f is active in step t, on average."""

    def __init__(self, features: int, device: torch.device) -> None:
        self._counts = torch.zeros(STEPS * features, dtype=torch.float64, device=device)
        self._steps = torch.zeros(STEPS, dtype=torch.float64, device=device)

    def add(self, active: Tensor, masked: Tensor) -> None:
        """Count a step of R completions.

        Args:
            active: features int64 [R, G, K], -1 for none.
            masked: bool [R, G].
        """
        part = progress(masked, STEPS)  # [R]
        features = len(self._counts) // STEPS
        places = (part[:, None, None] * features + active)[active >= 0]
        self._counts.index_add_(0, places, torch.ones_like(places, dtype=torch.float64))
        self._steps.index_add_(0, part, torch.ones_like(part, dtype=torch.float64))

    def scores(self, other: FeatureCounts) -> Tensor:
        """sum_t |C_t(f) - C'_t(f)| float64 [F], over the t that both have seen."""
        both = (self._steps > 0) & (other._steps > 0)
        means = [c._counts.view(STEPS, -1)[both] / c._steps[both][:, None] for c in (self, other)]
        return (means[0] - means[1]).abs().sum(dim=0)


class OrderRecorder(FeatureTracker):
    """Writes a report for each completion and autoencoder, and pools proposals over completions.

    If the record of a request has `tokens.truth`, the ids of the right completion with None where
    any will do, then each proposal for a masked position of the current block is pooled with its
    signals, from the second step of a completion on; and with `probes`, from the first step on,
    with what a probe reads. Completions are pooled with their measures and whether they are right.
    """

    def __init__(
        self, policy: Policy, saes: Sequence[SaeAtLayer], probes: int | None = None
    ) -> None:
        """`probes`: how many proposals are kept for the probes of each autoencoder."""
        super().__init__(policy, saes)
        self.reports: dict[int, list[dict[str, Any]]] = {}
        """Of finished completions, by the number of their request; a row per autoencoder."""
        self.counts = [FeatureCounts(one.sae.d_sae, policy.device) for one in saes]
        self.pools = [ProposalPool() for _ in saes]
        self.probed = None if probes is None else [ProposalPool(probes) for _ in saes]
        """Columns of `probing.Proposals`."""
        self.completed = [ProposalPool() for _ in saes]
        """Columns of `solving.solving_rows`."""
        self._passed: list[list[StepFeatures]] = [[] for _ in saes]
        """With `probes`, the passes of the step under way."""

    def on_start(self, canvas: Canvas) -> None:
        super().on_start(canvas)
        shape = len(canvas.owner), canvas.settings.gen_length  # [S, G]
        self._changes = [ChangeStats(*shape, canvas.device) for _ in self.saes]
        self._truth = torch.full(shape, -1, device=canvas.device)
        self._puzzle = torch.zeros(shape[0], dtype=torch.int64, device=canvas.device)
        zeros = torch.zeros(*shape, dtype=torch.float64, device=canvas.device)
        self._signals: list[dict[str, Tensor]] = [
            {name: zeros.clone() for name in SIGNALS[1:]} for _ in self.saes
        ]

    def on_request(self, slot: int, request: Request) -> None:
        for changes in self._changes:
            changes.reset(slot)
        record: Mapping[str, Any] = {} if request.record is None else request.record
        truth = ((record.get("tokens") or {}).get("truth") or [])[: self._truth.shape[1]]
        self._truth[slot] = -1
        known = [-1 if token is None else token for token in truth]
        self._truth[slot, : len(known)] = self.canvas.tensor(known)
        self._puzzle[slot] = stream_key(record.get("id", ""))

    def on_features(self, number: int, features: StepFeatures) -> None:
        self._changes[number].add(features.slots, features.change)
        self.counts[number].add(features.active, features.masked)
        if not bool((self._truth[features.slots] >= 0).any()):
            return
        if self.probed is not None:
            self._passed[number].append(features)
        x, codes, masked = features.x, features.codes, features.masked
        norm = x.norm(dim=1)
        reconstruction = self.saes[number].sae.decode(codes)
        for name, value in {
            "stability": features.change.similarity,
            "shared": features.shared,
            "top_activation": codes.values.amax(dim=1),
            "activation_norm": norm,
            "reconstruction_error": (x - reconstruction).norm(dim=1) / norm.clamp(min=1e-30),
            "progress": (~masked).double().mean(dim=1, keepdim=True).expand(masked.shape),
        }.items():
            self._signals[number][name][features.slots] = value.double().view(masked.shape)

    def adjust_confidence(
        self, targets: Targets, states: Sequence[Tensor], confidence: Tensor
    ) -> Tensor:
        canvas = self.canvas
        truth = self._truth[targets.slot, targets.completion]  # [N]
        [chosen] = (truth >= 0).nonzero(as_tuple=True)  # [P]
        if len(chosen):
            slot, place = targets.slot[chosen], targets.completion[chosen]
            parts = [part[chosen] for part in states]
            token, probability = self._likeliest(parts, slot)
            steps = canvas.tensor(canvas.step_numbers(range(len(canvas.owner))))[slot]
            common = {
                "unit": random_bits(sent(canvas.keys, slot.device)[slot], steps),
                "step": steps,
                "right": token == truth[chosen],
                "confidence": probability,
            }
            if self.probed is not None:
                self._offer_probes(slot, place, parts, common)
            later = canvas.tensor(canvas.nfe)[slot] > 0
            common = {name: column[later] for name, column in common.items()}
            slot, place = slot[later], place[later]
            for pool, signals in zip(self.pools, self._signals, strict=True):
                pool.offer(common | {name: table[slot, place] for name, table in signals.items()})
        for passed in self._passed:
            passed.clear()
        return super().adjust_confidence(targets, states, confidence)

    def _offer_probes(
        self,
        slot: Tensor,
        place: Tensor,
        states: Sequence[Tensor],
        common: Mapping[str, Tensor],
    ) -> None:
        """Pool P proposals, at these places of these slots, with what probes read."""
        assert self.probed is not None
        margin, entropy = (self._likeliest(states, slot, by)[1] for by in ("margin", "entropy"))
        columns = {
            "right": common["right"],
            "unit": common["unit"],
            "puzzle": self._puzzle[slot],
            "numbers": torch.stack([common["confidence"], margin, entropy], dim=1),
        }
        for pool, passed in zip(self.probed, self._passed, strict=True):
            pool.offer(columns | {"x": self._activations(passed, slot, place)})

    def _activations(self, passed: Sequence[StepFeatures], slot: Tensor, place: Tensor) -> Tensor:
        """[P, d], from the passes of a step."""
        x = passed[0].x.new_empty(len(slot), passed[0].x.shape[1])
        for features in passed:
            row = torch.full_like(self._puzzle, -1)  # [S]
            row[features.slots] = torch.arange(len(features.slots), device=row.device)
            [here] = (row[slot] >= 0).nonzero(as_tuple=True)
            table = features.x.view(*features.masked.shape, -1)  # [R, G, d]
            x[here] = table[row[slot[here]], place[here]]
        return x

    def _likeliest(
        self, states: Sequence[Tensor], keys: Tensor, by: Remasking = "low_confidence"
    ) -> tuple[Tensor, Tensor]:
        """Tokens [P] and how sure the model is of them, by p or by another rule.

        The order of the sampler does not matter; nothing is drawn, so any keys do.
        """
        settings = self.canvas.settings
        eos: EosRule = "never" if settings.eos == "never" else "normal"
        greedy = dataclasses.replace(settings, temperature=0.0, remasking=by, eos=eos)
        return predict_tokens(self.policy, states, keys, greedy)

    def on_finish(self, slot: int) -> None:
        canvas, number = self.canvas, self.canvas.owner[slot]
        assert number is not None
        reports = [changes.report(slot) for changes in self._changes]
        self.reports[number] = [
            one.fields() | report for one, report in zip(self.saes, reports, strict=True)
        ]
        truth = self._truth[slot].cpu()
        if not bool((known := truth >= 0).any()):
            return
        start = canvas.starts[slot]
        tokens = canvas.tokens[slot, start : start + len(truth)]
        same = {
            "unit": canvas.keys[slot : slot + 1],
            "puzzle": self._puzzle[slot : slot + 1].cpu(),
            "right": (tokens == truth)[known].all()[None],
        }
        for pool, report in zip(self.completed, reports, strict=True):
            numbers = {name: report[name] for name in MEASURES}
            pool.offer(same | {name: _column(value) for name, value in numbers.items()})


def _column(value: Any) -> Tensor:
    """A number as float64 [1], NaN for None."""
    return torch.tensor([torch.nan if value is None else value], dtype=torch.float64)
