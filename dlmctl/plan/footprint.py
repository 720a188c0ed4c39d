"""Memory of the passes of a training run, by following the passes themselves without values.

What stays (weights, gradients, moments) is counted from shapes. What comes and goes is followed
operation by operation (plan/live_memory) through the training code itself, under its autocast, on
tensors without memory. Two models with few blocks are followed, since memory is linear in the
number of blocks.

Not counted: rounding and fragmentation of torch's allocator, and the few hundred megabytes of CUDA
itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dlmctl.diffusion.autoregressive import next_tokens
from dlmctl.diffusion.fused_linear_logprob import target_log_probs, weighted_log_prob
from dlmctl.diffusion.proposals import positions_per_chunk, predict_tokens_chunk
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.blocks import decoder_blocks
from dlmctl.models.policy import Policy
from dlmctl.models.quantization import linear_layers, quantized_bytes
from dlmctl.models.weightless import followable
from dlmctl.plan.flops import head_size
from dlmctl.plan.live_memory import LiveMemory
from dlmctl.settings.optimizer import Method
from dlmctl.train.activations import checkpoint_activations, checkpoints_activations
from dlmctl.train.optimizer import moment_bytes
from dlmctl.train.precision import training_precision
from dlmctl.train.sharding import autocast_products

FEW = (3, 6)
"""Numbers of blocks of the models that are followed."""


class Passing(NamedTuple):
    """Bytes of what comes and goes, at its peak."""

    activations: float
    """What the blocks keep for the backward pass, and what they work with."""
    logits: float
    """Logits of a chunk of scored positions, and what the output head keeps."""

    @property
    def total(self) -> float:
        return self.activations + self.logits


class _Phases(NamedTuple):
    """Bytes alive in a pass: the peaks within its parts, and what is alive between them."""

    forward: float
    saved: float
    head: float
    kept: float
    backward: float


def gradient_memory(
    policy: Policy, rows: int, length: int, scored: int, compute: torch.dtype
) -> Passing:
    """A micro-batch of `update` on top of weights, gradients and moments.

    Args:
        policy: weightless, its adapter and gradient checkpointing in place.
        rows: number of sequences of this length; the last `scored` tokens of each are scored.
        compute: dtype of the matrix products.
    """
    phases = _for_all_blocks(
        policy, lambda few: _gradient(policy, few, rows, length, scored, compute)
    )
    at = _Phases(*phases)
    peak = max(at.forward, at.head, at.backward)
    if peak == at.head:
        return Passing(at.saved, at.head - at.saved)
    if peak == at.backward:
        return Passing(peak - (at.kept - at.saved), at.kept - at.saved)
    return Passing(peak, 0.0)


def _gradient(
    policy: Policy, few: int, rows: int, length: int, scored: int, compute: torch.dtype
) -> _Phases:
    with FakeTensorMode():
        model = followable(policy, few)
        for parameter in model.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        ids, row, column = _places(model, rows, length, scored)
        goals = torch.zeros(rows * scored, dtype=torch.int64)
        model.model.train()
        with _followed(model, compute) as live:
            states = model.hidden(ids, None)[row, column]
            saved, forward = live.now, live.peak
            live.begin_peak()
            value = weighted_log_prob(model, states, goals, torch.zeros(rows * scored))
            kept, head = live.now, live.peak
            live.begin_peak()
            del states
            value.backward(torch.tensor(1.0))
            return _Phases(forward, saved, head, kept, live.peak)


def scoring_memory(
    policy: Policy, rows: int, length: int, scored: int, compute: torch.dtype
) -> Passing:
    """A micro-batch that is scored without gradient, on top of the weights; arguments as above."""

    def follow(few: int) -> tuple[float, ...]:
        with FakeTensorMode():
            model = followable(policy, few)
            ids, row, column = _places(model, rows, length, scored)
            goals = torch.zeros(rows * scored, dtype=torch.int64)
            with _followed(model, compute) as live, torch.no_grad():
                states = model.hidden(ids, None)[row, column]
                forward = live.peak
                live.begin_peak()
                target_log_probs(model, states, goals)
                return forward, live.peak, live.now

    forward, head, kept = _for_all_blocks(policy, follow)
    return Passing(max(forward, kept), max(0.0, head - max(forward, kept)))


def sampling_memory(
    policy: Policy, settings: SamplerConfig, rows: int, prompt_length: int
) -> tuple[float, Passing]:
    """Bytes of keys and values that `rollout` keeps, and its pass over the whole batch with the
    proposals, whose logits are computed in chunks as large as on CUDA.
    """
    length = prompt_length + settings.gen_length
    config = policy.core.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dtype = next(policy.model.parameters()).dtype
    cached = 0.0
    if not policy.diffusion or settings.cached:
        per_token = 2 * config.num_hidden_layers * heads * head_size(config)
        cached = float(rows * length * per_token * dtype.itemsize)

    def follow(few: int) -> tuple[float, ...]:
        with FakeTensorMode():
            model = followable(policy, few)
            width = length if policy.diffusion else prompt_length
            ids = torch.zeros(rows, width, dtype=torch.int64)
            with LiveMemory() as live, torch.no_grad():
                hidden = model.hidden(ids, None)
                forward = live.peak
                live.begin_peak()
                _propose(model, hidden, settings)
                return forward, live.peak

    forward, head = _for_all_blocks(policy, follow)
    return cached, Passing(forward, max(0.0, head - forward))


def _propose(policy: Policy, hidden: Tensor, settings: SamplerConfig) -> None:
    rows = len(hidden)
    if not policy.diffusion:
        logits = policy.logits(hidden[:, -1]).double()
        keys = torch.zeros(rows, dtype=torch.int64)
        next_tokens(policy, logits, keys, 0, settings)
        return
    block = min(settings.block_length, settings.gen_length)
    states = hidden[:, -block:].flatten(0, 1)
    chunk = min(len(states), positions_per_chunk(policy.vocab_size, cuda=True))
    pieces = [states[:chunk]] * (2 if settings.cfg_scale > 0 else 1)
    predict_tokens_chunk(policy, pieces, torch.zeros(chunk, dtype=torch.int64), settings)


def tower_memory(policy: Policy, patches: int, trained: bool, compute: torch.dtype) -> float:
    """Bytes that a vision tower keeps, estimated by a Llama of the same shape."""
    from transformers import LlamaConfig, LlamaModel

    config: Any = policy.core.config.vision_config
    depth = getattr(config, "depth", None) or config.num_hidden_layers
    heads = getattr(config, "num_heads", None) or config.num_attention_heads
    shape: Any = LlamaConfig(
        vocab_size=1,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        is_causal=False,
    )
    recomputes = checkpoints_activations(policy.core)
    dtype = next(policy.model.parameters()).dtype

    def follow(few: int) -> tuple[float, ...]:
        shape.num_hidden_layers = few
        with FakeTensorMode():
            tower = LlamaModel._from_config(shape, dtype=dtype, attn_implementation="sdpa")
            if recomputes:
                checkpoint_activations(tower)
            tower.train(trained)
            given = torch.zeros(1, patches, config.hidden_size, dtype=dtype, requires_grad=trained)
            autocast = torch.autocast("cpu", compute, compute != torch.float32, False)
            with LiveMemory() as live, autocast, torch.set_grad_enabled(trained):
                seen = tower(inputs_embeds=given, use_cache=False).last_hidden_state
                return (live.now if trained else live.peak, float(seen.numel()))

    few, more = ((n, follow(n)[0]) for n in FEW)
    return _line(few, more, depth)


@contextlib.contextmanager
def _followed(policy: Policy, compute: torch.dtype) -> Iterator[LiveMemory]:
    """Follow memory in the body, in the arithmetic of training."""
    with LiveMemory() as live, training_precision(policy, compute):
        yield live


def _places(policy: Policy, rows: int, length: int, scored: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [B, T], and the rows and columns of the hidden states of scored tokens, [N] each."""
    ids = torch.zeros(rows, length, dtype=torch.int64)
    row = torch.arange(rows).repeat_interleave(scored)
    column = torch.arange(length - scored, length).repeat(rows)
    return ids, row, policy.source(column)


