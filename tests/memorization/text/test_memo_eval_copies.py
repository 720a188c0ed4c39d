"""`memo-eval copies`: figures by hand and by sets of n-grams, units, held-out texts, complaints."""

from __future__ import annotations

import random
from pathlib import Path

import orjson
import pytest
from conftest import invoke, read_jsonl


def written(path: Path, texts: list[str], key: str = "text") -> Path:
    rows = [{"id": f"{path.stem}{n}", key: text} for n, text in enumerate(texts)]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def measured(*options) -> dict:
    done = invoke("memo-eval", "copies", "--json", *options)
    assert done.exit_code == 0, done.stderr
    return {**orjson.loads(done.stdout), "stderr": done.stderr}


def refused(code: int, *options) -> str:
    done = invoke("memo-eval", "copies", *options)
    assert (done.exit_code, done.stdout) == (code, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


TRAIN = ["The cat sat on the mat.", "A dog, a bird and a fish."]
HELDOUT = ["The hen sat in a tree.", "No dog ran."]
TEXTS = ["Why? The cat sat on a mat.", "Nothing here!"]


@pytest.fixture
def sets(tmp_path) -> list[Path]:
    kinds = {"train": (TRAIN, "text"), "heldout": (HELDOUT, "text"), "own": (TEXTS, "completion")}
    return [written(tmp_path / f"{name}.jsonl", *kind) for name, kind in kinds.items()]


def test_words_by_hand(sets, tmp_path):
    train, heldout, own = sets
    rows = tmp_path / "rows.jsonl"
    row = measured(
        "--train", train, "--heldout", heldout, "--least", "4", "--ngrams", "1,2,9",
        "--rows", rows, own,
    )  # fmt: skip
    assert (row["unit"], row["least"], row["texts"], row["texts_units"]) == ("word", 4, 2, 12)
    assert (row["train"], row["train_units"], row["heldout_units"]) == (2, 16, 11)
    # Of the first text "The cat sat on", of the second nothing.
    assert (row["longest"], row["longest_max"], row["copied"]) == (2, 4, 0.5)
    assert row["longest_p95"] == pytest.approx(3.8)
    # New are Why, ?, and the second text; of the pairs "Why ?", "? The", "on a", "a mat" and two.
    assert row["novel_1"] == pytest.approx(5 / 12)
    assert row["novel_2"] == pytest.approx(6 / 10)
    assert row["novel_9"] == 1
    assert (row["heldout_longest_max"], row["heldout_copied"]) == (1, 0)
    first, second = read_jsonl(rows)
    assert first == {
        "id": "own0", "units": 9, "longest": 4, "match": "The cat sat on", "start": 2,
        "source": "train0", "source_start": 0, "heldout_longest": 1, "heldout_match": "The",
        "heldout_start": 2, "heldout_source": "heldout0", "heldout_source_start": 0,
    }  # fmt: skip
    assert second == {
        "id": "own1", "units": 3, "longest": 0, "match": "", "heldout_longest": 0,
        "heldout_match": "",
    }  # fmt: skip


def test_novelty_is_that_of_sets_of_ngrams(tmp_path):
    draw = random.Random(0)

    def some(count: int) -> list[str]:
        return ["".join(draw.choices("ab", k=draw.randrange(20))) for _ in range(count)]

    texts, corpora = some(10), {"": some(3), "heldout_": some(3)}
    train, heldout = (written(tmp_path / f"c{n}", c) for n, c in enumerate(corpora.values()))
    curve = tmp_path / "curve.jsonl"
    orders = [1, 2, 3, 4, 5, 6, 8, 18, 30]
    row = measured(
        "--train", train, "--heldout", heldout, "--unit", "character", "--set", "role=student",
        "--ngrams", ",".join(map(str, orders)), "--novelty", curve, written(tmp_path / "t", texts),
    )  # fmt: skip
    values = []
    for prefix, corpus in corpora.items():
        for n in orders:
            known = {d[i : i + n] for d in corpus for i in range(len(d) - n + 1)}
            grams = [t[i : i + n] for t in texts for i in range(len(t) - n + 1)]
            expected = sum(gram not in known for gram in grams) / len(grams) if grams else None
            assert row[f"{prefix}novel_{n}"] == pytest.approx(expected)
            values.append(row[f"{prefix}novel_{n}"])
    assert 0 < row["novel_4"] < 1 == row["novel_18"]
    assert row["novel_30"] is None
    assert row["role"] == "student"
    assert read_jsonl(curve) == [
        {"role": "student", "set": name, "n": n, "novel": value}
        for (name, n), value in zip(
            [(name, n) for name in ("train", "heldout") for n in orders], values, strict=True
        )
    ]
    picture = tmp_path / "novel.png"
    done = invoke("plot", curve, "-x", "n", "-y", "novel", "--by", "role,set", "-o", picture)
    assert done.exit_code == 0, done.stderr


def test_tokens_are_those_of_the_model(tmp_path):
    """Of the model that comes along a token is a character."""
    train = written(tmp_path / "train", ["1+2=3*45", "(7-6)/5"])
    own = written(tmp_path / "own", ["9+2=3*", "(7-6)*5"])
    rows = tmp_path / "rows.jsonl"
    by_token = measured("--train", train, "-m", "builtin:puzzles", "--rows", rows, own)
    assert [row["match"] for row in read_jsonl(rows)] == ["+2=3*", "(7-6)"]
    assert (by_token.pop("unit"), by_token.pop("model")) == ("token", "builtin:puzzles")
    options = ("-m", "builtin:puzzles", "--unit", "character")
    by_character = measured("--train", train, *options, own)
    assert by_character.pop("unit") == "character"
    assert by_token == by_character


def test_a_longer_held_out_set_is_cut_and_a_shorter_one_refused(sets, tmp_path):
    train, heldout, own = sets
    longer = written(tmp_path / "longer", [*HELDOUT, *TEXTS])
    cut = measured("--train", train, "--heldout", longer, own)
    assert "--heldout is cut from 4 to 2 texts" in cut.pop("stderr")
    whole = measured("--train", train, "--heldout", heldout, own)
    assert whole.pop("stderr") == ""
    assert whole == cut
    same = measured("--train", train, "--heldout", train, own)
    assert "2 of the held-out texts are in --train" in same["stderr"]
    assert same["novel_2"] == same["heldout_novel_2"]
    short = written(tmp_path / "short", HELDOUT[:1])
    assert "--heldout has 1 texts and --train 2" in refused(
        2, "--train", train, "--heldout", short, own
    )


def test_what_cannot_be_used_is_named(sets, tmp_path):
    train, _, own = sets
    empty, other = tmp_path / "empty", written(tmp_path / "other", TEXTS, "answer")
    empty.write_bytes(b"")
    assert "--train has no texts" in refused(2, "--train", empty, own)
    assert "the input has no texts" in refused(2, "--train", train, empty)
    assert "other:1: the record has no text" in refused(65, "--train", train, other)
    assert "--unit token needs" in refused(2, "--train", train, "--unit", "token", own)
    assert "--ngrams 0 is not" in refused(2, "--train", train, "--ngrams", "0", own)
    assert "--set unit=…" in refused(2, "--train", train, "--set", "unit=1", own)
    said = refused(65, "--train", train, "-m", "builtin:puzzles", own)
    assert f"{train}:1: builtin:puzzles has no tokens" in said


def test_faulty_records_are_skipped_or_kept_beside_the_rows(sets, tmp_path):
    train, _, own = sets
    mixed, rows = tmp_path / "mixed", tmp_path / "rows"
    mixed.write_bytes(b'{"id":"bad"}\n' + own.read_bytes())
    plain = measured("--train", train, own)
    skipped = measured("--train", train, "--on-error", "skip", mixed)
    assert "mixed:1" in skipped.pop("stderr")
    assert skipped == {name: value for name, value in plain.items() if name != "stderr"}
    measured("--train", train, "--on-error", "keep", "--rows", rows, mixed)
    assert [row["id"] for row in read_jsonl(rows)] == ["own0", "own1", "bad"]
    assert "no text" in read_jsonl(rows)[2]["error"]["message"]
    nowhere = measured("--train", train, "--on-error", "keep", mixed)
    assert "mixed:1: the record has no text" in nowhere["stderr"]
