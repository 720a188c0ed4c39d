"""`doctor --model` says without weights what loading finds with them, or refuses in its words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import orjson
import pytest
from conftest import invoke

from dlmctl.models.loading import load_policy
from dlmctl.plan.description import describe
from dlmctl.settings.families import Variant
from dlmctl.settings.optimizer import Adapter
from dlmctl.train.lora import add_adapter


def without_weights(model: str, place: Path, **fields: Any) -> Path:
    """A copy that has other fields in config.json and no weights."""
    copy = place / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | fields))
    return copy


def rows(result) -> dict[str, dict[str, str]]:
    return {row["name"]: row for row in map(orjson.loads, result.stdout.splitlines())}


@pytest.mark.parametrize("variant", get_args(Variant))
def test_it_says_what_loading_finds(saved_models, tmp_path, variant):
    policy = load_policy(saved_models(variant), "cpu", "float32")
    copy = without_weights(saved_models(variant), tmp_path)
    (copy / "model.safetensors").write_bytes(b"opened by nobody")
    traits = {trait.name: trait.detail for trait in describe(str(copy))}
    assert traits["family"].startswith(f"{policy.family}: ")
    assert traits["class"].startswith(f"{type(policy.model).__name__} of transformers")
    assert traits["parameters"] == f"{sum(p.numel() for p in policy.model.parameters()):,}"
    assert traits["stored as"] == "float32"
    assert traits["shift"].startswith(f"{policy.shift}: ")
    assert traits["chat template"].startswith("no")
    text = policy.tokenizer.convert_ids_to_tokens
    if policy.diffusion:
        assert traits["mask token"] == f"{policy.mask_id} {text(policy.mask_id)!r}"
        block = policy.blocks.length if policy.blocks else 16
        own = policy.model_family.sampling
        expected = f"gen_length 16 (its own), block_length {block}"
        expected += " (its own)" if "block_length" in own else ""
        expected += f", steps {own['steps']} (its own)" if "steps" in own else ", steps 16"
        others = sorted(own.keys() - {"gen_length", "block_length", "steps"})
        expected += "".join(f", {name} {own[name]} (its own)" for name in others)
        assert traits["sampler"] == expected
    else:
        assert "mask token" not in traits
        assert traits["sampler"] == "gen_length 16 (its own)"
    assert traits["end tokens"] == ", ".join(f"{i} {text(i)!r}" for i in sorted(policy.ends))
    pattern = policy.model_family.pattern or "as its class has it"
    assert traits["attention"] == pattern + (" of 4 tokens" if policy.blocks else "")
    assert "doubt" not in traits

    adapted = add_adapter(policy, Adapter(2)).model
    changed = [name for name, _ in adapted.named_modules() if name.endswith("lora_A.default")]
    counts = dict(part.rstrip(")").split(" (") for part in traits["LoRA"].split(", "))
    assert sum(map(int, counts.values())) == len(changed)
    assert {name.split(".")[-3] for name in changed} == counts.keys()


@pytest.mark.parametrize(
    ("family", "fields", "code"),
    [
        ("llada", {"dlmctl": None, "architectures": ["SomethingElse"]}, 65),
        ("ar", {"dlmctl": None, "mask_token_id": 2}, 65),
        ("a2d", {"dlmctl": None, "mask_token_id": 2, "block_size": 4}, 65),
        ("a2d", {"dlmctl": {"family": "a2d", "mask_token_id": 999}}, 65),
        ("a2d", {"dlmctl": {"family": "none"}}, 65),
        ("llada", {"hidden_size": "wide"}, 65),
    ],
)
def test_it_refuses_what_loading_refuses(saved_models, tmp_path, family, fields, code):
    copy = without_weights(saved_models(family), tmp_path, **fields)
    shutil.copy(Path(saved_models(family)) / "model.safetensors", copy)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "prompt": "1"}\n')
    loading = invoke("rollout", prompts, "-m", copy, "--raw")
    asked = invoke("doctor", "--model", copy)
    assert (loading.exit_code, asked.exit_code) == (code, code)
    assert asked.stderr == loading.stderr
    row = rows(asked)["model"]
    assert row["state"] == "broken"
    assert row["detail"] in loading.stderr


def test_what_is_not_there_and_a_hub_that_does_not_answer(tmp_path):
    asked = invoke("doctor", "-m", tmp_path / "none")
    assert (asked.exit_code, "no model at" in asked.stderr) == (66, True)
    asked = invoke("doctor", "-m", "nobody/nothing-of-this-name")
    assert (asked.exit_code, "the hub does not answer" in asked.stderr) == (75, True)
    assert rows(asked)["model"]["state"] == "broken"
    asked = invoke("doctor", "--family", "a2d")
    assert (asked.exit_code, "--model" in asked.stderr) == (2, True)


def test_settings_after_the_name_and_options_count(saved_models, tmp_path):
    copy = without_weights(saved_models("ar"), tmp_path)
    asked = rows(invoke("doctor", "-m", f"{copy},family=a2d", "--shift", 0, "--mask-id", 4))
    assert asked["family"]["detail"].startswith("a2d: ")
    assert asked["shift"]["detail"].startswith("0: ")
    assert asked["mask token"]["detail"].startswith("4 ")
    assert asked["torch"]["state"] == "ok"


def test_what_is_doubtful(saved_models, tmp_path):
    def doubts(**fields: Any) -> str:
        asked = invoke("doctor", "-m", without_weights(saved_models("ar"), tmp_path, **fields))
        assert asked.exit_code == 0, asked.output
        found = map(orjson.loads, asked.stdout.splitlines())
        return "\n".join(row["detail"] for row in found if row["state"] == "doubtful")

    assert "loading it would fail: " in doubts()  # no weights
    assert "attention" not in doubts()
    unknown = doubts(model_type="stablelm", is_causal=False, mask_token_id=2, dlmctl=None)
    assert "whether a StableLmForCausalLM attends in both directions" in unknown
    assert "quantized" in doubts(quantization_config={"quant_method": "awq"})
    assert "the model 10" in doubts(vocab_size=10)
    window = without_weights(saved_models("ar"), tmp_path, model_type="mistral", sliding_window=8)
    asked = rows(invoke("doctor", "-m", window))
    assert asked["attention"]["detail"] == "causal, in 2 of 2 layers within 8 tokens"


def test_of_an_adapter_its_base_model_is_described(saved_models, tmp_path):
    from dlmctl.models.saving import save_policy

    policy = load_policy(saved_models("llada"), "cpu", "float32")
    save_policy(add_adapter(policy, Adapter(2)), tmp_path / "adapter")
    traits = {trait.name: trait.detail for trait in describe(str(tmp_path / "adapter"))}
    assert traits["adapter"].startswith("LoRA of rank 2")
    assert traits["family"].startswith("llada: ")
    assert "doubt" not in traits
