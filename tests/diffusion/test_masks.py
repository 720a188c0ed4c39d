"""Mask laws: what they hide, with which weight, and that only names decide it."""

import math
from collections import Counter

import pytest
import torch

from dlmctl.diffusion.masks import LAWS, UNBIASED, draw_masks
from dlmctl.records.errors import UsageError


def all_scored(length):
    return torch.ones(length, dtype=torch.bool)


@pytest.mark.parametrize("law", [law for law in LAWS if law != "full"])
def test_masks_are_a_function_of_seed_record_and_sample(law):
    first = draw_masks(law, 4, all_scored(9), (1, "sudoku/12"), 3, block_length=4)
    again = draw_masks(law, 4, all_scored(9), (1, "sudoku/12"), 3, block_length=4)
    assert torch.equal(first.hidden, again.hidden)
    assert torch.equal(first.weights, again.weights)
    others = [((2, "sudoku/12"), 3), ((1, "sudoku/13"), 3), ((1, "sudoku/12"), 4)]
    for names in others:
        other = draw_masks(law, 4, all_scored(9), *names, block_length=4)
        assert not torch.equal(first.weights, other.weights) or not torch.equal(
            first.hidden, other.hidden
        )


@pytest.mark.parametrize("law", ["independent", "uniform", "complementary", "block"])
def test_more_masks_begin_with_the_same_ones(law):
    few = draw_masks(law, 2, all_scored(9), (0, "a"), 0)
    many = draw_masks(law, 8, all_scored(9), (0, "a"), 0)
    assert torch.equal(few.hidden, many.hidden[:2])


@pytest.mark.parametrize("law", [*UNBIASED, "quadrature"])
def test_tokens_that_do_not_count_are_never_hidden(law):
    scored = torch.tensor([True, True, True, False, False])
    masks = draw_masks(law, 64, scored, (0, "a"), 0)
    assert not masks.hidden[:, 3:].any()
    assert masks.hidden[:, :3].any()


def test_complementary_pairs_hide_every_token_once():
    masks = draw_masks("complementary", 40, all_scored(7), (0, "a"), 0)
    pairs = masks.hidden.view(20, 2, 7)
    assert torch.equal(pairs[:, 0], ~pairs[:, 1])
    for hidden, weight in zip(masks.hidden, masks.weights, strict=True):
        count = int(hidden.sum())
        assert float(weight) == (8 / count if count else 0)


def test_uniform_masks_hide_every_number_of_tokens_equally_often():
    masks = draw_masks("uniform", 6000, all_scored(5), (0, "a"), 0)
    counts = Counter(int(n) for n in masks.hidden.sum(dim=1))
    assert set(counts) == {1, 2, 3, 4, 5}
    error = math.sqrt(6000 * 0.2 * 0.8)
    assert all(abs(n - 1200) < 4 * error for n in counts.values())
    subsets = Counter(tuple(row) for row in masks.hidden[masks.hidden.sum(dim=1) == 2].tolist())
    assert len(subsets) == 10
    expected = sum(subsets.values()) / 10
    assert all(abs(n - expected) < 4.5 * math.sqrt(expected) for n in subsets.values())


def test_an_odd_number_of_complementary_masks_is_refused():
    with pytest.raises(UsageError, match="pairs"):
        draw_masks("complementary", 3, all_scored(4), (0, "a"), 0)


def test_an_unknown_law_is_refused_by_name():
    with pytest.raises(UsageError, match="unknown mask law 'cosine'"):
        draw_masks("cosine", 2, all_scored(4), (0, "a"), 0)


