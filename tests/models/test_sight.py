"""Whether classes of transformers attend, and compute logits, as dlmctl expects of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import invoke, read_jsonl
from test_adaptation import plain_tokenizer
from transformers import CONFIG_MAPPING

from dlmctl.diffusion.fused_linear_logprob import divergence, target_log_probs, weighted_log_prob
from dlmctl.distill.fused_linear_losses import weighted_divergence
from dlmctl.models.loading import load_policy
from dlmctl.models.policy import Policy
from dlmctl.models.sight import TESTED, left_to_right_blocks
from dlmctl.records.errors import DataError

LAYERS = 2
SIZES = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "eos_token_id": 1,
    "pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.5,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
OF_ENCODERS = {name: v for name, v in SIZES.items() if name not in ("num_key_value_heads",)}
MORE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "sarvam_moe": {**EXPERTS, "n_group": 2, "topk_group": 1, "num_shared_experts": 1,
                   "first_k_dense_replace": 1},
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gemma2": {"sliding_window": 3, "final_logit_softcapping": 0.9, "attn_logit_softcapping": 0.7},
    "gemma3_text": {"sliding_window": 3, "final_logit_softcapping": 0.9},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 3},
    "granite": {"logits_scaling": 4.0},
    "mistral": {"sliding_window": 3},
    "modernbert": {"cls_token_id": 0, "sep_token_id": 1, "bos_token_id": 0},
}  # fmt: skip
"""By type, what differs. Half of them change logits after the head, or cap scores of attention."""
KINDS = (
    "arcee", "cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "sarvam_moe",
    "granite", "llama", "ministral3", "mistral", "mixtral", "olmo2", "olmo3", "phi", "phi3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2", "gpt2",
)  # fmt: skip
ENCODERS = ("bert", "modernbert", "roberta")
CHANGED = ("gemma2", "gemma3_text", "cohere", "cohere2", "granite")


def config_of(kind: str, **fields: Any) -> Any:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    sizes = {k: v for k, v in SIZES.items() if kind != "gpt2" or not k.startswith("num_")}
    if kind in ("phi", "stablelm", "nemotron", *ENCODERS):
        sizes.pop("head_dim")
    if kind in ENCODERS:
        sizes.pop("num_key_value_heads")
    return CONFIG_MAPPING[kind](**{**sizes, **MORE.get(kind, {}), **fields})


def saved(place: Path, kind: str, auto: Any = transformers.AutoModelForCausalLM, **fields) -> str:
    """A small stock checkpoint with weights as large as those of trained models."""
    torch.manual_seed(0)
    model = auto.from_config(config_of(kind, **fields))
    model.save_pretrained(place)
    plain_tokenizer("<mask>").save_pretrained(place)
    return str(place)


def rows_of(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, 16, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return ids, policy.hidden(ids, None).flatten(0, 1)


def test_all_classes_that_are_taken_as_tested_are_tested_here():
    kinds = dict.fromkeys(KINDS, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    kinds |= dict.fromkeys(ENCODERS, "MODEL_FOR_MASKED_LM_MAPPING_NAMES")
    auto = transformers.models.auto.modeling_auto
    names = {getattr(auto, table).get(kind, "Glm4MoeForCausalLM") for kind, table in kinds.items()}
    assert names == TESTED


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_attends_as_is_causal_says(tmp_path, kind):
    place = saved(tmp_path, kind)
    blind = left_to_right_blocks(load_policy(f"{place},family=ar", "cpu"))
    assert len(blind) == LAYERS
    for reading in "family=a2d,mask_id=16", "family=bd3lm,mask_id=16,block_length=4":
        assert left_to_right_blocks(load_policy(f"{place},{reading}", "cpu")) == []


@pytest.mark.parametrize("kind", [*KINDS, *ENCODERS])
def test_its_logits_are_those_of_the_class_itself(tmp_path, kind):
    encoder = kind in ENCODERS
    auto = transformers.AutoModelForMaskedLM if encoder else transformers.AutoModelForCausalLM
    place = saved(tmp_path, kind, auto)
    policy = load_policy(f"{place},mask_id=16" if encoder else place, "cpu")
    ids, states = rows_of(policy)
    stock = auto.from_pretrained(place, attn_implementation="eager")
    with torch.no_grad():
        expected = stock(input_ids=ids).logits.flatten(0, 1)
        torch.testing.assert_close(policy.logits(states), expected, atol=1e-5, rtol=1e-5)
        targets = ids.flatten()
        wanted = expected.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        found = target_log_probs(policy, states, targets)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CHANGED)
def test_changed_logits_have_their_gradients(tmp_path, kind):
    policy = load_policy(saved(tmp_path, kind), "cpu", "float32")
    policy.model.double()
    ids, states = rows_of(policy)
    targets, other = ids.flatten(), torch.randn_like(states) * states.std()
    coefficients = torch.randn(len(states), dtype=torch.float64)
    matrix = policy.head.projection.weight

    def gradients(states: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(value, (states, matrix))

    def plain(states: torch.Tensor) -> torch.Tensor:
        return policy.logits(states).log_softmax(-1)

    states.requires_grad_()
    score = (coefficients * plain(states).gather(1, targets[:, None])[:, 0]).sum()
    found = weighted_log_prob(policy, states, targets, coefficients)
    torch.testing.assert_close(found, score)
    torch.testing.assert_close(gradients(states, found), gradients(states, score))

    for direction in "kl-fwd", "kl-bwd":
        p, q = plain(other).detach(), plain(states)
        ends = (p, q) if direction == "kl-fwd" else (q, p)
        distances = (ends[0].exp() * (ends[0] - ends[1])).sum(-1)
        wanted = (coefficients * distances).sum()
        found = weighted_divergence(policy, states, policy, other, coefficients, direction)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(gradients(states, found), gradients(states, wanted))
    torch.testing.assert_close(divergence(policy, states, other), distances.detach())


@pytest.mark.parametrize("kind", CHANGED)
def test_a_completion_is_scored_as_it_was_sampled(tmp_path, kind):
    """The sampler takes the logits of the class, the score those of the head."""
    place = saved(tmp_path / "m", kind)
    (tmp_path / "p").write_text('{"id": 1, "prompt": "12="}\n')
    common = ["-m", place, "--raw"]
    rollout = tmp_path / "rollout.jsonl"
    made = invoke("rollout", tmp_path / "p", *common, "-n", 4, "--gen-length", 6, "-o", rollout)
    assert made.exit_code == 0, made.output
    scored = invoke("score-elbo", rollout, *common, "-o", tmp_path / "scored.jsonl")
    assert scored.exit_code == 0, scored.output
    for row in read_jsonl(tmp_path / "scored.jsonl"):
        sampled = sum(row["rollout"]["log_probs"])
        assert row["elbo"]["policy"]["value"] == pytest.approx(sampled, abs=1e-4)


@pytest.mark.parametrize("kind", CHANGED)
def test_a_denoiser_made_of_it_keeps_what_changes_its_logits(tmp_path, kind):
    place = saved(tmp_path / "m", kind)
    result = invoke("init", tmp_path / "new", "--from", place)
    assert result.exit_code == 0, result.output
    policy = load_policy(str(tmp_path / "new"), "cpu", "float32")
    assert policy.family == "a2d"
    ids, states = rows_of(policy)
    with torch.no_grad():
        expected = policy.core(input_ids=ids).logits.flatten(0, 1)
        plain = policy.head.projection(states)
        torch.testing.assert_close(policy.logits(states), expected)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_a_field_that_the_class_does_not_read_changes_nothing(tmp_path):
    plain = load_policy(saved(tmp_path / "a", "llama"), "cpu")
    fields = {"final_logit_softcapping": 0.5, "logits_scaling": 8.0, "logit_scale": 0.1}
    other = load_policy(saved(tmp_path / "b", "llama", **fields), "cpu")
    assert torch.equal(plain.logits(rows_of(plain)[1]), other.logits(rows_of(other)[1]))


def test_capped_scores_of_attention_are_computed_under_any_mask(tmp_path):
    """Gemma 2 attends eagerly, which takes masks that are added and not boolean ones."""
    place = saved(tmp_path, "gemma2")
    policy = load_policy(f"{place},family=bd3lm,mask_id=16,block_length=4", "cpu")
    ids, states = rows_of(policy)
    columns = torch.arange(9)
    allowed = columns // 4 <= (columns // 4)[:, None]
    near = (columns[:, None] - columns).abs() <= 3
    body = transformers.AutoModelForCausalLM.from_pretrained(
        place, attn_implementation="eager"
    ).model

    def floats(seen: torch.Tensor) -> torch.Tensor:
        return torch.zeros(2, 1, 9, 9).masked_fill(~seen, -torch.inf)

    masks = {"full_attention": floats(allowed), "sliding_attention": floats(allowed & near)}
    with torch.no_grad():
        expected = body(input_ids=ids, attention_mask=masks, use_cache=False).last_hidden_state
        uncapped = load_policy(saved(tmp_path / "2", "gemma2", attn_logit_softcapping=None), "cpu")
        causal = policy.core.model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(states, expected.flatten(0, 1))
    assert not torch.allclose(rows_of(uncapped)[1], causal.flatten(0, 1), atol=1e-2)


@pytest.mark.parametrize("kind", ["stablelm", "nemotron"])
def test_a_class_that_reads_from_left_to_right_cannot_denoise(tmp_path, kind):
    place = saved(tmp_path, kind)
    assert load_policy(place, "cpu").family == "ar"
    with pytest.raises(DataError, match=r"block 0 of a \w+ reads from left to right only"):
        load_policy(f"{place},family=a2d,mask_id=16", "cpu")
    # Block by block it is given a mask, which the class does follow.
    in_blocks = load_policy(f"{place},family=bd3lm,block_length=4,mask_id=16", "cpu")
    assert left_to_right_blocks(in_blocks) == []


def test_an_encoder_is_no_left_to_right_model(tmp_path):
    place = saved(tmp_path, "bert")
    with pytest.raises(DataError, match="a BertLMHeadModel lets tokens see later ones"):
        load_policy(f"{place},family=ar", "cpu")


def test_logits_that_a_class_changes_in_its_own_way_are_refused(tmp_path):
    model = {"lm_head_multiplier": 0.5, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8}
    place = saved(tmp_path, "falcon_h1", **model)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["time_step_limit"]  # infinite, which is not read back
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="FalconH1ForCausalLM changes its logits after"):
        load_policy(place, "cpu")
    config["lm_head_multiplier"] = 1.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_policy(place, "cpu").family == "ar"
