"""Folders of dictionary_learning: config.json, ae.pt (the released autoencoders of DLM-Scope)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.models.torch_archive import read_torch_archive
from dlmctl.records.errors import DataError
from dlmctl.sae.formats.parts import (
    PARAMETERS,
    SavedSae,
    assemble,
    read_config,
    table,
    tensors_of,
    transposed,
    write_json,
)
from dlmctl.sae.topk import JumpReluSae

_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")
_CORPUS = ("dlm_t_min", "dlm_t_max", "dlm_pack", "dlm_hide_prompt")
"""How the corpus was masked and cut; our metadata and theirs use the same names."""


class _Class(NamedTuple):
    trainer: str
    names: tuple[str, ...]
    """Tensors in the place of `PARAMETERS`."""
    kind: str | None
    """`dlm_kind`."""


_CLASSES = {
    "AutoEncoderTopK": _Class("TopKTrainer", _LINEAR, None),
    "BatchTopKSAE": _Class("BatchTopKTrainer", _LINEAR, "batchtopk"),
    "MatryoshkaBatchTopKSAE": _Class("MatryoshkaBatchTopKTrainer", PARAMETERS, "matryoshka"),
    "JumpReluAutoEncoder": _Class("JumpReluTrainer", PARAMETERS, None),
}


def read_dictionary_learning(directory: Path) -> SavedSae:
    """An autoencoder of one of `_CLASSES`.

    Raises:
        DataError: it is of another class, or the threshold was not estimated in training.
    """
    config, where = read_config(directory / "config.json")
    trainer, buffer = table(config, "trainer", where), table(config, "buffer", where)
    name = _class_name(trainer, where)
    _, names, kind = _CLASSES[name]
    file = directory / "ae.pt"
    tensors = read_torch_archive(file)
    if names is _LINEAR:
        tensors = transposed(tensors, "encoder.weight", "decoder.weight")
    threshold = None if name == "AutoEncoderTopK" else "threshold"
    sae = assemble(tensors, names, tensors.get("k", trainer.get("k")), str(file), threshold)
    if isinstance(sae, JumpReluSae) and kind and bool((sae.threshold < 0).any()):
        raise DataError(
            "its threshold is below 0, which says that none was estimated in training", str(file)
        )
    if name == "JumpReluAutoEncoder":  # which encodes x, not x - b_dec
        with torch.no_grad():
            sae.b_enc += sae.b_dec @ sae.W_enc
    known = {
        "model_name": trainer.get("lm_name"),
        "dlm_layer": trainer.get("layer"),
        "context_size": buffer.get("ctx_len"),
        "dlm_positions": buffer.get("dlm_mask_policy"),
        **{name: buffer.get(name) for name in _CORPUS},
        "dlm_kind": kind,
        "dlm_prefixes": _prefixes(tensors.get("group_sizes")),
    }
    if isinstance(known["dlm_layer"], int):
        known["hook_name"] = f"model.layers.{known['dlm_layer']}"
    return SavedSae(sae, {name: value for name, value in known.items() if value is not None})


def _class_name(trainer: Mapping[str, Any], where: str) -> str:
    """The class of a dictionary; that of its trainer where it is not named."""
    trained_by = str(trainer.get("trainer_class", "TopKTrainer"))  # anything may stand there
    by_trainer = {row.trainer: name for name, row in _CLASSES.items()}
    name = str(trainer.get("dict_class") or by_trainer.get(trained_by, trained_by))
    if name not in _CLASSES:
        raise DataError(f"a '{name}'; known are {', '.join(_CLASSES)}", where)
    return name


def _prefixes(sizes: object) -> list[int] | None:
    """Ends of the groups of a Matryoshka autoencoder."""
    return sizes.cumsum(0).tolist() if isinstance(sizes, Tensor) and sizes.dim() == 1 else None


def write_dictionary_learning(saved: SavedSae, directory: Path) -> None:
    """Write the files into a directory.

    One threshold for all latents goes into a BatchTopKSAE; several, or one of an autoencoder whose
    K is not known, into a JumpReluAutoEncoder.
    """
    sae, known, tensors = saved.sae, saved.metadata, tensors_of(saved.sae)
    name, lowest = "AutoEncoderTopK", torch.tensor(-1.0)
    if isinstance(sae, JumpReluSae):
        lowest, highest = tensors["threshold"].aminmax()
        alike = sae.k is not None and bool(lowest >= 0) and bool(lowest == highest)
        name = "BatchTopKSAE" if alike else "JumpReluAutoEncoder"
    if name == "JumpReluAutoEncoder":
        state = {**tensors, "b_enc": tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]}
    else:
        state = {
            "b_dec": tensors["b_dec"],
            "k": torch.tensor(sae.k, dtype=torch.int32),
            "threshold": lowest.clone(),
            "encoder.weight": tensors["W_enc"].T.contiguous(),
            "encoder.bias": tensors["b_enc"],
            "decoder.weight": tensors["W_dec"].T.contiguous(),
        }
    torch.save(state, directory / "ae.pt")
    trainer = {
        "trainer_class": _CLASSES[name].trainer,
        "dict_class": name,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "k": sae.k,
        "layer": known.get("dlm_layer"),
        "lm_name": known.get("model_name"),
    }
    buffer = {
        "d_submodule": sae.d_in,
        "ctx_len": known.get("context_size"),
        "dlm_mask_policy": known.get("dlm_positions"),
        **{name: known.get(name) for name in _CORPUS},
    }
    write_json(directory / "config.json", {"trainer": trainer, "buffer": buffer})
