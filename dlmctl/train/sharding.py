"""Weights, gradients and moments spread over the ranks by FSDP2 (arXiv 2304.11277).

Every block is a unit, and so are the parts around the blocks: embeddings, last norm, output head
and vision tower. A unit's weights are gathered when it runs and freed after it, so that all ranks
must run the same number of passes. Gradients are summed, not averaged, because a loss is divided by
the counts of the whole step.

Weights are gathered in their own dtype, so that a pass computes the same as in one process; but the
linear layers of blocks, in float32 under autocast, in the dtype that autocast would cast them to
before every product. That halves the traffic and changes no bit. Norms and embeddings compute in
float32, and are gathered so. Gradients are summed in float32.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dlmctl.models.blocks import decoder_blocks
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.settings.optimizer import Method
from dlmctl.train.distributed import is_first, world_size

T = TypeVar("T")

_PASS = "run_whole_pass"


def check_trainable(policy: Policy, method: Method) -> None:
    """Raise UsageError if several ranks cannot train a model together with this optimizer."""
    if policy.quantized:
        raise UsageError(
            f"weights in {policy.quantized} are not spread over processes: train in one, without "
            "torchrun, or begin a run without --quantize"
        )
    if method != "adamw":
        raise UsageError(
            f"the moments of --optimizer {method} are not spread over processes: train in one, "
            "without torchrun, or with --optimizer adamw"
        )
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in policy.model.modules()):
        raise UsageError("what dropout leaves out is drawn by one process: none under torchrun")


def shard(policy: Policy, compute: torch.dtype = torch.float32) -> None:
    """Spread a model that every rank has loaded over the ranks.

    Args:
        compute: dtype of the autocast that all its passes will be under; float32: none.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(policy.device.type, (world_size(),))
    own, cast = (
        # The dtype of inputs is autocast's own matter.
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
        for dtype, reduced in ((None, None), (compute, torch.float32))
    )

    def spread(unit: Any, precision: MixedPrecisionPolicy = own) -> None:
        made = fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
        first: FSDPModule = made[0] if isinstance(made, list) else made
        # A sum: gloo has no other reduction, and custom factors need NCCL.
        first.set_gradient_divide_factor(1.0)
        first.set_force_sum_reduction_for_comms(True)

    model: Any = policy.model
    for block in decoder_blocks(policy):
        if compute != torch.float32 and (products := autocast_products(block)):
            # One unit: the first of them to run is the last to have its gradient.
            spread(products, cast)
        spread(block)
    spread(model)
    setattr(model, _PASS, lambda call: call())
    register_fsdp_forward_method(model, _PASS)


def autocast_products(block: nn.Module) -> list[nn.Module]:
    """The layers of a block whose weights autocast casts in every pass.

    None of a block with an adapter: its base has the dtype of the passes, and A and B are small.
    """
    from transformers.pytorch_utils import Conv1D

    if any("lora_" in name for name, _ in block.named_parameters()):
        return []
    return [
        module
        for module in block.modules()
        # Not of subclasses, which may use their weights in other ways.
        if type(module) in (nn.Linear, Conv1D) and module.weight.dtype == torch.float32
    ]


def whole_pass(model: nn.Module, call: Callable[[], T]) -> T:
    """`call()`, which runs parts of the model; gathers its outer weights first if it is spread."""
    run: Any = getattr(model, _PASS, None)
    made: T = call() if run is None else run(call)
    return made


def outline(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters have no values."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


def gathered(policy: Policy, form: nn.Module) -> Policy:
    """The policy with all its weights on the CPU; every rank calls this, the first has the result.

    Args:
        form: its outline.
    """
    whole: dict[int, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, value in policy.model.state_dict(keep_vars=True).items():
        if id(value) not in whole:  # tied weights stay tied
            whole[id(value)] = to_first(value)
        values[name] = whole[id(value)]
    if not is_first():
        return policy
    model = copy.deepcopy(form)
    model.load_state_dict(values, assign=True)
    return dataclasses.replace(policy, model=model)


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor, detached; all of it if it is spread, for which every rank calls this."""
    spread: Any = tensor
    whole: Tensor = spread.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def own_share(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor, not copied; all of it if it is not spread."""
    spread: Any = tensor
    share: Tensor = spread.to_local() if hasattr(tensor, "to_local") else tensor
    return share


def to_first(tensor: Tensor) -> Tensor:
    """A full tensor on the CPU of the first rank, an empty one on the others."""
    whole = full_tensor(tensor)
    return whole.cpu().contiguous() if is_first() else torch.empty(0)


def like(values: Tensor, parameter: Tensor) -> Tensor:
    """Values on the device of their parameter, and spread as it is."""
    values = values.to(parameter.device)
    if not hasattr(parameter, "placements"):
        return values
    from torch.distributed.tensor import distribute_tensor

    spread: Any = parameter
    return distribute_tensor(values, spread.device_mesh, spread.placements, src_data_rank=None)
