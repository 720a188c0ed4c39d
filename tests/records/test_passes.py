"""Records over and over in mixed orders: orders, bounded memory, and runs that resume in them."""

from __future__ import annotations

import random
from collections import Counter
from itertools import count, islice, permutations
from pathlib import Path

import orjson
import pytest
from conftest import invoke
from safetensors.torch import load_file

from dlmctl.records.errors import UsageError
from dlmctl.records.passes import read_passes, shuffled


@pytest.mark.parametrize("window", [3, 4, 50])
def test_a_window_of_all_items_gives_every_order_the_same_chance(window):
    orders = Counter(tuple(shuffled("abc", window, random.Random(seed))) for seed in range(6000))
    assert set(orders) == set(permutations("abc"))
    assert all(850 < number < 1150 for number in orders.values())  # 5 sd of 1000 are 144


@pytest.mark.parametrize("window", [1, 2, 7])
def test_no_more_is_read_than_the_window_holds(window):
    source = count()
    first = list(islice(shuffled(source, window, random.Random(0)), 10))
    assert next(source) == 10 + window - 1
    assert all(item < place + window for place, item in enumerate(first))
    assert (first == list(range(10))) == (window == 1)


def records(path: Path, many: int) -> Path:
    lines = [
        orjson.dumps({"id": str(n), "prompt": f"{n}+1=", "completion": f"{n + 1}"})
        for n in range(many)
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_every_epoch_has_all_records_in_an_order_of_its_own(tmp_path):
    files = [str(records(tmp_path / "a.jsonl", 5)), str(records(tmp_path / "b.jsonl", 4))]

    def places(epochs: int, window: int, seed: int = 0) -> list[str]:
        found = read_passes(files, "fail", epochs, window, seed)
        return [each.where.rpartition("/")[2] for each in found]

    plain = places(1, 1)
    assert plain == [f"a.jsonl:{n}" for n in range(1, 6)] + [f"b.jsonl:{n}" for n in range(1, 5)]
    assert places(2, 1) == 2 * plain
    mixed = places(2, 100)
    first, second = mixed[:9], mixed[9:]
    assert sorted(first) == sorted(second) == sorted(plain)
    assert first != second != plain != first
    assert mixed == places(2, 100) != places(2, 100, seed=1)
    assert places(1, 100) == first  # what a run has trained on when it is given more epochs


def test_what_can_be_read_once_is_refused(tmp_path):
    for files, named in (
        ([], "standard input"),
        (["-"], "standard input"),
        (["/dev/null"], "null"),
    ):
        with pytest.raises(UsageError, match=f"--epochs 2 needs files, and .*{named}"):
            read_passes(files, "fail", 2, 1, 0)


def train(model: str, run: Path, source: Path, *options: str) -> list[dict]:
    done = invoke(
        "update", "--algo", "sft", "-q", "-m", model, "-o", run, "--device", "cpu",
        "--prompts-per-step", 3, "--fill-to", 6, "--lr", 1e-2, *options, source,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return [orjson.loads(line) for line in done.stdout.splitlines()]


def test_a_run_resumes_in_the_second_epoch(tmp_path, saved_models):
    """One epoch, then the second with --resume, is the same as both at once."""
    source, model = records(tmp_path / "r.jsonl", 9), saved_models("llada")
    mixed = ["--shuffle", "4"]
    whole = train(model, tmp_path / "whole", source, "--epochs", "2", *mixed)
    assert len(whole) == 6
    parts = train(model, tmp_path / "parts", source, *mixed)
    parts += train(model, tmp_path / "parts", source, "--epochs", "2", "--resume", *mixed)
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    one, two = (
        load_file(tmp_path / name / "latest" / "model.safetensors") for name in ("whole", "parts")
    )
    assert all(one[name].equal(two[name]) for name in one)
    plain = train(model, tmp_path / "plain", source)
    assert [row["loss"] for row in plain] != [row["loss"] for row in whole[:3]]


def test_groups_are_not_mixed(tmp_path):
    done = invoke("update", "--algo", "rspo", "--shuffle", 9, records(tmp_path / "r.jsonl", 2))
    assert done.exit_code == 2
    assert "--epochs and --shuffle are for --algo sft" in done.stderr


def test_a_student_is_distilled_in_several_epochs(tmp_path, saved_models):
    source = records(tmp_path / "r.jsonl", 4)
    options = "--records-per-step 2 --rounds 1 --steps-per-round 5 --fill-to 6 --device cpu -q"
    done = invoke(
        "distill", "masked", source, "-m", saved_models("llada"), "-o", tmp_path / "run",
        "--epochs", 3, "--shuffle", 4, *options.split(),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 5
    card = (tmp_path / "run" / "latest" / "README.md").read_text()
    assert "epochs" in card
    assert "shuffle" in card
