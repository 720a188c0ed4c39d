"""Floating-point operations of passes, from the shapes of a model.

W is the number of weights in the matrix products of the blocks, W' of them trained; a = layers x
heads x size of a head; H is the number of weights in the output head, H' of them trained:

    forward(Q, S)    2 W Q + 4 a Q S            Q tokens that see S
    backward(Q, S)   2 W Q + 2 W' Q + 10 a Q S  fused attention recomputes its scores
    head(N)          2 H N                      logits of N positions
    its gradient     2 H N + 2 H' N

A product of an m x k and a k x n matrix counts as 2 m k n, and nothing else counts, as in torch's
FlopCounterMode. A backward pass that recomputes activations contains another forward pass, except
for the last product of each block. Gradients with respect to the inputs of the first block are
always counted, although they are not needed if the embeddings are not trained: that is about
1 / (4 layers) of an adapter's backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.attention import Blocks
from dlmctl.models.blocks import decoder_blocks
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError

TOWERS = ("visual", "vision_tower")
"""Names of the vision half of a model in transformers."""
JOINTS = ("merger", "projector")
"""Its parts that process the tokens of an image, not its patches."""


class Part(NamedTuple):
    """Number of weights in matrix products."""

    all: int
    trained: int

    def __add__(self, other: Any) -> Part:
        return Part(self.all + other.all, self.trained + other.trained)


@dataclass(frozen=True)
class Tower:
    """The vision half of a model."""

    patches: Part
    """Weights that each patch is multiplied with."""
    tokens: Part
    """Weights that each token of the image is multiplied with."""
    attention: int
    """Blocks that attend to the whole image, times heads times size of a head."""
    windowed: int
    """The same product for blocks that attend within windows."""
    window: int
    """Patches in a window."""
    per_token: int
    """Patches for each token."""

    def forward(self, tokens: int) -> float:
        """Operations for an image of this many tokens."""
        patches = tokens * self.per_token
        seen = self.attention * patches + self.windowed * min(self.window, patches)
        return 2 * (self.patches.all * patches + self.tokens.all * tokens) + 4 * seen * patches

    def backward(self, tokens: int) -> float:
        """Its backward pass: gradients of trained weights and of activations, but not of pixels."""
        if not self.patches.trained + self.tokens.trained:
            return 0.0
        patches = tokens * self.per_token
        trained = self.patches.trained * patches + self.tokens.trained * tokens
        attention = self.forward(tokens) - 2 * (
            self.patches.all * patches + self.tokens.all * tokens
        )
        return self.forward(tokens) + 2 * trained + 1.5 * attention


@dataclass(frozen=True)
class Counts:
    """What the number of operations of a model depends on."""

    blocks: Part
    head: Part
    attention: int
    """Layers x heads x size of a head."""
    recomputed: int | None
    """Weights of the blocks that a backward pass uses once more to recompute activations: all but
    the last product of each block, which is not needed. None: activations are kept."""
    tower: Tower | None = None

    def forward(self, queries: float, seen: float) -> float:
        """The blocks, for `queries` tokens that each attend to `seen` tokens."""
        return 2 * self.blocks.all * queries + 4 * self.attention * queries * seen

    def backward(self, queries: float, seen: float) -> float:
        """The backward pass of `forward`."""
        weights = 2 * (self.blocks.all + self.blocks.trained) * queries
        attention = self.attention * queries * seen
        if self.recomputed is None:
            return weights + 10 * attention
        return weights + 2 * self.recomputed * queries + 14 * attention

    def scoring(self, length: int, scored: float) -> float:
        """A sequence with this many scored tokens, without gradient."""
        return self.forward(length, length) + 2 * self.head.all * scored

    def gradient(self, length: int, scored: float) -> float:
        """The same with the backward pass."""
        head = 2 * (2 * self.head.all + self.head.trained) * scored
        return self.forward(length, length) + head + self.backward(length, length)

    def training(self, length: int, scored: float, plain: int, gradients: int) -> float:
        """This many passes without gradient over a sequence, and this many with it."""
        return plain * self.scoring(length, scored) + gradients * self.gradient(length, scored)

    def images(self, tokens: int, backward: bool) -> float:
        """One image through the tower."""
        if self.tower is None or not tokens:
            return 0.0
        forward = self.tower.forward(tokens)
        if not backward:
            return forward
        return forward * (1 if self.recomputed is None else 2) + self.tower.backward(tokens)


def counts(policy: Policy, recomputes: bool) -> Counts:
    """Counts of a policy, with its adapter's layers.

    Raises:
        UsageError: it is a mixture of experts, in which a token does not use all weights.
    """
    body = policy.body
    inside = {id(module) for module in body.modules()}
    blocks, head, patches, tokens = (Part(0, 0) for _ in range(4))
    for name, module in policy.core.named_modules():
        if name.endswith("experts"):
            raise UsageError(f"{policy.name} is a mixture of experts, which is not planned here")
        if _products(module) != [module]:
            continue
        weight: Any = module.weight
        part = Part(weight.numel(), weight.numel() * weight.requires_grad)
        if id(module) not in inside:
            head += part
        elif any(joint in name for joint in JOINTS):
            tokens += part
        elif any(tower in name for tower in TOWERS):
            patches += part
        else:
            blocks += part
    config = policy.core.config.get_text_config()
    attention = config.num_hidden_layers * config.num_attention_heads * head_size(config)
    tower = None
    if patches.all:
        tower = _tower(policy.core.config.vision_config, patches, tokens)
    recomputed = None
    if recomputes:
        last = [_products(block)[-1].weight for block in decoder_blocks(policy)]
        recomputed = blocks.all - sum(weight.numel() for weight in last)
    return Counts(blocks, head, attention, recomputed, tower)


def head_size(config: Any) -> int:
    """Size of an attention head of a language model with this configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _products(module: nn.Module) -> list[Any]:
    """Layers in it that are matrix products."""
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return [layer for layer in module.modules() if isinstance(layer, kinds)]


