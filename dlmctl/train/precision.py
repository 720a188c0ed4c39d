"""The arithmetic of a training pass: matrix products in a compute dtype, master weights in float32.

An adapter's A and B are float32 over a model in bfloat16. peft casts the input of each of their
layers to float32, and autocast casts it back for the product: two copies of every activation, of
which the second stays in memory until the backward pass. Left as it is, the input is the same
number, and only A and B are cast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from dlmctl.models.policy import Policy
from dlmctl.train.lora import adapter_settings


@contextlib.contextmanager
def training_precision(policy: Policy, compute: torch.dtype) -> Iterator[None]:
    """Within the block matrix products run in the compute dtype.

    Backward passes belong into the block, too: they may recompute activations.
    """
    enabled = compute != torch.float32
    adapter = adapter_settings(policy)
    with contextlib.ExitStack() as stack:
        # A cache would keep all weights in the compute dtype, too, until the step is over.
        stack.enter_context(
            torch.autocast(policy.device.type, compute, enabled=enabled, cache_enabled=False)
        )
        # Dropout scales what it keeps in the dtype of its input, which bfloat16 may round.
        if enabled and adapter is not None and not adapter.dropout:
            from peft.helpers import disable_input_dtype_casting

            stack.enter_context(disable_input_dtype_casting(policy.model))
        yield
