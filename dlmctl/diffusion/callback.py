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

    def on_rows(self, requests: Sequence[int]) -> None:
        """The next forward pass, over whole sequences or parts, has a row for each of these.

        Each is the number of a request, from 0 on in the order in which they came, or -1 for a row
        whose completion has ended. Autoregressive sampling calls this method and `on_tokens`, and
        none of the others.
        """

    def on_tokens(self, tokens: Tensor) -> None:
        """Autoregressive sampling decided these tokens, int64 [B], one for each row of `on_rows`.

        They are on the model's device. In diffusion, `canvas` has what was decided when the next
        `on_rows` is called.
        """

    @property
    def adjusts(self) -> bool:
        """Whether `adjust_confidence` is overridden, so that every target has to be predicted."""
        return type(self).adjust_confidence is not SamplerCallback.adjust_confidence

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


class SeveralCallbacks(SamplerCallback):
    """Callbacks one after the other; each sees the confidence that those before it leave."""

    def __init__(self, parts: Sequence[SamplerCallback]) -> None:
        self.parts = parts

    def on_start(self, canvas: Canvas) -> None:
        for part in self.parts:
            part.on_start(canvas)

    def on_request(self, slot: int, request: Request) -> None:
        for part in self.parts:
            part.on_request(slot, request)

    def on_pass(self, slots: Sequence[int]) -> None:
        for part in self.parts:
            part.on_pass(slots)

    def on_rows(self, requests: Sequence[int]) -> None:
        for part in self.parts:
            part.on_rows(requests)

    def on_tokens(self, tokens: Tensor) -> None:
        for part in self.parts:
            part.on_tokens(tokens)

    @property
    def adjusts(self) -> bool:
        return any(part.adjusts for part in self.parts)

    def adjust_confidence(
        self, targets: Targets, states: Sequence[Tensor], confidence: Tensor
    ) -> Tensor:
        for part in self.parts:
            confidence = part.adjust_confidence(targets, states, confidence)
        return confidence

    def on_finish(self, slot: int) -> None:
        for part in self.parts:
            part.on_finish(slot)
