"""Ranks in bfloat16: linear layers are gathered as autocast casts them, which changes no bit."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import invoke, read_jsonl
from ranks import Ranks, write
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlmctl.diffusion.elbo import Example
from dlmctl.diffusion.masks import draw_masks
from dlmctl.models.blocks import decoder_blocks
from dlmctl.models.loading import load_policy
from dlmctl.models.policy import Policy
from dlmctl.rl.gradient import accumulate_gradient, elbo_coefficients
from dlmctl.settings.optimizer import Adapter
from dlmctl.train import distributed
from dlmctl.train.activations import checkpoint_activations
from dlmctl.train.lora import add_adapter
from dlmctl.train.precision import training_precision
from dlmctl.train.sharding import full_tensor, shard

HALF = torch.bfloat16


def gradients(policy: Policy) -> dict[str, Tensor]:
    """Of an ELBO in bfloat16, in micro-batches of three rows, by parameter; and its value."""
    scored = torch.ones(12, dtype=torch.bool)
    rows = [[5 + (i + j) % 9 for j in range(20)] for i in range(4)]
    given = [
        Example(row, row[3:15], draw_masks("complementary", 4, scored, (0, n), 0))
        for n, row in enumerate(rows)
    ]
    with training_precision(policy, HALF):
        value = accumulate_gradient(policy, given, elbo_coefficients(given, torch.ones(4)), 3)
    found = {
        name: full_tensor(parameter.grad).clone()
        for name, parameter in policy.model.named_parameters()
        if parameter.grad is not None
    }
    return {**found, "value": torch.tensor(value)}


def gathered_dtypes(policy: Policy) -> dict[str, int]:
    """Counts modules of the blocks that ran, by their kind and the dtype of their weight, later."""
    ran: Counter[str] = Counter()

    def count(module: Any, *_: Any) -> None:
        kind = "linear" if isinstance(module, nn.Linear | Conv1D) else "other"
        ran[f"{kind} {module.weight.dtype}"] += 1

    for module in decoder_blocks(policy).modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            module.register_forward_pre_hook(count)
    return ran


def on_a_rank(rank: int, directory: Path, model: str, adapter: int, recomputes: bool) -> None:
    """Save gradients, and as what weights were gathered, without autocast's dtype and with it."""
    where = f"file://{directory}/meeting"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    distributed._control = dist.group.WORLD
    for compute in (torch.float32, HALF):
        torch.manual_seed(0)
        policy = load_policy(model, "cpu", "bfloat16" if adapter else "float32")
        policy = add_adapter(policy, Adapter(adapter)) if adapter else policy
        if recomputes:
            checkpoint_activations(policy.core)
        shard(policy, compute)
        ran = gathered_dtypes(policy)
        found = gradients(policy)
        if rank == 0:
            (directory / f"{compute}.json").write_text(json.dumps(ran))
            save_file(found, directory / f"{compute}.safetensors")
    dist.barrier()
    distributed._control = None
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("family", "adapter", "recomputes"),
    [
        ("llada", 0, False),
        ("llada", 0, True),
        ("llada", 4, False),
        ("mlm", 0, True),  # its norms stand behind the layers
        ("diffugpt", 0, False),  # no linear layers, but Conv1D
        ("llada-moe", 0, True),
    ],
)
def test_linear_layers_are_gathered_in_bfloat16_and_gradients_are_the_same_bits(
    tmp_path: Path, saved_models: Any, family: str, adapter: int, recomputes: bool
) -> None:
    model = saved_models(family)
    torch.multiprocessing.start_processes(
        on_a_rank, (tmp_path, model, adapter, recomputes), nprocs=2, start_method="fork"
    )
    whole, half = (load_file(tmp_path / f"{d}.safetensors") for d in (torch.float32, HALF))
    assert whole.keys() == half.keys()
    for name, gradient in whole.items():
        assert gradient.dtype == half[name].dtype == torch.float32
        assert torch.equal(gradient, half[name]), name
    ran, then = (json.loads((tmp_path / f"{d}.json").read_text()) for d in (torch.float32, HALF))
    if adapter:  # the base is in bfloat16, the adapter stays in float32
        assert ran == then
        assert set(ran) == {"linear torch.bfloat16", "linear torch.float32", "other torch.bfloat16"}
    else:
        assert set(ran) == {"linear torch.float32", "other torch.float32"}
        assert set(then) == {"linear torch.bfloat16", "other torch.float32"}
        assert list(ran.values()) == list(then.values())


def test_ranks_in_bfloat16_step_as_one_process(tmp_path: Path, saved_models: Any) -> None:
    """But for the rounding of products over other micro-batches; with a reference and ratios."""
    model = saved_models("llada")
    place = {"samples": 2, "revision": load_policy(model, "cpu").revision}
    records = [
        {
            "id": f"p{number // 2}",
            "sample": number % 2,
            "reward": float(number % 3 == 0),
            "tokens": {
                "prompt": [3 + number // 2 % 7, 8],
                "completion": [3 + (number * k) % 11 for k in range(3 + number % 3)],
            },
            "rollout": place,
        }
        for number in range(12)
    ]
    given = write(tmp_path / "all.jsonl", records)
    line = (
        f"update --algo espo --inner 2 -k 2 --prompts-per-step 2 -m {model} --dtype bfloat16 "
        "--batch-size 3 --lr 1e-3 -q"
    )
    alone = invoke(*line.split(), "-o", tmp_path / "one", given)
    assert alone.exit_code == 0, alone.output
    made = Ranks(f"{line} -o two", tmp_path, given).done()
    expected = read_jsonl(tmp_path / "one" / "metrics.jsonl")
    assert len(made) == len(expected) == 6
    for a, b in zip(expected, made, strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.02)
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02, abs=1e-3)
    a, b = (load_file(tmp_path / run / "latest" / "model.safetensors") for run in ("one", "two"))
    assert a.keys() == b.keys()
    assert all(value.dtype == b[name].dtype == torch.float32 for name, value in a.items())
