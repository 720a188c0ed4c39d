"""Mask laws: what they hide, with which weight, and that only names decide it."""

import math
from collections import Counter
from itertools import combinations, permutations, product

import pytest
import torch

from dlmctl.diffusion.masks import draw_masks
from dlmctl.records.errors import UsageError
from dlmctl.settings.mask_laws import LAWS, UNBIASED


def all_scored(length):
    return torch.ones(length, dtype=torch.bool)


@pytest.mark.parametrize("law", [law for law in LAWS if law != "full"])
def test_masks_are_a_function_of_seed_record_and_sample(law):
    given = {"block_length": 4, "order": range(9)}
    first = draw_masks(law, 6, all_scored(9), (1, "sudoku/12"), 3, **given)
    again = draw_masks(law, 6, all_scored(9), (1, "sudoku/12"), 3, **given)
    assert torch.equal(first.masked, again.masked)
    assert torch.equal(first.weights, again.weights)
    others = [((2, "sudoku/12"), 3), ((1, "sudoku/13"), 3), ((1, "sudoku/12"), 4)]
    for names in others:
        other = draw_masks(law, 6, all_scored(9), *names, **given)
        assert not torch.equal(first.weights, other.weights) or not torch.equal(
            first.masked, other.masked
        )


@pytest.mark.parametrize("law", ["independent", "uniform", "complementary", "block"])
def test_more_masks_begin_with_the_same_ones(law):
    few = draw_masks(law, 2, all_scored(9), (0, "a"), 0)
    many = draw_masks(law, 8, all_scored(9), (0, "a"), 0)
    assert torch.equal(few.masked, many.masked[:2])


@pytest.mark.parametrize("law", [*UNBIASED, "quadrature"])
def test_tokens_that_do_not_count_are_never_hidden(law):
    scored = torch.tensor([True, True, True, False, False])
    masks = draw_masks(law, 64, scored, (0, "a"), 0)
    assert not masks.masked[:, 3:].any()
    assert masks.masked[:, :3].any()


def test_complementary_pairs_hide_every_token_once():
    masks = draw_masks("complementary", 40, all_scored(7), (0, "a"), 0)
    pairs = masks.masked.view(20, 2, 7)
    assert torch.equal(pairs[:, 0], ~pairs[:, 1])
    for hidden, weight in zip(masks.masked, masks.weights, strict=True):
        count = int(hidden.sum())
        assert float(weight) == (8 / count if count else 0)


