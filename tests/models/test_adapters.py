"""LoRA adapters as peft saves them over the classes of a model's authors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_policy
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_original_naming import IDS, logits_everywhere, rms_norm, rotate
from torch import nn
from torch.nn.functional import silu

from dlmctl.models.loading import load_policy
from dlmctl.models.saving import save_original
from dlmctl.records.errors import DataError


class Block(nn.Module):
    """A block of LLaDA, its parts named as its authors name them."""

    def __init__(self, config):
        super().__init__()
        width, inner = config["d_model"], config["mlp_hidden_size"]
        self.heads, self.theta, self.eps = (
            config["n_heads"], config["rope_theta"], config["rms_norm_eps"],
        )  # fmt: skip
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.ff_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(inner, width, bias=False)
        self.attn_norm, self.ff_norm = (Norm(width) for _ in range(2))

    def forward(self, x):
        batch, length, width = x.shape
        normed = rms_norm(x, self.attn_norm.weight, self.eps)
        q, k, v = (
            project(normed).view(batch, length, self.heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, self.theta), rotate(k, self.theta)
        seen = (q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)).softmax(-1) @ v
        x = x + self.attn_out(seen.transpose(1, 2).reshape(batch, length, width))
        normed = rms_norm(x, self.ff_norm.weight, self.eps)
        return x + self.ff_out(silu(self.ff_proj(normed)) * self.up_proj(normed))


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Llada(nn.Module):
    """`model.transformer.blocks.0.q_proj` and so on, as in LLaDAModelLM."""

    def __init__(self, directory):
        super().__init__()
        config = json.loads((directory / "config.json").read_text())
        width, size = config["d_model"], config["embedding_size"]
        parts = {
            "wte": nn.Embedding(size, width),
            "blocks": nn.ModuleList(Block(config) for _ in range(config["n_layers"])),
            "ln_f": Norm(width),
            "ff_out": nn.Linear(width, size, bias=False),
        }
        self.model = nn.Module()
        self.model.transformer = nn.ModuleDict(parts)
        self.eps = config["rms_norm_eps"]
        self.load_state_dict(load_file(directory / "model.safetensors"))
        self.double()

    def forward(self, ids):
        parts = self.model.transformer
        x = parts["wte"](ids)
        for block in parts["blocks"]:
            x = block(x)
        return parts["ff_out"](rms_norm(x, parts["ln_f"].weight, self.eps))


D1 = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
"""Modules that d1's, ESPO's and GDSD's configurations name; LLaDA has four of them."""

KINDS = {
    "the modules of d1": {"target_modules": D1},
    "all linear layers of a block": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
    },
    "ranks by pattern": {
        "target_modules": ["q_proj", "ff_out"],
        "rank_pattern": {"blocks.1.q_proj": 2},
        "alpha_pattern": {"q_proj": 5, "transformer.ff_out": 3},
    },
    "a head that is trained whole": {
        "target_modules": D1,
        "modules_to_save": ["transformer.ff_out"],
    },
    "one layer": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "blocks",
    },
    "rank-stabilized": {"target_modules": D1, "use_rslora": True},
    "DoRA": {"target_modules": D1, "use_dora": True},
}


def trained_adapter(base: Path, directory: Path, **config) -> torch.Tensor:
    """Save an adapter of the model in `base` with peft; returns the logits of `IDS` with it."""
    model = get_peft_model(Llada(base), LoraConfig(r=4, lora_alpha=8, **config)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).double())
        logits = model(IDS)
    model.save_pretrained(str(directory))
    file = directory / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}
    file.write_text(json.dumps(settings))
    return logits


@pytest.fixture
def base(tmp_path):
    save_original(tiny_policy("llada", seed=5), tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_the_authors_class_gives_that_models_logits(base, tmp_path, kind):
    expected = trained_adapter(base, tmp_path / "lora", **KINDS[kind])
    policy = load_policy(str(tmp_path / "lora"), "cpu")
    policy.model.double()
    found = logits_everywhere(policy, IDS)
    plain = logits_everywhere(load_policy(str(base), "cpu"), IDS)
    # The files hold float64, which loading rounds to float32.
    assert float((found - expected).abs().max()) < 1e-4
    assert float((plain.double() - expected).abs().max()) > 0.1


def changed(directory: Path, change) -> None:
    file = directory / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def without_the_first(tensors):
    return {name: tensors[name] for name in sorted(tensors)[1:]}


def with_another(tensors):
    name = "base_model.model.model.transformer.blocks.0.q_norm.lora_A.weight"
    return {**tensors, name: torch.ones(4, 16)}


def under_another_layer(tensors):
    return {name.replace("blocks.1.", "blocks.7."): t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_the_first, r"1 of its weights are missing, as .*layers\.0\."),
        (with_another, r"does not fit its base model.*q_norm"),
        (under_another_layer, r"does not fit its base model.*layers\.7\."),
        (lambda tensors: {n: t[:2] for n, t in tensors.items()}, "does not fit its base model"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_the_names_of_its_weights(
    base, tmp_path, change, message
):
    trained_adapter(base, tmp_path / "lora", target_modules=D1)
    changed(tmp_path / "lora", change)
    with pytest.raises(DataError, match=message):
        load_policy(str(tmp_path / "lora"), "cpu")


def test_an_adapter_of_another_model_is_refused(tmp_path, saved_models, base):
    trained_adapter(base, tmp_path / "lora", target_modules=D1)
    file = tmp_path / "lora" / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": saved_models("mlm")}
    file.write_text(json.dumps(settings))
    with pytest.raises(DataError, match="does not fit its base model"):
        load_policy(str(tmp_path / "lora"), "cpu")
