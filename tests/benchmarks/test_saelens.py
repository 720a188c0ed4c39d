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
