"""The transformer blocks of a policy: reading and editing their outputs (the residual stream).

Layer L is block L, counted from 0; its output is what DLM-Scope and SAELens call the residual
stream after layer L.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dlmctl.models.attention import NoisedRows
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError, UsageError

Edit = Callable[[Tensor, Tensor], Tensor]
"""From the output of a block [B, T, H] and the ids [B, T] that the model saw, -1 for padding, to
the output that replaces it."""

_PATHS = ("layers", "encoder.layer", "transformer.layer", "h")


def blocks(policy: Policy) -> nn.ModuleList:
    """The blocks of a policy, in order; raises DataError for an unknown kind of model."""
    for path in _PATHS:
        module: Any = policy.body
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(module, nn.ModuleList):
            return module
    raise DataError(f"{type(policy.core).__name__} has its blocks in no known place")


def decoder_blocks(policy: Policy) -> nn.ModuleList:
    """The same; for a model that takes images, those of its language model."""
    path = policy.model_family.language_layers
    layers: Any = blocks(policy) if path is None else policy.body.get_submodule(path)
    return cast(nn.ModuleList, layers)


def block_name(policy: Policy, layer: int) -> str:
    """Path of a block in the Hugging Face model, such as `model.layers.5`."""
    wanted = blocks(policy)[layer]
    return next(name for name, module in policy.core.named_modules() if module is wanted)


def check_layers(policy: Policy, layers: Sequence[int]) -> None:
    """Raise UsageError if the policy lacks one of these blocks."""
    count = len(blocks(policy))
    for layer in layers:
        if not 0 <= layer < count:
            raise UsageError(f"{policy.name} has layers 0 to {count - 1}, and no layer {layer}")


def block_outputs(policy: Policy, rows: NoisedRows, layers: Sequence[int]) -> dict[int, Tensor]:
    """Outputs [B, T, H] of these blocks at the tokens of B noised texts.

    They are from one pass that stops after the last block.
    """
    outputs: dict[int, Tensor] = {}
    last = max(layers)

    def keep(layer: int) -> Edit:
        def run(output: Tensor, _: Tensor) -> Tensor:
            outputs[layer] = rows.noised(output)
            if layer == last:
                raise _StopPassError
            return output

        return run

    edits = {layer: keep(layer) for layer in layers}
    with edited_blocks(policy, edits), contextlib.suppress(_StopPassError):
        policy.hidden_of(rows)
    return outputs


@contextlib.contextmanager
def edited_blocks(policy: Policy, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Inside this context every pass of the policy has these outputs edited.

    A compiled pass is not affected: it does not run hooks.
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
        handles.callback(policy.body.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for layer, edit in edits.items():
            handles.callback(modules[layer].register_forward_hook(hook(edit)).remove)
        yield


def _without_padding(ids: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The ids of a pass, -1 for padding, which is known from its cache or its attention mask."""
    caches = (arguments.get(name) for name in ("past_key_values", "cache"))
    cache = next((cache for cache in caches if cache is not None), None)
    padding, attention = getattr(cache, "padding", None), arguments.get("attention_mask")
    if isinstance(attention, dict):  # a mask for each kind of layer
        attention = attention["full_attention"]
    if padding is None and attention is not None:
        if attention.dim() == 2:
            padding = attention[:, -ids.shape[1] :] == 0
        else:  # [B, 1, T, T]: a token attends to itself
            seen = attention[:, 0].diagonal(dim1=1, dim2=2)
            padding = ~seen if seen.dtype == torch.bool else seen < 0  # eager attention adds it
    return ids if padding is None else ids.masked_fill(padding, -1)


class _StopPassError(Exception):
    """No block after this one is needed."""
