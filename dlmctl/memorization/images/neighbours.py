"""Exact nearest neighbours of many vectors among many, at about the cost of one matrix product.

Squared distances come from |y|^2 - 2 x.y in float32, of vectors centred on the references' mean,
block by block. Near a copy this form cancels, so that it only selects candidates, a few more than
are asked for, whose distances are then computed from differences. If the last candidate is hardly
farther than the last neighbour, rounding may have left a true neighbour out; such rows are searched
again in float64. The bound on rounding is the probabilistic one, sqrt(D) u (Higham and Mary 2019,
SIAM J. Sci. Comput. 41(5)), times four.

GPUs may round the operands of a float32 product to TF32, which is switched off during the search;
and as other switches may exist, the error of a few products is measured and added to the bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.models.float32_products import whole_products
from dlmctl.records.errors import DataError

SPARE = 4
"""How many more candidates than neighbours are selected."""
GROUP = 32
"""Columns of a group, of which only the minimum is looked at first."""
MEMORY = 512 * 2**20
"""Default of the bytes that the search may use."""
CACHE = 2**20
"""Bytes of differences at once on a CPU: what stays in its cache."""
_FACTOR = 4.0
_PROBES = 256
"""Numbers on either side of the products whose error is measured."""


class Neighbours(NamedTuple):
    """For each sample its nearest references, nearest first."""

    distances: Tensor
    """float64 [N, k], L2."""
    indices: Tensor
    """int64 [N, k], into the references; equal distances are in the order of the references."""


def nearest(
    samples: Tensor,
    references: Tensor,
    k: int = 2,
    memory: int = MEMORY,
    device: torch.device | str | None = None,
    own: bool = False,
) -> Neighbours:
    """The k nearest references of each sample by L2 distance, exact.

    Args:
        samples: [N, D], float32 or float64.
        references: [M, D], of the same dtype.
        memory: bytes that the search may use on the device in addition to both sets.
        device: where to search; None is where the references are.
        own: the samples are the references, and none is its own neighbour.

    Returns:
        Distances and indices on the CPU.

    Raises:
        DataError: there are fewer than k references, or vectors of two sizes.
    """
    if samples.shape[1] != references.shape[1]:
        raise DataError(f"vectors of {samples.shape[1]} and of {references.shape[1]} numbers")
    if len(references) < k + own:
        raise DataError(f"{k + own} references are needed, and there are {len(references)}")
    where = references.device if device is None else torch.device(device)
    x, y = samples.to(where), references.to(where)
    search = _Search(y, k, max(memory, 2**16), own)
    rows = torch.arange(len(x), device=where)
    with whole_products():
        neighbours, certain = search.run(x, rows, torch.float32)
    if not bool(certain.all()):
        again, _ = search.run(x[~certain], rows[~certain], torch.float64)
        neighbours.distances[~certain], neighbours.indices[~certain] = again
    return Neighbours(neighbours.distances.cpu(), neighbours.indices.cpu())


class _Search:
    """What all blocks of samples share."""

    def __init__(self, references: Tensor, k: int, memory: int, own: bool) -> None:
        self.references, self.k, self.own = references, k, own
        self.memory = memory
        self.candidates = min(k + SPARE, len(references) - own)
        self.mean = references.mean(0)
        self.error = 0.0
        """Relative error of a product of two numbers in the dtype in use."""

    def run(self, x: Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[Neighbours, Tensor]:
        """Neighbours of `x`, which are the samples `rows`, and bool [N], which are certain."""
        self.error = product_error(x.device, dtype)
        size, columns = self._block(len(x), dtype)
        parts = [
            self._rows(part, numbers, columns, dtype)
            for part, numbers in zip(x.split(size), rows.split(size), strict=True)
        ]
        distances, indices, certain = (torch.cat(each) for each in zip(*parts, strict=True))
        return Neighbours(distances, indices), certain

    def _block(self, count: int, dtype: torch.dtype) -> tuple[int, int]:
        """Samples and references of a block, whose scores and centred copies use a third of the
        memory."""
        numbers = self.memory // (3 * dtype.itemsize)
        width = self.references.shape[1]
        side = int((width**2 + numbers) ** 0.5) - width
        size = max(1, min(count, side))
        columns = max(GROUP, (numbers - size * width) // (size + width))
        return size, min(columns, len(self.references))

    def _rows(
        self, x: Tensor, rows: Tensor, columns: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Distances, indices, and whether they are certain, of one block of samples."""
        centred = (x - self.mean).to(dtype)
        scores, chosen = self._candidates(centred, rows, columns)  # [n, candidates] each
        norms = torch.linalg.vector_norm(centred, dim=1).double().square()
        squares = 2 * scores.double() + norms[:, None]
        distances, indices = self._sorted(x, chosen[:, : self.k])
        if self.candidates > self.k:
            far = squares[:, self.k] > self._limit(distances[:, -1], norms, dtype)
            if not bool(far.all()):
                again = self._sorted(x[~far], chosen[~far])
                distances[~far], indices[~far] = (each[:, : self.k] for each in again)
        # The references that were left out scored no less than the last candidate.
        certain = squares[:, -1] >= self._limit(distances[:, -1], norms, dtype)
        if self.candidates == len(self.references) - self.own:
            certain = torch.ones_like(certain)
        return distances, indices, certain

    def _limit(self, last: Tensor, norms: Tensor, dtype: torch.dtype) -> Tensor:
        """The squared distance by scores from which on a reference is not nearer than `last`.

        Only references nearer than `last` matter: their norm is at most |x| + `last`.
        """
        # The error of x.y is at most |x| |y| times that of a product, a quarter of what it adds.
        rounding = _FACTOR * self.references.shape[1] ** 0.5 * torch.finfo(dtype).eps / 2
        rounding += 2 * self.error
        return last.square() + rounding * (2 * norms.sqrt() + last).square()

    def _sorted(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Distances of chosen references, ascending, and their indices; ties by index."""
        chosen = chosen.sort(dim=1).values
        distances, order = self._exact(x, chosen).sort(dim=1, stable=True)
        return distances, chosen.gather(1, order)

    def _candidates(self, centred: Tensor, rows: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """For each sample the least scores |y|^2 / 2 - x.y, ascending, and their references."""
        kept: list[tuple[Tensor, Tensor]] = []
        for begin in range(0, len(self.references), columns):
            y = (self.references[begin : begin + columns] - self.mean).to(centred.dtype)
            halves = torch.linalg.vector_norm(y, dim=1).square() / 2  # makes no copy of y
            scores = torch.addmm(halves[None], centred, y.T, alpha=-1)
            if self.own:
                within = (rows >= begin) & (rows < begin + len(y))
                scores[within, rows[within] - begin] = torch.inf
            least, places = _least(scores, self.candidates)
            kept.append((least, places + begin))
            if len(kept) > 1:
                least, places = (torch.cat(each, dim=1) for each in zip(*kept, strict=True))
                least, order = least.topk(min(self.candidates, least.shape[1]), largest=False)
                kept = [(least, places.gather(1, order))]
        return kept[0]

    def _exact(self, x: Tensor, chosen: Tensor) -> Tensor:
        """float64 [N, m]: distances by differences, for some rows at a time."""
        most = CACHE if x.device.type == "cpu" else self.memory // 4
        size = max(1, most // (chosen.shape[1] * x.shape[1] * x.element_size()))
        distances = [torch.empty(0, chosen.shape[1], dtype=torch.float64, device=x.device)]
        for part, some in zip(x.split(size), chosen.split(size), strict=True):
            differences = self.references[some.flatten()].view(*some.shape, -1)
            differences.sub_(part[:, None]).square_()
            distances.append(differences.sum(2, dtype=torch.float64).sqrt_())
        return torch.cat(distances)


def product_error(device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of products of two numbers in the operation that computes scores:
    half an ulp, unless operands are rounded to fewer bits."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.zeros(2, _PROBES, _PROBES, dtype=dtype, device=device)
    for each in (x, y):
        each[:, 0] = 1 + torch.rand(_PROBES, generator=generator, dtype=torch.float64)
    products = torch.addmm(x.new_zeros(1, _PROBES), x, y.T)
    exact = x[:, :1].double() * y[:, 0].double()
    return float(((products.double() - exact) / exact).abs().max())


def _least(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The least numbers of each row, ascending, and their columns.

    They are in the groups of columns with the least minima, so that every column is read once.
    """
    rows, columns = scores.shape
    groups = columns // GROUP
    if groups <= 2 * count:
        least, places = scores.topk(min(count, columns), largest=False)
        return least, places
    whole = scores[:, : groups * GROUP].unflatten(1, (groups, GROUP))
    chosen = whole.amin(2).topk(count, largest=False).indices
    inner = torch.arange(GROUP, device=scores.device)
    places = (chosen[:, :, None] * GROUP + inner).flatten(1)
    rest = torch.arange(groups * GROUP, columns, device=scores.device).expand(rows, -1)
    places = torch.cat([places, rest], dim=1)
    least, order = scores.gather(1, places).topk(count, largest=False)
    return least, places.gather(1, order)
