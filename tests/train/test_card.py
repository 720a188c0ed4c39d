"""Cards of checkpoints: the hub's own reader takes them, they are true, and their code runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from conftest import invoke, read_jsonl
from huggingface_hub import ModelCard

from dlmctl.models.loading import load_policy
from dlmctl.train.card import Card, base_model, card_text, last_metrics, told_metrics
from dlmctl.train.run_directory import latest_checkpoint


def _blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)


def _run(code: str, directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(code.replace("DIRECTORY", str(directory)), found)
    return found


def _rows(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.*?) \| (.*) \|$", text, re.MULTILINE))


def _update(model: str, run: Path, *options: str) -> Path:
    data = run.with_suffix(".jsonl")
    assert invoke("prompts", "sudoku", "-n", "4", "--completions", "-o", data).exit_code == 0
    line = ("--algo", "sft", "-m", model, "-o", run, "--prompts-per-step", "2", *options, data)
    done = invoke("update", *line)
    assert done.exit_code == 0, done.output
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


def test_the_card_of_a_model_says_what_was_done_and_how_it_is_loaded(
    tmp_path: Path, saved_models: Callable[[str], str]
) -> None:
    model = saved_models("llada")
    checkpoint = _update(model, tmp_path / "run", "--lr", "0.001", "--seed", "7")
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None  # a directory is no name of the hub
    assert card.data.license is None
    assert {"dlmctl", "sft", "diffusion-language-model"} <= set(card.data.tags)
    rows, last = _rows(card.text), read_jsonl(tmp_path / "run/metrics.jsonl")[-1]
    assert (rows["steps"], rows["seed"], rows["rate"]) == ("2", "7", "0.001")
    assert float(rows["loss"]) == pytest.approx(last["loss"], rel=1e-5)
    assert not {"seconds", "peak_memory_mb", "run"} & rows.keys()
    assert model in card.text
    ours, theirs = (_run(code, checkpoint) for code in _blocks(card.text))
    ids = torch.tensor([[3, 4, 2, 2]])
    with torch.no_grad():
        expected = load_policy(str(checkpoint)).model(input_ids=ids).logits
        assert torch.equal(ours["policy"].model(input_ids=ids).logits, expected)
        assert torch.equal(theirs["model"](input_ids=ids).logits, expected)


def test_the_card_of_an_adapter_is_ours_and_not_the_one_of_peft(
    tmp_path: Path, saved_models: Callable[[str], str]
) -> None:
    pytest.importorskip("peft")
    checkpoint = _update(saved_models("llada"), tmp_path / "run", "--lora-rank", "2")
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.library_name == "peft"
    assert "lora" in card.data.tags
    assert _rows(card.text)["LoRA rank"] == "2"
    [ours] = _blocks(card.text)
    assert hasattr(_run(ours, checkpoint)["policy"].model, "peft_config")
    targets = orjson.loads((checkpoint / "adapter_config.json").read_bytes())["target_modules"]
    assert targets == sorted(targets)  # as a set, they would differ from process to process


def test_the_same_run_elsewhere_writes_the_same_card(
    tmp_path: Path, saved_models: Callable[[str], str]
) -> None:
    made = [_update(saved_models("mlm"), tmp_path / place) for place in ("here", "there")]
    texts = [(checkpoint / "README.md").read_bytes() for checkpoint in made]
    assert texts[0] == texts[1]
    assert str(tmp_path).encode() not in texts[0]


def test_the_base_is_what_a_chain_of_runs_began_with(tmp_path: Path) -> None:
    for name, reference in (("a", "GSAI-ML/LLaDA-8B-Base@main"), ("b", str(tmp_path / "a"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dlmctl.json").write_bytes(orjson.dumps({"reference": reference}))
    assert base_model(str(tmp_path / "b")) == "GSAI-ML/LLaDA-8B-Base"
    assert base_model("gpt2") == "gpt2"
    for local in ("builtin:puzzles", "/somewhere/else", str(tmp_path), "optimal:builtin:digits"):
        assert base_model(local) is None
    (tmp_path / "a/dlmctl.json").write_bytes(orjson.dumps({"reference": str(tmp_path / "b")}))
    assert base_model(str(tmp_path / "b")) is None  # a circle has no beginning


def test_a_card_of_awkward_values_is_read_as_it_was_meant() -> None:
    card = Card(
        title="t",
        summary="s",
        library="dlmctl",
        base="org/a-name",
        tags=["yes", "a: b", "1"],
        settings={"task": "a|b\nc", "none": None, "on": True, "levels": (0.0, 0.25)},
        metrics={"loss": float("nan")},
    )
    text = card_text(card)
    read = ModelCard(text)
    assert read.data.tags == ["dlmctl", "yes", "a: b", "1"]
    assert read.data.base_model == "org/a-name"
    assert _rows(text) == {
        "option": "value",
        "---": "---",
        "task": r"a\|b c",
        "on": "yes",
        "levels": "0, 0.25",
        "measure": "value",
        "loss": "nan",
    }


def test_the_last_metrics_are_those_of_the_line_asked_for(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    assert last_metrics(log, step=1) == {}
    log.write_text('{"k":1,"step":1}\n{"k":2,"step":1}\n{"k":1,"step":2}\n{"k":2,"ste')
    assert last_metrics(log, k=2) == {"k": 2, "step": 1}
    assert last_metrics(log, k=1) == {"k": 1, "step": 2}
    assert last_metrics(log, k=3) == {}
    assert told_metrics({"loss": 1, "seconds": 2, "applied": True, "algo": "sft"}) == {"loss": 1}
