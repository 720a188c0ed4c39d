"""Passes whose layers go through torch.compile, which joins their small operations.

Every layer has the same code, so it is compiled once, for all layers and shapes. A cache differs
between layers, and torch would compile each of them for itself: with a cache only norms and MLPs
are compiled, and attention runs as it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from shutil import which
from typing import Any

import torch
from torch import nn

from dlmctl.records.errors import UnavailableError

COMPILER = "inductor"
"""Backend of torch.compile."""

_WHOLE, _PARTS = ("compiled_layers", "compiled_parts")


@contextlib.contextmanager
def compiled_layers(body: nn.Module, cached: bool) -> Iterator[None]:
    """Within the block the layers of a model, or with a cache their norms and MLPs, are compiled.

    What was compiled is kept in the model, for the next time.

    Raises:
        UnavailableError: there is no C++ compiler, which torch.compile needs.
    """
    kept: dict[nn.Module, Any] = body.__dict__.setdefault(_PARTS if cached else _WHOLE, {})
    if not kept:
        if not any(map(which, (os.environ.get("CXX", "g++"), "clang++", "c++", "cl"))):
            raise UnavailableError("--compile needs a C++ compiler: install g++, or set CXX")
        modules = _norms_and_mlps(body) if cached else _layers(body)
        kept |= {
            module: torch.compile(module.forward, dynamic=True, backend=COMPILER)
            for module in modules
        }
    before = {module: module.__dict__.get("forward") for module in kept}
    for module, forward in kept.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.__dict__["forward"]  # that of its class is back
            if forward is not None:
                module.__dict__["forward"] = forward


def _layers(body: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules."""
    for module in body.children():
        if isinstance(module, nn.ModuleList):
            yield from module
        else:
            yield from _layers(module)


def _norms_and_mlps(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.children():
        if type(part).__name__.endswith(("Norm", "MLP")):
            yield part
        else:
            yield from _norms_and_mlps(part)
