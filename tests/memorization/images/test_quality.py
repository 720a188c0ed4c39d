"""Quality against closed forms, plain loops, and sets small enough to go through by hand."""

import math

import pytest
import torch
from torch import Tensor

from dlmctl.memorization.images.quality import (
    Gaussian,
    _weighted,
    discrepancy,
    fit_gaussian,
    frechet_distance,
    frechet_error,
    kernel_sums,
    manifolds,
    median_distance,
    principal_components,
)
from dlmctl.records.errors import DataError

SMALL = 2**13


def normal(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64)


def test_the_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    one, two = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 1.0]).double()
    turn = torch.linalg.qr(normal(3, 3, 0)).Q
    mean = torch.tensor([1.0, 2.0, 0.0]).double()
    first = Gaussian(torch.zeros(3).double(), turn @ one.diag() @ turn.T)
    second = Gaussian(mean, turn @ two.diag() @ turn.T)
    wanted = 5 + float((one.sqrt() - two.sqrt()).square().sum())
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=1e-12)
    assert frechet_distance(second, first) == pytest.approx(wanted, rel=1e-12)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-10)


def test_the_frechet_distance_is_that_of_another_square_root():
    """Trace of (C1 C2)^(1/2) from the eigenvalues of the product, which is not symmetric."""
    one, two = fit_gaussian(normal(40, 6, 1), "one"), fit_gaussian(normal(40, 6, 2) * 2 + 1, "two")
    roots = torch.linalg.eigvals(one.covariance @ two.covariance).real.sqrt().sum()
    wanted = (one.mean - two.mean).square().sum() + one.covariance.trace() + two.covariance.trace()
    assert frechet_distance(one, two) == pytest.approx(float(wanted - 2 * roots), rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(12, 15), (12, 400), (400, 12)])
def test_the_frechet_distance_of_few_vectors_is_that_of_their_products(n, m):
    """tr (C1 C2)^(1/2) is the sum of the singular values of X Y^T, for centred sets X and Y."""
    x, y = normal(n, 60, 11), normal(m, 60, 12) * 1.5 + 0.2
    found = frechet_distance(*(fit_gaussian(each, "s", singular=True) for each in (x, y)))
    a, b = ((each - each.mean(0)) / (len(each) - 1) ** 0.5 for each in (x, y))
    inner = torch.linalg.svdvals(a @ b.T).sum()
    traces = a.square().sum() + b.square().sum()
    wanted = (x.mean(0) - y.mean(0)).square().sum() + traces - 2 * inner
    assert found == pytest.approx(float(wanted), rel=1e-12)
    assert frechet_distance(*[fit_gaussian(x, "s", singular=True)] * 2) == pytest.approx(
        0, abs=1e-12
    )


def test_sets_of_two_gaussians_have_about_their_distance():
    x, y = normal(20_000, 4, 3), normal(20_000, 4, 4) * 3 + 2
    found = frechet_distance(fit_gaussian(x, "x"), fit_gaussian(y, "y"))
    assert found == pytest.approx(4 * (3 - 1) ** 2 + 4 * 2**2, rel=0.03)


def test_a_singular_covariance_is_refused_or_gets_a_ridge():
    flat = normal(50, 3, 5)
    flat[:, 1] = flat[:, 0]
    with pytest.raises(DataError, match="of the samples is singular in 3 dimensions"):
        fit_gaussian(flat, "samples")
    with pytest.raises(DataError, match="of 3 samples in 3 dimensions is singular: more than 3"):
        fit_gaussian(normal(3, 3, 6), "samples")
    with pytest.raises(DataError, match="singular"):
        fit_gaussian(torch.ones(9, 2), "samples")
    plain = torch.cov(flat.T)
    ridged = fit_gaussian(flat, "samples", ridge=0.1).covariance
    torch.testing.assert_close(ridged - plain, 0.1 * plain.trace() / 3 * torch.eye(3).double())


@pytest.mark.parametrize(("rows", "width"), [(200, 10), (10, 200)])
def test_principal_components_hold_the_variance_of_the_svd(rows, width):
    x = normal(rows, width, 7) * torch.linspace(1, 3, width)
    project = principal_components(x, 6)
    torch.testing.assert_close(project.axes.T @ project.axes, torch.eye(6).double())
    values = torch.linalg.svdvals(x - x.mean(0))[:6]
    torch.testing.assert_close(project(x).norm(dim=0), values)
    with pytest.raises(DataError, match="axes"):
        principal_components(x, 200)


@pytest.mark.parametrize("rank", [600, 25])
def test_principal_components_of_a_large_matrix_are_those_of_the_svd(rank):
    sizes = torch.linspace(2, 0, rank).double().exp()
    x = normal(700, rank, 22) * sizes @ normal(rank, 600, 23)
    project = principal_components(x, 20)
    torch.testing.assert_close(project.axes.T @ project.axes, torch.eye(20).double())
    found, wanted = project(x).norm(dim=0), torch.linalg.svdvals(x - x.mean(0))[:20]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    again = principal_components(x[order], 20)(x)
    torch.testing.assert_close(again.abs(), project(x).abs(), rtol=1e-6, atol=1e-6)


