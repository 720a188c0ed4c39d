"""Sampling seen from outside: what each pass goes over, and a say in which tokens stay."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dlmctl.diffusion.canvas import Canvas, Masked
from dlmctl.diffusion.sampling import Request


class Watch:
    """Told by the sampler what it does; this one looks away."""

    canvas: Canvas
    """Where the sequences stand; whoever watches changes nothing there."""

    def start(self, canvas: Canvas) -> None:
        """Sampling begins, on a canvas with nothing under way."""
        self.canvas = canvas

    def begin(self, slot: int, request: Request) -> None:
        """A slot takes a request."""

    def aim(self, rows: Sequence[int]) -> None:
        """The next pass goes over these slots, a row for each, all of their sequences.

        With guidance the pass behind it, that does not see the prompt, comes unannounced.
        """

    def weigh(self, masked: Masked, states: Sequence[Tensor], sure: Tensor) -> Tensor:
        """The confidence float64 [N] of masked positions to the one that decides which stay.

        Args:
            states: hidden states [N, H] of these positions, as `propose` takes them.
        """
        return sure

    def end(self, slot: int) -> None:
        """The completion of a slot is done; it is still there."""
