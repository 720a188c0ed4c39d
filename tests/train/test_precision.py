"""An adapter in float32 over a model in bfloat16: autocast's numbers, without casts of inputs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dlmctl.diffusion.elbo import Example
from dlmctl.diffusion.masks import draw_masks
from dlmctl.models.loading import load_policy
from dlmctl.models.policy import Policy
from dlmctl.rl.gradient import accumulate_gradient, elbo_coefficients
from dlmctl.settings.optimizer import Adapter
from dlmctl.train.activations import checkpoint_activations
from dlmctl.train.lora import adapter_off, add_adapter
from dlmctl.train.precision import training_precision


class Casts(TorchDispatchMode):
    """Counts values that were cast, by the dtypes before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.values: Counter[tuple[torch.dtype, torch.dtype]] = Counter()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = call(*args, **(kwargs or {}))
        if call is torch.ops.aten._to_copy.default:
            self.values[args[0].dtype, made.dtype] += made.numel()
        return made


def adapted(dropout: float = 0.0, dtype: str = "bfloat16", checkpointing: bool = False) -> Policy:
    torch.manual_seed(0)
    policy = add_adapter(load_policy("builtin:puzzles", "cpu", dtype), Adapter(8, 16.0, dropout))
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.float32
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    if checkpointing:
        checkpoint_activations(policy.core)
    return policy


def examples() -> list[Example]:
    scored = torch.ones(12, dtype=torch.bool)
    rows = [[5 + (i + j) % 9 for j in range(20)] for i in range(4)]
    return [
        Example(row, row[3:15], draw_masks("complementary", 4, scored, (0, n), 0))
        for n, row in enumerate(rows)
    ]


def passed(policy: Policy, precision: Any) -> tuple[float, list[Tensor], Casts]:
    """Value and gradients of an ELBO, and what was cast for them."""
    torch.manual_seed(1)
    given = examples()
    with precision, Casts() as casts:
        value = accumulate_gradient(policy, given, elbo_coefficients(given, torch.ones(4)), 8)
    return value, [p.grad for p in policy.model.parameters() if p.grad is not None], casts


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_inputs_are_not_cast_and_every_bit_is_that_of_autocast(checkpointing: bool) -> None:
    plain, ours = (adapted(checkpointing=checkpointing) for _ in range(2))
    value, gradients, casts = passed(plain, autocast())
    same_value, same_gradients, fewer = passed(ours, training_precision(ours, torch.bfloat16))
    assert value == same_value
    assert len(gradients) == len(same_gradients) > 0
    for expected, made in zip(gradients, same_gradients, strict=True):
        assert made.dtype == torch.float32
        assert bool(made.any())
        assert torch.equal(expected, made)
    to_float32 = (torch.bfloat16, torch.float32)
    # What is left are norms, which compute in float32, and gradients of A and B.
    assert fewer.values[to_float32] < 0.4 * casts.values[to_float32]


def test_with_dropout_inputs_are_cast_as_ever() -> None:
    plain, ours = (adapted(dropout=0.1) for _ in range(2))
    value, gradients, _ = passed(plain, autocast())
    same_value, same_gradients, _ = passed(ours, training_precision(ours, torch.bfloat16))
    assert value == same_value
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))


def test_without_autocast_inputs_have_the_dtype_of_the_adapter() -> None:
    """In float32 over weights in bfloat16, and after a block, whatever ended it."""
    policy = adapted()
    ids = torch.tensor([[5, 6, 7]])
    expected = policy.model(ids).logits
    with training_precision(policy, torch.float32):
        assert torch.equal(policy.model(ids).logits, expected)
    with pytest.raises(ZeroDivisionError), training_precision(policy, torch.bfloat16):
        1 / 0  # noqa: B018
    assert torch.equal(policy.model(ids).logits, expected)


def test_the_reference_of_an_adapter_is_its_base() -> None:
    policy, base = adapted(), load_policy("builtin:puzzles", "cpu", "bfloat16")
    ids = torch.tensor([[5, 6, 7]])
    with training_precision(policy, torch.bfloat16), adapter_off(policy):
        made = policy.model(ids).logits
    with autocast():
        assert torch.equal(made, base.model(ids).logits)
