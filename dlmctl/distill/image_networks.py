"""Networks F(x, c) of a noisy input and its noise level: a small U-Net, and a residual MLP.

Sizes and layout of both are ours. The last layer is initialized to zero, so that a denoiser around
them begins as its skip connection. Dropout, of the U-Net alone, is off unless a run turns it on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlmctl.diffusion.noise import key_tensor, random_bits, stream_key, subkeys
from dlmctl.records.errors import UsageError
from dlmctl.settings.images import NetworkKind, NetworkSizes
from dlmctl.settings.parsing import whole_numbers

FASTEST = 16.0
"""Highest frequency of the embedding, in radians per unit of c_noise = ln(sigma) / 4; higher ones
make the derivative by time rough, on which consistency depends (ours)."""
SHARES = 2**16
"""Shares of activations that dropout tells apart."""


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of a network, as config.json of a checkpoint has them; see also `NetworkSizes`."""

    kind: NetworkKind
    shape: tuple[int, ...]
    """Of an input without the batch dimension: (C, H, W), or (D,), which only `mlp` takes."""
    width: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = ()
    """Levels of the U-Net, 0 the finest, with self-attention."""
    heads: int = 4

    def __post_init__(self) -> None:
        sizes = (self.width, self.blocks, self.heads, *self.shape, *self.multipliers)
        if not all(type(size) is int and size > 0 for size in sizes):
            raise UsageError("sizes of a network are whole numbers from 1 on")
        if not all(type(level) is int and level >= 0 for level in self.attention):
            raise UsageError("levels with attention are whole numbers from 0 on")
        if self.kind not in get_args(NetworkKind) or not self.shape:
            raise UsageError(f"a network is a unet or an mlp, not {self.kind!s:.80}")
        if self.kind == "mlp":
            return
        if len(self.shape) != 3:
            raise UsageError(f"a U-Net takes images, not vectors of {self.shape[0]}: take mlp")
        halvings = 2 ** (len(self.multipliers) - 1)
        if any(side % halvings for side in self.shape[1:]):
            raise UsageError(
                f"images of {self.shape[2]}x{self.shape[1]} cannot be halved "
                f"{len(self.multipliers) - 1} times: give fewer --multipliers"
            )
        if any(level >= len(self.multipliers) for level in self.attention):
            raise UsageError(f"there are {len(self.multipliers)} levels, from 0 on, for attention")
        if self.attention and any(
            self.width * self.multipliers[level] % self.heads for level in self.attention
        ):
            raise UsageError(f"channels of a level with attention are not {self.heads} heads")


def network_config(shape: tuple[int, ...], sizes: NetworkSizes) -> NetworkConfig:
    """The network that options describe, for inputs of a shape.

    Raises:
        UsageError: the options do not go together, or do not fit the shape.
    """
    kind = sizes.kind or ("unet" if len(shape) == 3 and min(shape[1:]) >= 16 else "mlp")
    blocks = sizes.blocks or 2
    if kind == "mlp":
        if sizes.multipliers or sizes.attention:
            raise UsageError("--multipliers and --attention are for --network unet")
        return NetworkConfig("mlp", shape, sizes.width or 256, (), blocks)
    levels = whole_numbers("--attention", sizes.attention) if sizes.attention else []
    multipliers = whole_numbers("--multipliers", sizes.multipliers or "1,2,2")
    attention = tuple(level - 1 for level in levels)
    return NetworkConfig("unet", shape, sizes.width or 32, tuple(multipliers), blocks, attention)


def make_network(config: NetworkConfig) -> nn.Module:
    """A network with new weights, drawn from torch's global generator.

    Its `forward(x, c)` maps float [N, *shape] and float [N] to float [N, *shape].
    """
    return Unet(config) if config.kind == "unet" else ResidualMlp(config)


class Unet(nn.Module):
    """Residual blocks, conditioned on the noise level, at falling then rising resolution, with skip
    connections between the two."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        channels, time = config.shape[0], 4 * config.width
        widths = [config.width * multiplier for multiplier in config.multipliers]
        self.embedding = LevelEmbedding(config.width, time)
        self.first = nn.Conv2d(channels, config.width, 3, padding=1)
        skips, width = [config.width], config.width
        self.down = nn.ModuleList()
        for level, out in enumerate(widths):
            if level:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
            for _ in range(config.blocks):
                heads = config.heads if level in config.attention else 0
                self.down.append(Block(width, out, time, heads))
                width = out
                skips.append(width)
        heads = config.heads if len(widths) - 1 in config.attention else 0
        self.middle = Block(width, width, time, heads)
        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                heads = config.heads if level in config.attention else 0
                self.up.append(Block(width + skips.pop(), out, time, heads))
                width = out
            if level:
                self.up.append(Upsample(width))
        self.norm = _norm(width)
        self.last = _zeroed(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """See `make_network`."""
        time = self.embedding(c)
        x = self.first(x)
        skips = [x]
        for part in self.down:
            x = part(x, time) if isinstance(part, Block) else part(x)
            skips.append(x)
        x = self.middle(x, time)
        for part in self.up:
            joined = isinstance(part, Block)
            x = part(torch.cat([x, skips.pop()], 1), time) if joined else part(x)
        out: Tensor = self.last(functional.silu(self.norm(x)))
        return out


class Block(nn.Module):
    """Two convolutions, between which the noise level scales and shifts, then attention."""

    def __init__(self, width: int, out: int, time: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(width), _norm(out)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.dropout = RowDropout()
        self.conv2 = _zeroed(nn.Conv2d(out, out, 3, padding=1))
        self.time = nn.Linear(time, 2 * out)
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()
        self.attention = Attention(out, heads) if heads else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x float [N, width, H, W] and time float [N, time]; float [N, out, H, W]."""
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        hidden = self.conv1(functional.silu(self.norm1(x)))
        hidden = self.norm2(hidden) * (1 + scale) + shift
        out: Tensor = self.skip(x) + self.conv2(self.dropout(functional.silu(hidden)))
        return out if self.attention is None else self.attention(out)


