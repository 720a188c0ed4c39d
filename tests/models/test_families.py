"""What every family of models must do: directions of attention, padding, saving, tokens."""

import dataclasses
import json

import pytest
import torch
import transformers
from conftest import tiny_policy
from safetensors.torch import load_file, save_file

from dlmctl.diffusion.elbo import scored_states
from dlmctl.diffusion.fused_linear_logprob import weighted_log_prob
from dlmctl.models.architecture import all_families, family_named
from dlmctl.models.loading import load_policy
from dlmctl.models.policy import Policy
from dlmctl.models.saving import save_original, save_policy
from dlmctl.models.tokenizers import byte_tokenizer, character_tokenizer
from dlmctl.records.errors import DataError, MissingInputError, UnavailableError, UsageError
from dlmctl.records.jsonl import Record

FAMILIES = [family.name for family in all_families() if not family.takes_images]


def all_logits(policy: Policy, ids, attention=None):
    rows, positions = torch.ones_like(ids).nonzero(as_tuple=True)
    with torch.no_grad():
        return policy.predict(ids, attention, rows, positions).view(*ids.shape, -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_token_changes_earlier_logits_only_in_denoisers(family):
    policy = tiny_policy(family)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    changed = ids.clone()
    changed[0, 4] = 8
    difference = (all_logits(policy, ids) - all_logits(policy, changed)).abs().amax(-1)[0]
    if policy.diffusion and policy.blocks is None:
        assert bool((difference[:4] > 1e-6).all())
    else:  # the token is the first of the second block, if there are blocks
        assert float(difference[: 4 if policy.blocks else 5].max()) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_logits_by_less_than_1e_5_in_float32(family):
    policy = tiny_policy(family)
    policy.model.float()
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    padded = torch.tensor([[3, 4, 5, 6, 7, 0, 0, 0], [8, 7, 6, 5, 4, 3, 8, 7]])
    attention = torch.tensor([[1] * 5 + [0] * 3, [1] * 8], dtype=torch.bool)
    alone = all_logits(policy, ids)
    together = all_logits(policy, padded, attention)[:1, :5]
    assert float((alone - together).abs().max()) < 1e-5
    assert float(alone.abs().max()) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_weights_compute_equal_bits_wherever_their_file_has_them(family, tmp_path):
    """A product rounds by where its operands begin, and a mapped file's begin behind its header."""
    policy = tiny_policy(family)
    policy.model.float()
    save_policy(policy, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for size in range(0, 64, 8):
        save_file(weights, file, metadata={"format": "pt", "note": " " * size})
        again = load_policy(str(tmp_path), "cpu")
        for ids in torch.tensor([[3]]), torch.tensor([[3, 4, 5, 2, 7]]):
            assert torch.equal(all_logits(policy, ids), all_logits(again, ids))
        assert {p.data_ptr() % 64 for p in again.model.parameters()} == {0}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_policy_loads_as_it_was(family, tmp_path):
    policy = tiny_policy(family)
    policy.model.float()
    policy = dataclasses.replace(policy, sampling={"gen_length": 9})
    save_policy(policy, tmp_path)
    again = load_policy(str(tmp_path), "cpu")
    ids = torch.tensor([[3, 4, 5, 2, 7]])
    assert torch.equal(all_logits(policy, ids), all_logits(again, ids))
    for name in ("family", "mask_id", "eos_id", "pad_id", "shift", "vocab_size", "sampling"):
        assert getattr(again, name) == getattr(policy, name)


@pytest.mark.parametrize("family", [f for f in FAMILIES if family_named(f).diffusion])
def test_transformers_alone_loads_what_is_saved(family, tmp_path):
    policy = tiny_policy(family)
    policy.model.float()
    save_policy(policy, tmp_path)
    stock = getattr(transformers, family_named(family).auto_class).from_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5, 2, 7]])
    with torch.no_grad():
        expected = policy.model(input_ids=ids).logits
        assert torch.allclose(stock(input_ids=ids).logits, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["roberta", "modernbert", "distilbert"])
