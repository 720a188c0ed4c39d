"""The spectrum in the limit of many dimensions: against drawn matrices, masses and known edges."""

import math

import pytest
import torch

from dlmctl.memorization.theory.density import density, stieltjes
from dlmctl.memorization.theory.random_features import constants, data_spectrum, draw_problem
from dlmctl.memorization.theory.study import expected_bulks
from dlmctl.settings.theory import FeatureModel

TABLE = FeatureModel(6, 24, 50, 0.05)
TWO = FeatureModel(6, 24, 50, 0.05, "0.5,1.5")


@pytest.mark.parametrize(
    "setting", [TABLE, FeatureModel(4, 32, 50, 0.01), FeatureModel(6, 24, 50, 0.001)]
)
def test_bulks_have_their_masses(setting):
    found = density(setting)
    beside, mem, gen = (mass for _, _, mass in found.supports())
    assert gen == pytest.approx(1 / setting.psi_p, rel=2e-3)
    assert mem == pytest.approx((setting.psi_n - 1) / setting.psi_p, rel=2e-3)
    assert mem + beside == pytest.approx(setting.psi_n / setting.psi_p, rel=2e-3)
    assert beside + mem + gen + found.atom == pytest.approx(1, abs=1e-3)
    assert bool((found.values > 0).all())


@pytest.mark.parametrize("psi_p", [2, 4])
def test_with_fewer_features_than_samples_there_is_no_null_bulk(psi_p):
    setting = FeatureModel(6, psi_p, 50, 0.05)
    found = density(setting)
    mem, gen = (mass for _, _, mass in found.supports())
    assert (gen, mem) == pytest.approx((1 / psi_p, 1 - 1 / psi_p), rel=2e-3)
    assert found.atom == 0
    values = draw_problem(setting, 0).values
    assert [*setting.bulks()] == ["gen", "mem"]
    for name, part in setting.bulks().items():
        low, high = expected_bulks(setting, found)[name]
        assert float(values[part].min()) == pytest.approx(low, rel=0.35)
        assert float(values[part].max()) == pytest.approx(high, rel=0.15)


def test_two_variances_split_the_bulk_that_generalizes():
    *_, low, high = (mass for _, _, mass in density(TWO).supports())
    assert (low, high) == pytest.approx((1 / 48, 1 / 48), rel=3e-3)
    expected = expected_bulks(TWO, density(TWO))
    assert expected["gen"] == pytest.approx([2.336, 22.79], rel=1e-2)


def test_bulks_end_where_they_are_known_to():
    found = expected_bulks(TABLE, density(TABLE))
    assert found["gen"][1] == pytest.approx(18.2, rel=0.01)
    assert found["null"][0] == constants(TABLE).s2
    # The edges of a Marchenko-Pastur law that the bulk that memorizes has for psi_n >> 1.
    many = FeatureModel(60, 2400, 50, 0.05)
    known, root = constants(many), math.sqrt(many.psi_p / many.psi_n)
    wanted = [known.s2 + known.v2 * (1 + side * root) ** 2 for side in (-1, 1)]
    assert expected_bulks(many, density(many))["mem"] == pytest.approx(wanted, rel=0.03)


def equivalent(setting: FeatureModel, seed: int) -> torch.Tensor:
    """Eigenvalues of the Gaussian equivalent of U."""
    generator = torch.Generator().manual_seed(seed)
    known, d, n, p = constants(setting), setting.dimension, setting.samples, setting.features

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    w, x = normal(p, d) / d**0.5, normal(d, n) * data_spectrum(setting).sqrt()[:, None]
    g = math.exp(-setting.time) * known.a * w @ x + known.v2**0.5 * normal(p, n)
    return torch.linalg.eigvalsh(g @ g.T / n + known.b**2 * w @ w.T) + known.s2


def furthest(values: torch.Tensor, setting: FeatureModel, z: torch.Tensor) -> float:
    """Of the transform of these eigenvalues from the limit, relative."""
    limit = stieltjes(setting, z)
    return float((((1 / (values - z[:, None])).mean(1) - limit).abs() / limit.abs()).max())


@pytest.mark.parametrize("variances", ["1", "0.5,1.5"])
def test_the_transform_is_that_of_drawn_matrices(variances):
    setting = FeatureModel(4, 10, 80, 0.1, variances)
    z = [5 + 2j, 1 + 1j, 0.2 + 0.1j, 0.1 + 0.03j, 0.03 + 0.01j, 0.015 + 0.002j]
    points = torch.tensor(z, dtype=torch.complex128)
    values = equivalent(setting, 0)
    assert furthest(values, setting, points) < 0.006
    for other in (
        FeatureModel(4.4, 10, 80, 0.1, variances),
        FeatureModel(4, 11, 80, 0.1, variances),
    ):
        assert furthest(values, other, points) > 0.03


@pytest.mark.parametrize("variances", ["1", "0.5,1.5"])
def test_the_transform_is_that_of_drawn_features(variances):
    """Where few dimensions do not yet show: those of W have not all the same length."""
    setting = FeatureModel(4, 16, 40, 0.1, variances)
    points = torch.tensor([5 + 2j, 1 + 1j, 0.2 + 0.1j], dtype=torch.complex128)
    assert furthest(draw_problem(setting, 0).values, setting, points) < 0.01


def test_equal_variances_are_one():
    z = torch.tensor([3 + 0.1j, 0.1 + 1e-6j, 0.02 + 1e-8j], dtype=torch.complex128)
    halves = stieltjes(FeatureModel(6, 24, 50, 0.05, "1,1"), z)
    torch.testing.assert_close(halves, stieltjes(TABLE, z), rtol=1e-9, atol=0)


def test_far_away_the_transform_has_the_moments_of_the_spectrum():
    """q = -1/z - m1/z^2 - ..., and m1 is the variance of a feature in the limit."""
    z = torch.tensor([3000 + 4000j], dtype=torch.complex128)
    known = constants(TABLE)
    m1 = known.s2 + known.v2 + known.b**2 + (known.a * math.exp(-0.05)) ** 2
    left = -(stieltjes(TABLE, z) + 1 / z) * z**2
    assert left.real.item() == pytest.approx(m1, rel=2e-2)
    assert abs(left.imag.item()) < 2e-2
