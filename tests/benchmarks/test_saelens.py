"""Folders of autoencoders between this package and SAELens itself, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlmctl.sae.formats.folders import SavedSae, read_sae, write_sae
from dlmctl.sae.topk import TopKSae

D, F, K = 16, 64, 5
X = torch.randn(40, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sae_lens() -> Any:
    return pytest.importorskip("sae_lens", reason="sae-lens is not installed")


def _saved(rates: bool) -> SavedSae:
    sae = TopKSae(D, F, K)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    known = {"model_name": "GSAI-ML/LLaDA-8B-Base", "hook_name": "model.layers.26"}
    return SavedSae(sae, known, torch.linspace(0, 1, F) if rates else None)


def _close(found: Tensor, expected: Tensor) -> None:
    """To a millionth of the largest number."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def _same(ours: TopKSae, theirs: Any) -> None:
    with torch.no_grad():
        codes = theirs.encode(X)
        _close(ours.encode(X).dense(F), codes)
        _close(ours(X), theirs.decode(codes))


@pytest.mark.parametrize("rates", [False, True])
def test_saelens_loads_what_is_written_here(sae_lens: Any, tmp_path: Path, rates: bool) -> None:
    saved = _saved(rates)
    write_sae(saved, tmp_path / "sae")
    assert (tmp_path / "sae/sparsity.safetensors").exists() == rates
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert type(theirs).__name__ == "TopKSAE"
    assert theirs.cfg.metadata.hook_name == "model.layers.26"
    _same(saved.sae, theirs)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_what_saelens_saves_is_read_here(
    sae_lens: Any, tmp_path: Path, rescaled: bool, inference: bool
) -> None:
    config = sae_lens.TopKTrainingSAEConfig(
        d_in=D, d_sae=F, k=K, rescale_acts_by_decoder_norm=rescaled
    )
    theirs = sae_lens.TopKTrainingSAE(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(generator=generator)
    (theirs.save_inference_model if inference else theirs.save_model)(tmp_path / "sae")
    with torch.no_grad():
        expected = theirs(X)
    found = read_sae(tmp_path / "sae").sae
    _close(found(X), expected)
    if inference:
        _same(found, sae_lens.SAE.load_from_disk(tmp_path / "sae"))


@pytest.mark.parametrize("subtracted", [False, True])
def test_thresholds_mean_the_same_here_and_in_saelens(
    sae_lens: Any, tmp_path: Path, subtracted: bool
) -> None:
    config = sae_lens.JumpReLUSAEConfig(d_in=D, d_sae=F, apply_b_dec_to_input=subtracted)
    theirs = sae_lens.JumpReLUSAE(config)
    _fill(theirs)
    theirs.save_model(tmp_path / "theirs")
    found = read_sae(tmp_path / "theirs")
    _same(found.sae, theirs)
    write_sae(found, tmp_path / "ours")
    again = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    assert type(again).__name__ == "JumpReLUSAE"
    _same(found.sae, again)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("widths", [None, [8, 24, F]])
def test_batchtopk_and_matryoshka_of_saelens_are_read(
    sae_lens: Any, tmp_path: Path, rescaled: bool, widths: list[int] | None
) -> None:
    theirs = _batchtopk(sae_lens, widths, rescale_acts_by_decoder_norm=rescaled)
    theirs.topk_threshold.fill_(1.5)
    theirs.save_inference_model(tmp_path / "inference")
    theirs.save_model(tmp_path / "training")
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    for folder in ("inference", "training"):
        _same(read_sae(tmp_path / folder).sae, loaded)


@pytest.mark.parametrize("widths", [None, [8, 24, F]])
def test_loss_and_gradient_are_those_of_saelens(sae_lens: Any, widths: list[int] | None) -> None:
    from sae_lens.saes.sae import TrainStepInput

    from dlmctl.sae.training.gradient import SaeWeights, add_gradient

    theirs = _batchtopk(sae_lens, widths, rescale_acts_by_decoder_norm=False).double()
    x = X.double()
    step = TrainStepInput(x, {}, None, 0, False)
    loss = theirs.training_forward_pass(step).loss
    parameters = [theirs.W_enc, theirs.b_enc, theirs.W_dec, theirs.b_dec]
    wanted = torch.autograd.grad(loss, parameters)
    ours = SaeWeights(D, F, torch.float64)
    with torch.no_grad():
        for mine, other in zip(
            (ours.encoder, ours.bias, ours.decoder, ours.centre), parameters, strict=True
        ):
            mine.copy_(other.T if mine is ours.encoder else other)
    none = torch.empty(0, dtype=torch.int64)
    kind: Any = "batchtopk" if widths is None else "matryoshka"
    outcome = add_gradient(ours, x, K, none, 1, 0.0, "straight", kind, widths or [])
    torch.testing.assert_close(outcome.reconstruction, loss.detach())
    found = [ours.encoder.grad.T, ours.bias.grad, ours.decoder.grad, ours.centre.grad]  # type: ignore[union-attr]
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other)


def _batchtopk(sae_lens: Any, widths: list[int] | None, **settings: Any) -> Any:
    """A BatchTopK autoencoder under training, or a Matryoshka one."""
    if widths is None:
        config = sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, **settings)
        made = sae_lens.BatchTopKTrainingSAE(config)
    else:
        config = sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
            d_in=D, d_sae=F, k=K, matryoshka_widths=widths, **settings
        )
        made = sae_lens.MatryoshkaBatchTopKTrainingSAE(config)
    _fill(made)
    return made


@torch.no_grad()
def _fill(sae: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in sae.parameters():
        parameter.normal_(generator=generator)
