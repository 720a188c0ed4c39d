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

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)


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


def normal(keys: Tensor, counters: Tensor) -> Tensor:
    """Standard normal noise, float64, for each (key, counter), by Box and Muller (1958)."""
    radius = uniform(keys, 2 * counters).log_().mul_(-2).sqrt_()
    return uniform(keys, 2 * counters + 1).mul_(2 * math.pi).cos_().mul_(radius)


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
