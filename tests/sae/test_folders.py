"""Autoencoders of three libraries: what goes out comes back, and means the same."""

import json

import pytest
import torch
from conftest import shell
from safetensors.torch import load_file, save_file

from dlmctl.commands.corpora import own_model
from dlmctl.records.errors import DataError, MissingInputError, UsageError
from dlmctl.sae.formats.folders import SavedSae, layout_of, read_sae, write_sae
from dlmctl.sae.topk import TopKSae

LAYOUTS = ["saelens", "dictionary_learning", "sparsify"]
KNOWN = {
    "model_name": "GSAI-ML/LLaDA-8B-Base",
    "hook_name": "model.layers.26",
    "context_size": 2048,
    "dlm_layer": 26,
    "dlm_positions": "mask",
    "dlm_t_min": 0.05,
    "dlm_t_max": 0.5,
    "dlm_pack": True,
    "dlm_hide_prompt": False,
}


@pytest.fixture
def saved():
    torch.manual_seed(0)
    sae = TopKSae(5, 12, 3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    return SavedSae(sae, KNOWN, torch.rand(12))


X = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_read_again(tmp_path, saved, layout):
    write_sae(saved, tmp_path / "sae", layout)
    assert layout_of(tmp_path / "sae") == layout
    found = read_sae(tmp_path / "sae")
    assert found.sae.k == 3
    for name, value in saved.sae.state_dict().items():
        assert torch.equal(found.sae.state_dict()[name], value)
    if layout == "saelens":
        assert KNOWN.items() <= found.metadata.items()
        torch.testing.assert_close(found.firing_rate, saved.firing_rate)
    if layout == "dictionary_learning":
        assert found.metadata == KNOWN


def test_a_folder_of_saelens_has_its_names_and_no_other(tmp_path, saved):
    write_sae(saved, tmp_path / "sae")
    tensors = load_file(tmp_path / "sae/sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "W_enc": (5, 12),
        "b_enc": (12,),
        "W_dec": (12, 5),
        "b_dec": (5,),
    }
    config = json.loads((tmp_path / "sae/cfg.json").read_text())
    assert (config["architecture"], config["k"], config["d_in"]) == ("topk", 3, 5)
    sparsity = load_file(tmp_path / "sae/sparsity.safetensors")["sparsity"]
    torch.testing.assert_close(sparsity, (saved.firing_rate + 1e-10).log10())


def test_switches_of_saelens_are_folded_into_the_weights(tmp_path, saved):
    """The definitions of apply_b_dec_to_input and rescale_acts_by_decoder_norm, written out."""
    sae = saved.sae
    write_sae(saved, tmp_path / "sae")
    file = tmp_path / "sae/cfg.json"
    config = json.loads(file.read_text())
    config |= {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True}
    file.write_text(json.dumps(config))
    norm = sae.W_dec.norm(dim=1)
    pre = (X @ sae.W_enc + sae.b_enc) * norm
    kept = pre.relu() * (pre >= pre.topk(3).values[:, -1:])
    expected = (kept / norm) @ sae.W_dec + sae.b_dec
    found = read_sae(tmp_path / "sae").sae
    torch.testing.assert_close(found(X), expected)
    torch.testing.assert_close(found.W_dec.norm(dim=1), torch.ones(12))


def test_an_encoder_of_the_released_folders_subtracts_the_decoder_bias(tmp_path, saved):
    """trainers/top_k of dictionary_learning: relu(encoder(x - b_dec)), top k, decoder, + b_dec."""
    write_sae(saved, tmp_path / "sae", "dictionary_learning")
    state = torch.load(tmp_path / "sae/ae.pt", weights_only=True)
    pre = ((X - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"]).relu()
    kept = pre * (pre >= pre.topk(int(state["k"])).values[:, -1:])
    expected = kept @ state["decoder.weight"].T + state["b_dec"]
    torch.testing.assert_close(read_sae(tmp_path / "sae").sae(X), expected)


def broken(tmp_path, saved, layout, **changes):
    write_sae(saved, tmp_path / "sae", layout)
    file = tmp_path / "sae" / ("config.json" if layout == "dictionary_learning" else "cfg.json")
    config = json.loads(file.read_text())
    if layout == "dictionary_learning":
        config["trainer"] |= changes
    else:
        config |= changes
    file.write_text(json.dumps(config))
    return tmp_path / "sae"


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("saelens", {"architecture": "jumprelu"}, "'jumprelu' autoencoder"),
        ("saelens", {"normalize_activations": "layer_norm"}, "layer_norm"),
        ("saelens", {"k": None}, "k is None"),
        ("saelens", {"k": 13}, "from 1 to 12"),
        ("sparsify", {"transcode": True}, "transcoder"),
        ("sparsify", {"activation": "groupmax"}, "groupmax"),
        ("dictionary_learning", {"dict_class": "GatedAutoEncoder"}, "GatedAutoEncoder"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path, saved, layout, changes, message):
    with pytest.raises(DataError, match=message):
        read_sae(broken(tmp_path, saved, layout, **changes))


def test_missing_and_misshapen_tensors_are_named(tmp_path, saved):
    write_sae(saved, tmp_path / "sae")
    file = tmp_path / "sae/sae_weights.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "b_enc": torch.zeros(3)}, file)
    with pytest.raises(DataError, match=r"'b_enc' has shape \(3,\), expected \(12,\)"):
        read_sae(tmp_path / "sae")
    save_file({k: v for k, v in tensors.items() if k != "W_dec"}, file)
    with pytest.raises(DataError, match="'W_dec' is missing"):
        read_sae(tmp_path / "sae")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        read_sae(tmp_path / "sae")
    with pytest.raises(MissingInputError, match="is no autoencoder"):
        read_sae(tmp_path)


def test_the_command_converts_there_and_back(tmp_path, saved):
    write_sae(saved, tmp_path / "released", "dictionary_learning")
    done = shell("dlmctl sae-convert released a && dlmctl sae-convert --to sparsify a b", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a: saelens from dictionary_learning, d 5, 12 latents, k 3" in done.stderr
    torch.testing.assert_close(read_sae(tmp_path / "b").sae(X), saved.sae(X))
    again = shell("dlmctl sae-convert released a", tmp_path)
    assert again.returncode == 73
    assert "not empty" in again.stderr


def test_autoencoders_of_several_models_need_one_to_be_named(saved):
    other = SavedSae(saved.sae, {**saved.metadata, "model_name": "other"}, saved.firing_rate)
    assert own_model({"a": saved, "b": saved}, None) == KNOWN["model_name"]
    assert own_model({"a": saved, "b": other}, "given") == "given"
    with pytest.raises(UsageError, match=r"another model_name: .* give --model"):
        own_model({"a": saved, "b": other}, None)
