"""NF4 weights against an independent computation, and what is refused."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import pytest
import torch
from conftest import invoke, tiny_policy
from torch import nn

from dlmctl.diffusion.elbo import log_probs
from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.models.blocks import decoder_blocks
from dlmctl.models.loading import load_policy
from dlmctl.models.quantization import (
    linear_layers,
    on_disk,
    quantization_of,
    quantized,
    quantized_bytes,
)
from dlmctl.models.saving import save_policy
from dlmctl.models.small import make_policy
from dlmctl.models.tokenizers import character_tokenizer
from dlmctl.records.errors import UnavailableError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.rl.gradient import accumulate_gradient
from dlmctl.settings.optimizer import Adapter
from dlmctl.settings.small import SmallModel
from dlmctl.train.lora import add_adapter

CPU, PUZZLES = torch.device("cpu"), "builtin:puzzles"


@pytest.fixture
def package():
    return pytest.importorskip("bitsandbytes", reason="pip install 'dlmctl[quantized]'")


def nf4_values() -> torch.Tensor:
    """The 16 values of NF4, as quantiles of N(0, 1): arXiv 2305.14314, section 3.

    8 values from 0 to 1 and 9 from -1 to 0 are joined at 0; the outermost quantile is the mean of
    1 - 1/32 and 1 - 1/30, so that there are no infinite ones.
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2

    def quantiles(count: int) -> torch.Tensor:
        places = torch.linspace(0.5, outermost, count, dtype=torch.float64)
        values = torch.special.ndtri(places)
        return values / values[-1]

    return torch.cat([-quantiles(8).flip(0), quantiles(9)[1:]])


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """A weight after a round trip through NF4, in its dtype."""
    flat = weight.detach().double().flatten()
    values, parts = nf4_values(), []
    for block in flat.split(64):
        scale = block.abs().max()
        nearest = (block[:, None] / scale - values).abs().argmin(1)
        parts.append(values[nearest] * scale)
    return torch.cat(parts).view_as(weight).to(weight.dtype)


def small(family: str, seed: int = 0):
    """A small policy in float32, and its double whose weights went through `nf4`."""
    policy = make_policy(SmallModel(family, 64, 2, 2, gen_length=6), character_tokenizer(), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2, generator=generator)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for _, _, layer in linear_layers(other):
            layer.weight.copy_(nf4(layer.weight))
    return policy, other


def examples(policy):
    given = [
        Record(
            id="a",
            sample=n,
            tokens={"prompt": [3, 4, 5], "completion": [3 + (n * k) % 4 for k in range(6)]},
        )
        for n in range(2)
    ]
    return [example_of(record, policy, MaskPlan(samples=2)) for record in given]


def test_the_values_are_those_of_the_paper():
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert nf4_values().tolist() == pytest.approx(published, abs=2e-6)


@pytest.mark.parametrize("family", ["llada", "dream", "mlm", "ar"])
def test_weights_are_those_of_an_independent_computation(package, family):
    policy, other = small(family)
    kept = {name: p.clone() for name, p in policy.model.named_parameters()}
    done = quantized(policy, "nf4", CPU)
    layers, expected = linear_layers(done), linear_layers(other)
    assert len(layers) == len(expected) >= 5 * len(decoder_blocks(done))
    for (_, name, layer), (_, _, plain) in zip(layers, expected, strict=True):
        whole = package.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.allclose(whole, plain.weight, rtol=1e-5, atol=1e-6), name
    # Embeddings, head, norms, biases, and layers with other rows are as they were.
    changed = {id(layer.weight) for _, _, layer in layers}
    for name, parameter in done.model.named_parameters():
        assert not parameter.requires_grad
        if id(parameter) not in changed:
            assert torch.equal(parameter, kept[name]), name
    assert type(done.model.get_output_embeddings()) is nn.Linear


def test_layers_whose_rows_are_no_multiple_of_a_block_stay_whole(package):
    policy, _ = small("llada")
    assert decoder_blocks(policy)[0].mlp.down_proj.in_features % 64
    done = decoder_blocks(quantized(policy, "nf4", CPU))[0]
    assert type(done.mlp.down_proj) is nn.Linear
    assert isinstance(done.mlp.up_proj, package.nn.Linear4bit)


