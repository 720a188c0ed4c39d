"""The feature with the largest output score for each value, and the one with the highest AUROC."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.models.policy import Policy
from dlmctl.models.token_text import TokenTexts
from dlmctl.records.errors import DataError
from dlmctl.report.estimate import Estimate, auroc_estimate, mean_estimate
from dlmctl.sae.evaluation.halves import Halves
from dlmctl.sae.evaluation.output_score import (
    Texts,
    probabilities,
    slopes,
    step,
    word_places,
)
from dlmctl.sae.evaluation.placed import PlacedSae
from dlmctl.sae.evaluation.sentence_codes import signed_weights
from dlmctl.sae.evaluation.sentences import Labelled
from dlmctl.sae.evaluation.single import Method, aurocs, direction_method, sae_method
from dlmctl.sae.evaluation.value_words import value_words
from dlmctl.sae.topk import random_directions
from dlmctl.settings.probing import Probing


class Features(NamedTuple):
    """M directions that a step may be taken along."""

    method: Method
    directions: Tensor
    """float32 [M, d]."""
    own: bool = False
    """There is one for each value, and it is for no other."""


class Choice(NamedTuple):
    """What was chosen for V values on the first half; a rank counts from 1."""

    feature: Tensor
    """int64 [V]."""
    effect: Tensor
    """float64 [V], on the first half."""
    auroc_rank: Tensor
    """int64 [V], among all M."""
    estimate_rank: Tensor
    """int64 [V], by the first-order estimate, among all M."""
    output_rank: Tensor
    """int64 [V], by the effect, among those that were measured."""
    measured: int
    """Number of features that were measured."""


class OutputStudy:
    """Effects of steps at the layer of one autoencoder.

    Raises:
        DataError: no token tells a value, or none is to be predicted.
    """

    def __init__(
        self,
        policy: Policy,
        placed: PlacedSae,
        labelled: Labelled,
        halves: Halves,
        probing: Probing,
    ) -> None:
        self.policy, self.placed, self.probing = policy, placed, probing
        law = labelled.law
        self.level = [law.t_min, law.t_max] if policy.diffusion else None
        # Words of the values that are left out count as words of the concept all the same.
        names = {(c, values[c]) for values in labelled.values for c in halves.concepts}
        words = value_words(labelled, sorted(names, key=str), probing.words, policy)
        self.wordless = [name for name in halves.names if not words[name]]
        kept = [n for n, name in enumerate(halves.names) if words[name]]
        if not kept:
            raise DataError("no token tells a value of a concept: give more texts")
        self.halves = halves.only(kept)
        self.words = [words[name] for name in self.halves.names]
        self.concept_words = {
            concept: {token for (c, _), tokens in words.items() if c == concept for token in tokens}
            for concept in self.halves.concepts
        }
        self.texts = [self._texts(labelled, parity) for parity in (0, 1)]
        self.before = [probabilities(policy, texts, self.words) for texts in self.texts]

    def _texts(self, labelled: Labelled, parity: int) -> Texts:
        parts = []
        for part in labelled.batches:
            wanted = torch.tensor([d.number % 2 == parity for d in part.batch.documents])
            if wanted.any():
                parts.append(part.rows(wanted))
        return word_places(self.policy, parts, self.halves.names, self.concept_words)

    def changes(self, direction: Tensor, half: int) -> Tensor:
        """Change of each probability after a step along a direction [d], float64 [P, V]."""
        edit = step(self.placed.sae, direction, self.probing.amplitude)
        edits = {self.placed.layer: edit}
        after = probabilities(self.policy, self.texts[half], self.words, edits)
        return after - self.before[half]

    def means(self, numbers: Tensor, half: int) -> Tensor:
        """The mean of numbers [P, V] over the places of each value, float64 [V]."""
        counts = self.texts[half].counts
        return (numbers * counts).sum(dim=0) / counts.sum(dim=0)

    def effect(self, changes: Tensor, value: int) -> Estimate:
        """The effect for one value on the second half, from the changes [P, V]."""
        texts = self.texts[1]
        counts, mean = texts.counts[:, value], self.means(changes, 1)[value]
        influence = (changes[:, value] - mean).where(counts, 0) / counts.sum()
        return Estimate(float(mean), influence)

    def choices(self, features: Features, slope: Tensor) -> dict[str | None, Choice]:
        """What each rule chooses; None if there is nothing to choose.

        Args:
            slope: float64 [V, d], that of `slopes`.
        """
        rows, values = features.directions, len(self.words)
        area = aurocs(features.method, self.halves.first).cpu()  # [M, V]
        estimate = (rows.double() @ slope.T).cpu() * self.probing.amplitude  # [M, V]
        everything = torch.arange(values)
        if features.own:
            measured = everything
        else:
            likely = estimate.topk(min(self.probing.candidates, len(rows)), dim=0).indices
            measured = torch.cat([likely, area.argmax(dim=0)[None]]).unique()
        effects = torch.stack([self.means(self.changes(rows[n], 0), 0) for n in measured])
        best = measured[effects.argmax(dim=0)]
        picks = {"output": best, "auroc": area.argmax(dim=0)}
        choices: dict[str | None, Choice] = {}
        for rule, pick in ({None: everything} if features.own else picks).items():
            place = (measured[:, None] == pick).long().argmax(dim=0)  # [V]
            effect = effects[place, everything]
            choices[rule] = Choice(
                pick,
                effect,
                auroc_rank=_rank(area, area[pick, everything]),
                estimate_rank=_rank(estimate, estimate[pick, everything]),
                output_rank=_rank(effects, effect),
                measured=len(measured),
            )
        return choices


def _rank(table: Tensor, numbers: Tensor) -> Tensor:
    """The rank of a number in each column of [M, V], 1 for the largest."""
    return (table > numbers).sum(dim=0) + 1


def output_rows(study: OutputStudy, seed: int) -> Iterator[dict[str, Any]]:
    """A row for each method, rule and value; then the means over the values.

    A value that no token tells has a row that says no more.

    Args:
        seed: of the random directions.
    """
    policy, placed, halves = study.policy, study.placed, study.halves
    for concept, value in study.wordless:
        yield {"concept": concept, "value": value, "words": []}
    slope = slopes(policy, placed.sae, placed.layer, study.texts[0], study.words)
    for features in _compared(placed, halves, seed):
        for rule, choice in study.choices(features, slope).items():
            if rule is None or study.probing.choose in (rule, "both"):
                yield from _rule_rows(study, features, rule, choice)


def _compared(placed: PlacedSae, halves: Halves, seed: int) -> Iterator[Features]:
    sae, first = placed.sae, halves.first
    yield Features(sae_method(sae), sae.W_dec.detach())
    random = random_directions(sae.d_sae, sae.d_in, seed).to(sae.W_dec)
    yield Features(direction_method("random", random, False), random)
    weights = torch.stack([signed_weights(present) for present in first.present])
    means = weights @ halves.first_means  # [V, d]
    means = (means / means.norm(dim=1, keepdim=True)).to(sae.W_dec)
    yield Features(direction_method("means", means, False), means, own=True)


def _rule_rows(
    study: OutputStudy, features: Features, rule: str | None, choice: Choice
) -> Iterator[dict[str, Any]]:
    method, halves, texts = features.method, study.halves, study.texts[1]
    tokens = TokenTexts(study.policy.tokenizer)
    before = study.means(study.before[1], 1).tolist()
    scores = method.scores(halves.second)(choice.feature.to(halves.second.states.device))  # [V, S]
    effects, about = [], {"method": method.name, "chosen_by": rule}
    for n, (concept, value) in enumerate(halves.names):
        changes = study.changes(features.directions[choice.feature[n]], 1)
        effects.append(study.effect(changes, n))
        feature, amplitude = int(choice.feature[n]), study.probing.amplitude
        steer = f"{study.placed.name}@{study.placed.layer}:{feature}={amplitude}"
        yield {
            "concept": concept,
            "value": value,
            **about,
            "feature": feature,
            "amplitude": amplitude,
            "steer": steer if method.name == "sae" else None,
            "t": study.level,
            "effect": effects[n].value,
            "effect_se": effects[n].error(texts.document),
            "before": before[n],
            "first_half_effect": float(choice.effect[n]),
            "output_rank": int(choice.output_rank[n]),
            "measured": choice.measured,
            "estimate_rank": int(choice.estimate_rank[n]),
            "auroc": auroc_estimate(scores[n], halves.second.present[n]).value,
            "auroc_rank": int(choice.auroc_rank[n]),
            "places": int(texts.counts[:, n].sum()),
            "words": [tokens(token) for token in study.words[n]],
        }
    mean = mean_estimate(effects)
    yield {
        **about,
        "values": len(effects),
        "effect": mean.value,
        "effect_se": mean.error(texts.document),
    }
