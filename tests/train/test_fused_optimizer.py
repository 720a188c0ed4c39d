"""The fused step, as it is taken on CUDA: torch has the same one for the CPU."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dlmctl.settings.optimizer import Optimizer
from dlmctl.train.optimizer import (
    apply_step,
    make_optimizer,
    optimizer_state,
    restore_optimizer,
)
from dlmctl.train.sharding import full_tensor, like

SETTINGS = Optimizer(weight_decay=0.1)
SHAPES = {"matrix": (5, 7), "vector": (3,), "single": (1, 4)}
"""Of two ranks, one has the single row and the other an empty share."""

State = tuple[dict[str, Tensor], dict[str, Tensor]]


def steps(
    fused: bool, numbers: range, begin: State | None = None, mesh: Any = None
) -> tuple[State, list[float]]:
    """Parameters and moments after these steps, and the norms of the gradients.

    Args:
        mesh: of ranks that the parameters are spread over.
    """
    drawn = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=drawn) for name, shape in SHAPES.items()}
    parameters: dict[str, nn.Parameter] = {}
    for name, value in (begin[0] if begin else values).items():
        value = value.clone() if mesh is None else spread(value, mesh)
        parameters[name] = nn.Parameter(value)
    optimizer = make_optimizer(parameters.values(), SETTINGS, fused=fused)
    if begin:
        restore_optimizer(optimizer, parameters, begin[1])
    norms = []
    for number in numbers:
        drawn.manual_seed(1 + number)
        for name, parameter in parameters.items():
            gradient = torch.randn(SHAPES[name], generator=drawn) * 10.0 ** (number % 4 - 2)
            parameter.grad = like(gradient, parameter)
        norms.append(apply_step(optimizer, parameters.values(), rate=0.05, max_norm=1.0)[0])
    moments = optimizer_state(optimizer, parameters)
    return (
        {name: full_tensor(p).clone() for name, p in parameters.items()},
        {name: full_tensor(value).clone() for name, value in moments.items()},
    ), norms


def spread(value: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)


def same_bits(one: State, other: State) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_fused_step_is_the_step():
    """To the rounding of sums that it takes in another order."""
    plain, fused = (steps(kind, range(40))[0] for kind in (False, True))
    assert all(plain[1][n] == fused[1][n] == 40 for n in plain[1] if ".step." in n)
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_parameters_that_are_not_on_cuda_are_stepped_as_ever():
    optimizer = make_optimizer([nn.Parameter(torch.ones(2, 2))], SETTINGS)
    assert optimizer.defaults["fused"] is None


@pytest.mark.cuda
def test_parameters_on_cuda_are_stepped_by_one_kernel():
    parameters = [nn.Parameter(torch.ones(2, 2, device="cuda"))]
    assert make_optimizer(parameters, SETTINGS).defaults["fused"] is True


@pytest.mark.parametrize(("before", "after"), [*itertools.product([False, True], repeat=2)])
def test_moments_resume_whether_they_were_fused_or_not(
    tmp_path: Path, before: bool, after: bool
) -> None:
    begun, _ = steps(before, range(15))
    save_file(begun[1], tmp_path / "moments.safetensors")
    resumed, _ = steps(
        after, range(15, 40), (begun[0], load_file(tmp_path / "moments.safetensors"))
    )
    whole, _ = steps(after, range(40))
    if before == after:
        same_bits(whole, resumed)
    for a, b in zip(whole, resumed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def on_a_rank(rank: int, directory: Path) -> None:
    """Fused steps on parameters spread over two ranks, resumed half-way."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    where = f"file://{directory}/meeting"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    begun, norms = steps(True, range(15), mesh=mesh)
    ended, more = steps(True, range(15, 40), begun, mesh)
    if rank == 0:
        save_file({**ended[0], **ended[1]}, directory / "ended.safetensors")
        save_file({"norms": torch.tensor([*norms, *more])}, directory / "norms.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def test_parameters_that_are_spread_over_ranks_take_the_same_fused_steps(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(on_a_rank, (tmp_path,), nprocs=2, start_method="fork")
    whole, norms = steps(True, range(40))
    torch.testing.assert_close(
        load_file(tmp_path / "norms.safetensors")["norms"], torch.tensor(norms)
    )
    # A norm is summed in another order.
    torch.testing.assert_close(
        load_file(tmp_path / "ended.safetensors"), {**whole[0], **whole[1]}, rtol=1e-5, atol=1e-6
    )
