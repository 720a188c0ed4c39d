"""`memo-eval text` on a model that was taught some texts, and on what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import orjson
import pytest
from conftest import invoke, read_jsonl, tiny_policy

from dlmctl.models.saving import save_policy

TAUGHT = ["0123401234", "4433221100", "0011223344"]
UNSEEN = ["3210432104", "1402314023", "2244113300"]


def written(path: Path, texts: list[str], key: str = "completion") -> str:
    rows = [{"id": f"t{n}", "prompt": "=", key: text} for n, text in enumerate(texts)]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def parrot(tmp_path_factory) -> str:
    """A small diffusion model that has seen three texts, and nothing else, hundreds of times."""
    place = tmp_path_factory.mktemp("parrot")
    policy = tiny_policy()
    policy.model.float()
    save_policy(policy, place / "new")
    source = written(place / "texts.jsonl", TAUGHT * 300)
    line = "-q --algo sft --lr 2e-3 -k 8 --weight-decay 0 --prompts-per-step 3 --device cpu"
    for _ in range(3):
        done = invoke("update", *line.split(), "-m", place / "new", "-o", place / "run", source)
        assert done.exit_code == 0, done.output
    return str(place / "run")


def asked(*options, model) -> list[dict]:
    done = invoke("memo-eval", "text", "--json", "--device", "cpu", "-m", model, *options)
    assert done.exit_code == 0, done.output
    return [orjson.loads(line) for line in done.stdout.splitlines()]


def test_what_was_taught_is_given_back_and_what_was_not_is_not(parrot, tmp_path):
    taught, unseen = written(tmp_path / "a", TAUGHT), written(tmp_path / "b", UNSEEN)
    rows = asked(
        "--mode", "prefix,suffix,edge", "--steps", "1,5", "--heldout", unseen, taught, model=parrot
    )
    assert [(row["mode"], row["steps"]) for row in rows] == [
        (mode, steps) for mode in ("prefix", "suffix", "edge") for steps in (1, 5)
    ]
    for row in rows:
        assert row["exact"] == row["extractable"] == row["right_tokens"] == 1
        assert row["heldout_exact"] == 0
        assert row["edit_distance"] == 0 < row["heldout_edit_distance"]
        assert row["near_bleu"] == row["bleu"] == 1 > row["heldout_bleu"]
        assert row["heldout_near_bleu"] == 0
        assert row["common_run"] == 5 > row["heldout_common_run"]
        assert row["log_prob_per_token"] > row["heldout_log_prob_per_token"] + 1


def test_a_row_for_each_text_adds_up_to_the_summary(parrot, tmp_path):
    source = written(tmp_path / "texts.jsonl", TAUGHT + UNSEEN, "text")
    target = tmp_path / "rows.jsonl"
    [summary] = asked("--steps", "2", "-p", "0.9", "--rows", target, source, model=parrot)
    rows = read_jsonl(target)
    assert [row["id"] for row in rows] == [f"t{n}" for n in range(6)]
    assert summary["texts"] == len(rows) == 6
    shares = ("extractable", "exact", "near", "near_bleu", "right_tokens")
    for name in (*shares, "edit_distance", "bleu", "common_run"):
        assert summary[name] == pytest.approx(sum(row[name] for row in rows) / 6)
    for row in rows:
        chance = 1 - (1 - math.exp(row["log_prob"])) ** 100
        assert row["extractable"] == (chance >= 0.9) == ((row["samples_needed"] or 1e9) <= 100)
        assert row["asked"] == 5
        assert row["near_bleu"] == (row["bleu"] >= 0.75)
        assert row["exact"] == (row["bleu"] == 1) == (row["common_run"] == 5)


def test_the_order_of_confidence_is_one_path(parrot, tmp_path):
    source, target = written(tmp_path / "texts.jsonl", UNSEEN), tmp_path / "rows.jsonl"
    asked("--steps", "5", "--orders", "0", "--rows", target, source, model=parrot)
    assert all(row["relative_error"] is None for row in read_jsonl(target))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--mode", "prefix,middle"], 2, "--mode middle"),
        (["-p", "1"], 2, "-p 1 is not between"),
        (["--steps", "0"], 2, "--steps 0"),
    ],
)
def test_wrong_options_are_one_line(parrot, tmp_path, options, code, message):
    source = written(tmp_path / "texts.jsonl", TAUGHT)
    done = invoke("memo-eval", "text", "-m", parrot, *options, source)
    assert (done.exit_code, message in done.stderr) == (code, True), done.stderr


def test_records_and_models_that_cannot_be_asked_are_named(parrot, tmp_path, saved_models):
    short = written(tmp_path / "short.jsonl", ["1"])
    done = invoke("memo-eval", "text", "-m", parrot, short)
    assert (done.exit_code, "short.jsonl:1: a text of two tokens" in done.stderr) == (65, True)
    empty = written(tmp_path / "empty.jsonl", ["1"], "other")
    done = invoke("memo-eval", "text", "-m", parrot, empty)
    assert (done.exit_code, "empty.jsonl:1: the record has no text" in done.stderr) == (65, True)
    source = written(tmp_path / "texts.jsonl", TAUGHT)
    done = invoke("memo-eval", "text", "-m", saved_models("ar"), "--mode", "edge", source)
    assert (done.exit_code, "--mode prefix is all" in done.stderr) == (2, True)
    done = invoke("memo-eval", "text", "-m", saved_models("ar"), "--json", source)
    assert done.exit_code == 0
    assert orjson.loads(done.stdout)["steps"] is None


BROKEN = [b"{", b'{"id": "a", "prompt": "="}', b'{"id": "b", "prompt": "=", "completion": "?1"}']
SAID = ["not JSON", "the record has no text", "has no tokens for '?1'"]


def test_faulty_records_are_refused_skipped_or_kept_beside_the_rows(parrot, tmp_path):
    source, mixed, rows = (tmp_path / name for name in ("t.jsonl", "mixed.jsonl", "rows.jsonl"))
    written(source, TAUGHT)
    mixed.write_bytes(b"\n".join([*BROKEN, source.read_bytes()]))
    for number, said in enumerate(SAID):
        (tmp_path / "one.jsonl").write_bytes(BROKEN[number])
        done = invoke("memo-eval", "text", "-m", parrot, "--steps", "1", tmp_path / "one.jsonl")
        assert done.exit_code == 65
        assert "one.jsonl:1: " in done.stderr
        assert said in done.stderr
    line = ["memo-eval", "text", "--json", "-m", parrot, "--steps", "1", "--heldout", mixed]
    plain = invoke(*line[:-1], source, source)
    for options in (["--on-error", "skip"], ["--on-error", "keep"]):  # nothing could keep them
        done = invoke(*line, *options, mixed)
        assert done.exit_code == 0, done.output
        assert done.stdout == plain.stdout
        for number, said in enumerate(SAID, start=1):
            assert f"skipped: {mixed}:{number}: " in done.stderr
            assert said in done.stderr
    done = invoke(*line, "--on-error", "keep", "--rows", rows, mixed)
    assert done.stdout == plain.stdout
    written_rows = read_jsonl(rows)
    assert [row["set"] for row in written_rows[:6]] == ["train"] * 3 + ["heldout"] * 3
    errors = [row["error"] for row in written_rows[6:]]
    assert [error["where"] for error in errors] == [f"{mixed}:{n}" for n in (1, 2, 3)] * 2