def test_heads_of_masked_language_models_give_their_own_logits(kind, tmp_path):

    sizes = {"vocab_size": 9, "pad_token_id": 0, "max_position_embeddings": 64}
    model = {
        "roberta": lambda: transformers.RobertaForMaskedLM(
            transformers.RobertaConfig(
                **sizes,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
            )
        ),
        "modernbert": lambda: transformers.ModernBertForMaskedLM(
            transformers.ModernBertConfig(
                **sizes,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                bos_token_id=0,
                eos_token_id=1,
                cls_token_id=0,
                sep_token_id=1,
            )
        ),
        "distilbert": lambda: transformers.DistilBertForMaskedLM(
            transformers.DistilBertConfig(**sizes, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
        ),
    }[kind]()
    model.eval().save_pretrained(tmp_path)
    character_tokenizer("01234=").save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), "cpu")
    assert policy.family == "mlm"
    ids = torch.tensor([[3, 4, 2, 2, 7]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert torch.allclose(all_logits(policy, ids), expected, atol=1e-5)


def test_a_model_with_dropout_is_read_without_it(tmp_path):
    policy = tiny_policy("mlm")
    save_policy(policy, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["hidden_dropout_prob"] = config["attention_probs_dropout_prob"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load_policy(str(tmp_path), "cpu")
    ids = torch.tensor([[3, 4, 5, 2, 7]])
    expected = all_logits(again, ids)
    again.model.train()
    assert torch.equal(all_logits(again, ids), expected)


def saved_as(directory, family="ar", **fields):
    """A small model whose config.json has these fields, and not ours."""
    policy = tiny_policy(family)
    policy.model.float()
    save_policy(policy, directory)
    config = json.loads((directory / "config.json").read_text())
    for name in ("dlmctl", "is_causal"):
        config.pop(name, None)
    (directory / "config.json").write_text(json.dumps(config | fields))
    return policy


def test_a2d_names_of_decoders_are_read_as_bidirectional(tmp_path):
    policy = saved_as(
        tmp_path,
        "a2d",
        model_type="a2d-qwen3",
        auto_map={"AutoModel": "evil.Model"},
        _name_or_path="dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1",
    )
    again = load_policy(str(tmp_path), "cpu")
    ids = torch.tensor([[3, 4, 5, 2, 7]])
    assert again.family == "a2d"
    assert again.mask_id == 2
    assert torch.equal(all_logits(policy, ids), all_logits(again, ids))


UNKNOWN = {
    "architectures": ["OtherDiffusionForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_other.OtherDiffusionForCausalLM"},
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (UNKNOWN, "OtherDiffusionForCausalLM is not part of transformers"),
        (
            {"architectures": None, "auto_map": {"AutoModelForCausalLM": "modeling_x.XDiffusion"}},
            "XDiffusion is not part of transformers",
        ),
        ({"mask_token_id": 2}, "has a mask token and would be read from left to right"),
        ({"mask_token_id": 2, "dlm_paradigm": "bidirectional"}, "indicates block diffusion"),
        ({"mask_token_id": 2, "block_size": 32}, "block_size indicates block diffusion"),
        ({"is_causal": False, "block_length": 4}, "block_length indicates block diffusion"),
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}},
            "its tokenizer has a mask token",
        ),
        (
            {"model_type": "a2d-llama", "_name_or_path": "x/Qwen3-0.6B-diffusion-bd3lm-v0.1"},
            "block diffusion",
        ),
        ({"model_type": "a2d-llama", "block_size": 32, "_name_or_path": "mdlm"}, "block diffusion"),
        ({"model_type": "a2d-llama"}, "does not say whether the model attends to the whole text"),
    ],
)
def test_a_checkpoint_that_its_config_does_not_describe_is_refused(tmp_path, fields, message):
    saved_as(tmp_path, **fields)
    with pytest.raises(DataError, match=message):
        load_policy(str(tmp_path), "cpu")


