"""The transformer blocks of a policy: their outputs read, or changed on the way (residual stream).

Layer L is block L, counted from 0; its output is what DLM-Scope and SAELens call the residual
stream behind layer L.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError, UsageError

Edit = Callable[[Tensor, Tensor], Tensor]
"""Output of a block [B, T, H] and the ids [B, T] that the model saw, -1 for padding, to the output
in its place."""

_PLACES = ("layers", "encoder.layer", "transformer.layer", "h")


def blocks(policy: Policy) -> nn.ModuleList:
    """The blocks of a policy, in their order; raises DataError for a kind not known here."""
    body = _body(policy)
    for place in _PLACES:
        found: Any = body
        for name in place.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise DataError(f"{type(policy.core).__name__} has no list of blocks that is known here")


def decoder_blocks(policy: Policy) -> nn.ModuleList:
    """The same; of a model that takes images, those of its language model."""
    if policy.family != "vlm":
        return blocks(policy)
    layers: nn.ModuleList = _body(policy).get_submodule("language_model.layers")
    return layers


def block_name(policy: Policy, layer: int) -> str:
    """Path of a block in the Hugging Face model, as `model.layers.5`."""
    wanted = blocks(policy)[layer]
    return next(name for name, module in policy.core.named_modules() if module is wanted)


def check_layers(policy: Policy, layers: Sequence[int]) -> None:
    """Raise UsageError where the policy has not so many blocks."""
    count = len(blocks(policy))
    for layer in layers:
        if not 0 <= layer < count:
            raise UsageError(f"{policy.name} has layers 0 to {count - 1}, and no layer {layer}")


def block_outputs(
    policy: Policy, ids: Tensor, attention: Tensor | None, layers: Sequence[int]
) -> dict[int, Tensor]:
    """Outputs [B, T, H] of these blocks from one pass that ends behind the last of them.

    Args:
        ids: int64 [B, T], padding on the right.
        attention: bool [B, T]; None without padding.
    """
    outputs: dict[int, Tensor] = {}
    last = max(layers)

    def keep(layer: int) -> Edit:
        def seen(output: Tensor, _: Tensor) -> Tensor:
            outputs[layer] = output
            if layer == last:
                raise _EnoughError
            return output

        return seen

    edits = {layer: keep(layer) for layer in layers}
    with edited_blocks(policy, edits), contextlib.suppress(_EnoughError):
        policy.hidden(ids, attention)
    return outputs


@contextlib.contextmanager
def edited_blocks(policy: Policy, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Within the block every pass of the policy runs with these outputs changed.

    Not for a compiled pass, which does not come by here.
    """
    modules, ids = blocks(policy), torch.empty(0)

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal ids
        ids = _without_padding(kwargs["input_ids"] if "input_ids" in kwargs else args[0], kwargs)

    def hook(edit: Edit) -> Callable[[nn.Module, Any, Any], Any]:
        def run(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit(output[0], ids), *output[1:])
            return edit(output, ids)

        return run

    with contextlib.ExitStack() as handles:
        handles.callback(_body(policy).register_forward_pre_hook(begin, with_kwargs=True).remove)
        for layer, edit in edits.items():
            handles.callback(modules[layer].register_forward_hook(hook(edit)).remove)
        yield


def _without_padding(ids: Tensor, given: Mapping[str, Any]) -> Tensor:
    """The ids of a pass, -1 for padding: a cache may know what that is, else the attention says."""
    caches = (given.get(name) for name in ("past_key_values", "cache"))
    cache = next((cache for cache in caches if cache is not None), None)
    padding, attention = getattr(cache, "padding", None), given.get("attention_mask")
    if padding is None and attention is not None and attention.dim() == 2:
        padding = attention[:, -ids.shape[1] :] == 0
    return ids if padding is None else ids.masked_fill(padding, -1)


class _EnoughError(Exception):
    """No block behind this one is wanted."""


def _body(policy: Policy) -> nn.Module:
    body: nn.Module = getattr(policy.core, policy.core.base_model_prefix)
    return body
