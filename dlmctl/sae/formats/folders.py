"""Autoencoders on disk, in the layouts of three libraries.

    saelens               cfg.json, sae_weights.safetensors, sparsity.safetensors
    dictionary_learning   config.json, ae.pt            (the released SAEs of DLM-Scope)
    sparsify              cfg.json, sae.safetensors

Our layout is that of SAELens. What the others fold into their weights, or leave to a switch, is
folded when a folder is read, so that an autoencoder means the same whatever it came from. A new
layout is a reader, a writer and a row of `LAYOUTS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from dlmctl.models.weights import read_weights
from dlmctl.records.errors import DataError, MissingInputError, UsageError
from dlmctl.records.files import publish_directory, read_json
from dlmctl.sae.formats.torch_archive import read_torch_archive
from dlmctl.sae.topk import TopKSae
from dlmctl.settings.sae import Layout
from dlmctl.train.card import Card, write_card

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")
_CORPUS = ("dlm_t_min", "dlm_t_max", "dlm_pack", "dlm_hide_prompt")
"""How the corpus was masked and cut; our metadata and dictionary_learning's use the same names."""


@dataclass(frozen=True)
class SavedSae:
    """An autoencoder and what is known about it."""

    sae: TopKSae
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """SAELens's names (model_name, hook_name, context_size), and ours with the prefix dlm_:
    dlm_layer, dlm_positions, dlm_t_min, dlm_t_max, dlm_pack, dlm_hide_prompt."""
    firing_rate: Tensor | None = None
    """[F], share of the tokens on which each latent was active, if it was counted."""


def layout_of(directory: Path) -> Layout:
    """The library whose folder it is; raises MissingInputError if it is none."""
    for layout, row in LAYOUTS.items():
        if (directory / row.weights).exists():
            return layout
    raise MissingInputError(f"{directory} is no autoencoder: it has none of {_weight_files()}")


def find_saes(directories: Sequence[Path]) -> list[Path]:
    """The autoencoders among these folders and in the folders under them, in natural order.

    Raises:
        MissingInputError: a directory has none.
    """
    found: list[Path] = []
    for directory in directories:
        if any((directory / row.weights).exists() for row in LAYOUTS.values()):
            found.append(directory)
            continue
        under = {path.parent for row in LAYOUTS.values() for path in directory.rglob(row.weights)}
        # A folder that is being written has a name that begins with a dot.
        whole = [p for p in under if not any(x[0] == "." for x in p.relative_to(directory).parts)]
        if not whole:
            raise MissingInputError(
                f"{directory} holds no autoencoder: there is none of {_weight_files()}"
            )
        found += sorted(whole, key=_natural_order)
    return found


def read_saes(directories: Sequence[Path]) -> dict[str, SavedSae]:
    """All of `find_saes`, by their folders' names."""
    return {str(folder): read_sae(folder) for folder in find_saes(directories)}


def trained_with(saved: Mapping[str, SavedSae], name: str, default: Any, option: str) -> Any:
    """The value that the metadata of all autoencoders agree on.

    Args:
        saved: autoencoders by their folders.
        name: of the metadata.
        default: value of a folder that does not say; its type is the type of the value.
        option: command-line option that decides it instead, for the messages.

    Raises:
        UsageError: they differ.
        DataError: one has a value of another type.
    """
    folders: dict[Any, str] = {}
    for folder, one in saved.items():
        value = one.metadata.get(name)
        value = default if value is None else value
        # For Python True is an int, and 1 is no float; here it is the other way round.
        kind = (float, int) if isinstance(default, float) else type(default)
        if not isinstance(value, kind) or isinstance(value, bool) != isinstance(default, bool):
            wanted = type(default).__name__
            raise DataError(f"'{name}' is {value!r}, expected {wanted}: give {option}", folder)
        folders.setdefault(value, folder)
    if len(folders) > 1:
        (first, here), (second, there) = list(folders.items())[:2]
        raise UsageError(
            f"the autoencoders were trained with another {name}: {here} with {first}, {there} "
            f"with {second}: give {option}, or take each kind by itself"
        )
    return next(iter(folders))


def read_sae(directory: Path) -> SavedSae:
    """An autoencoder in any of the layouts, in float32.

    Raises:
        MissingInputError: the folder is none of them.
        DataError: a file is broken, or it is another kind of autoencoder.
    """
    return LAYOUTS[layout_of(directory)].read(directory)


def write_sae(
    saved: SavedSae, directory: Path, layout: Layout = "saelens", card: Card | None = None
) -> None:
    """Write a folder that the library loads; it appears whole or not at all."""

    def fill(beside: Path) -> None:
        LAYOUTS[layout].write(saved, beside)
        if card is not None:
            write_card(beside, card)

    publish_directory(directory, fill)


def _read_saelens(directory: Path) -> SavedSae:
    config, where = _read_config(directory / "cfg.json")
    if config.get("architecture") != "topk":
        raise DataError(f"a '{config.get('architecture')}' autoencoder; only topk is known", where)
    scaled = config.get("normalize_activations", "none") or "none"
    if scaled != "none":
        raise DataError(f"it wants activations normalized by '{scaled}': fold that first", where)
    sae = _assemble(_safetensors(directory / "sae_weights.safetensors"), PARAMETERS, config, where)
    with torch.no_grad():
        if config.get("rescale_acts_by_decoder_norm"):
            norm = sae.W_dec.norm(dim=1)  # [F]
            sae.W_enc *= norm
            sae.b_enc *= norm
            sae.W_dec /= norm[:, None].clamp(min=1e-30)
        if not config.get("apply_b_dec_to_input", True):
            sae.b_enc += sae.b_dec @ sae.W_enc
    rates, file = None, directory / "sparsity.safetensors"
    if file.exists():
        logarithms = _safetensors(file).get("sparsity")
        if logarithms is None or tuple(logarithms.shape) != (sae.d_sae,):
            raise DataError(f"tensor 'sparsity' of {sae.d_sae} numbers is missing", str(file))
        rates = 10 ** logarithms.float()
    return SavedSae(sae, _table(config, "metadata", where), rates)