def test_a_model_of_transformers_that_brings_its_code_too_is_read(tmp_path):
    """As Phi-3 and DeepSeek-V3 are published: their classes are in transformers by now."""
    auto = {"AutoConfig": "configuration_llama.LlamaConfig", "AutoModel": "modeling_llama.Own"}
    saved_as(tmp_path, auto_map={**auto, "AutoModelForCausalLM": "m.LlamaForCausalLM"})
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del tokenizer["mask_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert load_policy(str(tmp_path), "cpu").family == "ar"


@pytest.mark.parametrize(
    ("behind", "expected"),
    [
        (",family=a2d", ("a2d", 2, 0)),
        (",family=llada,mask_id=8", ("llada", 8, 0)),
        (",family=dream", ("dream", 2, 1)),
        (",family=a2d,shift=1,mask_id=7", ("a2d", 7, 1)),
        (",family=ar", ("ar", None, 1)),
    ],
)
def test_settings_behind_the_name_say_how_to_read_a_model(tmp_path, behind, expected):
    saved_as(tmp_path, **UNKNOWN)
    policy = load_policy(f"{tmp_path}{behind}", "cpu")
    assert (policy.family, policy.mask_id, policy.shift) == expected
    assert policy.name == f"{tmp_path}{behind}"
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    changed = torch.tensor([[3, 4, 5, 6, 8]])
    first = (all_logits(policy, ids) - all_logits(policy, changed))[0, 0].abs().max()
    assert bool(first > 1e-6) == policy.diffusion


def test_a_marker_in_config_json_says_how_to_read_a_model(tmp_path):
    marker = {"family": "a2d", "mask_token_id": 7, "shift": 1}
    saved_as(tmp_path, **UNKNOWN, dlmctl=marker)
    policy = load_policy(str(tmp_path), "cpu")
    assert (policy.family, policy.mask_id, policy.shift) == ("a2d", 7, 1)
    # What the user says comes first; the shift is then that of the family.
    again = load_policy(f"{tmp_path},family=llada", "cpu")
    assert (again.family, again.mask_id, again.shift) == ("llada", 7, 0)


def test_settings_of_a_family_that_config_json_contradicts_are_refused(tmp_path):
    save_original(tiny_policy("llada"), tmp_path)
    with pytest.raises(DataError, match="it is of family llada, not ar"):
        load_policy(f"{tmp_path},family=ar", "cpu")
    with pytest.raises(DataError, match=r"mask token 99 .* is beyond its 9 tokens"):
        load_policy(f"{tmp_path},mask_id=99", "cpu")
    with pytest.raises(UsageError, match=r"mask_id=x .* not a whole number"):
        load_policy(f"{tmp_path},mask_id=x", "cpu")


def test_a_directory_whose_name_has_a_comma_is_a_directory(tmp_path):
    place = tmp_path / "a,b=c"
    save_policy(tiny_policy(), place)
    assert load_policy(str(place), "cpu").family == "llada"


def test_weights_that_belong_nowhere_are_refused_by_name(tmp_path):
    save_policy(tiny_policy(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.0.rotary_emb.inv_freq": torch.ones(4)}, file)
    load_policy(str(tmp_path), "cpu")
    extra = {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}
    save_file({**tensors, **extra}, file)
    with pytest.raises(DataError, match=r"1 weights belong to no part .*\.0\.self_attn\.q_norm"):
        load_policy(str(tmp_path), "cpu")


def test_berts_other_head_is_no_part_of_a_masked_language_model(tmp_path):
    policy = tiny_policy("mlm")
    save_policy(policy, tmp_path)
    file = tmp_path / "model.safetensors"
    more = {
        "cls.seq_relationship.weight": torch.ones(2, 16),
        "bert.pooler.dense.bias": torch.ones(16),
    }
    save_file({**load_file(file), **more}, file)
    assert load_policy(str(tmp_path), "cpu").family == "mlm"


def test_a_score_takes_gradients_through_every_family():
    for family in FAMILIES:
        policy = tiny_policy(family)
        scored = scored_states(policy, [[3, 4]], [[5, 6, 7]], [torch.tensor([True, True, True])])
        weighted_log_prob(policy, scored.states, scored.targets, torch.ones(3)).backward()
        without = [n for n, p in policy.model.named_parameters() if p.grad is None]
        assert not without


def test_the_hash_of_the_weights_knows_one_changed_bit(tmp_path):
    policy = tiny_policy()
    save_policy(policy, tmp_path / "a")
    save_policy(policy, tmp_path / "b")
    with torch.no_grad():
        policy.model.lm_head.weight[0, 0] += 1e-12
    save_policy(policy, tmp_path / "c")
    a, b, c = (load_policy(str(tmp_path / x), "cpu").revision for x in "abc")
    assert a == b != c


def test_character_tokens_are_one_per_character_and_come_back():
    tokenizer = character_tokenizer()
    ids = tokenizer.encode("30,100:(2)=", add_special_tokens=False)
    assert len(ids) == 11
    assert tokenizer.decode(ids) == "30,100:(2)="
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 1, 2)


def test_byte_tokens_hold_any_text():
    tokenizer = byte_tokenizer()
    text = "  é→数学\n\ttab"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 259


def test_prompts_are_taken_as_ids_as_text_or_through_the_template():
    policy = tiny_policy()
    assert policy.encode(Record(tokens={"prompt": [5, 6]}, prompt="12")) == [5, 6]
    plain = policy.encode(Record(prompt="12="))
    assert policy.decode(plain) == "12="
    assert policy.encode(Record(messages=[{"role": "user", "content": "12="}])) == plain
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}=0"
    chat = policy.encode(Record(prompt="12"))
    assert policy.decode(chat) == "12=0"
    assert policy.encode(Record(prompt=[{"role": "user", "content": "12"}])) == chat


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record(), "no 'prompt' and no 'messages'"),
        (Record(prompt="abc"), "no tokens for 'abc'"),
        (Record(tokens={"prompt": [99]}), "beyond the vocabulary"),
        (Record(messages=[{"content": "1"}, {"content": "2"}]), "no chat template"),
    ],
)
def test_prompts_that_cannot_be_written_down_are_refused(record, message):
    with pytest.raises(DataError, match=message):
        tiny_policy().encode(record)


def test_decoding_ends_at_the_first_end_of_sequence():
    policy = tiny_policy()
    assert policy.decode([4, 5, 1, 6]) == "12"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("./nowhere", MissingInputError),
        ("/nowhere/at/all", MissingInputError),
        ("builtin:nothing", MissingInputError),
    ],
)
def test_models_that_are_not_there_are_named(name, error):
    with pytest.raises(error, match="no model"):
        load_policy(name)


def test_devices_and_dtypes_are_checked():
    with pytest.raises(UsageError, match="--device gpu"):
        load_policy("builtin:puzzles", "gpu")
    with pytest.raises(UsageError, match="--dtype float8"):
        load_policy("builtin:puzzles", "cpu", "float8")
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="doctor"):
            load_policy("builtin:puzzles", "cuda")


def test_a_config_of_an_unknown_kind_is_refused_without_running_its_code(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "mystery", "auto_map": {"AutoModel": "code.py"}}'
    )
    with pytest.raises(DataError, match="'mystery' is not known"):
        load_policy(str(tmp_path), "cpu")
