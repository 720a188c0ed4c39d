"""Copies to a device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for the device."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
