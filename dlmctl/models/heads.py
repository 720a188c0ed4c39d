"""Output heads of Hugging Face models: from the last hidden states to the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from dlmctl.records.errors import DataError


class Head(NamedTuple):
    """logits = projection(transform(hidden states))."""

    transform: Callable[[Tensor], Tensor]
    """[N, H] to [N, H]; decoders have none, BERT-like encoders a layer of their own."""
    projection: nn.Linear
    """[N, H] to [N, V]."""


def output_head(model: Any) -> Head:
    """The output head of a Hugging Face model; raises DataError for an unknown kind."""
    if isinstance(getattr(model, "lm_head", None), nn.Linear):  # decoders
        return Head(_identity, model.lm_head)
    if hasattr(getattr(model, "lm_head", None), "decoder"):  # RoBERTa
        head = model.lm_head
        return Head(
            lambda states: head.layer_norm(functional.gelu(head.dense(states))), head.decoder
        )
    if hasattr(model, "cls"):  # BERT
        return Head(model.cls.predictions.transform, model.cls.predictions.decoder)
    if hasattr(model, "head") and hasattr(model, "decoder"):  # ModernBERT
        return Head(model.head, model.decoder)
    if hasattr(model, "vocab_projector"):  # DistilBERT
        return Head(
            lambda states: model.vocab_layer_norm(model.activation(model.vocab_transform(states))),
            model.vocab_projector,
        )
    raise DataError(f"{type(model).__name__} has no output head that is known here")


def _identity(states: Tensor) -> Tensor:
    return states
