"""Completions that a run keeps: which ones, how many, and after it resumed."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from conftest import invoke

from dlmctl.records.jsonl import Record
from dlmctl.rl.kept_samples import MOST, KeptSamples
from dlmctl.train.run_directory import SAMPLES, forget_steps


def groups(prompts: int, samples: int) -> list[list[Record]]:
    return [[Record(id=f"p{p}", sample=s) for s in range(samples)] for p in range(prompts)]


def kept(directory: Path) -> list[dict]:
    return [orjson.loads(line) for line in (directory / SAMPLES).read_bytes().splitlines()]


def test_completions_are_of_as_many_prompts_as_there_are(tmp_path: Path) -> None:
    KeptSamples(tmp_path, 1, 5).offer(groups(3, 4), 7, None)
    assert [(row["step"], row["id"], row["sample"]) for row in kept(tmp_path)] == [
        (7, "p0", 0),
        (7, "p1", 0),
        (7, "p2", 0),
        (7, "p0", 1),
        (7, "p1", 1),
    ]


def test_of_a_round_only_the_first_batch_is_kept(tmp_path: Path) -> None:
    samples = KeptSamples(tmp_path, 2, 1)
    for step in range(12):
        samples.offer(groups(1, 1), step + 1, step // 3)
    assert [(row["round"], row["step"]) for row in kept(tmp_path)] == [(0, 1), (2, 7)]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("stops", [[], [5, 100, 101, 300]])
def test_a_long_run_keeps_few_over_its_whole_length(
    every: int, stops: list[int], tmp_path: Path
) -> None:
    samples, last = KeptSamples(tmp_path, every, 2), 1000 * every
    for number in range(last):
        if number in stops:  # a process was killed: its last rounds are taken again
            forget_steps(tmp_path / SAMPLES, number - 3)
            samples = KeptSamples(tmp_path, every, 2)
            for again in range(number - 3, number):
                samples.offer(groups(2, 2), again + 1, again)
        samples.offer(groups(2, 2), number + 1, number)
        assert len(kept(tmp_path)) <= 2 * MOST if number % 97 == 0 else True
    rounds = [row["round"] for row in kept(tmp_path)]
    distance = rounds[2] - rounds[0]
    assert distance == every * 32
    assert rounds == [n for n in range(0, last, distance) for _ in range(2)]


@pytest.mark.parametrize("text", ["10", "0:4", "4:0", "a:b", "-1:2", "1:2:3"])
def test_another_form_is_refused(text: str, tmp_path: Path) -> None:
    done = invoke("update", "none.jsonl", "--keep-samples", text, "-o", tmp_path / "a")
    assert done.exit_code == 2
    assert "is not N:K" in done.stderr


def test_rows_of_preferences_are_no_samples(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "1", "chosen": "2", "rejected": "3"}\n')
    options = ["--algo", "vrpo", "--keep-samples", "1:1"]
    done = invoke("update", pairs, *options, "-o", tmp_path / "a")
    assert done.exit_code == 2
    assert f"were sampled: {pairs}:1" in done.stderr
    assert not (tmp_path / "a").exists()


def test_answers_of_a_data_set_are_no_samples(tmp_path: Path) -> None:
    options = ["--algo", "sft", "--keep-samples", "1:1"]
    done = invoke("update", "none.jsonl", *options, "-o", tmp_path / "a")
    assert done.exit_code == 2
    assert "that were sampled" in done.stderr