def _tower(config: Any, patches: Part, tokens: Part) -> Tower:
    depth = getattr(config, "depth", None) or config.num_hidden_layers
    merge = getattr(config, "spatial_merge_size", 1)
    window = getattr(config, "window_size", 0) // config.patch_size
    whole = len(getattr(config, "fullatt_block_indexes", ())) if window else depth
    width = config.hidden_size
    return Tower(
        patches, tokens, whole * width, (depth - whole) * width, window * window, merge * merge
    )


def denoising(
    model: Counts,
    settings: SamplerConfig,
    prompt_length: int,
    shift: int,
    blocks: Blocks | None = None,
) -> float:
    """Sampling one completion with the block-wise sampler, with all its steps.

    Args:
        blocks: of a block-causal model.
    """
    if blocks is not None:
        return _by_blocks(model, settings, prompt_length, shift, blocks)
    length = prompt_length + settings.gen_length
    interval = settings.refresh or settings.steps_per_block
    guided = 2 if settings.cfg_scale > 0 else 1
    total = 0.0
    for block, quota in enumerate(settings.quota().tolist()):
        start = block * settings.block_length
        rest = settings.gen_length - start
        masked = min(settings.block_length, rest)
        part = min(settings.block_length, rest) if settings.cache == "dual" else rest
        for step, decided in enumerate(quota):
            if settings.idles and not decided:
                continue
            whole = not settings.cached or step % interval == 0
            queries = length if whole else part + shift
            total += guided * (model.forward(queries, length) + 2 * model.head.all * masked)
            masked -= masked * decided if settings.ancestral else decided
    return total


def _by_blocks(
    model: Counts, settings: SamplerConfig, prompt_length: int, shift: int, blocks: Blocks
) -> float:
    """The same for a block-causal model, which passes over nothing behind its block."""
    size, first = blocks.length, blocks.first(prompt_length)
    length = blocks.whole(prompt_length + settings.gen_length)
    guided = 2 if settings.cfg_scale > 0 else 1
    total = 0.0
    for begin in range(first, length, size):
        end = min(begin + size, length)
        inside = masked = end - max(begin, prompt_length)
        more = [0] * settings.edit_steps if settings.editing else []
        for step, decided in enumerate([*settings.per_step(size if blocks.cut else inside), *more]):
            if masked <= 0 and not settings.editing:
                break
            whole = not settings.cached or (begin == first and step == 0)
            before = size if step == 0 else shift
            queries = end if whole else end - max(0, begin - before)
            predicted = inside if settings.editing else masked
            total += guided * (model.forward(queries, end) + 2 * model.head.all * predicted)
            masked -= int(decided)
    return total


def left_to_right(model: Counts, gen_length: int, prompt_length: int) -> float:
    """Sampling one completion of full length with an autoregressive model and its cache."""
    steps = gen_length - 1
    seen = prompt_length + (steps + 1) / 2
    return (
        model.forward(prompt_length, prompt_length)
        + model.forward(steps, seen)
        + 2 * model.head.all * gen_length
    )
