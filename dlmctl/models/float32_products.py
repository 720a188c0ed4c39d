"""Products of float32 numbers with all their bits, where the result decides something.

GPUs may round the operands of a product to TF32, which has 11 bits of 24. torch does so in
convolutions, and in NVIDIA's containers, which set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, in matrix
products, too. Then other neighbours are the nearest, and other latents among the K largest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import backends

T = TypeVar("T")


@contextlib.contextmanager
def whole_products() -> Iterator[None]:
    """Within the block float32 products have all 24 bits, as far as torch decides.

    torch has older switches, and from 2.9 newer ones, one for each operation. An older one cannot
    be read if the newer ones contradict it, and must not be set then.
    """
    newer = [(switch, switch.fp32_precision) for switch in _newer()]
    products = _readable(torch.get_float32_matmul_precision)
    convolutions = _readable(lambda: backends.cudnn.allow_tf32)
    try:
        if products is not None:
            torch.set_float32_matmul_precision("highest")
        if convolutions is not None:
            backends.cudnn.allow_tf32 = False
        for switch, _ in newer:
            if switch.fp32_precision not in ("ieee", "none"):  # also as a wider switch says
                switch.fp32_precision = "ieee"
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            backends.cudnn.allow_tf32 = convolutions
        # The older ones set more of them than they read.
        for switch, before in newer:
            switch.fp32_precision = before


def _newer() -> list[Any]:
    """The newer switches that this torch has: of matrix products, convolutions, recurrences."""
    cudnn, on_cpu = backends.cudnn, backends.mkldnn
    places = ((backends.cuda, "matmul"), (on_cpu, "matmul"), (cudnn, "conv"), (cudnn, "rnn"))
    switches = [getattr(place, name, None) for place, name in places]
    return [switch for switch in switches if hasattr(switch, "fp32_precision")]


def _readable(read: Callable[[], T]) -> T | None:
    """The value of an older switch; None: newer ones contradict it."""
    try:
        return read()
    except RuntimeError:
        return None
