"""Weights of a network in one file, as its authors publish them, read without running code.

A pickled state dict is read by torch's restricted reader (`weights_only`), which makes tensors and
nothing else. A TorchScript archive contains the network's code and is refused.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from dlmctl.models.weights import read_weights
from dlmctl.records.errors import DataError, MissingInputError

_BLOCK = 2**22


def read_state(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, on the CPU: safetensors, or a pickled state dict.

    Raises:
        MissingInputError: there is no such file.
        DataError: it is TorchScript, contains other things than tensors, or is damaged.
    """
    if not path.is_file():
        raise MissingInputError(f"no file {path}")
    if path.suffix == ".safetensors":
        return read_weights([path], str)
    try:
        program = _is_torchscript(path)
        state = None if program else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DataError(
            "this pickle is damaged or contains more than tensors, and is not read: save the state "
            "dict alone, as safetensors",
            str(path),
        ) from None
    except Exception as error:  # of damaged files, of many kinds
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"these weights cannot be read ({reason})", str(path)) from None
    if program:
        raise DataError(
            "this is TorchScript, a program, which is not run: take the file with the weights "
            "alone (of SSCD the one that ends in .torchvision.pt)",
            str(path),
        )
    if not isinstance(state, dict) or not all(isinstance(each, Tensor) for each in state.values()):
        raise DataError("this is no state dict, tensors by name", str(path))
    return {str(name): tensor for name, tensor in state.items()}


def load_exactly(network: nn.Module, state: dict[str, Tensor], path: Path, what: str) -> None:
    """Give a network weights of the same names and shapes, and no others.

    Counters of batches, which inference does not use, may be missing.

    Args:
        what: the network's name in the error message.

    Raises:
        DataError: a weight is missing, or belongs to another network.
    """
    expected = network.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        if name.endswith(".num_batches_tracked"):
            continue
        if name not in state:
            raise DataError(f"{name} is missing: these are no weights of {what}", str(path))
        if name not in expected:
            raise DataError(f"{name} belongs to no part of {what}", str(path))
        if state[name].shape != expected[name].shape:
            here, there = list(state[name].shape), list(expected[name].shape)
            raise DataError(f"{name} has the shape {here}, and that of {what} {there}", str(path))
    network.load_state_dict({**expected, **state})


def sha256(path: Path) -> str:
    """Of the whole file, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _is_torchscript(path: Path) -> bool:
    """Only TorchScript has a table of constants next to its code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
