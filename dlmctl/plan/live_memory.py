"""Bytes of the tensors that are alive, followed operation by operation.

An operation's results count until the last tensor that shares their memory is gone: what torch's
allocator has handed out, without what it rounds up. Tensors from outside the block do not count.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Within the block `now` and `peak` are the bytes of what was made in it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage(), given)
        return made

    def _see(self, storage: Any, given: set[int]) -> None:
        key = storage._cdata
        if key in self._sizes or key in given:  # a view, or changed in place
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def begin_peak(self) -> None:
        """From here on `peak` is that of what follows."""
        self.peak = self.now
