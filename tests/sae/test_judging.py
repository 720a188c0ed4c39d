"""Prompts for a judge, and scores from its answers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record
from dlmctl.sae.features.autointerp import EXPLAIN, accuracies, advance, excerpt
from dlmctl.sae.judges import read_numbers


def window(kind: str, number: int, active: bool) -> dict[str, Any]:
    values = [0.0, 1.0 - number / 100, 0.001] if active else [0.0] * 3
    return {
        "id": f"{kind}{number}",
        "position": 1,
        "middle": 1,
        "t": 0.5,
        "tokens": ["a ", f"{kind}{number}", " z"],
        "masked": [False, active, False],
        "activations": values,
    }


def feature(top: int = 12, weighted: int = 7, inactive: int = 10, **fields: Any) -> Record:
    counts = {"top": top, "weighted": weighted, "inactive": inactive}
    windows = {
        kind: [window(kind, number, kind != "inactive") for number in range(count)]
        for kind, count in counts.items()
    }
    return Record(id="saes/x/7", feature=7, sae="saes/x", max=1.0, windows=windows, **fields)


def answered(record: Record, completion: str) -> Record:
    """As `rollout` leaves it."""
    tokens, made = {"prompt": [1], "completion": [2]}, {"model": "judge"}
    return Record(record, completion=completion, sample=0, tokens=tokens, rollout=made)


def excerpts(prompt: str) -> list[str]:
    return re.findall(r"^\d+\. (.*)$", prompt, re.M)


def named(lines: list[str]) -> list[str]:
    return [re.search(r"(top|weighted|inactive)\d+", line)[0] for line in lines]


def test_an_explanation_is_asked_for_from_ten_top_and_five_weighted_windows() -> None:
    made = advance(feature())
    assert made["id"] == "saes/x/7/explain"
    lines = excerpts(made["prompt"])
    names = named(lines)
    assert [sum(name.startswith(kind) for name in names) for kind in ("top", "weighted")] == [10, 5]
    assert lines[0] == f"a [[<<{names[0]}>>]] z"  # the last token has less than 1 % of the max
    assert "at most 30 words" in made["prompt"]
    assert "was hidden from the model" in made["prompt"]


def test_the_windows_asked_about_are_none_of_those_shown() -> None:
    first = advance(feature())
    second = advance(answered(first, "  words\nthat say it "))
    lines = excerpts(second["prompt"])
    names = named(lines)
    assert second["id"] == "saes/x/7/detect"
    assert second["explanation"] == "words that say it"
    assert "following: words that say it\n" in second["prompt"]
    assert not set(names) & set(named(excerpts(first["prompt"])))
    assert len(names) == second["answer"]["windows"] == 14
    active = [n for n, name in enumerate(names, start=1) if not name.startswith("inactive")]
    assert active == second["answer"]["active"]
    assert len(active) == 4
    assert not any("<<" in line for line in lines)
    # A pipe that asks again makes a prompt of its own, not the ids of the last one.
    assert not {"tokens", "completion", "sample", "rollout"} & second.keys()


def test_prompts_are_a_function_of_the_seed() -> None:
    def asked(seed: int) -> list[int]:
        return advance(answered(advance(feature(), seed), "it"), seed)["answer"]["active"]

    assert asked(0) == asked(0)
    assert len({tuple(asked(seed)) for seed in range(6)}) > 3


def test_a_judge_that_always_answers_none() -> None:
    judged = advance(answered(advance(answered(advance(feature()), "x")), "None"))["judged"]
    assert judged["accuracy"] == pytest.approx(10 / 14)
    assert judged["balanced_accuracy"] == 0.5
    assert judged["judge"] == "judge"


def test_a_judge_that_knows_and_one_that_is_always_wrong() -> None:
    second = advance(answered(advance(feature()), "x"))
    active = set(second["answer"]["active"])
    right = advance(answered(second, ", ".join(map(str, sorted(active)))))
    wrong = advance(answered(second, " ".join(str(n) for n in range(1, 15) if n not in active)))
    for record, score in ((right, 1.0), (wrong, 0.0)):
        assert record["judged"]["accuracy"] == record["judged"]["balanced_accuracy"] == score
        assert record["id"] == "saes/x/7"
        assert not {"prompt", "answer", "task", "completion"} & record.keys()
        assert advance(record) == record


def test_scores_in_numbers() -> None:
    found = accuracies({1, 2, 3, 4}, {1, 2, 3, 9, 10}, 14)
    assert found["accuracy"] == pytest.approx((3 + 8) / 14)
    assert found["balanced_accuracy"] == pytest.approx((3 / 4 + 8 / 10) / 2)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1, 4,14", {1, 4, 14}),
        ("3", {3}),
        ("2 and 5", {2, 5}),
        ("1, 2, and 3.", {1, 2, 3}),
        ("[1, 2]", {1, 2}),
        ("Answer: 7, 7", {7}),
        ("**None**", set()),
        ("none of them.", set()),
        ("Let me see.\n\n4, 5\nbecause 9 of them", {4, 5}),
        ("0, 1", None),
        ("15", None),
        ("", None),
        ("The 3 windows are alike", None),
        ("None but 3", None),
        ("1-3", None),
        ("<think>3, or\n4?</think>\n5", {5}),
        ("<think>\n4", None),
        ("²", None),
    ],
)
def test_answers_are_lists_of_numbers_or_none(text: str, numbers: set[int] | None) -> None:
    assert read_numbers(text, 14) == numbers


def test_runs_are_marked_together_and_stay_on_one_line() -> None:
    found = excerpt(
        {
            "tokens": ["a", "b", "c\n", "d", "e", "f"],
            "masked": [False, True, True, True, False, False],
            "activations": [0.5, 0.5, 0.4, 0.0, 0.0, 0.9],
        },
        lowest=0.1,
    )
    assert found == "<<a>>[[<<bc >>d]]e<<f>>"


def test_features_that_cannot_be_judged_say_why() -> None:
    with pytest.raises(DataError, match="never active"):
        advance(feature(0, 0))
    first = advance(feature())
    with pytest.raises(DataError, match="gave no explanation"):
        advance(answered(first, " \n"))
    with pytest.raises(DataError, match="4 active and 0 inactive windows: too few"):
        advance(answered(advance(feature(inactive=0)), "it"))
    with pytest.raises(DataError, match="no list of numbers up to 14"):
        advance(answered(advance(answered(first, "it")), "I cannot say"))
    with pytest.raises(DataError, match="'completion' is missing"):
        advance(first)
    with pytest.raises(DataError, match="'windows' is missing"):
        advance(Record(prompt="2+2"))
    with pytest.raises(DataError, match="field 'max' is missing"):
        advance(Record({k: v for k, v in feature().items() if k != "max"}))


def test_few_windows_are_shared_between_the_two_prompts() -> None:
    first = advance(feature(top=3, weighted=1))
    assert len(excerpts(first["prompt"])) == 3
    assert first["asked"]["weighted"] == []
    assert len(advance(answered(first, "it"))["answer"]["active"]) == 1
    alone = advance(feature(top=1, weighted=0))
    assert alone["task"] == EXPLAIN