def plain_manifolds(x: Tensor, y: Tensor, k: int) -> dict[str, float]:
    """As the papers define them, by loops."""

    def radius(points: Tensor, at: int) -> float:
        far = [float((points[at] - p).norm()) for n, p in enumerate(points) if n != at]
        return sorted(far)[k - 1]

    of_x = [radius(x, n) for n in range(len(x))]
    of_y = [radius(y, n) for n in range(len(y))]
    far = [[float((a - b).norm()) for b in y] for a in x]
    balls = [sum(far[i][j] <= of_y[j] + 1e-9 for j in range(len(y))) for i in range(len(x))]
    recall = [any(far[i][j] <= of_x[i] + 1e-9 for i in range(len(x))) for j in range(len(y))]
    covered = [any(far[i][j] <= of_y[j] + 1e-9 for i in range(len(x))) for j in range(len(y))]
    return {
        "precision": sum(each > 0 for each in balls) / len(x),
        "recall": sum(recall) / len(y),
        "density": sum(balls) / (k * len(x)),
        "coverage": sum(covered) / len(y),
    }


@pytest.mark.parametrize("memory", [SMALL, 2**29])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_manifolds_are_those_of_a_plain_loop(memory, k, offset):
    x, y = normal(45, 3, 8) + 0.7, normal(37, 3, 9)
    x[:12] = y[5:17]  # memorized: copies lie on the surface of other balls
    wanted = plain_manifolds(x, y, k)
    found = manifolds(x + offset, y + offset, k, memory)
    assert {name: float(each.mean()) for name, each in found._asdict().items()} == pytest.approx(
        wanted
    )
    assert 0 < wanted["recall"] < 1 or k > 1


def test_manifolds_by_hand():
    """On a line, k = 1: references 0 1 3 have radii 1 1 2; samples 0.5 9 10 have 8.5 1 1."""
    y = torch.tensor([[0.0], [1.0], [3.0]])
    x = torch.tensor([[0.5], [9.0], [10.0]])
    found = manifolds(x, y, 1)
    assert found.precision.tolist() == [1, 0, 0]
    assert found.density.tolist() == [2, 0, 0]
    assert found.coverage.tolist() == [1, 1, 0]
    assert found.recall.tolist() == [1, 1, 1]
    # The surface belongs to the ball: 3 is at distance 2 of 1, 5 at distance 2 of 3.
    on = manifolds(torch.tensor([[5.0], [7.0]]), y, 1)
    assert on.precision.tolist() == [1, 0]
    assert on.recall.tolist() == [0, 0, 1]


def test_a_set_beside_itself_is_within_itself():
    x = normal(60, 5, 10)
    found = manifolds(x, x, 3)
    assert all(float(each.mean()) == 1 for each in (found.precision, found.recall, found.coverage))
    far = manifolds(x + 100, x, 3)
    assert all(float(each.mean()) == 0 for each in far)


def plain_mmd(x: Tensor, y: Tensor, width: float) -> float:
    def kernel(a: Tensor, b: Tensor) -> float:
        return math.exp(-float((a - b).square().sum()) / (2 * width**2))

    def within(points: Tensor) -> float:
        n = len(points)
        pairs = [kernel(points[i], points[j]) for i in range(n) for j in range(n) if i != j]
        return sum(pairs) / (n * (n - 1))

    across = [kernel(a, b) for a in x for b in y]
    return within(x) + within(y) - 2 * sum(across) / len(across)


@pytest.mark.parametrize("memory", [SMALL, 2**29])
def test_mmd_is_that_of_a_plain_loop(memory):
    x, y, z = normal(21, 3, 11) * 2, normal(40, 3, 12) + 0.5, normal(40, 3, 13)
    found = discrepancy(x, y, z, 50, memory=memory)
    assert found.train == pytest.approx(plain_mmd(x, y, found.width), abs=1e-12)
    assert found.heldout == pytest.approx(plain_mmd(x, z, found.width), abs=1e-12)
    assert found.gap == pytest.approx(found.train - found.heldout, abs=1e-12)
    alone = discrepancy(x, y, memory=memory)
    assert alone.train == pytest.approx(plain_mmd(x, y, alone.width), abs=1e-12)
    assert alone[1:4] == (None, None, None)


def test_of_sets_of_two_sizes_there_is_a_gap_without_p():
    x, y, z = normal(21, 3, 11) * 2, normal(40, 3, 12) + 0.5, normal(17, 3, 13)
    found = discrepancy(x, y, z, 50)
    assert found.train == pytest.approx(plain_mmd(x, y, found.width), abs=1e-12)
    assert found.heldout == pytest.approx(plain_mmd(x, z, found.width), abs=1e-12)
    assert found.gap == found.train - found.heldout
    assert found.p is None


