"""What the readers and writers of all layouts share: `SavedSae`, and checked tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dlmctl.models.weights import read_weights
from dlmctl.records.errors import DataError
from dlmctl.records.files import read_json
from dlmctl.sae.topk import JumpReluSae, TopKSae

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class SavedSae:
    """An autoencoder and what is known about it."""

    sae: TopKSae
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """SAELens's names (model_name, hook_name, context_size), and ours with the prefix dlm_:
    dlm_layer, dlm_positions, dlm_t_min, dlm_t_max, dlm_pack, dlm_hide_prompt; dlm_kind unless it is
    topk, and dlm_prefixes of a Matryoshka autoencoder."""
    firing_rate: Tensor | None = None
    """[F], share of the tokens on which each latent was active, if it was counted."""


def assemble(
    tensors: Mapping[str, Any],
    names: tuple[str, ...],
    k: object,
    where: str,
    threshold: str | None = None,
) -> TopKSae:
    """An autoencoder from the tensors that have the place of `PARAMETERS`, checked.

    Args:
        names: of W_enc [d, F], b_enc [F], W_dec [F, d] and b_dec [d] among the tensors.
        k: what the folder says of K.
        threshold: name of the thresholds, [F] or a single number, of a JumpReLU autoencoder; its
            `k` may be missing.

    Raises:
        DataError: one is missing or has another shape, or K is no number of latents.
    """
    missing = [name for name in names if not isinstance(tensors.get(name), Tensor)]
    if missing:
        raise DataError(f"tensor '{missing[0]}' is missing", where)
    parts = [tensors[name].float().contiguous() for name in names]
    if parts[0].dim() != 2:
        raise DataError(f"tensor '{names[0]}' is no matrix", where)
    d_in, d_sae = parts[0].shape
    shapes = [(d_in, d_sae), (d_sae,), (d_sae, d_in), (d_in,)]
    for name, part, shape in zip(names, parts, shapes, strict=True):
        if tuple(part.shape) != shape:
            raise DataError(f"'{name}' has shape {tuple(part.shape)}, expected {shape}", where)
    sae: TopKSae
    if threshold is None:
        sae = TopKSae(d_in, d_sae, _checked_k(k, d_sae, where))
    else:
        sae = JumpReluSae(d_in, d_sae, None if k is None else _checked_k(k, d_sae, where))
        sae.threshold.copy_(_thresholds(tensors.get(threshold), threshold, d_sae, where))
    for name, part in zip(PARAMETERS, parts, strict=True):
        getattr(sae, name).data = part
    return sae


def _checked_k(k: object, d_sae: int, where: str) -> int:
    if isinstance(k, Tensor) and k.numel() == 1:
        k = k.item()
    if isinstance(k, float) and k.is_integer():
        k = int(k)
    if not isinstance(k, int) or not 1 <= k <= d_sae:
        raise DataError(f"k is {k}, expected a number of latents from 1 to {d_sae}", where)
    return k


def _thresholds(value: object, name: str, d_sae: int, where: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise DataError(f"tensor '{name}' is missing", where)
    if value.numel() != 1 and tuple(value.shape) != (d_sae,):
        raise DataError(f"'{name}' has shape {tuple(value.shape)}, expected {(d_sae,)}", where)
    if bool(value.isnan().any()):
        raise DataError(f"'{name}' has NaN in it", where)
    return value.float()


def transposed(tensors: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """With the weights of linear layers, whose outputs come first, the other way round."""
    matrices = {name: tensors[name].T for name in names if isinstance(tensors.get(name), Tensor)}
    return {**tensors, **matrices}


def table(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """An object within a configuration; raises DataError if it is something else."""
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise DataError(f"'{name}' is {type(found).__name__}, expected an object", where)
    return found


def read_config(file: Path) -> tuple[dict[str, Any], str]:
    """A configuration, and its place for messages."""
    return read_json(file), str(file)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def tensors_of(sae: TopKSae) -> dict[str, Tensor]:
    """`PARAMETERS`, and `threshold` if it has one, in float32 on the CPU."""
    return {name: value.detach().float().cpu() for name, value in sae.state_dict().items()}


def safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file; raises DataError if it is not whole."""
    return read_weights([path], lambda name: name)
