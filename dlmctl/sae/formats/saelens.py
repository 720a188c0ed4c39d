"""Folders of SAELens: cfg.json, sae_weights.safetensors, sparsity.safetensors.

Its BatchTopK and Matryoshka autoencoders are saved as jumprelu, with the threshold that was
estimated in training; checkpoints of their training have that threshold as `topk_threshold`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from dlmctl.records.errors import DataError
from dlmctl.sae.formats.parts import (
    PARAMETERS,
    SavedSae,
    assemble,
    read_config,
    safetensors,
    table,
    tensors_of,
    write_json,
)
from dlmctl.sae.topk import JumpReluSae

_THRESHOLDS = {
    "topk": None,
    "jumprelu": "threshold",
    "batchtopk": "topk_threshold",
    "matryoshka_batchtopk": "topk_threshold",
}
"""The architectures that are read, and the tensor of each that has the thresholds."""


def read_saelens(directory: Path) -> SavedSae:
    """An autoencoder of SAELens; raises DataError if it is of another architecture."""
    config, where = read_config(directory / "cfg.json")
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or architecture not in _THRESHOLDS:
        known = ", ".join(_THRESHOLDS)
        raise DataError(f"a '{architecture}' autoencoder; known are {known}", where)
    scaled = config.get("normalize_activations", "none") or "none"
    if scaled != "none":
        raise DataError(f"it wants activations normalized by '{scaled}': fold that first", where)
    rescaled = config.get("rescale_acts_by_decoder_norm")
    if rescaled and architecture == "jumprelu":
        raise DataError(
            "a jumprelu autoencoder has no rescale_acts_by_decoder_norm in SAELens, which would "
            "leave it out: fold that first",
            where,
        )
    k = config.get("k")  # SAELens writes none for jumprelu, and reads none
    if architecture != "topk" and isinstance(k, float) and not k.is_integer():
        k = None  # a mean, which need not be whole
    tensors = safetensors(directory / "sae_weights.safetensors")
    sae = assemble(tensors, PARAMETERS, k, where, _THRESHOLDS[architecture])
    with torch.no_grad():
        if rescaled:  # the threshold is one of rescaled activations already
            norm = sae.W_dec.norm(dim=1)  # [F]
            sae.W_enc *= norm
            sae.b_enc *= norm
            sae.W_dec /= norm[:, None].clamp(min=1e-30)
        if not config.get("apply_b_dec_to_input", True):
            sae.b_enc += sae.b_dec @ sae.W_enc
    rates, file = None, directory / "sparsity.safetensors"
    if file.exists():
        logarithms = safetensors(file).get("sparsity")
        if logarithms is None or tuple(logarithms.shape) != (sae.d_sae,):
            raise DataError(f"tensor 'sparsity' of {sae.d_sae} numbers is missing", str(file))
        rates = 10 ** logarithms.float()
    return SavedSae(sae, table(config, "metadata", where), rates)


def write_saelens(saved: SavedSae, directory: Path) -> None:
    """Write the files into a directory."""
    sae = saved.sae
    config = {
        "architecture": "jumprelu" if isinstance(sae, JumpReluSae) else "topk",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        # Without a version of at least 6, SAELens takes it for an old folder.
        "metadata": {"sae_lens_version": "6.0.0", **saved.metadata},
    }
    write_json(directory / "cfg.json", config)
    save_file(tensors_of(sae), directory / "sae_weights.safetensors")
    if saved.firing_rate is not None:
        rates = (saved.firing_rate.float() + 1e-10).log10()
        save_file({"sparsity": rates}, directory / "sparsity.safetensors")
