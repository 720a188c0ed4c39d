"""Models with random weights in the shape of published ones, to measure speed and memory with.

Weights are scaled so that predictions are confident and differ between positions: confidences are
spread between 0 and 1, a few of them above 0.9, as parallel decoding expects of a trained model.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dlmctl.models.loading import load_policy, resolve_device, resolve_dtype
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"vocab": 1000, "hidden": 32, "inner": 88, "layers": 2, "heads": 2},
    "100m": {"vocab": 126464, "hidden": 320, "inner": 1024, "layers": 14, "heads": 5},
    "8b": {"vocab": 126464, "hidden": 4096, "inner": 12288, "layers": 32, "heads": 32},
}
"""8b is LLaDA-8B; 100m has its vocabulary and as many layers as 100 million parameters allow."""


def bench_policy(model: str, device: str, dtype: str) -> Policy:
    """A model to measure: `random:SHAPE`, or anything that `load_policy` takes.

    Raises:
        UsageError: there is no such shape.
    """
    if not model.startswith("random:"):
        return load_policy(model, device, dtype)
    shape = model.removeprefix("random:")
    if shape not in SHAPES:
        raise UsageError(f"no shape '{shape}'; there are: {', '.join(SHAPES)}")
    where = resolve_device(device)
    return _random_policy(shape, where, resolve_dtype(dtype, where))


def _random_policy(shape: str, device: torch.device, dtype: torch.dtype) -> Policy:
    sizes = SHAPES[shape]
    mask, eos = sizes["vocab"] - 128, sizes["vocab"] - 127
    config: Any = LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["inner"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"],
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        is_causal=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    _scale_weights(model)
    return Policy(
        model=model.eval(),
        tokenizer=None,
        family="llada",
        mask_id=mask,
        eos_id=eos,
        pad_id=eos,
        shift=0,
        vocab_size=sizes["vocab"],
        name=f"random:{shape}",
        revision="random",
    )


@torch.no_grad()
def _scale_weights(model: LlamaForCausalLM) -> None:
    """Variance 1 / inputs keeps the size of activations; a gain of 2 makes positions differ."""
    generator = torch.Generator(model.device).manual_seed(0)
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            weight.normal_(0.0, 1.0, generator=generator)
        elif weight.dim() > 1:
            gain = 8.0 if "lm_head" in name else 2.0
            weight.normal_(0.0, gain / weight.shape[1] ** 0.5, generator=generator)


def random_prompts(policy: Policy, number: int, shortest: int, longest: int) -> list[list[int]]:
    """Prompts of random ids, with evenly spread lengths."""
    generator = torch.Generator().manual_seed(1)
    limit = min(policy.vocab_size, policy.mask_id or policy.vocab_size)
    lengths = torch.linspace(shortest, longest, number).round().int().tolist()
    return [torch.randint(limit, (n,), generator=generator).tolist() for n in lengths]
