"""A CUDA device that is not there: tensors that say cuda:0, with values that the CPU computes.

    with mirrored() as ledger:      # torch.cuda.is_available() is true in here
        ...any code...
    ledger.waits                    # how often the host waited for the device, by line and why
    ledger.mixes                    # operations that were refused, by line and what they were

It must be imported before torch, which looks for its CUDA hooks once; so a test starts a process of
its own. The hooks are C++ (guard.cpp), which `build` compiles.

An operation on tensors of two devices is refused as CUDA refuses it. What makes a host wait for a
device is noted with the line of dlmctl that asked for it:

    value   .item(), float(x), `if x`, equal        the host needs a number
    size    nonzero, x[mask], bincount, unique      the shape of a result is data
    fetch   .cpu(), .tolist()                       a copy to the host
    push    torch.tensor(…, device=…), x.to(…)      a copy from memory that is not pinned, or blocks

It counts kernels too: operations that are no views. Attention is that of the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, ValuesView
from pathlib import Path
from typing import Any

from ledger import ACTIVE, Ledger, current

GUARD = Path(__file__).with_name("guard.cpp")


def build(library: Path) -> None:
    """Compile the guard.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    home = Path(spec.origin).parent
    subprocess.run(
        ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{home}/include", GUARD, "-o", library,
         f"-L{home}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home}/lib"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip


def load(library: Path) -> None:
    """Give torch the guard, before it is imported."""
    assert "torch" not in sys.modules, "the hooks must be there before torch is imported"
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


guard = Path(os.environ["DLMCTL_TEST_GUARD"])
if not guard.exists():
    build(guard)
load(guard)

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  imports what only a CUDA build has once CUDA is available
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

DEVICE = torch.device("cuda:0")
aten = torch.ops.aten
VALUE = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
SIZE = {
    aten.nonzero.default, aten.masked_select.default, aten.bincount.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip
INDEXING = {
    aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default,
    aten.index_put_.default, aten._index_put_impl_.default,
}  # fmt: skip
COPIES = {aten.copy_.default, aten._to_copy.default}
NO_NUMBERS = {
    aten.stack.default, aten.equal.default, aten.searchsorted.Tensor, aten.bucketize.Tensor,
}  # fmt: skip
"""Those that take no single number of the CPU either."""
NO_KERNEL = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand",
    "slice", "select", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "split",
    "split_with_sizes", "unbind", "diagonal", "unfold", "lift_fresh", "chunk", "empty",
    "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense",
}  # fmt: skip


class Mirrored(torch.Tensor):
    """A tensor that says cuda:0; `inside` has its values."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> Mirrored:
        made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inside.size(), inside.stride(), inside.storage_offset(), dtype=inside.dtype,
            layout=inside.layout, device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.inside = inside
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {}, current())

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Mirrored({self.inside})"

    def tolist(self) -> Any:
        """Its numbers, by way of a copy."""
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        """What CUDA says."""
        raise TypeError(current().mix("can't convert cuda:0 device type tensor to numpy"))

    def data_ptr(self) -> int:
        """The address of its values."""
        return self.inside.data_ptr()

    def untyped_storage(self) -> Any:
        """The storage of its values."""
        return self.inside.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copy = Mirrored(self.inside.detach().clone()).requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copy._is_param = True  # type: ignore[attr-defined]
            memo[id(self)] = copy
        return memo[id(self)]


class Mode(TorchDispatchMode):
    """Sends every operation through `dispatch`."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {}, self.ledger)


def dispatch(func: Any, args: Any, kwargs: dict[str, Any], ledger: Ledger) -> Any:
    """An operation: on the device if a tensor or the argument `device` is of it."""
    leaves = [*flat((args, kwargs.values()))]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    here = [x for x in tensors if isinstance(x, Mirrored)]
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if not here and target != "cuda":
        return func(*args, **kwargs)
    if any(isinstance(x, torch.Generator) and x.device.type == "cpu" for x in leaves):
        raise ledger.mix(f"{func} has a generator of the CPU")
    check_devices(func, args, kwargs, tensors, ledger)
    note_waits(func, args, kwargs, target, ledger)
    name = func._schema.name.split("::")[1]
    ledger.kernels += name not in NO_KERNEL
    # 1. The operation itself, on the values.
    inner_args = mapped(inside, args)
    inner_kwargs = {name: mapped(inside, x) for name, x in kwargs.items()}
    if target is not None:
        inner_kwargs["device"] = torch.device("cpu")
        inner_kwargs.pop("pin_memory", None)
    result = compute(func, inner_args, inner_kwargs)
    # 2. The result is where CUDA would have it; what was changed in place is the tensor given.
    if target == "cpu" or func is aten._local_scalar_dense.default:
        return result
    if func is aten.copy_.default and not isinstance(args[0], Mirrored):
        return args[0]
    given = {id(x.inside): x for x in here}
    return mapped(lambda x: given[id(x)] if id(x) in given else wrapped(x), result)


def flat(x: Any) -> Iterator[Any]:
    """What is in lists within lists; those of operations need no more, and torch's is slow."""
    if isinstance(x, (list, tuple, ValuesView)):
        for inner in x:
            yield from flat(inner)
    else:
        yield x


def mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """The same lists with a function of each."""
    if isinstance(x, (list, tuple)):
        return type(x)([mapped(function, inner) for inner in x])
    return function(x)


def inside(x: Any) -> Any:
    """The values of a tensor of the device."""
    return x.inside if isinstance(x, Mirrored) else x


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation by the CPU, which counts floats alone in a histogram."""
    if func is aten.histc.default and not args[0].is_floating_point():
        return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


FULL = False
"""Whether the device has no memory left."""


def limit_memory(fraction: float, device: Any = None) -> None:
    """`torch.cuda.set_per_process_memory_fraction`, which knows all and nothing."""
    global FULL
    FULL = fraction == 0


def wrapped(x: Any) -> Any:
    """On the device, if it is a tensor."""
    if FULL:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return Mirrored(x) if isinstance(x, Tensor) else x


def check_devices(
    func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], ledger: Ledger
) -> None:
    """Refuse what CUDA refuses: tensors of two devices, but for copies and single numbers."""
    away = [x for x in tensors if not isinstance(x, Mirrored)]
    if func in COPIES or len(away) in (0, len(tensors)):
        return
    if func in INDEXING and isinstance(args[0], Mirrored):
        # Indices of the host are copied first.
        indices = [x for x in args[1] if x is not None and not isinstance(x, Mirrored)]
        for _ in indices:
            ledger.wait("push")
        away = [x for x in away if not any(x is index for index in indices)]
    written = written_to(func, args, kwargs)
    if any(x.dim() or x in written or func in NO_NUMBERS for x in away):
        shapes = [tuple(x.shape) for x in away]
        raise ledger.mix(f"{func} has tensors {shapes} on the CPU, others on cuda:0")


def written_to(func: Any, args: Any, kwargs: dict[str, Any]) -> set[Any]:
    """The arguments that an operation changes."""
    declared = func._schema.arguments
    given = {known.name: x for known, x in zip(declared, args, strict=False)} | kwargs
    changed = [
        given[known.name]
        for known in declared
        if known.alias_info is not None and known.alias_info.is_write and known.name in given
    ]
    return {x for x in flat(changed) if isinstance(x, Tensor)}


def note_waits(
    func: Any, args: Any, kwargs: dict[str, Any], target: str | None, ledger: Ledger
) -> None:
    """Note whether the host waits."""
    if func in VALUE:
        ledger.wait("value")
    elif func in SIZE:
        ledger.wait("size")
    elif func in INDEXING:
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                ledger.wait("size")
    elif func is aten._to_copy.default and target is not None:
        from_device = isinstance(args[0], Mirrored)
        if from_device and target == "cpu":
            ledger.wait("fetch")
        elif not from_device and target == "cuda" and not asynchronous(args[0], kwargs):
            ledger.wait("push")
    elif func is aten.copy_.default:
        to, source = (isinstance(x, Mirrored) for x in args[:2])
        blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if source and not to:
            ledger.wait("fetch")
        elif to and not source and (blocks or not pinned(args[1])):
            ledger.wait("push")


PINNED: set[int] = set()
"""Addresses of host memory that a copy need not wait for; freed ones may be among them."""


def pinned(x: Tensor) -> bool:
    return x.data_ptr() in PINNED


def asynchronous(x: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a copy to the device goes on by itself."""
    return bool(kwargs.get("non_blocking")) and pinned(x)


def pin_memory(x: Tensor, device: Any = None) -> Tensor:
    """`Tensor.pin_memory`: a copy that is remembered."""
    copy = x.clone()
    PINNED.add(copy.data_ptr())
    return copy


def number(x: Mirrored) -> Any:
    """What `torch.tensor` reads of a list of tensors, where no mode sees it."""
    current().wait("value")
    return x.inside.item()


LIBRARY = torch.library.Library("aten", "IMPL", "CUDA")
LIBRARY.impl("_local_scalar_dense", number)

CUDA = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "_lazy_init": lambda: None,
    "get_device_name": lambda *_: "mirror",
    "get_device_capability": lambda *_: (9, 0),
    "mem_get_info": lambda *_: (80 << 30, 80 << 30),
    "max_memory_allocated": lambda *_: 1 << 20,
    "memory_allocated": lambda *_: 0,
    "reset_peak_memory_stats": lambda *_: None,
    "set_per_process_memory_fraction": limit_memory,
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
    "set_device": lambda *_: None,
    "manual_seed": lambda *_: None,
    "manual_seed_all": lambda *_: None,
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
    "set_rng_state": lambda *_: None,
    "set_rng_state_all": lambda *_: None,
}


@contextlib.contextmanager
def mirrored() -> Iterator[Ledger]:
    """Within it, CUDA is there."""
    ledger = Ledger()
    with contextlib.ExitStack() as undo:
        for name, value in CUDA.items():
            undo.callback(setattr, torch.cuda, name, getattr(torch.cuda, name))
            setattr(torch.cuda, name, value)
        undo.callback(setattr, torch.Tensor, "pin_memory", torch.Tensor.pin_memory)
        torch.Tensor.pin_memory = pin_memory  # type: ignore[method-assign, assignment]
        # Tensors given as numbers are made on the CPU, and modules swap their parameters: the class
        # of a tensor cannot change in place.
        undo.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        swap = torch.__future__
        undo.callback(
            swap.set_swap_module_params_on_conversion, swap.get_swap_module_params_on_conversion()
        )
        swap.set_swap_module_params_on_conversion(True)
        ACTIVE.append(ledger)
        undo.callback(ACTIVE.pop)
        undo.enter_context(Mode(ledger))
        yield ledger