def test_stratified_pairs_hide_every_token_once_and_spread_their_levels():
    counts = []
    for sample in range(6):
        masks = draw_masks("stratified", 8, all_scored(31), (0, "a"), sample)
        pairs = masks.hidden.view(4, 2, 31)
        assert torch.equal(pairs[:, 0], ~pairs[:, 1])
        sizes = sorted(masks.hidden.sum(dim=1).tolist())
        # One level in each eighth of 0..31.
        assert [size // 4 for size in sizes] == list(range(8))
        counts.append(sizes[0])
    assert len(set(counts)) > 2


@pytest.mark.parametrize("pairs", [1, 3])
def test_over_its_random_start_a_stratified_mask_has_every_size_equally_often(pairs):
    sizes = Counter()
    for name in range(3000):
        masks = draw_masks("stratified", 2 * pairs, all_scored(4), (0, name), 1)
        sizes.update(masks.hidden.sum(dim=1).tolist())
    total = 3000 * 2 * pairs
    assert all(abs(sizes[n] / total - 0.2) < 0.015 for n in range(5))


def test_quadrature_integrates_polynomials_in_t_exactly():
    masks = draw_masks("quadrature", 3, all_scored(50), (0, "a"), 0)
    # weight = K w/t with t = 5 - sqrt(15) over 10, one half, 5 + sqrt(15) over 10.
    levels = torch.tensor([(5 - 15**0.5) / 10, 0.5, (5 + 15**0.5) / 10], dtype=torch.float64)
    shares = torch.tensor([5 / 18, 8 / 18, 5 / 18], dtype=torch.float64)
    assert torch.allclose(masks.weights, 3 * shares / levels)
    for power in range(1, 6):
        estimate = (masks.weights * levels**power).mean()
        assert float(estimate) == pytest.approx(1 / power)


@pytest.mark.parametrize("law", ["independent", "quadrature"])
def test_levels_in_a_range_estimate_the_mean_of_the_bound_there(law):
    """Where every token scores t^2, the mean of S/t is L times the mean of t^2 over the range."""
    low, high, length, count = 0.2, 0.5, 60, 4000 if law == "independent" else 2
    masks = draw_masks(law, count, all_scored(length), (0, "a"), 0, levels=(low, high))
    nodes = torch.tensor([-1, 1]) / 3**0.5 * (high - low) / 2 + (high + low) / 2
    level = nodes.double() if law == "quadrature" else 1 / masks.weights
    assert float(level.min()) >= low
    assert float(level.max()) <= high
    mean = (high**3 - low**3) / (3 * (high - low))
    estimate = float((masks.weights * level * level**2).mean())
    assert estimate == pytest.approx(mean, rel=0.02 if law == "independent" else 1e-6)
    if law == "independent":
        hidden = masks.hidden.sum(dim=1) * masks.weights
        assert float(hidden.mean()) == pytest.approx(length, rel=0.02)


def test_a_law_that_draws_no_level_takes_no_range():
    with pytest.raises(UsageError, match="--t goes with --masks independent or quadrature"):
        draw_masks("stratified", 2, all_scored(4), (0, "a"), 0, levels=(0.1, 0.5))


def test_a_block_mask_leaves_what_is_before_it_and_hides_what_is_behind():
    scored = torch.tensor([True] * 10 + [False] * 6)
    masks = draw_masks("block", 300, scored, (0, "a"), 0, block_length=4)
    firsts = Counter()
    for hidden, weight in zip(masks.hidden, masks.weights, strict=True):
        first = int(hidden.nonzero()[0, 0]) // 4
        firsts[first] += 1
        assert hidden[4 * (first + 1) :].all()
        assert hidden[10:].all()
        assert float(weight) == pytest.approx(10 / int(hidden[:10].sum()))
    assert set(firsts) == {0, 1, 2}
    assert min(firsts.values()) > 70
    inside = Counter(int(h[4:8].sum()) for h in masks.hidden if not h[:4].any() and h[4:8].any())
    assert set(inside) == {1, 2, 3, 4}


def test_the_full_mask_hides_everything_and_scores_what_counts():
    scored = torch.tensor([True, True, False])
    masks = draw_masks("full", 2, scored, (0, "a"), 0)
    assert masks.hidden.all()
    assert masks.targets.tolist() == [[True, True, False]] * 2
    assert masks.weights.tolist() == [1, 1]


def test_prompt_tokens_are_hidden_with_the_probability_asked_for():
    masks = draw_masks("full", 400, all_scored(3), (0, "a"), 0, prompt_length=20, prompt_mask=0.15)
    assert masks.prompt_hidden.shape == (400, 20)
    assert float(masks.prompt_hidden.double().mean()) == pytest.approx(0.15, abs=0.016)
    assert draw_masks("full", 2, all_scored(3), (0, "a"), 0).prompt_hidden is None
