"""A draw from softmax(logits / temperature): argmax_v logit_v + temperature * Gumbel noise.

The noise of token v in a row is `gumbel` of (the row's key, v), so that a draw does not depend on
how it is made: for all tokens at once; in one kernel; or for the few tokens that can win.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dlmctl.diffusion.noise import GOLDEN, MIX_1, MIX_2, gumbel
from dlmctl.models.compiled import COMPILER

Array = NDArray[Any]
TILE = 1 << 15
"""Numbers that are made at once on a CPU, which stay in the cache of a core."""
LARGE = 4096
"""Size of a vocabulary from which most tokens of a row are passed over without noise."""


def gumbel_max(
    logits: Tensor, keys: Tensor, temperature: float, least: Tensor | None = None
) -> Tensor:
    """A token for each row.

    Args:
        logits: float32 or float64 [N, V].
        keys: int64 [N].
        least: [N, 1], the least logit of a token that may be drawn; None: all may.

    Returns:
        int64 [N].
    """
    if len(logits) == 0:
        return keys
    # `dlmctl plan` follows a pass without values, on fake tensors.
    plain = type(logits) is Tensor
    if plain and logits.device.type == "cpu" and logits.shape[1] >= LARGE:
        return _largest_of_few(logits, keys, temperature, least)
    vocabulary = torch.arange(logits.shape[1], device=logits.device)  # [V]
    scale = torch.full((), temperature, dtype=torch.float64, device=logits.device)
    if logits.device.type == "cuda" and _has_triton():
        return _fused(logits.device)(logits, keys, vocabulary, scale, least)
    rows = max(1, TILE // len(vocabulary)) if logits.device.type == "cpu" else len(logits)
    tokens = []
    for first in range(0, len(logits), rows):
        part = slice(first, first + rows)
        bound = None if least is None else least[part]
        tokens.append(_largest(logits[part], keys[part], vocabulary, scale, bound))
        if isinstance(logits, FakeTensor):  # no values, and the memory of all parts is the same
            return keys
    return torch.cat(tokens)


def _largest(
    logits: Tensor, keys: Tensor, vocabulary: Tensor, temperature: Tensor, least: Tensor | None
) -> Tensor:
    """The draw with the noise of all tokens.

    Args:
        vocabulary: int64 [V], 0, 1, 2, … If it were made here, torch.compile would fold it into an
            index, and make other noise (torch 2.13).
        temperature: float64 [].
    """
    drawn = gumbel(keys[:, None], vocabulary).mul_(temperature).add_(logits)
    if least is not None:
        drawn.masked_fill_(logits < least, -torch.inf)
    return drawn.argmax(dim=1)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _fused(device: torch.device) -> Any:
    """`_largest` in one kernel, if that draws the same tokens on this device, else as it is."""
    fused = torch.compile(_largest, dynamic=True, backend=COMPILER)
    keys = torch.arange(64, device=device)
    vocabulary = torch.arange(5000, device=device)
    scale = torch.ones((), dtype=torch.float64, device=device)
    logits = gumbel(-1 - keys[:, None], vocabulary).float()
    try:
        same = fused(logits, keys, vocabulary, scale, None) == _largest(
            logits, keys, vocabulary, scale, None
        )
        reason = "" if bool(same.all()) else "its noise differs"
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split())[:200]
    if not reason:
        return fused
    print(f"dlmctl: drawing tokens is slower without torch.compile: {reason}", file=sys.stderr)
    return _largest


def _largest_of_few(
    logits: Tensor, keys: Tensor, temperature: float, least: Tensor | None
) -> Tensor:
    """The draw on a CPU with the noise of only those tokens that can win.

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
