"""Bytes of the tensors that are alive, followed operation by operation.

An operation's results count until the last tensor that shares their memory is gone: what torch's
allocator has handed out, without its rounding. Tensors from outside the body do not count.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """In the body of `with`, `now` and `peak` are the bytes of the tensors created in it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        arguments = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(results):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), arguments)
        return results

    def _count(self, storage: Any, arguments: set[int]) -> None:
        key = storage._cdata
        if key in self._sizes or key in arguments:  # a view, or changed in place
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def begin_peak(self) -> None:
        """Start a new peak from what is alive now."""
        self.peak = self.now
