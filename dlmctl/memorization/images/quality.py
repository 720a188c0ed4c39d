"""Quality of samples against a set of references, in a space of features.

Fréchet distance (Heusel et al. 2017, arXiv 1706.08500), precision and recall (Kynkäänniemi et al.
2019, arXiv 1904.06991), density and coverage (Naeem et al. 2020, arXiv 2002.09797), and the maximum
mean discrepancy (Gretton et al. 2012, JMLR 13). All in float64; distances in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.memorization.images.neighbours import MEMORY, nearest
from dlmctl.records.errors import DataError
from dlmctl.report.bootstrap import drawn_counts

SINGULAR = 1e-10
"""Smallest variance along any direction, relative to the largest, of an accepted covariance."""
TIE = 1e-9
"""Squared distances that differ by less than this share of the squared norms count as equal, as
those of a copy and of the radius of its ball."""
WHOLE = 512
"""Most rows or columns of a matrix whose principal components come from all its eigenvectors."""
RESAMPLES = 100
"""Of the error of the Fréchet distance, which is then known to 7 %."""
KRYLOV = 6
"""Steps of the Krylov space for larger matrices."""
MEDIAN_OF = 1000
"""Number of vectors from whose distances the kernel's width is taken."""


class Projection(NamedTuple):
    """Principal components: x becomes (x - mean) @ axes."""

    mean: Tensor
    """float64 [D]."""
    axes: Tensor
    """float64 [D, K], orthonormal columns."""

    def __call__(self, vectors: Tensor) -> Tensor:
        """float64 [N, K] of [N, D]."""
        return (vectors.double() - self.mean) @ self.axes


def principal_components(vectors: Tensor, k: int) -> Projection:
    """The k directions of largest variance of [N, D].

    Raises:
        DataError: k is more than N - 1 or D.
    """
    most = min(len(vectors) - 1, vectors.shape[1])
    if k > most:
        raise DataError(f"{len(vectors)} vectors of {vectors.shape[1]} numbers have {most} axes")
    mean = vectors.double().mean(0)
    centred = vectors.double() - mean
    basis = _krylov(centred, k)
    within = centred @ basis
    inner = torch.linalg.eigh(within.T @ within).eigenvectors
    return Projection(mean, basis @ inner[:, -k:].flip(1))


def _krylov(centred: Tensor, k: int) -> Tensor:
    """Orthonormal columns whose span contains the k leading right singular vectors of [N, D].

    For a small matrix they span all its rows or columns; for others a block Krylov space (Musco and
    Musco 2015, arXiv 1504.05477), which does not depend on the order of the rows.
    """
    rows, width = centred.shape
    if width <= WHOLE:
        return torch.eye(width, dtype=centred.dtype, device=centred.device)
    if rows <= WHOLE:
        return torch.linalg.qr(centred.T).Q
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(width, k + 16, generator=generator, dtype=torch.float64)
    blocks = [torch.linalg.qr(start.to(centred.device)).Q]
    for _ in range(KRYLOV):
        new = centred.T @ (centred @ blocks[-1])
        before = torch.cat(blocks, dim=1)
        blocks.append(torch.linalg.qr(new - before @ (before.T @ new)).Q)
    # Once more: rounding, or a matrix of low rank, leaves the blocks not quite orthogonal.
    return torch.linalg.qr(torch.cat(blocks, dim=1)).Q


class Gaussian(NamedTuple):
    """Mean and covariance of a set of vectors."""

    mean: Tensor
    """float64 [D]."""
    covariance: Tensor
    """float64 [D, D]."""


def fit_gaussian(
    vectors: Tensor, name: str, ridge: float | None = None, singular: bool = False
) -> Gaussian:
    """Mean and unbiased covariance of [N, D].

    Args:
        name: of the vectors in error messages.
        ridge: this many mean variances are added along every direction.
        singular: accept a singular covariance.

    Raises:
        DataError: the covariance is singular, there is no ridge, and it is not accepted.
    """
    vectors = vectors.double()
    count, width = vectors.shape
    covariance = torch.cov(vectors.T).reshape(width, width)
    advice = "take fewer dimensions (--space pca:K), or --ridge 1e-6, or --no-quality"
    if ridge is None and not singular:
        if count <= width:
            raise DataError(
                f"the covariance of {count} {name} in {width} dimensions is singular: more than "
                f"{width} are needed; {advice}"
            )
        spread = torch.linalg.eigvalsh(covariance)
        if not float(spread[0]) > SINGULAR * float(spread[-1]):
            raise DataError(
                f"the covariance of the {name} is singular in {width} dimensions: along some "
                f"direction they are all the same; {advice}"
            )
    elif ridge is not None:
        scale = float(covariance.diagonal().mean()) * ridge
        covariance = covariance + scale * torch.eye(width, dtype=torch.float64).to(vectors.device)
    return Gaussian(vectors.mean(0), covariance)


