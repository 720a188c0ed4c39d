"""LLaDA and Dream checkpoints as their authors publish them, against plain torch.

The computations below use nothing of transformers or of the package: they read the tensors of the
saved file under their original names.
"""

import json
import math

import pytest
import torch
from conftest import tiny_policy
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from dlmctl.models.loading import load_policy
from dlmctl.models.saving import save_original
from dlmctl.records.errors import DataError, MissingInputError

IDS = torch.tensor([[3, 4, 8, 2, 2, 7, 2], [5, 2, 8, 6, 2, 2, 1]])


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x, theta):
    """Rotary embedding of [B, heads, T, D], halves convention."""
    length, size = x.shape[-2:]
    frequency = theta ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
    angle = torch.outer(torch.arange(length, dtype=x.dtype), frequency)
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., : size // 2], x[..., size // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(x, weights, names, heads, theta):
    """Full attention in both directions, no mask."""
    batch, length, width = x.shape

    def project(name):
        y = x @ weights[f"{name}.weight"].T
        if f"{name}.bias" in weights:
            y = y + weights[f"{name}.bias"]
        return y.view(batch, length, heads, width // heads).transpose(1, 2)

    q, k, v = (project(name) for name in names[:3])
    q, k = rotate(q, theta), rotate(k, theta)
    scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
    return y @ weights[f"{names[3]}.weight"].T


def mlp(x, weights, gate, up, down):
    inner = silu(x @ weights[f"{gate}.weight"].T) * (x @ weights[f"{up}.weight"].T)
    return inner @ weights[f"{down}.weight"].T


def llada_logits(directory, ids):
    config = json.loads((directory / "config.json").read_text())
    w = {k: v.double() for k, v in load_file(directory / "model.safetensors").items()}
    top, eps = "model.transformer", config["rms_norm_eps"]
    x = w[f"{top}.wte.weight"][ids]
    for layer in range(config["n_layers"]):
        at = f"{top}.blocks.{layer}"
        normed = rms_norm(x, w[f"{at}.attn_norm.weight"], eps)
        names = [f"{at}.{n}" for n in ("q_proj", "k_proj", "v_proj", "attn_out")]
        x = x + attention(normed, w, names, config["n_heads"], config["rope_theta"])
        normed = rms_norm(x, w[f"{at}.ff_norm.weight"], eps)
        x = x + mlp(normed, w, f"{at}.ff_proj", f"{at}.up_proj", f"{at}.ff_out")
    return rms_norm(x, w[f"{top}.ln_f.weight"], eps) @ w[f"{top}.ff_out.weight"].T


def dream_logits(directory, ids):
    """Dream's logits with its shift: those of position i are computed at position i - 1."""
    config = json.loads((directory / "config.json").read_text())
    w = {k: v.double() for k, v in load_file(directory / "model.safetensors").items()}
    eps = config["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        normed = rms_norm(x, w[f"{at}.input_layernorm.weight"], eps)
        names = [f"{at}.self_attn.{n}_proj" for n in "qkvo"]
        x = x + attention(normed, w, names, config["num_attention_heads"], config["rope_theta"])
        normed = rms_norm(x, w[f"{at}.post_attention_layernorm.weight"], eps)
        x = x + mlp(normed, w, *(f"{at}.mlp.{n}_proj" for n in ("gate", "up", "down")))
    logits = rms_norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


def logits_everywhere(policy, ids, attention=None):
    rows, positions = torch.ones_like(ids).nonzero(as_tuple=True)
    with torch.no_grad():
        return policy.predict(ids, attention, rows, positions).view(*ids.shape, -1)


@pytest.fixture(params=["llada", "dream"])
def original(request, tmp_path):
    policy = tiny_policy(request.param, seed=5)
    if request.param == "dream":
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.3)
    save_original(policy, tmp_path)
    return request.param, tmp_path


def test_logits_equal_a_computation_in_plain_torch(original):
    family, directory = original
    policy = load_policy(str(directory), "cpu")
    policy.model.double()
    plain = {"llada": llada_logits, "dream": dream_logits}[family](directory, IDS)
    assert policy.family == family
    # The file holds float64 weights; loading rounds them to float32.
    assert torch.allclose(logits_everywhere(policy, IDS), plain, rtol=0, atol=2e-5)


def test_the_names_are_those_of_the_authors(original):
    family, directory = original
    names = set(load_file(directory / "model.safetensors"))
    config = json.loads((directory / "config.json").read_text())
    expected = {
        "llada": ("model.transformer.blocks.1.attn_out.weight", "LLaDAModelLM", "d_model"),
        "dream": ("model.layers.1.self_attn.q_proj.bias", "DreamModel", "hidden_size"),
    }[family]
    assert expected[0] in names
    assert config["architectures"] == [expected[1]]
    assert expected[2] in config
    assert config["mask_token_id"] == 2


def test_special_tokens_come_from_the_checkpoint(original):
    _, directory = original
    policy = load_policy(str(directory), "cpu")
    assert (policy.mask_id, policy.eos_id, policy.pad_id) == (2, 1, 0)
    assert policy.shift == (policy.family == "dream")


def test_sharded_checkpoints_load_like_whole_ones(original):
    _, directory = original
    whole = logits_everywhere(load_policy(str(directory), "cpu"), IDS)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, directory / file)
    index = {"weight_map": {n: f for f, part in shards.items() for n in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits_everywhere(load_policy(str(directory), "cpu"), IDS), whole)
    (directory / "b.safetensors").unlink()
    with pytest.raises(MissingInputError, match=r"b\.safetensors"):
        load_policy(str(directory), "cpu")


def test_a_missing_weight_is_named_and_nothing_is_filled_in(original):
    _, directory = original
    tensors = load_file(directory / "model.safetensors")
    del tensors[next(n for n in tensors if "q_proj" in n and n.endswith("weight"))]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(DataError, match=r"missing.*q_proj"):
        load_policy(str(directory), "cpu")


def test_pickled_weights_are_refused(original):
    _, directory = original
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(DataError, match="safetensors"):
        load_policy(str(directory), "cpu")


def test_a_cut_off_file_is_refused(original):
    _, directory = original
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        load_policy(str(directory), "cpu")
