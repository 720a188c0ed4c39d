"""The gain of the last norm, compared with finite differences of the real head."""

from dataclasses import replace

import pytest
import torch
import transformers
from conftest import tiny_policy, tiny_vision_policy

from dlmctl.models.final_norm import final_norm, through_final_norm

SIZES = {
    "vocab_size": 20,
    "hidden_size": 15,  # odd, so that as many +1 as -1 do not fit
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 8,
}


def stock_policy(name, **sizes):
    """A policy of a class of transformers with random weights, gains too."""
    config = getattr(transformers, f"{name}Config")(**SIZES | sizes)
    kind = {"ModernBert": "ForMaskedLM"}.get(name, "ForCausalLM")
    torch.manual_seed(4)
    model = getattr(transformers, name + kind)(config).eval().double()
    family = "mlm" if kind == "ForMaskedLM" else "ar"
    return replace(tiny_policy(family), model=model, vocab_size=20)


def with_random_gain(policy):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in final_norm(policy).parameters():
            parameter.normal_(0.3, 1.0, generator=generator)
    return policy


POLICIES = {
    "llada": lambda: tiny_policy("llada"),
    "dream": lambda: tiny_policy("dream"),
    "diffugpt": lambda: tiny_policy("diffugpt"),
    "qwen2.5-vl": lambda: tiny_vision_policy("qwen2.5-vl"),
    "gemma": lambda: stock_policy("Gemma", head_dim=4),
    "cohere": lambda: stock_policy("Cohere", hidden_size=12),
    "olmo": lambda: stock_policy("Olmo", hidden_size=12),  # a LayerNorm without parameters
    "modernbert": lambda: stock_policy(
        "ModernBert", hidden_size=12, pad_token_id=0, cls_token_id=1, sep_token_id=2
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_it_moves_the_head_as_a_small_step_does_that_leaves_the_size_alone(name):
    policy = with_random_gain(POLICIES[name]())
    generator = torch.Generator().manual_seed(2)
    width = policy.width
    norm, weight = final_norm(policy), policy.head.projection.weight.detach()
    for _ in range(3):
        step = torch.randn(width, dtype=torch.float64, generator=generator)
        state = 3 * torch.randn(width, dtype=torch.float64, generator=generator)
        # Orthogonal to a step, with and without their means, an activation keeps its size.
        basis = torch.linalg.qr(torch.stack([step, torch.ones(width)], dim=1).double())[0]
        state = state - basis @ (basis.T @ state)
        size = state.square().mean().sqrt()
        with torch.no_grad():
            # The norms of transformers compute in float32.
            moved = norm(state + 1e-2 * step) - norm(state - 1e-2 * step)
            slope = weight @ moved.double() * size / 2e-2
            found = weight @ through_final_norm(policy, step[None])[0]
        torch.testing.assert_close(found, slope, rtol=2e-3, atol=2e-3)
        ranked = slope[found.argsort()]
        assert float(ranked.diff().min()) > -2e-3  # the same order, but for near ties


def test_encoders_whose_blocks_end_with_a_norm_have_none_behind_them():
    policy = tiny_policy("mlm")
    assert final_norm(policy) is None
    directions = torch.randn(2, 16)
    assert through_final_norm(policy, directions) is directions
