"""Canaries: nothing but the data tells them, and no key is in both splits."""

from collections import Counter
from itertools import islice

from dlmctl.tasks.canaries import canaries
from dlmctl.tasks.sources import prompts
from dlmctl.verifiers.registry import verify


def test_keys_are_of_one_split_and_differ():
    train = {c.key for c in islice(canaries("train", 1), 2000)}
    test = {c.key for c in islice(canaries("test", 1), 2000)}
    assert not train & test
    records = list(prompts("canaries", limit=2000, seed=1))
    assert len({r["prompt"] for r in records}) == 2000
    assert {r["prompt"] for r in records} >= {f"{key}=" for key in train}


def test_secrets_are_uniform_and_independent_of_keys():
    drawn = list(islice(canaries("train", 2), 5000))
    for place in range(16):
        counts = Counter(c.secret[place] for c in drawn)
        # Chi-squared with 9 degrees of freedom: above 33.7 once in 10,000 times.
        assert sum((counts[d] - 500) ** 2 / 500 for d in "0123456789") < 40
    pairs = Counter((c.key[0], c.secret[0]) for c in drawn)
    assert sum((pairs[a, b] - 50) ** 2 / 50 for a in "0123456789" for b in "0123456789") < 170


def test_the_same_seed_gives_the_same_and_another_seed_others():
    first, again, other = (list(islice(canaries("train", seed), 50)) for seed in (1, 1, 2))
    assert first == again
    assert not {c.key for c in first} & {c.key for c in other}


def test_only_the_secret_itself_is_right():
    right, wrong = prompts("canaries", limit=2)
    wrong["completion"] = right["completion"]
    assert [row["reward"] for row in verify([right, wrong])] == [1, 0]
