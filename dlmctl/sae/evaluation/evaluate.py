"""Evaluation of autoencoders on a model: reconstruction, and the loss on insertion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.models.blocks import Edit, edited_blocks
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError
from dlmctl.sae.chunks import encoded, join_codes
from dlmctl.sae.corpus import MaskedBatch
from dlmctl.sae.evaluation.controls import in_sample, sampled
from dlmctl.sae.evaluation.insertion import Losses, Scored, Seen, predicted, seen
from dlmctl.sae.evaluation.placed import PlacedSae, as_inserted
from dlmctl.sae.evaluation.spliced import Ablated, Insertions
from dlmctl.sae.measures import Reconstruction, Tokens, Variance, average_max_cosines
from dlmctl.sae.topk import Codes
from dlmctl.settings.sae import Insertion


class Coded(NamedTuple):
    """Codes of N tokens of B documents."""

    codes: Codes
    row: Tensor
    """int64 [N], the document of each."""
    numbers: Tensor
    """int64 [B], the number of each document in the corpus, on the CPU."""


class Evaluation:
    """Measures of autoencoders on one policy, summed over batches."""

    def __init__(
        self, policy: Policy, saes: Sequence[PlacedSae], insertion: Insertion, seed: int = 0
    ) -> None:
        """Args:
        seed: of the noise of a control.
        """
        self.policy, self.saes, self.insertion, self.seed = policy, saes, insertion, seed
        self.measures = [Reconstruction(placed.sae.d_in, placed.latents) for placed in saes]
        self.losses = {False: Losses(), True: Losses()}
        """Of the model as it is, on masked and (True) on clean text."""
        self.insertions = Insertions(policy, saes, insertion)
        self._controls = [Variance(placed.sae.d_in, placed.latents) for placed in saes]
        """Of what principal components reconstruct."""

    @torch.no_grad()
    def prepare(self, sample: Iterable[MaskedBatch]) -> None:
        """See the documents from which means and principal components are."""
        for batch in sample if self.insertion.needs_sample else ():
            inside = in_sample(batch).to(self.policy.device)[:, None]
            for clean, numbers in self._kinds():
                view, outputs = self._seen(batch, clean), dict[int, Tensor]()
                with edited_blocks(self.policy, self._keeping(outputs, numbers)):
                    self.policy.hidden_of(view.rows)
                self.insertions.see(view, clean, outputs, inside)
        self.insertions.seen_all()

    @torch.no_grad()
    def add(self, batch: MaskedBatch) -> list[Coded]:
        """Take in a batch; returns the codes of each autoencoder at the positions it is for."""
        coded: dict[int, Coded] = {}
        for clean, numbers in self._kinds():
            view, outputs = self._seen(batch, clean), dict[int, Tensor]()
            scored = self._scored(clean)
            before = predicted(self.policy, view, scored, self._keeping(outputs, numbers))
            self.losses[clean].add_pass(before.losses)
            ablated: Ablated = {}
            for n in numbers:
                coded[n] = self._measure(n, view, outputs[self.saes[n].layer])
                if self.insertion.insert:
                    self.insertions.add(n, view, before, scored, ablated)
        return [coded[n] for n in range(len(self.saes))]

    def _measure(self, number: int, view: Seen, output: Tensor) -> Coded:
        """Measure the reconstruction of the output of a block, [R, Q, d]."""
        every, placed, latents = view.rows.noised(output), self.saes[number], 0  # [B, T, d]
        controls = self.insertions.components[number]
        parts = []
        for place, part in enumerate(placed.parts):
            wanted = view.batch.selected(part.positions)
            row, x = wanted.nonzero(as_tuple=True)[0], every[wanted].to(part.sae.W_enc.dtype)
            codes = encoded(part.sae, x)
            components = controls[place] if controls else None
            control = x if components is None else components.replace(x, row)
            moved = Codes(codes.values, codes.indices + latents)
            parts.append((x, part.sae.decode(codes), moved, row, control))
            latents += part.sae.d_sae
        x, made, row, control = (torch.cat([part[n] for part in parts]) for n in (0, 1, 3, 4))
        codes = join_codes([part[2] for part in parts])
        numbers = torch.tensor([document.number for document in view.batch.documents])
        # A document's tokens must come together, for its sums.
        self.measures[number].add(x, made, codes, row, numbers)
        if controls and len(x):
            self._controls[number].add(Tokens(x.double(), control.double(), codes, row, numbers))
        return Coded(codes, row, numbers)

    def row(self, number: int) -> dict[str, Any]:
        """The measures of an autoencoder; raises DataError if no token was of its kind."""
        placed = self.saes[number]
        if not self.measures[number].tokens:
            raise DataError(f"the corpus has no token at positions {placed.about['positions']}")
        row = self.measures[number].row() | self.losses[placed.positions == "clean"].row()
        if self.insertion.insert:
            row |= self.insertions.row(number)
        if self.insertions.components[number]:
            found = self._controls[number].row()
            row |= {f"control_{name}": found[name] for name in ("fve", "fve_se")}
        return row

    def _scored(self, clean: bool) -> Scored:
        """The tokens that the model predicts."""
        return "mask" if self.policy.diffusion and not clean else "unmask"

    def _kinds(self) -> Iterator[tuple[bool, list[int]]]:
        """Autoencoders of activations on masked and (True) on clean text, by their numbers."""
        for clean in (False, True):
            numbers = [n for n, s in enumerate(self.saes) if (s.positions == "clean") == clean]
            if numbers:
                yield clean, numbers

    def _seen(self, batch: MaskedBatch, clean: bool) -> Seen:
        return seen(self.policy, batch.clean() if clean else batch, self.seed)

    def _keeping(self, outputs: dict[int, Tensor], numbers: Sequence[int]) -> dict[int, Edit]:
        layers = {self.saes[n].layer for n in numbers}
        return {layer: _keep(outputs, layer) for layer in layers}


def evaluate(
    policy: Policy,
    batches: Iterable[MaskedBatch],
    saes: Sequence[PlacedSae],
    insertion: Insertion,
    corpus: Mapping[str, Any],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A record for each autoencoder, or, with scope `both`, for each pair.

    Args:
        corpus: what each record says about the corpus.
        seed: of the noise of a control.

    Raises:
        DataError: the corpus has no token of the kind that an autoencoder is for.
        UsageError: with scope `both`, an autoencoder has no partner.
    """
    saes = as_inserted(saes, insertion)
    evaluation = Evaluation(policy, saes, insertion, seed)
    sample, batches = sampled(batches)
    evaluation.prepare(sample)
    for batch in batches:
        evaluation.add(batch)
    about = {"model": policy.name, **corpus, **about_insertion(policy, insertion)}
    return [
        {**placed.about, **about, **evaluation.row(n), **about_weights(placed)}
        for n, placed in enumerate(saes)
    ]


def about_insertion(policy: Policy, insertion: Insertion) -> dict[str, Any]:
    """How something stands in, as it stands in a record."""
    if not insertion.insert:
        return {}
    names = "scope", "keep_first", "control"
    about = {name: getattr(insertion, name) for name in names}
    return {**about, "logit_shift": policy.shift}


def about_weights(placed: PlacedSae) -> dict[str, Any]:
    """Measures of an autoencoder that need no tokens; none of a pair."""
    return average_max_cosines(placed.sae) if placed.partner is None else {}


def _keep(outputs: dict[int, Tensor], layer: int) -> Edit:
    """An edit that changes nothing and keeps the output of a block."""

    def keep(output: Tensor, _: Tensor) -> Tensor:
        outputs[layer] = output
        return output

    return keep
