"""Mask laws: what they hide, with which weight, and that only names decide it."""

import math
from collections import Counter

import pytest
import torch

from dlmctl.diffusion.masks import LAWS, draw_masks
from dlmctl.records.errors import UsageError


def all_scored(length):
    return torch.ones(length, dtype=torch.bool)


@pytest.mark.parametrize("law", LAWS)
def test_masks_are_a_function_of_seed_record_and_sample(law):
    first = draw_masks(law, 4, all_scored(9), 1, "sudoku/12", 3)
    again = draw_masks(law, 4, all_scored(9), 1, "sudoku/12", 3)
    assert torch.equal(first.hidden, again.hidden)
    assert torch.equal(first.weights, again.weights)
    others = [(2, "sudoku/12", 3), (1, "sudoku/13", 3), (1, "sudoku/12", 4)]
    for names in others:
        other = draw_masks(law, 4, all_scored(9), *names)
        assert not torch.equal(first.weights, other.weights) or not torch.equal(
            first.hidden, other.hidden
        )


@pytest.mark.parametrize("law", LAWS)
def test_more_masks_begin_with_the_same_ones(law):
    few = draw_masks(law, 2, all_scored(9), 0, "a", 0)
    many = draw_masks(law, 8, all_scored(9), 0, "a", 0)
    assert torch.equal(few.hidden, many.hidden[:2])


@pytest.mark.parametrize("law", LAWS)
def test_tokens_that_do_not_count_are_never_hidden(law):
    scored = torch.tensor([True, True, True, False, False])
    masks = draw_masks(law, 64, scored, 0, "a", 0)
    assert not masks.hidden[:, 3:].any()
    assert masks.hidden[:, :3].any()


def test_complementary_pairs_hide_every_token_once():
    masks = draw_masks("complementary", 40, all_scored(7), 0, "a", 0)
    pairs = masks.hidden.view(20, 2, 7)
    assert torch.equal(pairs[:, 0], ~pairs[:, 1])
    for hidden, weight in zip(masks.hidden, masks.weights, strict=True):
        count = int(hidden.sum())
        assert float(weight) == (8 / count if count else 0)


def test_uniform_masks_hide_every_number_of_tokens_equally_often():
    masks = draw_masks("uniform", 6000, all_scored(5), 0, "a", 0)
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
        draw_masks("complementary", 3, all_scored(4), 0, "a", 0)


def test_an_unknown_law_is_refused_by_name():
    with pytest.raises(UsageError, match="unknown mask law 'cosine'"):
        draw_masks("cosine", 2, all_scored(4), 0, "a", 0)
