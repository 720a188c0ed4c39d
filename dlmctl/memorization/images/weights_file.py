"""Weights of a network in one file, as its authors publish them, read without running code.

A file of torch.save is read as data (`models/torch_archive`). TorchScript is a program, and files
older than torch 1.6 are pickles all through: both are refused.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from torch import Tensor, nn

from dlmctl.models.torch_archive import read_torch_archive
from dlmctl.models.weights import read_weights
from dlmctl.records.errors import DataError, MissingInputError

_BLOCK = 2**22


def read_state(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, on the CPU: safetensors, or a state dict of torch.save.

    Raises:
        MissingInputError: there is no such file.
        DataError: it is TorchScript or a pickle, has other things than tensors, or is damaged.
    """
    if not path.is_file():
        raise MissingInputError(f"no file {path}")
    if path.suffix == ".safetensors":
        return read_weights([path], str)
    if not _begins_as_archive(path):
        raise DataError(
            "no archive of torch.save, and a pickle is not read; if you trust it, convert it: "
            "python -c 'import sys, torch; from safetensors.torch import save_file; save_file("
            'torch.load(sys.argv[1], "cpu", weights_only=True), sys.argv[2])'
            "' FILE FILE.safetensors",
            str(path),
        )
    if _is_torchscript(path):
        raise DataError(
            "this is TorchScript, a program, which is not run: take the file with the weights "
            "alone (of SSCD the one that ends in .torchvision.pt)",
            str(path),
        )
    state = read_torch_archive(path)
    if not all(isinstance(each, Tensor) for each in state.values()):
        raise DataError("this is no state dict, tensors by name", str(path))
    return state


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


def _begins_as_archive(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"PK"


def _is_torchscript(path: Path) -> bool:
    """Only TorchScript has a table of constants next to its code."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, LookupError, RuntimeError):
        return False  # reading it says what is wrong