class RowDropout(nn.Module):
    """Dropout whose mask is a function of a key and of the row of the batch.

    So it is the same in a run that is resumed, on every device, whatever rows of the batch a
    process has, and in all passes of a step: those of a student and of its target, as ect has them
    (arXiv 2406.14548). Nothing is dropped before `draw_dropout`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.share, self.first_row = 0.0, 0
        self.key: tuple[str | int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Float [N, ...] to the same shape."""
        if not self.training or not self.share:
            return x
        size, dropped = x[0].numel(), round(self.share * SHARES)
        rows = torch.arange(self.first_row, self.first_row + len(x), device=x.device)
        keys = subkeys(key_tensor([stream_key(*self.key)], x.device), rows)
        counters = torch.arange((size + 3) // 4, device=x.device)
        # Each 64 bits make four numbers from -2^15 on.
        numbers = random_bits(keys[:, None], counters).view(torch.int16)[:, :size]
        kept = (numbers >= dropped - SHARES // 2).reshape(x.shape)
        return x * kept * (SHARES / (SHARES - dropped))


def draw_dropout(network: nn.Module, share: float, seed: int, step: int, first_row: int) -> None:
    """Set the masks of a step: of this share, for inputs whose rows begin at this of the batch."""
    parts = [part for part in network.modules() if isinstance(part, RowDropout)]
    for number, part in enumerate(parts):
        part.share, part.first_row = share, first_row
        part.key = seed, "dropout", step, number


class Attention(nn.Module):
    """Residual self-attention over the pixels of a level."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = _zeroed(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Float [N, width, H, W] to the same shape."""
        n, width, h, w = x.shape
        parts = self.qkv(self.norm(x)).view(n, 3, self.heads, width // self.heads, h * w)
        q, k, v = parts.transpose(-1, -2).unbind(1)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.out(mixed.transpose(-1, -2).reshape(n, width, h, w))
        return out


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbours, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Float [N, width, H, W] to [N, width, 2H, 2W]."""
        out: Tensor = self.conv(functional.interpolate(x, scale_factor=2.0))
        return out


class ResidualMlp(nn.Module):
    """Residual blocks of two layers on the flattened input."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        size, width = math.prod(config.shape), config.width
        self.embedding = LevelEmbedding(min(width, 64), width)
        self.first = nn.Linear(size, width)
        self.blocks = nn.ModuleList(MlpBlock(width) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(width)
        self.last = _zeroed(nn.Linear(width, size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """See `make_network`."""
        time = self.embedding(c)
        hidden = self.first(x.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, time)
        out: Tensor = self.last(functional.silu(self.norm(hidden)))
        return out.view(x.shape)


class MlpBlock(nn.Module):
    """Two layers, between which the noise level scales and shifts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, width)
        self.linear2 = _zeroed(nn.Linear(width, width))
        self.time = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """hidden float [N, width] and time float [N, width] to float [N, width]."""
        scale, shift = self.time(time).chunk(2, dim=1)
        hidden = self.linear1(self.norm(x)) * (1 + scale) + shift
        out: Tensor = x + self.linear2(functional.silu(hidden))
        return out


class LevelEmbedding(nn.Module):
    """Sines and cosines of the noise level at geometric frequencies, then two layers."""

    frequencies: Tensor

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        half = max(2, size // 2)
        powers = torch.arange(half, dtype=torch.float64) / (half - 1)
        frequencies = 0.5 * (FASTEST / 0.5) ** powers
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.linear1, self.linear2 = nn.Linear(2 * half, out), nn.Linear(out, out)

    def forward(self, c: Tensor) -> Tensor:
        """Float [N] to float [N, out]."""
        angles = c[:, None] * self.frequencies
        hidden = self.linear1(torch.cat([angles.sin(), angles.cos()], 1))
        return functional.silu(self.linear2(functional.silu(hidden)))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, width), width)


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
