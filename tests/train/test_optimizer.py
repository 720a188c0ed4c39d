"""The optimizer's settings and schedule."""

import math
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dlmctl.records.errors import UnavailableError
from dlmctl.settings.optimizer import Optimizer
from dlmctl.train.optimizer import (
    apply_step,
    learning_rate,
    make_optimizer,
    method_of,
    moment_bytes,
    optimizer_state,
    restore_optimizer,
)


def test_the_rate_warms_up_and_then_stays():
    rates = [learning_rate(s, 1.0, warmup=4) for s in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_cosine_falls_to_zero_at_its_end():
    rates = [learning_rate(s, 2.0, 0, "cosine", 4) for s in range(6)]
    expected = [1 + math.cos(math.pi * min(s, 4) / 4) for s in range(6)]
    assert rates == pytest.approx(expected)


def test_matrices_decay_and_vectors_do_not():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([matrix, vector], Optimizer(weight_decay=0.5))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    apply_step(optimizer, [matrix, vector], rate=0.1, max_norm=0)
    assert matrix.flatten().tolist() == pytest.approx([0.95] * 4)
    assert vector.tolist() == [1, 1]


def test_gradients_are_clipped_to_their_norm_and_cleared():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.tensor([3.0, 4.0])
    norm, applied = apply_step(optimizer, [parameter], rate=1.0, max_norm=1.0)
    assert (norm, applied) == (5.0, True)
    assert parameter.tolist() == pytest.approx([-0.6, -0.8], abs=1e-4)
    assert parameter.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(bad):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([parameter], Optimizer(weight_decay=0.0))
    parameter.grad = torch.tensor([1.0, bad])
    _, applied = apply_step(optimizer, [parameter], rate=1.0, max_norm=1.0)
    assert not applied
    assert parameter.tolist() == [1, 1]
    assert not optimizer.state


# --- moments in 8 bits -------------------------------------------------------------------------

EIGHT = Optimizer(weight_decay=0.1, optimizer="adamw-8bit")
LARGE, SMALL = (50, 100), (10, 10)
"""5000 values, of which the last scale has 136, and 100, which stay in float32."""


@pytest.fixture
def package():
    return pytest.importorskip("bitsandbytes", reason="pip install 'dlmctl[quantized]'")


def problem():
    """Two matrices to be learned, and a function that gives them noisy gradients of step n."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in (LARGE, SMALL)]
    # Scales that differ by orders of magnitude, as within a model.
    goals = [
        torch.randn(shape, generator=generator) * 10 ** torch.rand(shape, generator=generator)
        for shape in (LARGE, SMALL)
    ]
    noise = [[torch.randn(g.shape, generator=generator) for g in goals] for _ in range(40)]

    def gradients(values, step):
        return [v - g + 0.5 * n for v, g, n in zip(values, goals, noise[step], strict=True)]

    return start, gradients


def trajectory(settings, steps=range(40), begin=None):
    """The matrices after these steps of the optimizer that dlmctl makes."""
    start, gradients = problem()
    parameters = {n: nn.Parameter(v.clone()) for n, v in zip("ab", start, strict=True)}
    optimizer = make_optimizer(parameters.values(), settings)
    if begin is not None:
        values, tensors = begin
        with torch.no_grad():
            for parameter, value in zip(parameters.values(), values, strict=True):
                parameter.copy_(value)
        restore_optimizer(optimizer, parameters, tensors)
    for step in steps:
        found = gradients([p.detach() for p in parameters.values()], step)
        for parameter, gradient in zip(parameters.values(), found, strict=True):
            parameter.grad = gradient
        apply_step(optimizer, list(parameters.values()), rate=0.05, max_norm=0)
    return [p.detach() for p in parameters.values()], optimizer_state(optimizer, parameters)


def dynamic_map(signed):
    """The 256 numbers of dynamic quantization: arXiv 2110.02861, section 2.1 and appendix F.

    A number with e leading zeros is 10^-e times one of 2^(6 - e), twice as many without sign,
    fractions, which are the middles of as many equal parts of [0.1, 1]; 0 and 1 are added.
    """
    numbers = [0.0, 1.0]
    for exponent in range(7):
        parts = 2 ** (6 - exponent + (not signed))
        for part in range(parts):
            number = 10.0**-exponent * (0.1 + 0.9 * (part + 0.5) / parts)
            numbers += [number, -number] if signed else [number]
    return torch.tensor(sorted(numbers), dtype=torch.float64)


def blocks(values):
    """Values by their scales, [blocks, 256], the last filled up with zeros."""
    flat = values.double().flatten()
    return nn.functional.pad(flat, (0, -len(flat) % 256)).view(-1, 256)


def adamw(value, gradient, first, second, step, rate=0.05, beta1=0.9, beta2=0.99, decay=0.1):
    """A step of AdamW (arXiv 1711.05101, algorithm 2) in float64: value and both moments."""
    gradient = gradient.double()
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient**2
    root = (second / (1 - beta2 ** (step + 1))).sqrt() + 1e-8
    change = first / (1 - beta1 ** (step + 1)) / root
    return value.double() * (1 - rate * decay) - rate * change, first, second


def test_steps_and_moments_in_8_bits_are_those_of_an_independent_computation(package):
    """Each step from what the one before it left in 8 bits, and what it leaves in turn."""
    start, gradients = problem()
    maps = {"1": dynamic_map(True), "2": dynamic_map(False)}
    assert [len(numbers) for numbers in maps.values()] == [256, 256]
    value, moments = start[0], {key: torch.zeros(LARGE).double() for key in maps}
    for step in range(40):
        gradient = gradients([value, start[1]], step)[0]
        expected, *exact = adamw(value, gradient, *moments.values(), step)
        found, tensors = trajectory(EIGHT, range(step + 1))
        assert torch.allclose(found[0].double(), expected, atol=1e-5), step
        value = found[0]
        for (key, numbers), moment in zip(maps.items(), exact, strict=True):
            codes = tensors[f"optimizer.state{key}.a"].flatten().long()
            scales = tensors[f"optimizer.absmax{key}.a"].double()
            assert torch.allclose(scales, blocks(moment).abs().amax(1), rtol=1e-4)
            moments[key] = (blocks(numbers[codes]) * scales[:, None]).flatten()[:5000].view(LARGE)
            wanted = blocks(moment) / scales[:, None]
            nearest = (wanted[..., None] - numbers).abs().amin(-1)
            error = (blocks(moments[key]) / scales[:, None] - wanted).abs()
            # The library looks the nearest number up in a table of steps of 1 / 32768.
            assert float((error - nearest).max()) < 2 / 32768, (step, key)


def test_moments_in_8_bits_change_little(package):
    found, _ = trajectory(EIGHT)
    plain, _ = trajectory(Optimizer(weight_decay=0.1))
    start, _ = problem()
    moved = float((plain[0] - start[0]).abs().mean())
    assert 1e-4 < float((found[0] - plain[0]).abs().mean()) < 0.05 * moved
    assert torch.allclose(found[1], plain[1], atol=1e-4)  # these stay in float32


def test_without_8_bits_steps_are_those_of_an_independent_computation():
    values, gradients = problem()
    first, second = ([torch.zeros_like(v).double() for v in values] for _ in range(2))
    for step in range(40):
        given = gradients(values, step)
        for n in range(2):
            values[n], first[n], second[n] = adamw(values[n], given[n], first[n], second[n], step)
    found, _ = trajectory(Optimizer(weight_decay=0.1))
    for value, expected in zip(found, values, strict=True):
        assert torch.allclose(value.double(), expected, atol=1e-4)


@pytest.mark.parametrize("method", ["adamw", "adamw-8bit"])
def test_saved_moments_resume_to_the_bit(request, tmp_path, method):
    if method == "adamw-8bit":
        request.getfixturevalue("package")
    settings = Optimizer(optimizer=method)
    whole, last = trajectory(settings)
    values, tensors = trajectory(settings, range(15))
    save_file(tensors, tmp_path / "t.safetensors")
    assert method_of(tensors) == method
    resumed, end = trajectory(
        settings, range(15, 40), (values, load_file(tmp_path / "t.safetensors"))
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert last.keys() == end.keys()
    assert all(torch.equal(last[name], end[name]) for name in last)


def test_moments_in_8_bits_take_as_many_bytes_as_are_planned(package):
    _, tensors = trajectory(EIGHT, range(1))
    for name, shape in (("a", LARGE), ("b", SMALL)):
        kept = [t for key, t in tensors.items() if key.endswith(f".{name}") and "step" not in key]
        planned = moment_bytes(torch.empty(shape))
        assert planned == sum(t.numel() * t.itemsize for t in kept)
        assert tensors[f"optimizer.state1.{name}"].dtype == (
            torch.uint8 if name == "a" else torch.float32
        )


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnavailableError, match=r"adamw-8bit needs .* 'dlmctl\[quantized\]'"):
        make_optimizer([nn.Parameter(torch.ones(2))], EIGHT)
