"""Sizes rounded up, so that few shapes recur where a product is compiled for each shape.

oneDNN, which multiplies matrices in bfloat16 on a CPU, generates code for every shape that it has
not seen. Texts of many lengths are many shapes: generating code took half the time of a training
step.
"""

from __future__ import annotations

import torch

UNIT = 32


def even_size(size: int, device: torch.device, dtype: torch.dtype, most: int | None = None) -> int:
    """The size, or the next multiple of 32 where that is faster: for products in bfloat16 on a CPU.

    Args:
        device: where the product runs.
        dtype: that of its factors, if autocast does not change it.
        most: a size that is not exceeded by rounding.
    """
    if device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    if device.type != "cpu" or dtype != torch.bfloat16:
        return size
    even = -(-size // UNIT) * UNIT
    return even if most is None or even <= most else max(size, most)
