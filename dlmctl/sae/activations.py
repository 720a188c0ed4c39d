"""Activations of a corpus: from one pass of the model for all layers and positions, or from disk.

Stored activations are a directory with `activations.json` and a file `block-000000.safetensors` for
each batch of the corpus. Its tensors are `LAYER.POSITIONS` [N, d] and, to tell where a row comes
from, `POSITIONS.document`, `POSITIONS.position` and `POSITIONS.level`, [N] each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from dlmctl.models.blocks import block_name, block_outputs, check_layers
from dlmctl.models.policy import Policy
from dlmctl.models.weights import read_weights
from dlmctl.records.errors import CannotWriteError, DataError, MissingInputError, UsageError
from dlmctl.records.files import read_json, write_file
from dlmctl.sae.corpus import CorpusPlan, MaskedBatch, Positions
from dlmctl.train.sharding import whole_pass

INDEX = "activations.json"


class Key(NamedTuple):
    """Which activations of a model."""

    layer: int
    positions: Positions

    def __str__(self) -> str:
        return f"{self.layer}.{self.positions}"


ActivationBatch = Mapping[Key, Tensor]
"""Activations [N, d] of the selected tokens of a batch; N depends on the positions."""


def check_keys(policy: Policy, layers: Sequence[int], positions: Sequence[Positions]) -> None:
    """Raise UsageError if the policy has no such layer, or masks nothing."""
    check_layers(policy, layers)
    if not policy.diffusion and (asked := {"mask", "unmask"} & set(positions)):
        raise UsageError(
            f"{policy.name} is autoregressive and masks nothing: --positions {min(asked)} "
            "means nothing, take all"
        )


@torch.no_grad()
def model_activations(
    policy: Policy,
    batches: Iterable[MaskedBatch],
    layers: Sequence[int],
    positions: Sequence[Positions],
) -> Iterator[dict[Key, Tensor]]:
    """Activations of each batch; `clean` costs a second pass over the text with nothing masked."""
    corrupt = [kind for kind in positions if kind != "clean"]
    clean = [kind for kind in positions if kind == "clean"]
    for batch in batches:
        rows: dict[Key, Tensor] = {}
        for seen, kinds in ((batch, corrupt), (batch.clean(), clean)):
            if not kinds:
                continue
            run = partial(block_outputs, policy, seen.rows(policy), layers)
            outputs = whole_pass(policy.model, run)
            for kind in kinds:
                wanted = seen.selected(kind)
                rows |= {Key(layer, kind): outputs[layer][wanted] for layer in layers}
        yield rows


def store_activations(
    policy: Policy,
    batches: Iterable[MaskedBatch],
    layers: Sequence[int],
    positions: Sequence[Positions],
    metadata: Mapping[str, Any],
    directory: Path,
) -> Iterator[dict[str, Any]]:
    """Write the activations of a corpus; yields a record for each block that is on disk.

    The index is written last, so that a directory without one is incomplete.

    Args:
        metadata: of `source_metadata`.

    Raises:
        CannotWriteError: writing failed.
    """
    tokens: dict[str, int] = dict.fromkeys(positions, 0)
    number = width = 0
    for number, batch in enumerate(batches, start=1):
        [rows] = model_activations(policy, [batch], layers, positions)
        width = next(iter(rows.values())).shape[1]
        tensors = {str(key): value.cpu().contiguous() for key, value in rows.items()}
        for kind in positions:
            row, position = batch.selected(kind).nonzero(as_tuple=True)
            names = torch.tensor([document.number for document in batch.documents])
            level = batch.level.cpu() if kind != "clean" else torch.zeros(len(names))
            tensors[f"{kind}.document"] = names[row.cpu()]
            tensors[f"{kind}.position"] = position.cpu().int()
            tensors[f"{kind}.level"] = level[row.cpu()].float()
            tokens[kind] += len(row)
        path = directory / f"block-{number - 1:06d}.safetensors"
        try:
            save_file(tensors, path)
        except Exception as error:  # safetensors wraps what the system says
            raise CannotWriteError(f"cannot write {path} ({error})") from None
        yield {"block": number - 1, **tokens}
    index = {
        "layers": list(layers),
        "positions": list(positions),
        "blocks": number,
        "tokens": tokens,
        "width": width,
        "metadata": metadata,
        "hooks": {str(layer): block_name(policy, layer) for layer in layers},
    }
    write_file(directory / INDEX, json.dumps(index, indent=2).encode() + b"\n")


def source_metadata(policy: Policy, plan: CorpusPlan) -> dict[str, Any]:
    """What an autoencoder's metadata say about the model and the corpus it was trained on."""
    return {
        "model_name": policy.name,
        "dlm_revision": policy.revision,
        "dlm_t_min": plan.law.t_min,
        "dlm_t_max": plan.law.t_max,
        "dlm_per_batch": plan.law.per_batch,
        "dlm_pack": plan.pack,
        "dlm_hide_prompt": plan.hide_prompt,
        "context_size": plan.context,
    }


class StoredActivations:
    """A directory that `store_activations` wrote."""

    def __init__(self, directory: Path) -> None:
        """Raises MissingInputError if it is none, DataError if the index is broken."""
        if not (directory / INDEX).exists():
            raise MissingInputError(
                f"{directory} has no {INDEX}: 'dlmctl sae-activations' writes it"
            )
        self.directory, self.index = directory, read_json(directory / INDEX)

    @property
    def metadata(self) -> dict[str, Any]:
        found: dict[str, Any] = self.index["metadata"]
        return found

    def check(self, keys: Sequence[Key]) -> None:
        """Raise UsageError if it does not contain these."""
        for key in keys:
            for name, value in key._asdict().items():
                plural = "layers" if name == "layer" else name
                if value not in self.index[plural]:
                    there = ",".join(map(str, self.index[plural]))
                    raise UsageError(f"{self.directory} has {plural} {there}, and not {value}")

    def blocks(
        self, keys: Sequence[Key], device: torch.device | str, start: int = 0
    ) -> Iterator[dict[Key, Tensor]]:
        """These activations of its blocks, over and over, beginning with block `start`."""
        for number in count(start) if self.index["blocks"] else ():
            path = self.directory / f"block-{number % self.index['blocks']:06d}.safetensors"
            tensors = read_weights([path], lambda name: name)
            for key in keys:
                if str(key) not in tensors:
                    raise DataError(f"tensor '{key}' is missing", str(path))
            yield {key: tensors[str(key)].to(device) for key in keys}