def test_the_width_of_the_kernel_is_the_median_distance():
    x, y = normal(30, 4, 14), normal(31, 4, 15)
    assert median_distance([x, y]) == float(torch.pdist(torch.cat([x, y])).median())
    with pytest.raises(DataError, match="most vectors are the same"):
        median_distance([torch.ones(9, 2)])


def test_the_expectation_of_mmd_is_0_for_equal_distributions():
    found = torch.tensor(
        [discrepancy(normal(12, 2, s), normal(12, 2, 1000 + s)).train for s in range(300)]
    )
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean())) < 3 * error
    # The biased estimator would be at about (2 / 12) (1 - mean kernel), many errors away.
    assert error < 0.01


def test_p_is_small_where_samples_are_near_training_data_and_else_uniform():
    train, heldout = normal(60, 3, 16), normal(60, 3, 17)
    near = discrepancy(train + 0.05 * normal(60, 3, 18), train, heldout, 400)
    assert near.gap < 0
    assert near.p < 0.05
    swapped = discrepancy(train + 0.05 * normal(60, 3, 18), heldout, train, 400)
    assert swapped.gap == pytest.approx(-near.gap)
    assert swapped.p > 0.95
    ps = [
        discrepancy(normal(20, 2, 3 * s), normal(15, 2, 3 * s + 1), normal(15, 2, 3 * s + 2), 99).p
        for s in range(100, 250)
    ]
    found = torch.tensor(ps)
    assert float(found.mean()) == pytest.approx(0.5, abs=3 * math.sqrt(1 / 12 / 150))
    assert 0.02 < float((found <= 0.1).double().mean()) < 0.2


def test_the_exchange_that_p_rests_on_is_that_of_the_sets():
    """One exchange, by the formula that is linear and by the two discrepancies themselves."""
    x, train, heldout = normal(15, 2, 19), normal(9, 2, 20), normal(9, 2, 21)
    found = discrepancy(x, train, heldout, 10)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    signs = torch.ones(18).double()
    signs[9:] = -1
    both, drawn = torch.cat([train, heldout]), signs[order]
    r, s = kernel_sums(both, None, found.width), kernel_sums(both, x, found.width) / 15
    linear = float(drawn @ (r / 72 - 2 * s / 9))
    direct = plain_mmd(x, both[drawn > 0], found.width) - plain_mmd(x, both[drawn < 0], found.width)
    assert linear == pytest.approx(direct, abs=1e-12)


def test_the_error_of_the_distance_is_its_spread_over_redrawn_sets():
    random = torch.Generator().manual_seed(0)

    def drawn(count, shift):
        return torch.randn(count, 2, generator=random, dtype=torch.float64) + shift

    pairs = [(drawn(400, 1.0), drawn(300, 0.0)) for _ in range(60)]
    distances = [
        frechet_distance(fit_gaussian(one, "one"), fit_gaussian(two, "two")) for one, two in pairs
    ]
    errors = [frechet_error(one, two, 0, resamples=60) for one, two in pairs[:10]]
    spread = float(torch.tensor(distances).std())
    assert sum(errors) / 10 == pytest.approx(spread, rel=0.3)
    assert frechet_error(torch.ones(3, 513), torch.ones(3, 513), 0) is None
    # A resample is what is left of the set after drawing.
    x, counts = drawn(5, 0.0), torch.tensor([2.0, 0.0, 1.0, 1.0, 1.0]).double()
    ours, plain = _weighted(x, counts), fit_gaussian(x[[0, 0, 2, 3, 4]], "five")
    torch.testing.assert_close(ours.mean, plain.mean)
    torch.testing.assert_close(ours.covariance, plain.covariance)


@pytest.mark.parametrize("k", [1, 5])
def test_the_prdc_package_has_the_same_figures(k):
    """Its balls have no surface, on which no vector lies here."""
    prdc = pytest.importorskip("prdc")
    real, fake = normal(120, 6, 21), normal(90, 6, 22) * 0.8 + 0.3
    wanted = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=k)
    found = manifolds(fake, real, k)
    for name, values in zip(found._fields, found, strict=True):
        assert float(values.mean()) == pytest.approx(wanted[name], rel=1e-12), name


def test_torch_fidelity_has_the_same_frechet_distance():
    pytest.importorskip("torchvision")
    metric = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = normal(300, 20, 23), normal(200, 20, 24) * 1.3 + 0.1
    statistics = [metric.fid_features_to_statistics(each) for each in (x, y)]
    wanted = metric.fid_statistics_to_metric(*statistics, verbose=False)
    found = frechet_distance(fit_gaussian(x, "x"), fit_gaussian(y, "y"))
    assert found == pytest.approx(wanted["frechet_inception_distance"], rel=1e-9)