def _write_saelens(saved: SavedSae, directory: Path) -> None:
    sae = saved.sae
    config = {
        "architecture": "topk",
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
    _write_json(directory / "cfg.json", config)
    save_file(_tensors(sae), directory / "sae_weights.safetensors")
    if saved.firing_rate is not None:
        rates = (saved.firing_rate.float() + 1e-10).log10()
        save_file({"sparsity": rates}, directory / "sparsity.safetensors")


def _read_dictionary_learning(directory: Path) -> SavedSae:
    config, where = _read_config(directory / "config.json")
    trainer, buffer = _table(config, "trainer", where), _table(config, "buffer", where)
    kind = trainer.get("dict_class", "AutoEncoderTopK")
    if kind != "AutoEncoderTopK":
        raise DataError(f"a '{kind}'; only AutoEncoderTopK is known", where)
    file = directory / "ae.pt"
    tensors = _transposed(read_torch_archive(file), "encoder.weight", "decoder.weight")
    k = tensors.get("k", trainer.get("k"))
    if isinstance(k, Tensor):
        k = k.item() if k.numel() == 1 else None
    names = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")
    sae = _assemble(tensors, names, {"k": k}, str(file))
    known = {
        "model_name": trainer.get("lm_name"),
        "dlm_layer": trainer.get("layer"),
        "context_size": buffer.get("ctx_len"),
        "dlm_positions": buffer.get("dlm_mask_policy"),
        **{name: buffer.get(name) for name in _CORPUS},
    }
    if isinstance(known["dlm_layer"], int):
        known["hook_name"] = f"model.layers.{known['dlm_layer']}"
    return SavedSae(sae, {name: value for name, value in known.items() if value is not None})


def _write_dictionary_learning(saved: SavedSae, directory: Path) -> None:
    sae, known, tensors = saved.sae, saved.metadata, _tensors(saved.sae)
    state = {
        "b_dec": tensors["b_dec"],
        "k": torch.tensor(sae.k, dtype=torch.int32),
        "threshold": torch.tensor(-1.0),
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].T.contiguous(),
    }
    torch.save(state, directory / "ae.pt")
    trainer = {
        "trainer_class": "TopKTrainer",
        "dict_class": "AutoEncoderTopK",
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
    _write_json(directory / "config.json", {"trainer": trainer, "buffer": buffer})


def _read_sparsify(directory: Path) -> SavedSae:
    config, where = _read_config(directory / "cfg.json")
    if config.get("transcode") or config.get("skip_connection"):
        raise DataError("a transcoder, not an autoencoder of one activation", where)
    if config.get("activation", "topk") != "topk":
        raise DataError(f"its activation is '{config['activation']}'; only topk is known", where)
    file = directory / "sae.safetensors"
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    tensors = _transposed(_safetensors(file), "encoder.weight")
    return SavedSae(_assemble(tensors, names, config, str(file)))


def _write_sparsify(saved: SavedSae, directory: Path) -> None:
    sae, tensors = saved.sae, _tensors(saved.sae)
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
    _write_json(directory / "cfg.json", config)


def _assemble(
    tensors: Mapping[str, Any],
    names: tuple[str, ...],
    config: Mapping[str, Any],
    where: str,
) -> TopKSae:
    """An autoencoder from the tensors that have the place of `PARAMETERS`, checked.

    Args:
        names: of W_enc [d, F], b_enc [F], W_dec [F, d] and b_dec [d] among the tensors.
        config: with `k`.
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
    k = config.get("k")
    if not isinstance(k, int) or not 1 <= k <= d_sae:
        raise DataError(f"k is {k}, expected a number of latents from 1 to {d_sae}", where)
    sae = TopKSae(d_in, d_sae, k)
    for name, part in zip(PARAMETERS, parts, strict=True):
        getattr(sae, name).data = part
    return sae


def _transposed(tensors: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """With the weights of linear layers, whose outputs come first, the other way round."""
    matrices = {name: tensors[name].T for name in names if isinstance(tensors.get(name), Tensor)}
    return {**tensors, **matrices}


def _table(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """An object within a configuration; raises DataError if it is something else."""
    table = config.get(name) or {}
    if not isinstance(table, dict):
        raise DataError(f"'{name}' is {type(table).__name__}, expected an object", where)
    return table


def _read_config(file: Path) -> tuple[dict[str, Any], str]:
    """A configuration, and its place for messages."""
    return read_json(file), str(file)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _tensors(sae: TopKSae) -> dict[str, Tensor]:
    return {name: value.detach().float().cpu() for name, value in sae.state_dict().items()}


def _safetensors(path: Path) -> dict[str, Tensor]:
    return read_weights([path], lambda name: name)


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """layer5-k50 before layer10-k50."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _weight_files() -> str:
    return ", ".join(f"{row.weights} ({layout})" for layout, row in LAYOUTS.items())


class _Row(NamedTuple):
    weights: str
    """File by which a folder is recognised."""
    read: Callable[[Path], SavedSae]
    write: Callable[[SavedSae, Path], None]


LAYOUTS: dict[Layout, _Row] = {
    "saelens": _Row("sae_weights.safetensors", _read_saelens, _write_saelens),
    "dictionary_learning": _Row("ae.pt", _read_dictionary_learning, _write_dictionary_learning),
    "sparsify": _Row("sae.safetensors", _read_sparsify, _write_sparsify),
}
