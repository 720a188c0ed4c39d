"""An autoencoder at the block of a policy whose output it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from dlmctl.models.blocks import check_layers
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.sae.formats.folders import read_sae
from dlmctl.sae.topk import TopKSae


class SaeAtLayer(NamedTuple):
    """An autoencoder for the output of a block."""

    name: str
    """Its folder."""
    layer: int
    sae: TopKSae

    def fields(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"sae": self.name, "layer": self.layer}


def read_at_layer(name: str, layer: int | None, policy: Policy, option: str) -> SaeAtLayer:
    """An autoencoder on the device of the policy, in its computing dtype, without gradients.

    Args:
        name: its folder.
        layer: None: the block that the folder names.
        option: how the command line names an autoencoder and its layer, for the message.

    Raises:
        MissingInputError, DataError: it cannot be read.
        UsageError: it does not fit the policy, or does not say which layer it is of.
    """
    saved = read_sae(Path(name))
    layer = saved.metadata.get("dlm_layer") if layer is None else layer
    if not isinstance(layer, int):
        raise UsageError(f"{name} does not say which layer it is of (dlm_layer): write {option}")
    check_layers(policy, [layer])
    if saved.sae.d_in != policy.width:
        raise UsageError(
            f"{name} is for activations of width {saved.sae.d_in}, the model's have {policy.width}"
        )
    sae = saved.sae.requires_grad_(False).to(policy.device, computing_dtype(policy))
    return SaeAtLayer(name, layer, sae)


def computing_dtype(policy: Policy) -> torch.dtype:
    """float32, whatever the precision of the model; float64 for a model in float64."""
    wide = next(policy.model.parameters()).dtype == torch.float64
    return torch.float64 if wide else torch.float32