def _for_all_blocks(
    policy: Policy, follow: Callable[[int], tuple[float, ...]]
) -> tuple[float, ...]:
    """What `follow` would return for all blocks of the policy, extrapolated from few blocks."""
    depth = len(decoder_blocks(policy))
    if depth <= FEW[1]:
        return tuple(follow(depth))
    few, more = follow(FEW[0]), follow(FEW[1])
    pairs = zip(few, more, strict=True)
    return tuple(_line((FEW[0], a), (FEW[1], b), depth) for a, b in pairs)


def _line(first: tuple[int, float], second: tuple[int, float], place: int) -> float:
    slope = (second[1] - first[1]) / (second[0] - first[0])
    return first[1] + slope * (place - first[0])


class Kept(NamedTuple):
    """Bytes that stay on a device; shards, if there are several devices."""

    weights: int
    gradients: int
    moments: int


def kept_memory(policy: Policy, devices: int, method: Method = "adamw") -> Kept:
    """Bytes of a policy that is trained on this many devices, each as full as the first."""
    everything, small = list(policy.model.parameters()), quantized_bytes(policy)
    weights = sum(small[p] if p in small else shard_bytes(p, devices) for p in everything)
    trained = [p for p in everything if p.requires_grad]
    gradients = sum(shard_bytes(p, devices) for p in trained)
    if method == "adamw":
        return Kept(weights, gradients, 2 * gradients)
    return Kept(weights, gradients, sum(moment_bytes(p) for p in trained))


