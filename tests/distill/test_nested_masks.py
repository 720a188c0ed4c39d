"""Nested masks: what is hidden at the lower level is hidden at the higher one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import tiny_policy

from dlmctl.diffusion.rollout import rollout
from dlmctl.diffusion.sampling import configured
from dlmctl.distill.nested_masks import draw_nested, nested_masks
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record
from dlmctl.settings.sampler import Sampler

EVERY = torch.ones(6, dtype=torch.bool)


def drawn(number: int, decided: int = 2, scored: torch.Tensor = EVERY, **record):
    order = "trajectory" if "rollout" in record else "random"
    return draw_nested(Record(record), scored, order, decided, ("seed", number))


@pytest.mark.parametrize("hidden", range(1, 6))
@pytest.mark.parametrize("decided", [1, 2, 8])
def test_counts_and_nesting(hidden, decided):
    scored = torch.tensor([True, False, True, True, True, True])
    made = nested_masks(scored, torch.tensor([3, 0, 4, 1, 2]), hidden, decided)
    assert int(made.hidden.sum()) == hidden
    assert int(made.still.sum()) == max(hidden - decided, 0)
    assert not (made.still & ~made.hidden).any()
    assert not (made.hidden & ~scored).any()
    assert torch.equal(made.decided, made.hidden ^ made.still)
    # The lowest rank stays hidden longest.
    assert bool(made.hidden[2])


def test_a_draw_is_a_function_of_its_keys():
    assert all(torch.equal(*pair) for pair in zip(drawn(1), drawn(1), strict=True))
    assert len({tuple(drawn(n).hidden.tolist()) for n in range(40)}) > 10


def test_levels_are_uniform_and_tokens_alike():
    number = 3000
    made = [drawn(n).hidden for n in range(number)]
    counts = Counter(int(hidden.sum()) for hidden in made)
    assert set(counts) == set(range(1, 7))
    # Five standard deviations of a share of one in six.
    assert max(abs(c / number - 1 / 6) for c in counts.values()) < 5 * (5 / 36 / number) ** 0.5
    share = torch.stack(made).double().mean(0)
    assert (share - 3.5 / 6).abs().max() < 5 * (0.25 / number) ** 0.5


def test_tokens_that_do_not_count_are_never_masked():
    scored = torch.tensor([True] * 5 + [False])
    assert not any(drawn(n, scored=scored).hidden[5] for n in range(50))
    assert any(drawn(n, scored=scored).hidden[4] for n in range(50))


def test_along_a_trajectory_what_is_hidden_is_what_the_sampler_had_not_decided():
    policy = tiny_policy()
    settings = configured(policy, Sampler(temperature=1.0))
    prompts = [Record(id="p", prompt="12=")]
    [record] = rollout(prompts, policy, settings, 1, 0, 1)
    order = torch.tensor(record["rollout"]["order"])
    scored = torch.ones(len(order), dtype=torch.bool)
    for n in range(30):
        made = draw_nested(record, scored, "trajectory", 2, (n,))
        for level in made:
            undecided = int(level.sum())
            assert torch.equal(level, order >= len(order) - undecided)


def test_tokens_of_one_step_are_left_to_chance():
    steps = [0, 0, 0, 1, 1, 1]
    seen = set()
    for n in range(80):
        hidden = drawn(n, rollout={"order": steps}).hidden
        late = hidden[3:].sum()
        assert late == min(int(hidden.sum()), 3)
        seen.add(tuple(hidden.tolist()))
    # All subsets that the order allows.
    assert len(seen) == 3 + 3 + 1 + 3 + 3 + 1


@pytest.mark.parametrize("order", [None, [0, 1], list("abcdef")])
def test_a_record_without_its_order_is_refused(order):
    record = Record(rollout={"order": order})
    record.where = "f.jsonl:4"
    with pytest.raises(DataError, match=r"f\.jsonl:4: .*rollout\.order"):
        draw_nested(record, EVERY, "trajectory", 1, (0,))
