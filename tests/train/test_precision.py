"""The arithmetic of a training pass: what autocast casts, shapes that recur, compiled layers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import tiny_policy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dlmctl.diffusion.elbo import Example
from dlmctl.diffusion.masks import draw_masks
from dlmctl.models.even_shapes import even_size
from dlmctl.models.loading import load_policy
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.rl.gradient import accumulate_gradient, elbo_coefficients
from dlmctl.settings.optimizer import Adapter, Optimizer
from dlmctl.train.activations import checkpoint_activations
from dlmctl.train.lora import adapter_off, add_adapter
from dlmctl.train.precision import training_precision
from dlmctl.train.run import open_run


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


CPU, HALF, SINGLE = torch.device("cpu"), torch.bfloat16, torch.float32


def test_sizes_are_rounded_up_for_products_in_bfloat16_on_a_processor() -> None:
    assert [even_size(size, CPU, HALF) for size in (0, 1, 32, 33)] == [0, 32, 32, 64]
    assert even_size(33, CPU, SINGLE) == even_size(33, torch.device("cuda"), HALF) == 33
    assert [even_size(33, CPU, HALF, most=most) for most in (20, 50, 64)] == [33, 50, 64]
    with torch.autocast("cpu", HALF):
        assert even_size(33, CPU, SINGLE) == 64


@pytest.mark.parametrize("family", ["llada", "dream", "ar", "a2d", "diffugpt"])
def test_padding_to_even_sizes_changes_no_gradient(family: str, monkeypatch: Any) -> None:
    policies = [tiny_policy(family, "0123456789=abcdefgh") for _ in range(2)]
    given = [Example(e.prompt[: 9 + n], e.completion, e.masks) for n, e in enumerate(examples())]
    seen = []
    for policy, unit in zip(policies, (1, 7), strict=True):

        def even(size: int, *_: Any, unit: int = unit) -> int:
            seen.append(size)
            return -(-size // unit) * unit

        for module in ("dlmctl.diffusion.elbo", "dlmctl.diffusion.fused_linear_logprob"):
            monkeypatch.setattr(f"{module}.even_size", even)
        accumulate_gradient(policy, given, elbo_coefficients(given, torch.ones(4)), 3)
    assert any(size % 7 for size in seen)
    for one, two in zip(*(policy.model.parameters() for policy in policies), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert torch.allclose(one.grad, two.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("rank", "checkpointing"), [(0, False), (0, True), (4, False)])
def test_compiled_layers_have_the_same_gradients(
    rank: int, checkpointing: bool, monkeypatch: Any, tmp_path: Any
) -> None:
    # The graph is captured as for the real compiler, which would take a minute.
    graphs = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("dlmctl.models.compiled.COMPILER", compiler)
    gradients = []
    for compiled in (False, True):
        begun = Optimizer(), Adapter(rank), "cpu", "auto", checkpointing, 0
        place = tmp_path / str(compiled)
        run = open_run(place, "builtin:puzzles", "sft", *begun, compiled=compiled)
        given = examples()
        for _ in range(2):
            with run.precision():
                accumulate_gradient(run.policy, given, elbo_coefficients(given, torch.ones(4)), 8)
        gradients.append([parameter.grad for parameter in run.parameters.values()])
        assert bool(graphs) == compiled
        assert not any("forward" in module.__dict__ for module in run.policy.model.modules())
    assert len(graphs) < 4
    assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in zip(*gradients, strict=True))
    monkeypatch.setattr("dlmctl.train.run.world_size", lambda: 2)
    with pytest.raises(UsageError, match="--compile is for one process"):
        open_run(tmp_path / "two", "builtin:puzzles", "sft", *begun, compiled=True)
