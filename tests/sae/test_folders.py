"""Autoencoders of three libraries: what goes out comes back, and means the same."""

import json

import pytest
import torch
from conftest import shell
from safetensors.torch import load_file, save_file

from dlmctl.commands.corpora import own_model
from dlmctl.records.errors import DataError, MissingInputError, UsageError
from dlmctl.sae.formats.folders import SavedSae, layout_of, read_sae, write_sae
from dlmctl.sae.topk import JumpReluSae, TopKSae

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
        ("saelens", {"architecture": "gated"}, "'gated' autoencoder"),
        ("saelens", {"architecture": "jumprelu"}, "'threshold' is missing"),
        ("saelens", {"architecture": "batchtopk"}, "'topk_threshold' is missing"),
        ("saelens", {"architecture": "jumprelu", "rescale_acts_by_decoder_norm": True}, "fold"),
        ("saelens", {"normalize_activations": "layer_norm"}, "layer_norm"),
        ("saelens", {"k": None}, "k is None"),
        ("saelens", {"k": 13}, "from 1 to 12"),
        ("sparsify", {"transcode": True}, "transcoder"),
        ("sparsify", {"activation": "groupmax"}, "groupmax"),
        ("dictionary_learning", {"dict_class": "GatedAutoEncoder"}, "GatedAutoEncoder"),
        ("dictionary_learning", {"dict_class": "BatchTopKSAE"}, "none was estimated"),
        ("dictionary_learning", {"dict_class": None, "trainer_class": "GatedSAETrainer"}, "Gated"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path, saved, layout, changes, message):
    with pytest.raises(DataError, match=message):
        read_sae(broken(tmp_path, saved, layout, **changes))


def jump_relu(**thresholds):
    """An autoencoder with one threshold, or one for each latent."""
    torch.manual_seed(1)
    sae = JumpReluSae(5, 12, 3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    sae.threshold.copy_(thresholds.get("threshold", torch.linspace(0, 2, 12)))
    return SavedSae(sae, KNOWN)


@pytest.mark.parametrize("layout", ["saelens", "dictionary_learning"])
@pytest.mark.parametrize("threshold", [torch.tensor(0.75), torch.linspace(-1, 2, 12)])
def test_thresholds_are_written_and_read_again(tmp_path, layout, threshold):
    saved = jump_relu(threshold=threshold)
    write_sae(saved, tmp_path / "sae", layout)
    found = read_sae(tmp_path / "sae")
    assert type(found.sae) is JumpReluSae
    torch.testing.assert_close(found.sae.threshold, saved.sae.threshold, rtol=0, atol=0)
    torch.testing.assert_close(found.sae.encode(X).dense(12), saved.sae.encode(X).dense(12))
    torch.testing.assert_close(found.sae(X), saved.sae(X))
    assert found.sae.k == 3 or layout == "dictionary_learning"
    with pytest.raises(UsageError, match="no autoencoders with thresholds"):
        write_sae(saved, tmp_path / "other", "sparsify")
    assert not (tmp_path / "other").exists()


def test_b_dec_that_is_not_subtracted_from_the_input_is_folded_into_the_encoder(tmp_path):
    """As in GemmaScope, whose folders in SAELens say apply_b_dec_to_input false."""
    saved = jump_relu()
    write_sae(saved, tmp_path / "sae")
    file = tmp_path / "sae/cfg.json"
    config = json.loads(file.read_text()) | {"apply_b_dec_to_input": False}
    file.write_text(json.dumps({name: config[name] for name in config if name != "k"}))
    sae = saved.sae
    pre = X @ sae.W_enc + sae.b_enc
    codes = torch.where(pre > sae.threshold, pre, 0.0).relu()
    found = read_sae(tmp_path / "sae").sae
    assert found.k is None
    torch.testing.assert_close(found.encode(X).dense(12), codes)
    torch.testing.assert_close(found(X), codes @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize("rescaled", [False, True])
def test_a_checkpoint_of_batchtopk_training_has_one_threshold(tmp_path, rescaled):
    """`topk_threshold` of SAELens, in units of the rescaled activations."""
    saved = jump_relu()
    write_sae(saved, tmp_path / "sae")
    file = tmp_path / "sae/cfg.json"
    about = {"architecture": "batchtopk", "k": 2.5, "rescale_acts_by_decoder_norm": rescaled}
    file.write_text(json.dumps(json.loads(file.read_text()) | about))
    file = tmp_path / "sae/sae_weights.safetensors"
    tensors = load_file(file)
    del tensors["threshold"]
    save_file(tensors | {"topk_threshold": torch.tensor(1.25, dtype=torch.float64)}, file)
    sae, found = saved.sae, read_sae(tmp_path / "sae").sae
    norm = sae.W_dec.norm(dim=1) if rescaled else torch.ones(12)
    pre = ((X - sae.b_dec) @ sae.W_enc + sae.b_enc) * norm
    codes = pre.where(pre > 1.25, 0.0)
    torch.testing.assert_close(found.encode(X).dense(12), codes)
    torch.testing.assert_close(found(X), codes / norm @ sae.W_dec + sae.b_dec)


def test_batchtopk_and_matryoshka_of_dictionary_learning_are_read(tmp_path):
    """Names of their tensors, and the threshold that their `encode` uses."""
    sae = jump_relu(threshold=torch.tensor(0.5)).sae
    shared = {"b_dec": sae.b_dec, "k": torch.tensor(3, dtype=torch.int32)}
    shared = {name: value.detach() for name, value in shared.items()}
    linear = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc,
              "decoder.weight": sae.W_dec.T}  # fmt: skip
    own = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec}
    for name, tensors, about in (
        ("BatchTopKSAE", linear, {"dlm_kind": "batchtopk"}),
        ("MatryoshkaBatchTopKSAE", {**own, "group_sizes": torch.tensor([3, 4, 5])},
         {"dlm_kind": "matryoshka", "dlm_prefixes": [3, 7, 12]}),
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        state = {n: t.detach().contiguous() for n, t in tensors.items()}
        torch.save({**shared, "threshold": torch.tensor(0.5), **state}, folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "k": 3}}))
        found = read_sae(folder)
        assert found.metadata == about
        assert found.sae.k == 3
        for key, value in sae.state_dict().items():
            assert torch.equal(found.sae.state_dict()[key], value)


def test_thresholds_of_another_size_are_refused(tmp_path):
    write_sae(jump_relu(), tmp_path / "sae")
    file = tmp_path / "sae/sae_weights.safetensors"
    for wrong, message in (
        (torch.zeros(3), r"shape \(3,\)"),
        (torch.full((12,), torch.nan), "NaN"),
    ):
        save_file(load_file(file) | {"threshold": wrong}, file)
        with pytest.raises(DataError, match=message):
            read_sae(tmp_path / "sae")


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