def dequantized(policy: Policy) -> int:
    """Bytes of the largest layer that is to be quantized, which is whole while it computes."""
    if policy.quantized is None:
        return 0
    return max(layer.weight.numel() * layer.weight.itemsize for *_, layer in linear_layers(policy))


def shard_bytes(parameter: Tensor, devices: int) -> int:
    """Bytes of a device's share: FSDP2 splits the first dimension and pads the last share."""
    if devices == 1:
        return parameter.numel() * parameter.itemsize
    rows = math.ceil(len(parameter) / devices)
    return rows * (parameter.numel() // len(parameter)) * parameter.itemsize


class Units(NamedTuple):
    """Bytes of the units in which FSDP2 moves a model: their gathered weights and gradients."""

    blocks: list[int]
    gradients: list[int]
    root: int
    root_gradients: int

    @property
    def gathered(self) -> int:
        """The most that is alive at once, in the backward pass.

        The root, a block, the next block that is fetched ahead and its buffer; gradients of root
        and block, and the buffers they leave by. Two ranks on the CPU, where nothing is fetched
        ahead, had a peak of 0.5 to 0.8 of this plus the passes.
        """
        weights = self.root + 3 * max(self.blocks)
        return weights + 2 * self.root_gradients + 2 * max(self.gradients)


def units(policy: Policy, devices: int, compute: torch.dtype = torch.float32) -> Units:
    """Units of a policy: every block, and the root, which is everything outside the blocks.

    Args:
        compute: dtype of the matrix products, in which the weights of linear layers are gathered.
    """

    def whole(parameters: Iterator[nn.Parameter], trained: bool = False) -> int:
        chosen = (p for p in parameters if p.requires_grad or not trained)
        return devices * sum(shard_bytes(p, devices) for p in chosen)

    parts = list(decoder_blocks(policy))
    root = whole(policy.model.parameters()) - sum(whole(block.parameters()) for block in parts)
    blocks = []
    for block in parts:
        cast = sum(whole(layer.parameters()) for layer in autocast_products(block))
        kept = whole(block.parameters()) - cast
        blocks.append(kept + cast * compute.itemsize // torch.float32.itemsize)
    gradients = [whole(block.parameters(), True) for block in parts]
    return Units(blocks, gradients, root, whole(policy.model.parameters(), True) - sum(gradients))
