"""From signals to weights: numbers made by hand from the formula, and what must hold for any."""

from __future__ import annotations

import math

import pytest
import torch

from dlmctl.records.errors import UsageError
from dlmctl.rl.srpo.credit import Weighted, token_weights
from dlmctl.rl.srpo.roles import token_roles
from dlmctl.settings.layout import Tags
from dlmctl.settings.srpo import Credit

ROLES = [[1, 1, 2, 2, 0], [1, 2, 2, 0, 0], [1, 1, 2, 2, 0], [0, 0, 0, 0, 0]]
SIGNALS = [[1.2, 0.1, 0.8, -0.1, 0], [0.4, 0.3, 1.5, 0, 0], [-0.1, 2.5, 0.05, 0.6, 0], [0] * 5]


RLSD = {"tau": 1.0, "weight_clip": "0.8,1.2", "norm": "none"}
"""Constants whose weights are quickly found by hand."""


def weights_of(signal, roles, advantage: float = 1.0, limit: float = 5.0, **settings) -> Weighted:
    signal = torch.tensor(signal, dtype=torch.float64)
    credit = Credit(**{**RLSD, **settings})
    return token_weights(signal, torch.tensor(roles), advantage, credit, limit)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {},
            [
                [1.2, 0.8, 1.2, 0.8, 1],
                [0.8, 0.8, 1.2, 1, 1],
                [0.8, 1.2, 0.8, 0.850016, 1],
                [1, 1, 1, 1, 1],
            ],
        ),
        (
            {"norm": "mean"},
            [
                [1.2, 0.8, 1.2, 0.8, 1],
                [0.857143, 0.857143, 1.285714, 1, 1],
                [0.876708, 1.315063, 0.876708, 0.931520, 1],
                [1, 1, 1, 1, 1],
            ],
        ),
        ({"strength": 0.5}, [[1.1, 0.9, 1.1, 0.9, 1], [0.9, 0.9, 1.1, 1, 1]]),
    ],
)
def test_weights_of_the_worked_case(settings, expected):
    for signal, roles, wanted in zip(SIGNALS, ROLES, expected, strict=False):
        assert weights_of(signal, roles, **settings).weights.tolist() == pytest.approx(
            wanted, abs=1e-6
        )


def test_default_weights_share_a_mean_of_one_and_go_by_the_difference_of_signals():
    signal = torch.tensor([2.0, 0.0, -1.0, 9.0], dtype=torch.float64)
    made = token_weights(signal, torch.tensor([1, 1, 2, 0]), 1.0, Credit()).weights
    assert made[:3].mean() == pytest.approx(1, abs=1e-12)
    assert made[3] == 1
    assert made[0] / made[1] == pytest.approx(math.exp(0.3 * 2))
    assert made[1] / made[2] == pytest.approx(math.exp(0.3))


SETTINGS = [
    {"signal_baseline": baseline, "weight_map": kind, "norm": norm, "sign_aware": aware}
    for baseline in ("traj-mean", "role-mean", "none")
    for kind in ("exp", "softplus", "sigmoid2", "tanh1")
    for norm in ("none", "mean")
    for aware in (False, True)
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_weights_are_positive_and_keep_the_sign(settings):
    generator = torch.Generator().manual_seed(1)
    for advantage in (-2.0, 0.7):
        signal = torch.randn(40, generator=generator, dtype=torch.float64) * 4
        roles = torch.randint(0, 3, (40,), generator=generator)
        made = weights_of(signal.tolist(), roles.tolist(), advantage, **settings)
        assert (made.weights > 0).all()
        assert (made.weights[roles == 0] == 1).all()
        if settings["norm"] == "mean":
            assert made.weights[roles != 0].mean() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("off", [{"strength": 0.0}, {"tau": 0.0}])
def test_no_strength_and_no_temperature_are_exactly_plain(off):
    assert weights_of(SIGNALS[0], ROLES[0], **off).weights.tolist() == [1.0] * 5


def test_no_role_is_exactly_plain():
    assert weights_of(SIGNALS[0], [0] * 5).weights.tolist() == [1.0] * 5


def test_a_shared_baseline_moves_credit_between_roles_and_one_of_each_role_does_not():
    signal, roles = [0.20, 0.24, -0.05, -0.09], [1, 1, 2, 2]
    shared = weights_of(signal, roles).weights
    assert shared[:2].mean() > 1.1 > 0.9 > shared[2:].mean()
    own = weights_of(signal, roles, signal_baseline="role-mean").weights
    assert float(own[:2].mean()) == pytest.approx(float(own[2:].mean()), abs=1e-12)


def test_signals_are_limited_before_the_baseline_is_taken():
    assert weights_of([100.0, 0.0], [1, 2]).baseline == 2.5
    assert weights_of([100.0, 0.0], [1, 2], limit=1.0).baseline == 0.5


def test_sign_aware_turns_the_signal_over_for_bad_completions():
    good = weights_of([0.1, -0.1], [1, 2], 1.0, sign_aware=True).weights
    bad = weights_of([0.1, -0.1], [1, 2], -1.0, sign_aware=True).weights
    assert good[0] == pytest.approx(float(bad[1]))
    assert good[0] > 1 > bad[0]


def test_ratio_to_the_mean():
    made = weights_of([1.0, 3.0], [1, 2], signal_baseline="traj-ratio", weight_clip="0.1,2").weights
    assert made.tolist() == [0.5, 1.5]
    assert weights_of([0.0, 0.0], [1, 2], signal_baseline="traj-ratio").weights.tolist() == [
        1.0,
        1.0,
    ]
    with pytest.raises(UsageError, match="never negative"):
        weights_of([-1.0, 3.0], [1, 2], signal_baseline="traj-ratio")


def test_bounds_are_counted_where_they_hold():
    made = weights_of([0.0, 0.0, 4.0, -4.0], [1, 2, 2, 1])
    assert (made.clipped_low, made.clipped_high) == (0.25, 0.25)
    with pytest.raises(UsageError, match="--weight-clip"):
        Credit(weight_clip="0,1.2")
    with pytest.raises(UsageError, match="--weight-lambda"):
        weights_of([-9.0, 9.0], [1, 2], strength=6.0)


def test_roles_go_by_characters_and_not_by_tokens():
    texts = ["<desc", "ription>\n", "a red", " box", "</description><", "think>", "so"]
    texts += [" 1", "</think>", " \\boxed{", "1", "}", "<eos>"]
    # The newline belongs to a token that begins in the tag, so that token has no role.
    assert token_roles(texts, Tags()) == [0, 0, 1, 1, 0, 0, 2, 2, 0, 0, 0, 0, 0]


def test_part_of_a_character_has_the_role_of_its_place():
    texts = ["<description>", "", "é", "</description>", "<think>", "x", "</think>\\boxed{1}"]
    assert token_roles(texts, Tags()) == [0, 1, 1, 0, 0, 2, 0]


@pytest.mark.parametrize(
    "text",
    [
        "<think>x</think>\\boxed{1}",
        "<description>a</description><think></think>\\boxed{1}",
        "<description>a</description><think>b</think>",
        "<think>b</think><description>a</description>\\boxed{1}",
    ],
)
def test_a_malformed_response_has_no_roles(text):
    assert token_roles(list(text), Tags()) is None
    assert token_roles(list(text.replace("description", "see")), Tags("see", "think")) is None
