"""Weights on disk: only safetensors, one file or shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dlmctl.records.errors import DataError, MissingInputError
from dlmctl.records.files import read_json

WHOLE_HASH_BYTES = 2**30
SAMPLE_BYTES, SAMPLES = 2**20, 64
ALIGNMENT = 64
"""torch allocates tensors at addresses that are multiples of this many bytes."""


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, shards in order.

    Raises:
        MissingInputError: there are no weights, or a shard that the index names is missing.
        DataError: there are weights, but only in a format that can run code when read.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            files = [directory / Path(name).name for name in names]
            missing = next((file.name for file in files if not file.is_file()), None)
        except (KeyError, AttributeError, TypeError, OSError) as error:
            raise DataError(f"not a safetensors index ({error})", str(index)) from None
        if missing is not None:
            raise MissingInputError(f"{index} names {missing}, which does not exist")
        return files
    if list(directory.glob("*.bin")) or list(directory.glob("*.pt*")):
        raise DataError(
            f"{directory} has no safetensors, only pickled weights, which are not read: convert "
            "them with save_pretrained(..., safe_serialization=True) on a machine you trust"
        )
    raise MissingInputError(f"{directory} has no model.safetensors and no index of shards")


def read_weights(files: list[Path], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """All tensors by their new names, memory-mapped from the files; raises DataError."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    if rename(name) in tensors:
                        raise DataError(f"weight {rename(name)} occurs twice", str(file))
                    tensors[rename(name)] = shard.get_tensor(name)
        except FileNotFoundError:
            raise MissingInputError(f"{file} does not exist") from None
        except (SafetensorError, OSError) as error:
            raise DataError(f"not a whole safetensors file ({error})", str(file)) from None
    return tensors


def stored_dtype(files: list[Path]) -> str:
    """torch's name for the dtype of the first tensor; raises DataError."""
    try:
        with safe_open(files[0], framework="pt") as shard:
            first = next(iter(shard.keys()))
            return str(shard.get_tensor(first).dtype).removeprefix("torch.")
    except (SafetensorError, OSError, StopIteration) as error:
        raise DataError(f"not a whole safetensors file ({error})", str(files[0])) from None


def align(model: nn.Module) -> None:
    """Copy the memory-mapped weights that lie at addresses where torch would not begin a tensor.

    How matrix products on a CPU round depends on the alignment of their operands, and the weights
    of a file begin where its header ends. Without this a model and its checkpoint, with equal
    weights, differ in their last digits, and so would a resumed run.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def first_misfit(model: Any, tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the first weight of a checkpoint that does not fit a model; None: all fit.

    transformers says it only in a table. Names are those of the checkpoint, which are not the
    model's own where transformers joins tensors, as the experts of a mixture.

    Args:
        model: a model of transformers, on any device.
    """
    from transformers.core_model_loading import revert_weight_conversion

    expected = revert_weight_conversion(model, dict(model.state_dict()))
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} belongs to no part of a {type(model).__name__}"
        if (there := [*tensors[name].shape]) != (here := [*expected[name].shape]):
            return f"{name} has the shape {there}, expected {here}"
    return None


def weights_hash(files: list[Path]) -> str:
    """Identity of the weights, 16 hex digits.

    Every byte of a file of up to 1 GiB counts; of a larger file its size, its header and 64 pieces
    of 1 MiB spread over it, so that opening a large model does not mean reading it twice.
    """
    digest = blake2b(digest_size=8)
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            if size <= WHOLE_HASH_BYTES:
                while block := stream.read(2**22):
                    digest.update(block)
                continue
            for piece in range(SAMPLES):
                stream.seek(piece * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
