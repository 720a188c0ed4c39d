"""What a model predicts while autoencoders, or what they are compared with, stand in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dlmctl.models.blocks import Edit
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError
from dlmctl.sae.evaluation.controls import (
    SAMPLE,
    Components,
    Explained,
    Moments,
    constant,
    gaussian,
    reconstruction,
)
from dlmctl.sae.evaluation.insertion import (
    ABLATIONS,
    LOSSES,
    Changes,
    Prediction,
    Recovered,
    Replacement,
    Scored,
    Seen,
    Where,
    divergences,
    predicted,
    splice,
)
from dlmctl.sae.evaluation.placed import PlacedSae
from dlmctl.settings.sae import Insertion

Spot = tuple[bool, int, Where]
"""Whether the text is clean; the block; which of its tokens."""
Ablated = dict[tuple[Spot, ...], dict[str, tuple[Tensor, Tensor]]]
"""Loss and divergence of each document, float64 [B], under each ablation of these spots."""


class Insertions:
    """The changes that autoencoders make to the predictions of one policy, summed over batches."""

    def __init__(self, policy: Policy, saes: Sequence[PlacedSae], insertion: Insertion) -> None:
        self.policy, self.saes, self.insertion = policy, saes, insertion
        self.changes = [Changes() for _ in saes]
        self.recovered = [Recovered(insertion.ablate) for _ in saes]
        spots = {self._spot(part) for placed in saes for part in placed.parts}
        self.means = {spot: Moments() for spot in sorted(spots)}
        """Of the activations at which something stands in, in the sample."""
        by_components = insertion.insert and insertion.control == "pca"
        self._explained = [
            [Explained(part.sae) for part in placed.parts] if by_components else []
            for placed in saes
        ]
        self.components: list[list[Components | None]] = [[] for _ in saes]
        """Of the parts of each autoencoder; none unless --control is pca."""

    def see(self, view: Seen, clean: bool, outputs: Mapping[int, Tensor], inside: Tensor) -> None:
        """Take in a batch of the sample.

        Args:
            clean: whether this is the text without masks.
            outputs: of the blocks, [R, Q, d] each.
            inside: bool [B, 1], the documents of the sample.
        """
        for spot, moments in self.means.items():
            if spot[0] == clean:
                wanted = view.spliced(spot[2], self.insertion.keep_first) & inside
                moments.add(outputs[spot[1]][wanted])
        for placed, explained in zip(self.saes, self._explained, strict=True):
            if (placed.positions == "clean") == clean:
                x = view.rows.noised(outputs[placed.layer])  # [B, T, d]
                for part, one in zip(placed.parts, explained, strict=False):
                    one.add(x[view.batch.selected(part.positions) & inside])

    def seen_all(self) -> None:
        """End the sample."""
        self.components = [[one.components() for one in each] for each in self._explained]

    def add(
        self, number: int, view: Seen, before: Prediction, scored: Scored, ablated: Ablated
    ) -> None:
        """Take in a batch for one autoencoder.

        Args:
            before: what the model predicts as it is.
            ablated: what is known of the batch; ablations that were missing are added to it.
        """
        placed, which = self.saes[number], LOSSES.index(scored)
        spots = tuple(self._spot(part) for part in placed.parts)

        def passed(name: str) -> Prediction:
            edits = []
            for place, spot in enumerate(spots):
                wanted = view.spliced(spot[2], self.insertion.keep_first)
                replacement = self._replacement(name, number, place)
                edits.append(splice(wanted, view.keys, replacement))
            return predicted(self.policy, view, scored, {placed.layer: _in_turn(edits)})

        after = passed(self.insertion.control)
        self.changes[number].add_pair(before.losses, after.losses)
        if self.insertion.ablate and spots not in ablated:
            found = {name: passed(name) for name in ABLATIONS}
            ablated[spots] = {
                name: (one.losses.sums[which], divergences(self.policy, before, one))
                for name, one in found.items()
            }
        self.recovered[number].add_documents(
            (before.losses.sums[which], after.losses.sums[which]),
            divergences(self.policy, before, after),
            before.losses.tokens[which],
            ablated.get(spots, {}),
        )

    def row(self, number: int) -> dict[str, Any]:
        """What the insertion changes."""
        row: dict[str, Any] = self.changes[number].row() | self.recovered[number].row()
        placed = self.saes[number]
        for part, components in zip(placed.parts, self.components[number], strict=False):
            name = "components" if placed.partner is None else f"components_{part.positions}"
            row[name] = None if components is None else components.basis.shape[1]
        return row

    def _spot(self, part: PlacedSae) -> Spot:
        """Where an autoencoder stands in."""
        kind = part.positions
        if kind == "clean":
            return True, part.layer, "all"
        return False, part.layer, "all" if self.insertion.scope == "all" else kind

    def _replacement(self, name: str, number: int, place: int) -> Replacement:
        """What stands in: as --control says, or `zero` or `mean`."""
        part = self.saes[number].parts[place]
        if name == "none":
            return reconstruction(part.sae)
        if name == "gaussian":
            return gaussian(part.sae)
        if name == "zero":
            return constant(0)
        if name == "mean":
            moments = self.means[self._spot(part)]
            return constant(moments.mean) if moments.count else _missing(part)
        components = self.components[number][place]
        return _missing(part) if components is None else components.replace


def _missing(part: PlacedSae) -> Replacement:
    def replace(x: Tensor, _: Tensor) -> Tensor:
        if len(x):
            raise DataError(
                f"the first {SAMPLE:,} texts have no token at positions {part.positions}"
            )
        return x

    return replace


def _in_turn(edits: Sequence[Edit]) -> Edit:
    """Several edits, one after the other."""

    def edit(output: Tensor, ids: Tensor) -> Tensor:
        for one in edits:
            output = one(output, ids)
        return output

    return edit
