"""Tensors out of a file that torch.save wrote, without running what it says.

Such a file is a zip archive: raw bytes of the tensors, and `data.pkl`, a program that puts them
together. Here it is read as data: a stack machine of the few instructions that a dictionary of
tensors needs, in which a call has a meaning only if it rebuilds a tensor, a parameter or an ordered
dictionary. Anything else is refused.

torch.load(weights_only=True) is not enough for a file of unknown origin: it calls bytearray and
torch.Tensor with any size that the program names (a kilobyte of file took 16 GB with torch 2.13),
inflates compressed storages, and accepts tensors that are larger than their storage.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.records.errors import DataError

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
LARGEST_PROGRAM = 2**24
"""Bytes of `data.pkl`; that of a large model has well under one million."""

FAULTS = (
    zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ArithmeticError,
    LookupError, ValueError, TypeError, AttributeError, RuntimeError,
)  # fmt: skip
"""What zipfile, pickletools and the machine raise on malformed bytes."""


class _Name(NamedTuple):
    """A function or class that the program names."""

    module: str
    name: str


class _Mark:
    """Beginning of a run of stack entries."""


def read_torch_archive(path: Path) -> dict[str, Any]:
    """The dictionary in a file of torch.save: tensors, numbers, texts, nested dictionaries.

    Raises:
        DataError: it is no such archive, it is cut off, or its program does more than put tensors
            together.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            programs = [n for n in archive.namelist() if n.count("/") == 1 and "/data.pkl" in n]
            if len(programs) != 1:
                raise DataError("not a file of torch.save: it has no data.pkl", str(path))
            folder = programs[0].split("/")[0]
            if f"{folder}/byteorder" in archive.namelist() and (
                archive.read(f"{folder}/byteorder") != b"little"
            ):
                raise DataError("its numbers are big-endian, which is not read", str(path))
            if archive.getinfo(programs[0]).file_size > LARGEST_PROGRAM:
                raise DataError("its data.pkl is larger than any list of tensors", str(path))

            def storage(key: str, size: int) -> bytes:
                entry = archive.getinfo(f"{folder}/data/{key}")
                if entry.file_size != size:
                    raise DataError(f"storage {key} has {entry.file_size} bytes, expected {size}")
                if entry.compress_type != zipfile.ZIP_STORED:  # it could inflate to any size
                    raise DataError(f"storage {key} is compressed, which torch.save does not do")
                return archive.read(entry)

            result = _Machine(storage).run(archive.read(programs[0]))
    except DataError as error:
        raise DataError(error.message, error.where or str(path)) from None
    except FAULTS as error:
        raise DataError(f"not a whole file of torch.save ({error})", str(path)) from None
    if not isinstance(result, dict):
        raise DataError("it does not hold a dictionary of tensors", str(path))
    return result


class _Machine:
    """Stack and memory of the program."""

    def __init__(self, storage: Callable[[str, int], bytes]) -> None:
        self._storage = storage
        self._stack: list[Any] = []
        self._memory: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """What is on the stack at the end."""
        for code, argument, _ in pickletools.genops(program):
            if code.name == "STOP":
                return self._stack.pop()
            self._step(code.name, argument)
        raise DataError("its program has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memory[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memory[len(self._memory)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memory[argument])
        elif name == "GLOBAL":
            stack.append(_Name(*argument.split(" ")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Name(module, attribute))
        elif name in _TUPLES:
            size = _TUPLES[name]
            stack[-size:] = [tuple(stack[-size:])]
        elif name in ("TUPLE", "SETITEMS", "APPENDS"):
            self._close(name)
        elif name in ("SETITEM", "APPEND"):
            count = 2 if name == "SETITEM" else 1
            _fill(stack[-count - 1], stack[-count:])
            del stack[-count:]
        elif name == "BINPERSID":
            stack.append(self._load(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif name == "BUILD" and stack[-1] is not None and isinstance(stack[-2], dict):
            stack.pop()  # attributes of an ordered dictionary, such as _metadata
        else:
            raise DataError(f"its program has the instruction {name}, which tensors do not need")

    def _close(self, name: str) -> None:
        """Gather the entries above the mark."""
        start = max(n for n, entry in enumerate(self._stack) if isinstance(entry, _Mark))
        entries = self._stack[start + 1 :]
        del self._stack[start:]
        if name == "TUPLE":
            self._stack.append(tuple(entries))
        else:
            _fill(self._stack[-1], entries)

    def _load(self, identity: Any) -> Tensor:
        """The storage of a tensor, flat."""
        kind, storage, key, _, length = identity
        if kind != "storage" or not isinstance(storage, _Name) or storage.name not in STORAGES:
            raise DataError(f"it holds {storage}, which is no storage of numbers")
        dtype = STORAGES[storage.name]
        data = bytearray(self._storage(str(key), length * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype) if data else torch.zeros(0, dtype=dtype)


def _fill(container: Any, entries: list[Any]) -> None:
    if isinstance(container, dict):
        container.update(zip(entries[::2], entries[1::2], strict=True))
    elif isinstance(container, list):
        container.extend(entries)
    else:
        raise DataError(f"its program adds to a {type(container).__name__}")


def _call(function: Any, arguments: tuple[Any, ...]) -> Any:
    """The meaning of the calls that are known."""
    if function == _Name("collections", "OrderedDict") and not arguments:
        return {}
    if function == _Name("torch._utils", "_rebuild_tensor_v2"):
        flat, offset, shape, stride = arguments[:4]
        if not isinstance(flat, Tensor) or min((offset, *shape, *stride)) < 0:
            raise DataError("it holds a tensor with an impossible shape")
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if 0 not in shape and (last >= len(flat) or math.prod(shape) > len(flat)):
            raise DataError("it holds a tensor that is larger than its storage")
        return flat.as_strided(shape, stride, offset).clone()
    if function == _Name("torch._utils", "_rebuild_parameter"):
        return arguments[0]
    named = ".".join(function) if isinstance(function, _Name) else repr(function)
    raise DataError(f"its program calls {named}, which tensors do not need; it was not run")


_LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
    | {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": _Mark,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
