"""What `dlmctl plan` counts of quantized weights and of moments in 8 bits."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import chain
from pathlib import Path

import orjson
import pytest
import torch
from conftest import invoke
from torch import nn

from dlmctl.models.blocks import decoder_blocks
from dlmctl.models.loading import load_policy
from dlmctl.plan.footprint import dequantized, kept_memory
from dlmctl.settings.optimizer import Adapter, Optimizer
from dlmctl.train.lora import add_adapter
from dlmctl.train.optimizer import apply_step, make_optimizer, trained_parameters

LLADA = Path(__file__).parents[2] / "examples" / "large" / "llada-8b.json"


@pytest.fixture
def package():
    return pytest.importorskip("bitsandbytes", reason="pip install 'dlmctl[quantized]'")


def planned(*options):
    done = invoke("plan", "--gen-length", 12, "--batch-size", 2, "-n", 2, *options)
    assert done.exit_code == 0, done.output
    return {row["stage"]: row for row in map(orjson.loads, done.stdout.splitlines())}


def test_what_stays_is_that_of_a_step_to_the_byte(package):
    plain = load_policy("builtin:puzzles", "cpu")
    weightless = replace(plain, model=copy.deepcopy(plain.model).to("meta"), quantized="nf4")
    weightless = add_adapter(weightless, Adapter(64))
    expected = kept_memory(weightless, 1, "adamw-8bit")
    policy = load_policy("builtin:puzzles", "cpu", quantize="nf4")
    policy = add_adapter(policy, Adapter(64))
    scales = [p.quant_state.absmax for p in policy.model.parameters() if hasattr(p, "quant_state")]
    kept = chain(policy.model.parameters(), scales)
    assert expected.weights == sum(t.numel() * t.itemsize for t in kept)
    trained = trained_parameters(policy.model)
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer(trained.values(), Optimizer(optimizer="adamw-8bit"))
    apply_step(optimizer, trained.values(), 1e-3, 1.0)
    moments = [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if name.startswith(("state", "absmax"))
    ]
    assert expected.moments == sum(t.numel() * t.itemsize for t in moments)
    whole = [
        4 * layer.in_features * layer.out_features
        for layer in decoder_blocks(plain).modules()
        if isinstance(layer, nn.Linear) and layer.in_features % 64 == 0
    ]
    assert dequantized(weightless) == max(whole)


def test_llada_8b_in_nf4_is_as_computed_by_hand():
    """32 blocks of four matrices of 4096^2 and three of 4096 x 12288, at 4.5 bits, not 16."""
    options = ("-m", LLADA, "--lora-rank", 8, "--dtype", "bfloat16")
    before, after = (planned(*options, *more) for more in ((), ("--quantize", "nf4")))
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    for stage in ("rollout", "update"):
        saved = before[stage]["weights"] - after[stage]["weights"]
        assert saved == linear * 2 - linear * 9 // 16
        assert after[stage]["activations"] - before[stage]["activations"] == 2 * 4096 * 12288
    assert after["update"]["moments"] == before["update"]["moments"]
    assert "--quantize nf4" in after["step"]["options"]
    small = planned(*options, "--optimizer", "adamw-8bit")["update"]
    # 8 bits with a float32 for 256, of moments that were in float32.
    ratio = small["moments"] / before["update"]["moments"]
    assert ratio == pytest.approx((1 + 4 / 256) / 4, rel=1e-3)


def test_quantized_weights_are_proposed_where_nothing_larger_fits():
    """LLaDA-8B under an adapter in bfloat16 has 16 GB of weights alone."""
    options = ("-m", LLADA, "--batch-size", 1, "--rollout-batch-size", 1)
    step = planned(*options, "--gpu-memory", "24G")["step"]
    assert step["fits"] is False
    [small] = [change for change in step["changes"] if change.endswith("--gpus 1")]
    assert "--quantize nf4" in small
    chosen = planned(*options, *small.split(), "--gpu-memory", "24G")
    assert chosen["step"]["fits"] is True


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--quantize", "nf4"), "give --lora-rank too"),
        (("--quantize", "nf4", "--lora-rank", 8, "--gpus", 2), "in one process only"),
        (("--optimizer", "adamw-8bit", "--gpus", 2), "in one process only"),
    ],
)
def test_what_update_refuses_is_not_planned(options, reason):
    done = invoke("plan", *options)
    assert done.exit_code == 2
    assert reason in done.stderr
