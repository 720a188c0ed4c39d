"""Whether an autoencoder fits a model, and in what precision it runs beside it."""

from __future__ import annotations

import torch

from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.sae.topk import TopKSae


def check_width(name: str, sae: TopKSae, policy: Policy) -> None:
    """Raise UsageError where it is for activations of another width."""
    if sae.d_in != policy.width:
        raise UsageError(
            f"{name} is for activations of width {sae.d_in}, the model's have {policy.width}"
        )


def computing_dtype(policy: Policy) -> torch.dtype:
    """float32, whatever the precision of the model, or float64 for a model in that."""
    wide = next(policy.model.parameters()).dtype == torch.float64
    return torch.float64 if wide else torch.float32