def frechet_distance(one: Gaussian, two: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared 2-Wasserstein distance."""
    roots = [_root(each.covariance) for each in (one, two)]
    if all(root.shape[1] == len(root) for root in roots):
        inner = torch.linalg.eigvalsh(roots[0].T @ two.covariance @ roots[0]).clamp_min(0).sqrt()
    else:
        # Eigenvalues that ought to be 0 are not quite, and their square roots add up. The singular
        # values of the product of the roots are the same square roots, without this error.
        inner = torch.linalg.svdvals(roots[0].T @ roots[1])
    traces = one.covariance.trace() + two.covariance.trace()
    return max(0.0, float((one.mean - two.mean).square().sum() + traces - 2 * inner.sum()))


def _root(covariance: Tensor) -> Tensor:
    """float64 [D, r], R with covariance R R^T; r is the rank, up to rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    least = len(values) * torch.finfo(values.dtype).eps * values[-1].clamp_min(0)
    kept = values > least
    return vectors[:, kept] * values[kept].sqrt()


def frechet_error(one: Tensor, two: Tensor, seed: int, resamples: int = RESAMPLES) -> float | None:
    """Standard error of the distance between the Gaussians of two sets, [N, D] and [M, D].

    It is the spread over bootstrap resamples of both. Their mean is no estimate of the distance:
    fewer different vectors lie farther apart. None beyond 512 dimensions, where a distance takes
    long.
    """
    if one.shape[1] > WHOLE:
        return None
    drawn = []
    sets = [(each.double().cpu(), drawn_counts(len(each), resamples, seed)) for each in (one, two)]
    for number in range(resamples):
        drawn.append(frechet_distance(*(_weighted(x, counts[number]) for x, counts in sets)))
    return float(torch.tensor(drawn, dtype=torch.float64).std())


def _weighted(vectors: Tensor, counts: Tensor) -> Gaussian:
    """Mean and covariance of [N, D] in which each vector comes so often, float64 [N]."""
    covariance = torch.cov(vectors.T, fweights=counts.long())
    mean = counts @ vectors / counts.sum()
    return Gaussian(mean, covariance.reshape(len(mean), len(mean)))


class Manifolds(NamedTuple):
    """The values of which precision, recall, density and coverage are the means."""

    precision: Tensor
    """float64 [N], 1 for a sample within the ball of a reference."""
    recall: Tensor
    """float64 [M], 1 for a reference within the ball of a sample."""
    density: Tensor
    """float64 [N], the number of references' balls that contain a sample, over k."""
    coverage: Tensor
    """float64 [M], 1 for a reference with a sample in its ball."""


def manifolds(samples: Tensor, references: Tensor, k: int, memory: int = MEMORY) -> Manifolds:
    """Which vectors lie in the balls of the other set.

    The ball of a vector reaches to its k-th nearest neighbour in its own set, not counting itself,
    and contains its surface.

    Raises:
        DataError: a set has no more than k vectors.
    """
    x, y = samples.double(), references.double()
    of_x, of_y = (nearest(each, each, k, memory, own=True).distances[:, -1] for each in (x, y))
    of_x, of_y = of_x.to(x.device).square(), of_y.to(x.device).square()
    balls = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    recall, coverage = (torch.zeros(len(y), dtype=torch.bool, device=x.device) for _ in range(2))
    scale = TIE * sum(float((each - y.mean(0)).square().sum(1).mean()) for each in (x, y))
    for rows, columns, squares in blocks(x, y, memory):
        squares -= scale
        within = squares <= of_y[columns]
        balls[rows] += within.sum(1)
        coverage[columns] |= within.any(0)
        recall[columns] |= (squares <= of_x[rows, None]).any(0)
    return Manifolds((balls > 0).double(), recall.double(), balls / k, coverage.double())


class Discrepancy(NamedTuple):
    """Maximum mean discrepancies, squared and unbiased (they can be negative)."""

    train: float
    heldout: float | None
    gap: float | None
    """Train less held-out: below 0 if the samples are closer to the training set."""
    p: float | None
    """One-sided probability of a gap as low if the sets were exchanged at random; None for sets of
    two sizes."""
    width: float
    """Standard deviation of the Gaussian kernel."""


def discrepancy(
    samples: Tensor,
    train: Tensor,
    heldout: Tensor | None = None,
    resamples: int = 1000,
    seed: int = 0,
    memory: int = MEMORY,
) -> Discrepancy:
    """MMD of samples to the training set and to as many held-out vectors, Gaussian kernel.

    The kernel's width is the median distance between vectors of all sets. Whether samples are
    closer to the training set than to fresh data is the test of one-step students in
    arXiv 2502.02970. The gap is linear in which vectors are training data: with z = 1 for these and
    -1 for held-out ones, n of each, it is sum_j z_j (r_j / (n (n - 1)) - 2 s_j / n), where r_j is
    the kernel's sum over the other vectors of both sets and s_j its mean over samples. Therefore
    the distribution under exchange, which gives p, needs no further kernels; that test is ours.

    Args:
        samples: float64 [N, D].
        train: float64 [n, D].
        heldout: float64 [n, D]; if there are not n, p is None.
    """
    held = [] if heldout is None else [heldout]
    width = median_distance([samples, train, *held], seed)
    n, m = len(train), len(samples)
    within = float(kernel_sums(samples, None, width, memory).sum()) / (m * (m - 1))

    def squared(own: Tensor, across: Tensor) -> float:
        count = len(own)
        return within + float(own.sum()) / (count * (count - 1)) - 2 * float(across.mean()) / m

    own = [kernel_sums(each, None, width, memory) for each in (train, *held)]
    across = [kernel_sums(each, samples, width, memory) for each in (train, *held)]
    near = squared(own[0], across[0])
    if heldout is None:
        return Discrepancy(near, None, None, None, width)
    far = squared(own[1], across[1])
    if len(heldout) != n:
        return Discrepancy(near, far, near - far, None, width)
    own[0] = own[0] + kernel_sums(train, heldout, width, memory)
    own[1] = own[1] + kernel_sums(heldout, train, width, memory)
    r, s = torch.cat(own), torch.cat(across) / m  # [2 n] each
    weights = (r / (n * (n - 1)) - 2 * s / n).cpu()
    signs = torch.ones(2 * n, dtype=torch.float64)
    signs[n:] = -1
    gap = float(signs @ weights)
    generator = torch.Generator().manual_seed(seed)
    exchanged = [
        float(signs[torch.randperm(2 * n, generator=generator)] @ weights) for _ in range(resamples)
    ]
    p = (1 + sum(value <= gap for value in exchanged)) / (1 + resamples)
    return Discrepancy(near, far, gap, p, width)


def median_distance(sets: list[Tensor], seed: int = 0) -> float:
    """Median distance between two of a random part of the vectors of all sets.

    Raises:
        DataError: most of them are the same.
    """
    pool = torch.cat(sets)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    some = pool[order[:MEDIAN_OF].to(pool.device)]
    width = float(torch.nn.functional.pdist(some).median())
    if not width > 0:
        raise DataError("most vectors are the same: no width of a kernel can be taken from them")
    return width


def kernel_sums(x: Tensor, y: Tensor | None, width: float, memory: int = MEMORY) -> Tensor:
    """float64 [N]: for each x the sum of the kernel over y, or without y over the other x."""
    sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for rows, columns, squares in blocks(x, x if y is None else y, memory):
        values = squares.mul_(-0.5 / width**2).exp_()
        if y is None:
            begin, end = max(rows.start, columns.start), min(rows.stop, columns.stop)
            places = torch.arange(begin, max(begin, end), device=x.device)
            values[places - rows.start, places - columns.start] = 0
        sums[rows] += values.sum(1)
    return sums


def blocks(x: Tensor, y: Tensor, memory: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances, float64 [n, m], of parts of both sets, after the places of the parts."""
    centre = y.mean(0)
    side = max(16, int((memory / 32) ** 0.5))
    for top in range(0, len(x), side):
        a = x[top : top + side] - centre
        for left in range(0, len(y), side):
            b = y[left : left + side] - centre
            squares = torch.addmm(b.square().sum(1)[None], a, b.T, alpha=-2)
            squares.add_(a.square().sum(1)[:, None]).clamp_min_(0)
            yield slice(top, top + len(a)), slice(left, left + len(b)), squares
