"""Random numbers as a pure function of (key, counter): no state, no order, no device in them.

A sampler that draws from a generator gives a row other numbers when its batch changes. Here the
noise of a token depends on who it is (seed, record, sample, step, position) and on nothing else,
so that results do not depend on batch size or device, and two processes agree without talking.

The generator is SplitMix64 (Steele, Lea, Flood 2014): output n of the stream with key k is
mix(k + (n + 1) * golden ratio), in 64-bit wrap-around arithmetic, which int64 tensors have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)
TILE = 1 << 15
"""Numbers that are made at once on a CPU, which stay in the cache of a core."""
LARGE = 4096
"""Size of a vocabulary from which most tokens of a row are passed over without noise."""


def stream_key(*parts: str | int) -> int:
    """A 64-bit key (signed) for the stream that these parts name, the same in every process."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def random_bits(keys: Tensor, counters: Tensor) -> Tensor:
    """64 random bits for each (key, counter); int64 tensors that broadcast against each other."""
    return _mix_(keys + (counters + 1) * GOLDEN)


def uniform(keys: Tensor, counters: Tensor) -> Tensor:
    """Uniform numbers in the open interval (0, 1), float64, for each (key, counter)."""
    return _open_interval(random_bits(keys, counters))


def gumbel(keys: Tensor, counters: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, for each (key, counter)."""
    return _gumbel(random_bits(keys, counters))


def gumbel_max(
    logits: Tensor, keys: Tensor, temperature: float, least: Tensor | None = None
) -> Tensor:
    """A draw from softmax(logits / temperature): argmax_v logit_v + temperature * Gumbel noise.

    The noise of token v in row n is `gumbel` of (keys[n], v).

    Args:
        logits: float32 or float64 [N, V].
        keys: int64 [N].
        least: [N, 1], the least logit of a token that may be drawn; None: all may.

    Returns:
        int64 [N].
    """
    if logits.device.type == "cpu" and logits.shape[1] >= LARGE:
        return _largest_of_few(logits, keys, temperature, least)
    vocabulary = torch.arange(logits.shape[1], device=logits.device)  # [V]
    size = TILE if logits.device.type == "cpu" else logits.numel()
    rows = max(1, size // max(1, len(vocabulary)))
    tokens = []
    for first in range(0, len(logits), rows):
        part = slice(first, first + rows)
        drawn = gumbel(keys[part, None], vocabulary).mul_(temperature).add_(logits[part])
        if least is not None:
            drawn.masked_fill_(logits[part] < least[part], -torch.inf)
        tokens.append(drawn.argmax(dim=1))
    return torch.cat(tokens) if tokens else keys


def _largest_of_few(
    logits: Tensor, keys: Tensor, temperature: float, least: Tensor | None
) -> Tensor:
    """The same draw, on a CPU, with the noise of only those tokens that can win.

    The probable tokens of a row, a few of its vocabulary, get their noise first. To beat the best
    of them, another one needs noise beyond some bound, so a uniform number close to 1: a comparison
    of bits finds those, and their noise decides.
    """
    offsets = ((torch.arange(logits.shape[1]) + 1) * GOLDEN).numpy().view(np.uint64)  # [V]
    reach = temperature * (math.log(len(offsets)) + 2)
    memory = np.empty((2, min(TILE, len(offsets))), np.uint64)
    bounds = np.full(len(logits), -np.inf) if least is None else least[:, 0].double().numpy()

    def noisy(row: Array, key: int, tokens: Array) -> Array:
        noise = gumbel(torch.tensor(key), torch.from_numpy(tokens)).mul_(temperature)
        return (noise + torch.from_numpy(row[tokens])).numpy()

    def draw(row: Array, key: int, bound: float) -> int:
        best = float(row.max())
        if not math.isfinite(best):
            return int(row.argmax())
        sample = row[:: max(1, len(row) // 1024)]
        usual = np.partition(sample, -len(sample) // 128)[-len(sample) // 128]
        floor = float(row.dtype.type(max(best - reach, float(usual), bound)))
        probable = np.flatnonzero(row >= floor)
        scores = noisy(row, key, probable)
        index = int(scores.argmax())
        token, score = int(probable[index]), float(scores[index])
        if floor <= bound:
            return token
        # Noise above x is a uniform number above exp(-exp(-x)); a little less, for rounding.
        needed = math.exp(-math.exp(min(700.0, 1e-6 - (score - floor) / temperature)))
        rare = _with_high_bits(key, offsets, needed, memory)
        rare = rare[(row[rare] >= bound) & (row[rare] < floor)]
        if len(rare) == 0:
            return token
        others = noisy(row, key, rare)
        index = int(others.argmax())
        # Of two that are equal, the first counts, as in argmax.
        scored = [(score, -token), (float(others[index]), -int(rare[index]))]
        return -max(scored)[1]

    rows = zip(logits.numpy(), keys.tolist(), bounds.tolist(), strict=True)
    return torch.tensor([draw(*row) for row in rows], dtype=torch.int64)


def _with_high_bits(key: int, offsets: Array, least: float, memory: Array) -> Array:
    """Where the uniform number of key + offset may be at least this: int64 [n], in order.

    Args:
        offsets: uint64 [V].
        memory: uint64 [2, W] to compute in.
    """
    # The last step of the mix leaves the highest 31 bits as they are, and these are enough.
    bound = np.uint64(max(0, int(least * 2**31) - 2) << 33)
    found = []
    for start in range(0, len(offsets), memory.shape[1]):
        part = offsets[start : start + memory.shape[1]]
        z, shifted = memory[:, : len(part)]
        np.add(part, np.uint64(key % 2**64), out=z)
        for bits, factor in ((30, MIX_1), (27, MIX_2)):
            np.right_shift(z, np.uint64(bits), out=shifted)
            np.bitwise_xor(z, shifted, out=z)
            np.multiply(z, np.uint64(factor % 2**64), out=z)
        if z.max() >= bound:
            found.append(np.flatnonzero(z >= bound) + start)
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _mix_(z: Tensor) -> Tensor:
    """The mix of SplitMix64, in the memory of its argument and once more as much."""
    shifted = torch.empty_like(z)
    for bits, factor in ((30, MIX_1), (27, MIX_2)):
        z.bitwise_xor_(_shift_right(z, bits, shifted)).mul_(factor)
    return z.bitwise_xor_(_shift_right(z, 31, shifted))


def _shift_right(z: Tensor, bits: int, out: Tensor) -> Tensor:
    """Bits shifted to the right, with zeros from the left."""
    return torch.bitwise_right_shift(z, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)


def _open_interval(bits: Tensor) -> Tensor:
    """The highest 53 of 64 random bits (overwritten) as a number in (0, 1), float64."""
    return _shift_right(bits, 11, bits).double().add_(0.5).mul_(2.0**-53)


def _gumbel(bits: Tensor) -> Tensor:
    """Gumbel noise from random bits (overwritten), float64."""
    return _open_interval(bits).log_().neg_().log_().neg_()


def subkeys(keys: Tensor, counters: Tensor) -> Tensor:
    """Keys of independent streams under each key; the same bits, used as keys."""
    return random_bits(keys ^ MIX_2, counters)


def key_tensor(keys: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Keys as an int64 tensor [N]."""
    return torch.tensor(keys, dtype=torch.int64, device=device)


def stream_uniform(parts: Sequence[str | int], count: int) -> Tensor:
    """The first uniform numbers of the stream that these parts name: float64 [count]."""
    return uniform(key_tensor([stream_key(*parts)])[:, None], torch.arange(count)[None])[0]
