"""The random-feature model: constants, losses, training in closed form, consistency students."""

import math

import pytest
import torch

from dlmctl.memorization.theory.closed_form import (
    descent_steps,
    distill_student,
    map_error,
    train_teacher,
)
from dlmctl.memorization.theory.random_features import (
    Problem,
    constants,
    data_spectrum,
    draw_problem,
    losses,
    make_problem,
    noisy_samples,
    norms,
)
from dlmctl.records.errors import UsageError
from dlmctl.settings.theory import FeatureModel, noise_variance

SMALL = FeatureModel(psi_n=2, psi_p=4, dimension=6, time=0.3, variances="0.5,1.5")
DRAWS = 200_000


@pytest.fixture(scope="module")
def problem() -> Problem:
    return draw_problem(SMALL, 0)


@pytest.fixture(scope="module")
def network(problem) -> torch.Tensor:
    """Any: B, in the eigenvectors of U."""
    shape = SMALL.dimension, SMALL.features
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


def features(problem: Problem, y: torch.Tensor) -> torch.Tensor:
    """phi of the columns of y, in the eigenvectors of U."""
    return problem.vectors.T @ torch.tanh(problem.weights @ y / SMALL.dimension**0.5)


def noised(data: torch.Tensor, draws: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and xi as columns."""
    chosen = data[torch.arange(draws) % len(data)]
    noise = torch.randn(chosen.shape, generator=torch.Generator().manual_seed(seed)).double()
    return (math.exp(-SMALL.time) * chosen + SMALL.noise**0.5 * noise).T, noise.T


@pytest.mark.parametrize(
    ("time", "wanted"),
    [
        (0.01, (0.605706, 0.085233, 0.025542, 0.001874)),
        (0.05, (0.605706, 0.186851, 0.019362, 0.008053)),
        (0.10, (0.605706, 0.257884, 0.013841, 0.013574)),
    ],
)
def test_constants_are_the_known_ones(time, wanted):
    assert constants(FeatureModel(6, 24, 50, time)) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"psi_n": 1}, "--psi-n 1"),
        ({"psi_p": 1}, "--psi-p 1"),
        ({"time": 0}, "--time 0"),
        ({"variances": "1,-1"}, "--variances"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    known = {"psi_n": 2, "psi_p": 4, "dimension": 6, "time": 0.3}
    with pytest.raises(UsageError, match=message):
        FeatureModel(**{**known, **options})


@pytest.mark.parametrize("draws", [0, 5])
def test_losses_are_those_of_drawn_noise_and_data(network, draws):
    problem = draw_problem(SMALL, 0, draws)
    found = losses(problem, network)
    y, noise = noised(problem.data, DRAWS, 2)
    left = SMALL.noise**0.5 * network @ features(problem, y) + noise
    assert float((left**2).sum(0).mean()) / 6 == pytest.approx(found.train, rel=0.01)
    fresh = torch.randn(DRAWS, 6, generator=torch.Generator().manual_seed(3)).double()
    y, noise = noised(fresh * data_spectrum(SMALL).sqrt(), DRAWS, 4)
    phi = network @ features(problem, y)
    left = SMALL.noise**0.5 * phi + noise
    assert float((left**2).sum(0).mean()) / 6 == pytest.approx(found.test, rel=0.01)
    gamma = math.exp(-2 * SMALL.time) * data_spectrum(SMALL) + SMALL.noise
    error = float(((phi + y / gamma[:, None]) ** 2).sum(0).mean()) / 6
    assert error == pytest.approx(found.score_err, rel=0.01)


def test_a_network_with_few_features_has_little_room_to_memorize():
    """The teacher that has learned all it can: its gap falls with the number of features, and with
    fewer than samples it is that of least squares, which leaves a residual."""
    gaps, train = [], []
    for psi_p in (2, 4, 8, 16):
        setting = FeatureModel(psi_n=6, psi_p=psi_p, dimension=8, time=0.1)
        problem = draw_problem(setting, 0)
        found = losses(problem, train_teacher(problem, 1e12))
        gaps.append(found.test - found.train)
        train.append(found.train)
        left = setting.dimension - float(
            (problem.noise_product.square().sum(1) / problem.values).sum()
        )
        assert found.train * setting.dimension == pytest.approx(left, rel=1e-9)
    assert gaps == sorted(gaps)
    assert gaps[-1] > 10 * gaps[0]
    assert train == sorted(train, reverse=True)


def test_with_draws_the_moments_are_means_over_them():
    problem = draw_problem(SMALL, 0, draws=5)
    parts = [*noisy_samples(SMALL, problem.data, 5, problem.noise_seed)]
    y, noise = (torch.cat(each, 1).double() for each in list(zip(*parts, strict=True))[1:])
    assert y.shape == (6, 5 * 12)
    torch.testing.assert_close(
        y - SMALL.noise**0.5 * noise,
        math.exp(-SMALL.time) * problem.data.T.repeat(1, 5),
        rtol=0,
        atol=1e-6,
    )
    phi = features(problem, y)
    means = phi @ phi.T / 60, phi @ noise.T / 60, phi @ y.T / 60
    found = torch.diag(problem.values), problem.noise_product, problem.input_product
    torch.testing.assert_close(found, means, rtol=0, atol=1e-6)
    assert draw_problem(SMALL, 0).data.equal(problem.data)
    with pytest.raises(UsageError, match="--draws 3 are too few: at least 4"):
        draw_problem(SMALL, 0, draws=3)


def test_what_draws_add_to_the_score_error_falls_as_their_inverse():
    setting, tau = FeatureModel(psi_n=3, psi_p=8, dimension=10, time=0.1), 100.0
    exact = draw_problem(setting, 0)
    best = losses(exact, train_teacher(exact, tau)).score_err
    above = []
    for draws in (20, 80):
        many = [make_problem(setting, exact.weights, exact.data, draws, s) for s in range(20)]
        found = [losses(each, train_teacher(each, tau)).score_err for each in many]
        above.append(sum(found) / len(found) - best)
    assert above[0] / above[1] == pytest.approx(4, rel=0.25), above


def test_a_student_of_draws_learns_from_the_same():
    """M and R are means over the teacher's own noisy samples."""
    problem = draw_problem(SMALL, 0, draws=5)
    network = train_teacher(problem, 300.0)
    student = distill_student(problem, network, 0.2, None, 99, 99)
    parts = [*noisy_samples(SMALL, problem.data, 5, problem.noise_seed)]
    y = torch.cat([part[1] for part in parts], 1).double()
    phi, later = features(problem, y), SMALL.time - 0.2
    there = y + 0.2 * (y + network @ phi)
    alpha, beta = (math.exp(t) * noise_variance(t) for t in (SMALL.time, later))
    drift = (alpha * phi - beta * features(problem, there)) @ phi.T / 60
    target = (math.exp(SMALL.time) * y - math.exp(later) * there) @ phi.T / 60
    torch.testing.assert_close(student.drift.T, drift.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(student.target, target, rtol=0, atol=1e-5)


def train_gradient(problem: Problem, at: torch.Tensor) -> torch.Tensor:
    """Of the training loss by finite differences; exact of a quadratic, but for rounding."""
    made = []
    for place in range(at.numel()):
        away = torch.zeros(at.numel(), dtype=at.dtype)
        away[place] = 1
        up, down = (losses(problem, at + side * away.reshape(at.shape)).train for side in (1, -1))
        made.append((up - down) / 2)
    return torch.tensor(made, dtype=at.dtype).reshape(at.shape)


def test_the_flow_follows_the_gradient(problem):
    for tau in (0.5, 20.0, 400.0):
        step = 1e-4 * tau
        speed = (train_teacher(problem, tau + step) - train_teacher(problem, tau - step)) / (
            2 * step
        )
        gradient = train_gradient(problem, train_teacher(problem, tau))
        wanted = -SMALL.dimension / SMALL.psi_p * gradient
        torch.testing.assert_close(speed, wanted, rtol=1e-5, atol=1e-9)
    assert train_teacher(problem, 0).abs().max() == 0
    assert train_gradient(problem, train_teacher(problem, 1e12)).abs().max() < 1e-9


def test_descent_in_closed_form_is_descent_on_a_fixed_set_of_noise():
    setting = FeatureModel(psi_n=3, psi_p=5, dimension=8, time=0.2)
    problem = draw_problem(setting, 0)
    draws, rate, steps = 12, 3.0, 400
    noise = torch.randn(draws, 24, 8, generator=torch.Generator().manual_seed(1)).double()
    y = (math.exp(-0.2) * problem.data + setting.noise**0.5 * noise).reshape(-1, 8)
    phi = torch.tanh(y @ problem.weights.T / 8**0.5)
    network = torch.zeros(8, 40, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        left = setting.noise**0.5 * phi @ network.T + noise.reshape(-1, 8)
        [gradient] = torch.autograd.grad((left**2).sum(1).mean() / 8, network)
        network = (network - rate * gradient).detach().requires_grad_()
    values, vectors = torch.linalg.eigh(phi.T @ phi / len(phi))
    product = vectors.T @ (phi.T @ noise.reshape(-1, 8) / len(phi))
    drawn = problem._replace(values=values, vectors=vectors, noise_product=product)
    tau = setting.psi_p * rate * steps / 8
    found = train_teacher(drawn, tau, rate) @ vectors.T
    assert descent_steps(setting, rate, tau) == steps
    torch.testing.assert_close(found, network.detach(), rtol=0, atol=1e-9)


def test_small_steps_of_descent_are_the_flow(problem):
    flow = train_teacher(problem, 50.0)
    rates = (0.1, 0.01)
    off = [float((train_teacher(problem, 50.0, rate) - flow).norm()) for rate in rates]
    assert off[0] < 0.02 * float(flow.norm())
    assert off[1] == pytest.approx(off[0] / 10, rel=0.05)  # of first order
    with pytest.raises(UsageError, match="diverges: it must be below"):
        train_teacher(problem, 50.0, 1e4)


def test_bulks_are_d_and_n_less_d_directions():
    setting = FeatureModel(psi_n=4, psi_p=20, dimension=24, time=0.01)
    values = draw_problem(setting, 1).values
    drops = (values[:200] / values[1:201]).log()
    # The largest falls from one eigenvalue to the next, among those above the null bulk.
    assert sorted((drops.topk(2).indices + 1).tolist()) == [24, 96]
    parts = setting.bulks()
    assert [part.stop - part.start for part in parts.values()] == [24, 72, 384]


def test_turned_data_and_features_have_the_same_losses():
    setting = FeatureModel(psi_n=2, psi_p=4, dimension=5, time=0.3)
    plain = draw_problem(setting, 0)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(9)).double())[
        0
    ]
    turned = make_problem(setting, plain.weights @ turn, plain.data @ turn)
    for tau in (3.0, 3e4):
        one, other = (losses(each, train_teacher(each, tau)) for each in (plain, turned))
        assert one == pytest.approx(other, rel=1e-8)


@pytest.fixture(scope="module")
def taught(problem) -> torch.Tensor:
    return train_teacher(problem, 300.0)


def test_the_student_descends_the_consistency_loss(problem, taught, network):
    """The gradient of the loss with drawn noise and a fixed target."""
    delta, later = 0.2, SMALL.time - 0.2
    student = distill_student(problem, taught, delta, None, 2000, 0)
    y, _ = noised(problem.data, DRAWS, 5)
    phi = features(problem, y)
    there = y + delta * (y + taught @ phi)

    def f(own, at, time):
        return math.exp(time) * (at + noise_variance(time) * own @ features(problem, at))

    own = network.clone().requires_grad_()
    left = f(own, y, SMALL.time) - f(network, there, later)
    [gradient] = torch.autograd.grad((left**2).sum(0).mean(), own)
    alpha = math.exp(SMALL.time) * SMALL.noise
    wanted = 2 * alpha * (network @ student.drift + student.target)
    assert float((gradient - wanted).norm() / wanted.norm()) < 0.01


@pytest.mark.parametrize("start", ["teacher", "zero"])
def test_the_student_follows_its_flow_to_the_fixed_point(problem, taught, start):
    begin = taught if start == "teacher" else torch.zeros_like(taught)
    student = distill_student(problem, taught, 0.2, begin if start == "teacher" else None, 300, 0)
    torch.testing.assert_close(student.at(0.0), begin, rtol=0, atol=1e-8)
    alpha = math.exp(SMALL.time) * SMALL.noise
    for tau in (3.0, 300.0):
        step = 1e-4 * tau
        speed = (student.at(tau + step) - student.at(tau - step)) / (2 * step)
        here = student.at(tau) @ student.drift + student.target
        torch.testing.assert_close(speed, -2 * alpha / SMALL.psi_p * here, rtol=1e-5, atol=1e-8)
    at_rest = student.limit @ student.drift + student.target
    assert at_rest.abs().max() < 1e-10
    assert student.rates.real.min() > 0
    late = 40 / float(student.rates.real.min())
    torch.testing.assert_close(student.at(late), student.limit, rtol=0, atol=1e-8)


def test_kappa_is_the_share_that_a_step_of_the_teacher_moves(problem, taught):
    student = distill_student(problem, taught, 0.2, None, 2000, 0)
    y, _ = noised(problem.data, DRAWS, 6)
    phi = features(problem, y)
    moved = phi - features(problem, y + 0.2 * (y + taught @ phi))
    wanted = (moved**2).mean(1) / (phi**2).mean(1)
    bulks = SMALL.bulks().values()
    found = [float(student.kappa[part].mean() / wanted[part].mean()) for part in bulks]
    assert found == pytest.approx([1, 1, 1], abs=0.1)
    assert float((phi**2).mean(1) @ problem.values.reciprocal()) == pytest.approx(24, rel=0.02)


def test_a_student_needs_a_time_before_the_teachers(problem, taught):
    for delta in (0.0, 0.3):
        with pytest.raises(UsageError, match="--delta"):
            distill_student(problem, taught, delta, None, 1, 0)


def test_norms_of_the_bulks_make_the_whole(problem, taught):
    parts = norms(problem, taught)
    assert list(parts) == ["gen", "mem", "null"]
    assert math.hypot(*parts.values()) == pytest.approx(float(taught.norm()))


def ends_of_paths(y: torch.Tensor, setting: FeatureModel, steps: int = 200) -> torch.Tensor:
    """Points at time 0 of the probability flow dx/dt = -x - score(x, t) through y [d, N] at time t:
    the classical method of Runge and Kutta, with the score of N(0, e^-2t Sigma + (1 - e^-2t) I)."""
    spectrum = data_spectrum(setting)[:, None]

    def slope(x: torch.Tensor, time: float) -> torch.Tensor:
        shrunk = math.exp(-2 * time)
        return -x + x / (shrunk * spectrum + 1 - shrunk)

    x, h = y, -setting.time / steps
    for step in range(steps):
        at = setting.time + step * h
        one = slope(x, at)
        two = slope(x + h / 2 * one, at + h / 2)
        three = slope(x + h / 2 * two, at + h / 2)
        x = x + h / 6 * (one + 2 * two + 2 * three + slope(x + h * three, at + h))
    return x


def test_the_error_of_a_map_is_from_the_ends_of_the_probability_flow(network):
    problem = draw_problem(SMALL, 0)
    fresh = torch.randn(DRAWS, 6, generator=torch.Generator().manual_seed(5)).double()
    y, _ = noised(fresh * data_spectrum(SMALL).sqrt(), DRAWS, 6)
    assert len(data_spectrum(SMALL).unique()) > 1
    for each in (network, torch.zeros_like(network), train_teacher(problem, 300.0)):
        found = math.exp(SMALL.time) * (y + SMALL.noise * each @ features(problem, y))
        missed = found - ends_of_paths(y, SMALL)
        wanted = float((missed**2).sum(0).mean()) / 6
        assert map_error(problem, each) == pytest.approx(wanted, rel=0.01)


def test_a_perfect_student_has_no_error_and_is_no_denoiser():
    """Features that are all but linear can be the map of N(0, I), f*(y) = y, itself."""
    setting = FeatureModel(psi_n=2, psi_p=3, dimension=6, time=0.05)
    drawn = draw_problem(setting, 0)
    # Where tanh is linear; its moments are of the order of the square of the weights.
    problem = make_problem(setting, 1e-3 * drawn.weights, drawn.data)
    inverse = torch.linalg.pinv(problem.weights / 6**0.5)
    perfect = math.expm1(-setting.time) / setting.noise * inverse @ problem.vectors
    assert map_error(problem, perfect) == pytest.approx(0, abs=1e-6)
    assert losses(problem, perfect).score_err == pytest.approx(0.238, abs=5e-4)
    true_score = -inverse @ problem.vectors
    assert losses(problem, true_score).score_err == pytest.approx(0, abs=1e-6)
    # Tweedie's mean of the data is e^-t y.
    tweedie = math.expm1(-setting.time) ** 2
    assert map_error(problem, true_score) == pytest.approx(tweedie, rel=1e-3)