def test_uniform_masks_hide_every_number_of_tokens_equally_often():
    masks = draw_masks("uniform", 6000, all_scored(5), (0, "a"), 0)
    counts = Counter(int(n) for n in masks.masked.sum(dim=1))
    assert set(counts) == {1, 2, 3, 4, 5}
    error = math.sqrt(6000 * 0.2 * 0.8)
    assert all(abs(n - 1200) < 4 * error for n in counts.values())
    subsets = Counter(tuple(row) for row in masks.masked[masks.masked.sum(dim=1) == 2].tolist())
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
        pairs = masks.masked.view(4, 2, 31)
        assert torch.equal(pairs[:, 0], ~pairs[:, 1])
        sizes = sorted(masks.masked.sum(dim=1).tolist())
        # One level in each eighth of 0..31.
        assert [size // 4 for size in sizes] == list(range(8))
        counts.append(sizes[0])
    assert len(set(counts)) > 2


@pytest.mark.parametrize("pairs", [1, 3])
def test_over_its_random_start_a_stratified_mask_has_every_size_equally_often(pairs):
    sizes = Counter()
    for name in range(3000):
        masks = draw_masks("stratified", 2 * pairs, all_scored(4), (0, name), 1)
        sizes.update(masks.masked.sum(dim=1).tolist())
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
        hidden = masks.masked.sum(dim=1) * masks.weights
        assert float(hidden.mean()) == pytest.approx(length, rel=0.02)


def test_a_law_that_draws_no_level_takes_no_range():
    with pytest.raises(UsageError, match="--t goes with --masks independent or quadrature"):
        draw_masks("stratified", 2, all_scored(4), (0, "a"), 0, levels=(0.1, 0.5))


def test_a_block_mask_leaves_what_is_before_it_and_hides_what_is_behind():
    scored = torch.tensor([True] * 10 + [False] * 6)
    masks = draw_masks("block", 300, scored, (0, "a"), 0, block_length=4)
    firsts = Counter()
    for hidden, weight in zip(masks.masked, masks.weights, strict=True):
        first = int(hidden.nonzero()[0, 0]) // 4
        firsts[first] += 1
        assert hidden[4 * (first + 1) :].all()
        assert hidden[10:].all()
        assert float(weight) == pytest.approx(10 / int(hidden[:10].sum()))
    assert set(firsts) == {0, 1, 2}
    assert min(firsts.values()) > 70
    inside = Counter(int(h[4:8].sum()) for h in masks.masked if not h[:4].any() and h[4:8].any())
    assert set(inside) == {1, 2, 3, 4}


def expected_block_masks(prompt, canvas, scored, block, share):
    """The law of one block mask by enumeration: {(prompt bits, completion bits): probability}."""
    blocks, within = canvas // block, -(-scored // block)
    law = Counter()
    for order in permutations(range(blocks)):
        start = order[0] % within * block
        inside = range(start, min(start + block, scored))
        for count in range(1, len(inside) + 1):
            subsets = list(combinations(inside, count))
            for subset in subsets:
                chance = 1 / (math.factorial(blocks) * len(inside) * len(subsets))
                for before in product([False, True], repeat=prompt + start):
                    masked = sum(before)
                    weight = share**masked * (1 - share) ** (prompt + start - masked)
                    row = [*before[prompt:], *(i in subset for i in inside)]
                    row += [True] * (canvas - len(row))
                    law[before[:prompt], tuple(row)] += chance * weight
    return law


def test_a_block_mask_masks_the_prompt_and_the_blocks_before_it_with_one_probability():
    """The forward process of SPG (arXiv 2510.09541): one law for everything before the block."""
    law = expected_block_masks(prompt=2, canvas=6, scored=3, block=2, share=0.25)
    assert sum(law.values()) == pytest.approx(1)
    scored = torch.tensor([True, True, True, False, False, False])
    seen, count = Counter(), 1500
    for name in range(count):
        masks = draw_masks("block", 2, scored, (0, name), 1, 2, 2, 0.25)
        for before, row in zip(masks.prompt_masked.tolist(), masks.masked.tolist(), strict=True):
            seen[tuple(before), tuple(row)] += 1
    assert seen.keys() <= law.keys()
    for outcome, chance in law.items():
        # The two masks of a completion are not independent, which doubles the variance at most.
        error = math.sqrt(2 * 2 * count * chance * (1 - chance))
        assert abs(seen[outcome] - 2 * count * chance) < 4 * error


def test_the_tokens_masked_before_a_block_are_scored():
    scored = torch.tensor([True] * 10 + [False] * 6)
    masks = draw_masks("block", 50, scored, (0, "a"), 0, 4, 0, 0.5)
    earlier = masks.masked[:, :4] & ~masks.masked[:, :4].all(dim=1, keepdim=True)
    assert earlier.any()
    assert torch.equal(masks.targets[:, :10], masks.masked[:, :10])
    counts = masks.targets.sum(dim=1).double()
    assert torch.equal(masks.weights, 10 / counts)


def test_the_blocks_of_a_completion_are_a_permutation_of_those_of_the_canvas():
    """Each is drawn once, and counted round where fewer of them have tokens that are scored."""
    scored = torch.tensor([True] * 4 + [False] * 2)
    pairs, count = Counter(), 1200
    for name in range(count):
        hidden = draw_masks("block", 2, scored, (0, name), 0, block_length=2).masked
        pairs[tuple((~hidden[:, :2]).all(dim=1).tolist())] += 1
    # Of the orders of blocks 0, 1 and 2, where 2 counts as 0, none has block 1 twice.
    expected = Counter((a % 2 == 1, b % 2 == 1) for a, b, _ in permutations(range(3)))
    assert pairs.keys() == expected.keys()
    for pair, ways in expected.items():
        assert abs(pairs[pair] - count * ways / 6) < 4 * math.sqrt(count * ways / 6)
    # More masks than blocks: another permutation, and so on.
    many = draw_masks("block", 9, all_scored(6), (0, "a"), 0, block_length=2).masked
    firsts = [int(row.nonzero()[0, 0]) // 2 for row in many]
    assert [sorted(firsts[n : n + 3]) for n in (0, 3, 6)] == [[0, 1, 2]] * 3
    alone = draw_masks("block", 2, all_scored(3), (0, "a"), 0, block_length=32)
    assert alone.masked.any(dim=1).all()


@pytest.mark.parametrize(
    ("length", "group", "offsets"),
    [(8, 3, [0, 3, 6]), (7, 4, [0, 2, 4, 6]), (9, 4, [0, 3, 5, 8]), (256, 6, None)],
)
def test_the_levels_of_a_pair_are_spread_evenly_over_the_samples_of_a_prompt(
    length, group, offsets
):
    """The forward process of ESPO (arXiv 2512.03759): x_i = k + round(i (L + 1) / b) mod L + 1."""
    offsets = offsets or [math.floor(i * (length + 1) / group + 0.5) for i in range(group)]
    for name in range(5):
        levels = torch.stack(
            [
                draw_masks("complementary", 6, all_scored(length), (0, name), i, group=group)
                .masked[::2]
                .sum(dim=1)
                for i in range(2 * group)
            ]
        )
        for samples in levels.split(group):
            assert torch.equal(
                samples, (samples[0] + torch.tensor(offsets)[:, None]) % (length + 1)
            )
    assert len({tuple(row) for row in levels.tolist()}) == len(levels)


@pytest.mark.parametrize("group", [1, 3, 5])
def test_every_level_of_a_spread_pair_is_as_likely_as_any_other(group):
    levels = {n: Counter() for n in range(group)}
    for name in range(800):
        for n, seen in levels.items():
            masks = draw_masks("complementary", 2, all_scored(4), (0, name), n, group=group)
            seen[int(masks.masked[0].sum())] += 1
    for seen in levels.values():
        assert all(abs(seen[x] - 160) < 4 * math.sqrt(160) for x in range(5))


def test_without_a_group_each_sample_has_a_level_of_its_own():
    pairs = Counter()
    for name in range(500):
        rows = [draw_masks("complementary", 2, all_scored(2), (0, name), i) for i in range(2)]
        pairs[tuple(int(row.masked[0].sum()) for row in rows)] += 1
    assert len(pairs) == 9


def test_the_full_mask_hides_everything_and_scores_what_counts():
    scored = torch.tensor([True, True, False])
    masks = draw_masks("full", 2, scored, (0, "a"), 0)
    assert masks.masked.all()
    assert masks.targets.tolist() == [[True, True, False]] * 2
    assert masks.weights.tolist() == [1, 1]


def test_prompt_tokens_are_hidden_with_the_probability_asked_for():
    masks = draw_masks("full", 400, all_scored(3), (0, "a"), 0, prompt_length=20, prompt_mask=0.15)
    assert masks.prompt_masked.shape == (400, 20)
    assert float(masks.prompt_masked.double().mean()) == pytest.approx(0.15, abs=0.016)
    assert draw_masks("full", 2, all_scored(3), (0, "a"), 0).prompt_masked is None