@pytest.mark.parametrize("family", ["llada", "dream", "mlm", "ar"])
def test_scores_are_those_of_the_weights_after_the_round_trip(package, family):
    policy, other = small(family)
    with torch.no_grad():
        before = log_probs(policy, examples(policy), 4)
        expected = log_probs(other, examples(other), 4)
        found = log_probs(quantized(policy, "nf4", CPU), examples(policy), 4)
    assert torch.allclose(found, expected, atol=1e-4)
    assert float((before - expected).abs().max()) > 1e-2


def test_an_adapter_learns_as_over_the_weights_after_the_round_trip(package):
    policy, other = small("llada")
    gradients = []
    for base in (quantized(policy, "nf4", CPU), other):
        torch.manual_seed(0)
        adapted = add_adapter(base, Adapter(2, 8.0))
        with torch.no_grad():
            for name, parameter in adapted.model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.05)
        coefficients = torch.ones(2, 2, 6, dtype=torch.float64)
        accumulate_gradient(adapted, examples(adapted), coefficients, 4)
        gradients.append(
            {n: p.grad for n, p in adapted.model.named_parameters() if p.grad is not None}
        )
    found, expected = gradients
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found)
    for name in found:
        assert torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4), name


def test_bytes_are_those_of_the_quantized_layers(package):
    policy, _ = small("llada")
    assert not quantized_bytes(policy)  # it is not to be quantized
    planned = sum(quantized_bytes(replace(policy, quantized="nf4")).values())
    weights = [layer.weight for _, _, layer in linear_layers(quantized(policy, "nf4", CPU))]
    states = [weight.quant_state.absmax for weight in weights]
    assert planned == sum(t.numel() * t.itemsize for t in [*weights, *states])


def test_a_revision_says_what_its_weights_are_quantized_to(package):
    plain = load_policy(PUZZLES, "cpu")
    policy = load_policy(PUZZLES, "cpu", quantize="nf4")
    assert (policy.quantized, policy.revision) == ("nf4", f"{plain.revision}-nf4")
    assert on_disk(policy.revision) == on_disk(plain.revision) == plain.revision
    for revision, kind in {
        "ab-nf4": "nf4", "ab.cd-nf4": "nf4", "ab-nf4.cd": "nf4", "ab-nf4.cd+3": "nf4",
        "ab": None, "ab.cd": None, "ab.cd+12": None, "random": None,
    }.items():  # fmt: skip
        assert quantization_of(revision) == kind


@pytest.mark.parametrize(
    ("family", "reason"),
    [("llada-moe", "is a mixture"), ("diffugpt", "blocks of .* have none")],
)
def test_models_that_cannot_be_quantized_are_refused(family, reason):
    with pytest.raises(UsageError, match=reason):
        linear_layers(tiny_policy(family))


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnavailableError, match=r"pip install 'dlmctl\[quantized\]'"):
        load_policy(PUZZLES, "cpu", quantize="nf4")
    done = invoke("score-elbo", "-m", PUZZLES, "--quantize", "nf4", "/dev/null")
    assert done.exit_code == 69
    assert "--quantize nf4 needs the package bitsandbytes" in done.stderr


def test_no_kernels_are_downloaded_on_import(package, monkeypatch):
    """On CPUs with AVX512-BF16 bitsandbytes asks the package kernels for code of the hub."""
    asked = []

    class Watching:
        def find_spec(self, name, *_):
            if name == "kernels":
                asked.append(name)

    monkeypatch.setattr(sys, "meta_path", [Watching(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    load_policy(PUZZLES, "cpu", quantize="nf4")
    assert not asked
    assert "kernels" not in sys.modules


def test_an_adapter_of_the_head_is_refused_over_quantized_weights(package, tmp_path):
    policy, _ = small("llada")
    save_policy(policy, tmp_path / "base")
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load_policy(str(tmp_path / "base"), "cpu").model,
        LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
    )
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    load_policy(str(tmp_path / "adapter"), "cpu")
    with pytest.raises(UsageError, match="changes the output head"):
        load_policy(str(tmp_path / "adapter"), "cpu", quantize="nf4")
