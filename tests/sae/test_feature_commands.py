"""`sae-features` and `sae-judge` as a user calls them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import Result
from conftest import read_jsonl
from small_world import random_sae, small_world
from typer.testing import CliRunner

from dlmctl.cli import app
from dlmctl.models.saving import save_new, save_policy
from dlmctl.models.small import make_policy
from dlmctl.models.tokenizers import byte_tokenizer
from dlmctl.sae.formats.folders import SavedSae, write_sae
from dlmctl.settings.small import SmallModel

KNOWN = {"dlm_layer": 1, "dlm_positions": "unmask", "dlm_t_min": 0.2, "dlm_t_max": 0.6}


def run(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small world on disk."""
    monkeypatch.chdir(tmp_path)
    world = small_world()
    save_policy(world.policy, Path("model"))
    write_sae(SavedSae(world.sae, {**KNOWN, "model_name": "model"}), Path("sae"))
    Path("corpus.jsonl").write_bytes(b"\n".join(map(orjson.dumps, world.records)))
    return tmp_path


def test_what_the_autoencoder_is_for_is_the_default(place: Path) -> None:
    done = run("sae-features", "sae", "corpus.jsonl", "--features", "all", "-o", "out.jsonl")
    assert done.exit_code == 0, done.output
    assert "60 documents" in done.stderr
    records = read_jsonl(place / "out.jsonl")
    assert {(r["layer"], r["positions"], *r["t"]) for r in records} == {(1, "unmask", 0.2, 0.6)}
    for record in records:
        for window in record["windows"]["top"]:
            assert not window["masked"][window["middle"]]
            assert 0.2 <= window["t"] <= 0.6
    once = (place / "out.jsonl").read_bytes()
    run("sae-features", "sae", "corpus.jsonl", "--features", "all", "-o", "out.jsonl")
    assert (place / "out.jsonl").read_bytes() == once


def test_clean_text_has_no_masks_and_no_profile_over_t(place: Path) -> None:
    words = ["--positions", "clean", "--features", "top:3", "--html", "page.html", "--delphi", "d"]
    words += ["--neuronpedia", "exports/small/1-clean"]
    done = run("sae-features", "sae", "corpus.jsonl", *words, "-o", "out.jsonl")
    assert done.exit_code == 0, done.output
    records = read_jsonl(place / "out.jsonl")
    assert len(records) == 3
    assert [r["active"] for r in records] == sorted((r["active"] for r in records), reverse=True)
    assert {r["t"] for r in records} == {r["time_profile"] for r in records} == {None}
    assert not any(any(w["masked"]) for r in records for ws in r["windows"].values() for w in ws)
    assert "text in which nothing is masked" in Path("page.html").read_text()
    assert len(list(Path("d/model.layers.1").glob("*.safetensors"))) == 5
    exported = gzip.decompress(Path("exports/small/1-clean/features/batch-0.jsonl.gz").read_bytes())
    indices = [orjson.loads(line)["index"] for line in exported.splitlines()]
    assert indices == [str(record["feature"]) for record in records]
    again = run("sae-features", "sae", "corpus.jsonl", *words)
    assert again.exit_code == 73
    assert "not empty" in again.stderr


def test_what_does_not_fit_is_refused(place: Path, saved_models: Any) -> None:
    def refused(*words: Any) -> str:
        done = run("sae-features", "sae", "corpus.jsonl", *words)
        assert done.exit_code == 2, done.output
        return done.stderr

    assert "no layer 5" in refused("--layer", 5)
    assert "features 0 to 39" in refused("--features", 40)
    assert "is autoregressive" in refused("-m", saved_models("ar"), "--positions", "mask")
    assert "levels from 0.9" in refused("--t", "0.9-0.6")
    write_sae(SavedSae(random_sae(), {"model_name": "model"}), Path("sae"))
    assert "give --layer" in refused()
    write_sae(SavedSae(random_sae(), {**KNOWN, "dlm_positions": "odd"}), Path("sae"))
    assert "'odd': give --positions" in refused("-m", "model")
    write_sae(SavedSae(random_sae(width=8), KNOWN), Path("sae"))
    assert "of width 8" in refused("-m", "model")


def answer(source: str, target: str, text: str) -> None:
    records = [{**record, "completion": text} for record in read_jsonl(Path(source))]
    Path(target).write_bytes(b"\n".join(map(orjson.dumps, records)))


def test_records_go_round_twice_and_have_scores(place: Path) -> None:
    run("sae-features", "sae", "corpus.jsonl", "--features", "4,6,22", "-o", "features.jsonl")
    first = run("sae-judge", "features.jsonl", "-o", "explain.jsonl")
    assert "3 to be answered" in first.stderr
    answer("explain.jsonl", "explained.jsonl", "digits")
    second = run("sae-judge", "explained.jsonl", "-o", "detect.jsonl")
    assert "3 to be answered" in second.stderr
    answer("detect.jsonl", "detected.jsonl", "None")
    records = read_jsonl(place / "detected.jsonl")
    records[0]["completion"] = "What do you mean by 3?"
    Path("detected.jsonl").write_bytes(b"\n".join(map(orjson.dumps, records)))
    words = ["--html", "page.html", "--neuronpedia", "small/1-unmask", "-o", "scores.jsonl"]
    last = run("sae-judge", "detected.jsonl", *words)
    assert last.exit_code == 0, last.output
    assert "2 judged, accuracy 0." in last.stderr
    assert "balanced accuracy 0.500; 1 that could not be judged" in last.stderr
    scores = read_jsonl(place / "scores.jsonl")
    assert "no list of numbers" in scores[0]["error"]["message"]
    assert [record["explanation"] for record in scores] == ["digits"] * 3
    assert "not judged" in Path("page.html").read_text()
    exported = Path("small/1-unmask/explanations/batch-0.jsonl.gz").read_bytes()
    assert gzip.decompress(exported).count(b'"digits"') == 3
    failed = run("sae-judge", "detected.jsonl", "--on-error", "fail")
    assert failed.exit_code == 65
    assert "detected.jsonl:1" in failed.stderr


def test_a_model_here_can_be_the_judge(place: Path) -> None:
    """One of random weights, whose answers no one can read: the way there is what is tested."""
    save_new(make_policy(SmallModel("llada", 16, 1, 2), byte_tokenizer()), Path("judge"), False)
    run("sae-features", "sae", "corpus.jsonl", "--features", "top:2", "-o", "features.jsonl")
    done = run(
        *("sae-judge", "--judge", "judge", "--gen-length", 4, "features.jsonl"),
        *("-o", "scores.jsonl"),
    )
    assert done.exit_code == 0, done.output
    records = read_jsonl(place / "scores.jsonl")
    assert len(records) == 2
    assert all("judged" in record or "error" in record for record in records)
