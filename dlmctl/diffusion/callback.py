"""Callbacks of the sampler: what each pass goes over, and a say in which tokens stay."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dlmctl.diffusion.canvas import Canvas, Targets
from dlmctl.diffusion.sampling import Request


class SamplerCallback:
    """Callback that does nothing."""

    canvas: Canvas
    """The sequences being sampled; a callback reads it and never changes it."""

    def on_start(self, canvas: Canvas) -> None:
        """Sampling begins on an empty canvas."""
        self.canvas = canvas

    def on_request(self, slot: int, request: Request) -> None:
        """A slot of the canvas takes a request."""

    def on_pass(self, slots: Sequence[int]) -> None:
        """The next forward pass goes over the whole sequences in these slots, one per row.

        With guidance a second pass follows, without the prompt; it is not announced.
        """

    def adjust_confidence(
        self, targets: Targets, states: Sequence[Tensor], confidence: Tensor
    ) -> Tensor:
        """The confidence that decides which tokens stay, float64 [N] for N targets.

        Args:
            targets: the N positions.
            states: hidden states [N, H] at these positions, as `predict_tokens` takes them.
            confidence: the sampler's own, float64 [N].
        """
        return confidence

    def on_finish(self, slot: int) -> None:
        """The completion in a slot is done; the canvas still has it."""
