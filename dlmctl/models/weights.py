"""Weights on disk: safetensors alone, one file or shards, under the names of their own family.

LLaDA's checkpoints keep the names of OLMo; they are a Llama under other names, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import blake2b
from itertools import chain
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dlmctl.records.errors import DataError, MissingInputError
from dlmctl.records.files import read_json

LLADA_LAYER = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}
LLADA_TOP = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}

WHOLE_HASH_BYTES = 2**30
SAMPLE_BYTES, SAMPLES = 2**20, 64
ALIGNMENT = 64
"""Bytes of which the address of a tensor is a multiple, where torch allocates it."""


def from_llada(name: str) -> str:
    """Llama's name for a weight of an original LLaDA checkpoint; other names stay."""
    if match := re.fullmatch(r"(?:model\.)?transformer\.blocks\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{LLADA_LAYER.get(part, part)}.{kind}"
    if match := re.fullmatch(r"(?:model\.)?transformer\.(\w+)\.(weight|bias)", name):
        part, kind = match.groups()
        return f"{LLADA_TOP.get(part, part)}.{kind}"
    return name


def to_llada(name: str) -> str:
    """The inverse of `from_llada`."""
    layer_names = {new: old for old, new in LLADA_LAYER.items()}
    top_names = {new: old for old, new in LLADA_TOP.items()}
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        return f"model.transformer.blocks.{layer}.{layer_names[part]}.{kind}"
    part, _, kind = name.rpartition(".")
    return f"model.transformer.{top_names[part]}.{kind}"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, shards in order.

    Raises:
        MissingInputError: a shard that the index names is not there.
        DataError: there are weights, but only in a format that can run code when it is read.
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
            raise MissingInputError(f"{index} names {missing}, which is not there")
        return files
    if list(directory.glob("*.bin")) or list(directory.glob("*.pt*")):
        raise DataError(
            f"{directory} has no safetensors, only pickled weights, which are not read: convert "
            "them with save_pretrained(..., safe_serialization=True) on a machine you trust"
        )
    raise MissingInputError(f"{directory} has no model.safetensors and no index of shards")


def read_weights(files: list[Path], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """All tensors by name, mapped from the files rather than copied; raises DataError."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    if rename(name) in tensors:
                        raise DataError(f"weight {rename(name)} is there twice", str(file))
                    tensors[rename(name)] = shard.get_tensor(name)
        except FileNotFoundError:
            raise MissingInputError(f"{file} is not there") from None
        except (SafetensorError, OSError) as error:
            raise DataError(f"not a whole safetensors file ({error})", str(file)) from None
    return tensors


def stored_dtype(files: list[Path]) -> str:
    """The dtype of the first tensor, as torch names it; raises DataError."""
    try:
        with safe_open(files[0], framework="pt") as shard:
            first = next(iter(shard.keys()))
            return str(shard.get_tensor(first).dtype).removeprefix("torch.")
    except (SafetensorError, OSError, StopIteration) as error:
        raise DataError(f"not a whole safetensors file ({error})", str(files[0])) from None


def align(model: nn.Module) -> None:
    """Copy the weights that a file, which is mapped, has where torch would not begin a tensor.

    The products of a CPU round by where their operands begin, and the weights of a file begin where
    its names end. Without this a model and a checkpoint with equal weights differ in their last
    digits, and so would a run that is resumed.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def weights_hash(files: list[Path]) -> str:
    """Identity of the weights, 16 hex digits.

    Up to 1 GiB a file counts with every byte, beyond with its size, its header and 64 pieces of
    1 MiB spread over it, so that opening a large model does not mean reading it twice.
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
