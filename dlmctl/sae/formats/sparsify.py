"""Folders of sparsify: cfg.json, sae.safetensors. It has Top-K autoencoders alone."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from dlmctl.records.errors import DataError, UsageError
from dlmctl.sae.formats.parts import (
    SavedSae,
    assemble,
    read_config,
    safetensors,
    tensors_of,
    transposed,
    write_json,
)
from dlmctl.sae.topk import JumpReluSae


def read_sparsify(directory: Path) -> SavedSae:
    """An autoencoder of sparsify; raises DataError if it is a transcoder or not Top-K."""
    config, where = read_config(directory / "cfg.json")
    if config.get("transcode") or config.get("skip_connection"):
        raise DataError("a transcoder, not an autoencoder of one activation", where)
    if config.get("activation", "topk") != "topk":
        raise DataError(f"its activation is '{config['activation']}'; only topk is known", where)
    file = directory / "sae.safetensors"
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    tensors = transposed(safetensors(file), "encoder.weight")
    return SavedSae(assemble(tensors, names, config.get("k"), str(file)))


def write_sparsify(saved: SavedSae, directory: Path) -> None:
    """Write the files into a directory; raises UsageError for a JumpReLU autoencoder."""
    sae, tensors = saved.sae, tensors_of(saved.sae)
    if isinstance(sae, JumpReluSae):
        raise UsageError(
            "sparsify has no autoencoders with thresholds: give --to saelens or dictionary_learning"
        )
    state = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    save_file(state, directory / "sae.safetensors")
    config = {
        "activation": "topk",
        "expansion_factor": sae.d_sae // sae.d_in,
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
    }
    write_json(directory / "cfg.json", config)
