"""Floating-point operations of passes, from the shapes of a model.

With W weights in the matrix products of the blocks, W' of them trained, a = layers x heads x size
of a head, and H weights in the output head, H' of them trained:

    forward(Q, S)    2 W Q + 4 a Q S            Q tokens that see S
    backward(Q, S)   2 W Q + 2 W' Q + 10 a Q S  fused attention makes its scores again
    head(N)          2 H N                      logits of N positions
    its gradient     2 H N + 2 H' N

A product of an m x k and a k x n matrix counts as 2 m k n, and nothing else counts, as in torch's
FlopCounterMode. A backward pass that makes activations again has another forward pass in it, but
for the last product of each block.
Gradients by the inputs of the first block, which nothing asks for where the embeddings are not
trained, are counted all the same: a share of about 1 / (4 layers) of an adapter's backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.blocks import decoder_blocks
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError

TOWERS = ("visual", "vision_tower")
"""What transformers calls the vision half of a model."""
JOINTS = ("merger", "projector")
"""Parts of it that see the tokens of an image, and not its patches."""


class Part(NamedTuple):
    """Weights in matrix products."""

    all: int
    trained: int

    def __add__(self, other: Any) -> Part:
        return Part(self.all + other.all, self.trained + other.trained)


@dataclass(frozen=True)
class Tower:
    """The vision half of a model."""

    patches: Part
    """Weights that a patch goes through."""
    tokens: Part
    """Weights that a token of the image goes through."""
    attention: int
    """Blocks that attend to the whole image, times heads and their size."""
    windowed: int
    """The same of those that attend within windows."""
    window: int
    """Patches of a window."""
    per_token: int
    """Patches of a token."""

    def forward(self, tokens: int) -> float:
        """An image of so many tokens."""
        patches = tokens * self.per_token
        seen = self.attention * patches + self.windowed * min(self.window, patches)
        return 2 * (self.patches.all * patches + self.tokens.all * tokens) + 4 * seen * patches

    def backward(self, tokens: int) -> float:
        """Nothing is asked of the pixels, but of all that stands behind what is trained."""
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
    """What the operations of a model depend on."""

    blocks: Part
    head: Part
    attention: int
    """Layers x heads x size of a head."""
    again: int | None
    """Weights of the blocks that a backward pass goes through once more, where activations are made
    again: without the last product of each block, which nothing needs."""
    tower: Tower | None = None

    def forward(self, queries: float, seen: float) -> float:
        """Tokens that go through the blocks, each of which sees so many."""
        return 2 * self.blocks.all * queries + 4 * self.attention * queries * seen

    def backward(self, queries: float, seen: float) -> float:
        """The same tokens backward."""
        weights = 2 * (self.blocks.all + self.blocks.trained) * queries
        attention = self.attention * queries * seen
        if self.again is None:
            return weights + 10 * attention
        return weights + 2 * self.again * queries + 14 * attention

    def scoring(self, length: int, scored: float) -> float:
        """A sequence of which so many tokens are scored, without gradient."""
        return self.forward(length, length) + 2 * self.head.all * scored

    def gradient(self, length: int, scored: float) -> float:
        """The same with its backward pass."""
        head = 2 * (2 * self.head.all + self.head.trained) * scored
        return self.forward(length, length) + head + self.backward(length, length)

    def images(self, tokens: int, backward: bool) -> float:
        """One image through the tower."""
        if self.tower is None or not tokens:
            return 0.0
        forward = self.tower.forward(tokens)
        if not backward:
            return forward
        return forward * (1 if self.again is None else 2) + self.tower.backward(tokens)


def counts(policy: Policy, recomputes: bool) -> Counts:
    """Those of a policy, its adapter's layers among them.

    Raises:
        UsageError: it is a mixture of experts, of which a token does not go through all.
    """
    body = getattr(policy.core, policy.core.base_model_prefix)
    own = {id(module) for module in body.modules()}
    blocks, head, patches, tokens = (Part(0, 0) for _ in range(4))
    for name, module in policy.core.named_modules():
        if name.endswith("experts"):
            raise UsageError(f"{policy.name} is a mixture of experts, which is not planned here")
        if _products(module) != [module]:
            continue
        weight: Any = module.weight
        part = Part(weight.numel(), weight.numel() * weight.requires_grad)
        if id(module) not in own:
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
    again = None
    if recomputes:
        last = [_products(block)[-1].weight for block in decoder_blocks(policy)]
        again = blocks.all - sum(weight.numel() for weight in last)
    return Counts(blocks, head, attention, again, tower)


def head_size(config: Any) -> int:
    """Of an attention head of a language model with this configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _products(module: nn.Module) -> list[Any]:
    """Its layers that are matrix products."""
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return [found for found in module.modules() if isinstance(found, kinds)]


def _tower(config: Any, patches: Part, tokens: Part) -> Tower:
    depth = getattr(config, "depth", None) or config.num_hidden_layers
    merge = getattr(config, "spatial_merge_size", 1)
    window = getattr(config, "window_size", 0) // config.patch_size
    whole = len(getattr(config, "fullatt_block_indexes", ())) if window else depth
    width = config.hidden_size
    return Tower(
        patches, tokens, whole * width, (depth - whole) * width, window * window, merge * merge
    )


def denoising(found: Counts, settings: SamplerConfig, prompt_length: int, shift: int) -> float:
    """Sampling of one completion by the block-wise sampler, with all its steps."""
    length = prompt_length + settings.gen_length
    interval = settings.refresh or settings.steps_per_block
    guided = 2 if settings.cfg_scale > 0 else 1
    total = 0.0
    for block, quota in enumerate(settings.quota().tolist()):
        masked = sum(quota)
        start = block * settings.block_length
        rest = settings.gen_length - start
        part = min(settings.block_length, rest) if settings.cache == "dual" else rest
        for step, decided in enumerate(quota):
            whole = settings.cache == "none" or step % interval == 0
            queries = length if whole else part + shift
            total += guided * (found.forward(queries, length) + 2 * found.head.all * masked)
            masked -= decided
    return total


def left_to_right(found: Counts, gen_length: int, prompt_length: int) -> float:
    """Sampling of one completion of full length by an autoregressive model with its cache."""
    steps = gen_length - 1
    seen = prompt_length + (steps + 1) / 2
    return (
        found.forward(prompt_length, prompt_length)
        + found.forward(steps, seen)
        + 2 * found.head.all * gen_length
    )
