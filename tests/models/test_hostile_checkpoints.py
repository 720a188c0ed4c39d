"""What a checkpoint names is not run, and names that go in a circle end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dlmctl.models.architecture import architecture
from dlmctl.models.loading import load_policy
from dlmctl.models.special_tokens import load_tokenizer
from dlmctl.models.token_text import tokenizer_of_model
from dlmctl.records.errors import DataError


def adapter(directory: Path, **settings: object) -> str:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    (directory / "adapter_model.safetensors").write_bytes(b"")
    return str(directory)


def test_an_adapter_that_is_its_own_base_is_refused(tmp_path):
    name = adapter(tmp_path / "a", base_model_name_or_path=str(tmp_path / "a"))
    for read in (load_policy, tokenizer_of_model):
        with pytest.raises(DataError, match="is an adapter on itself"):
            read(name)


@pytest.mark.parametrize("base", [5, ["x"], "", "a\0b", None])
def test_an_adapter_without_a_base_is_refused(tmp_path, base):
    name = adapter(tmp_path / "a", base_model_name_or_path=base)
    for read in (load_policy, tokenizer_of_model):
        with pytest.raises(DataError, match="does not name its base model"):
            read(name)


def test_an_adapter_does_not_choose_what_is_imported(tmp_path, monkeypatch):
    (tmp_path / "touched.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    name = adapter(
        tmp_path / "a",
        base_model_name_or_path="builtin:puzzles",
        megatron_config={"tensor_model_parallel_size": 1},
        megatron_core="touched",
        target_modules=["q_proj"],
    )
    with pytest.raises(DataError, match="Megatron"):
        load_policy(name, "cpu", "float32")


def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "own.py").write_text("raise SystemExit('imported')")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"})
    )
    raw = {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(DataError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path, architecture(raw, "config.json"))
    assert "y/N" not in capsys.readouterr().out


@pytest.mark.parametrize("place", ["num_hidden_layers", "text_config"])
def test_layers_without_end_are_refused_before_anything_is_made_of_them(place):
    value = 10**9 if place != "text_config" else {"num_hidden_layers": 10**9}
    with pytest.raises(DataError, match="more than any model has"):
        architecture({"model_type": "qwen2", place: value}, "config.json")
