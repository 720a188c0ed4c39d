"""4-bit weights of a frozen model: NF4 of QLoRA (arXiv 2305.14314), through bitsandbytes.

64 weights of a linear layer, in row-major order, share the largest magnitude among them, in
float32; each weight is that times the nearest of 16 quantiles of the normal distribution
(section 3 and appendix E; the magnitudes are not quantized in turn). The linear layers of the
blocks are quantized whose rows are a multiple of 64 long, as those of published models are: on a
CPU, bitsandbytes 0.50 restores other rows with the magnitudes of their neighbours. Embeddings,
norms, biases, the output head and a vision tower are not quantized.

The revision of a quantized policy is that of its weights on disk with the name of the format behind
it, as in `0123456789abcdef-nf4`: its probabilities are not those of the weights on disk.
"""

from __future__ import annotations

import dataclasses
import sys
from math import ceil
from typing import Any, get_args

import torch
from torch import nn

from dlmctl.models.blocks import decoder_blocks
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError, missing_package
from dlmctl.settings.compute import Quantization

BLOCK = 64
"""Weights that share a magnitude: all of one row."""


def bitsandbytes(option: str) -> Any:
    """The package, for the option that needs it; raises UnavailableError."""
    # On some CPUs it would let this package download kernels, which are code, from the hub.
    absent = object()
    before = sys.modules.get("kernels", absent)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes as package
    except ImportError:
        raise missing_package("bitsandbytes", "quantized", option) from None
    finally:
        del sys.modules["kernels"]
        if before is not absent:
            sys.modules["kernels"] = before  # type: ignore[assignment]
    return package


def quantization_of(revision: str) -> Quantization | None:
    """The format that the weights of a revision, or those below its adapter, are quantized to."""
    return next((kind for kind in get_args(Quantization) if f"-{kind}" in revision), None)


def on_disk(revision: str) -> str:
    """The revision of the weights that a base model was quantized from, or its own."""
    return revision.removesuffix(f"-{quantization_of(revision)}")


def linear_layers(policy: Policy) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The layers to quantize, each with its parent and its name there.

    Raises:
        UsageError: the model is a mixture of experts, or its blocks have no such layers.
    """
    blocks = decoder_blocks(policy)
    if any(parameter.dim() == 3 for parameter in blocks.parameters()):
        raise UsageError(
            f"--quantize is for linear layers, and {policy.name} is a mixture: transformers has "
            "its experts in one tensor, which would stay as it is; leave --quantize out"
        )
    layers = [
        (parent, name, child)
        for path, parent in blocks.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and "lora_" not in path
        if child.in_features % BLOCK == 0
    ]
    if not layers:
        raise UsageError(
            f"--quantize is for linear layers whose rows are a multiple of {BLOCK} long, and the "
            f"blocks of {policy.name} have none; leave it out"
        )
    return layers


def quantizable(policy: Policy) -> bool:
    """Whether its layers can be quantized."""
    try:
        return bool(linear_layers(policy))
    except UsageError:
        return False


def quantized(policy: Policy, kind: Quantization, device: torch.device) -> Policy:
    """The policy on a device, its linear layers quantized; changes the model in place.

    Its weights are frozen.

    Args:
        policy: on the CPU, without adapter. Whole layers are on the device one at a time.

    Raises:
        UnavailableError: bitsandbytes is not installed.
        UsageError: the model cannot be quantized.
    """
    nn_of = bitsandbytes(f"--quantize {kind}").nn
    model: Any = policy.model.requires_grad_(False)
    for parent, name, layer in linear_layers(policy):
        small = nn_of.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=layer.weight.dtype,
            compress_statistics=False,
            quant_type=kind,
            device="meta",
        )
        small.weight = nn_of.Params4bit(
            layer.weight.detach(),
            requires_grad=False,
            blocksize=BLOCK,
            compress_statistics=False,
            quant_type=kind,
            module=small,
        ).to(device)
        small.bias = layer.bias
        # On some CPUs inference would round otherwise than training, and repack the weights.
        small.support_avx512bf16_for_cpu = False
        setattr(parent, name, small.train(layer.training))
    model.is_loaded_in_4bit = True  # what peft asks
    return dataclasses.replace(
        policy, model=model.to(device), quantized=kind, revision=f"{policy.revision}-{kind}"
    )


def quantized_bytes(policy: Policy) -> dict[nn.Parameter, int]:
    """Bytes of the weights that are to be quantized, by parameter.

    Args:
        policy: `quantized` says the format, in which its layers are not yet.
    """
    if policy.quantized is None:
        return {}
    weights = [layer.weight for _, _, layer in linear_layers(policy)]
    return {w: ceil(w.numel() / 2) + 4 * ceil(w.numel() / BLOCK) for w in weights}
