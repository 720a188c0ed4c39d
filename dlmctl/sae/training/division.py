"""What the ranks of a training run under torchrun do for each other.

The batches of the corpus go round the ranks, each of which passes its own through the model. Each
autoencoder is trained by one rank, which is sent the activations of all batches, in their order:
its steps are those of one process, and its weights, gradients and moments stand in one place. Those
of one kind of activations, which share a shuffle buffer, are neighbours, so that the buffers are
divided too where there are as many kinds as ranks.

What travels are the activations that were selected, once to each rank that trains on them. The
alternative, every autoencoder spread over all ranks, would send its gradients at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dlmctl.records.jsonl import Record
from dlmctl.sae.activations import ActivationBatch, Key
from dlmctl.sae.corpus import Document, MaskedBatch
from dlmctl.train.distributed import from_all, items_of_first, rank, size, total

T = TypeVar("T")

Round = list[tuple[int, list[Document]]]
"""As many batches as there are ranks, or the last ones: the number of each, and its documents."""
Takers = Mapping[Key, Collection[int]]
"""The ranks that train on each kind of activations."""


def divided(keys: Sequence[Key], ks: Sequence[int]) -> dict[Key, dict[int, int]]:
    """The rank that trains each autoencoder, by its activations and its K."""
    every = [(key, k) for key in keys for k in ks]
    owners: dict[Key, dict[int, int]] = {key: {} for key in keys}
    for number, (key, k) in enumerate(every):
        owners[key][k] = number * size() // max(size(), len(every))
    return owners


def own_batches(
    windows: Iterable[list[Document]],
    make: Callable[[list[Document], int], MaskedBatch],
    start: int,
) -> Iterator[tuple[MaskedBatch, int]]:
    """This rank's batch of each round, and how many batches the round has.

    A rank for which there is none is given the last one, whose pass it must take part in.

    Args:
        windows: the documents of each batch, which the first rank alone looks at.
        make: a batch from its documents and its number.
        start: number of the batch to begin with.
    """
    numbered = islice(enumerate(windows), start, None)
    rounds = iter(lambda: list(islice(numbered, size())), [])
    for batches in items_of_first(rounds, _packed, _unpacked):
        number, window = batches[min(rank(), len(batches) - 1)]
        yield make(window, number), len(batches)


def shared_out(rows: ActivationBatch, count: int, takers: Takers) -> Iterator[ActivationBatch]:
    """The blocks of a round, in their order; of several ranks, what this one trains on.

    Args:
        rows: of this rank's batch.
        count: how many batches there are; those of ranks from `count` on are left out.
    """
    if size() == 1:
        yield rows
        return
    keys = list(rows)
    lengths = torch.zeros(size(), len(keys), dtype=torch.int64)
    if rank() < count:
        lengths[rank()] = torch.tensor([len(rows[key]) for key in keys])
    total(lengths)
    wanted = [[n for n, key in enumerate(keys) if r in takers[key]] for r in range(size())]
    sent = [rows[keys[n]][: int(lengths[rank(), n])].contiguous() for part in wanted for n in part]
    given = [int(lengths[rank(), part].sum()) for part in wanted]
    taken = lengths[:, wanted[rank()]]  # by the rank that they come from
    like = rows[keys[0]]
    # As bytes, which every backend can send.
    outgoing = torch.cat([*sent, like[:0]]).view(torch.uint8)
    incoming = outgoing.new_empty(int(taken.sum()), outgoing.shape[1])
    dist.all_to_all_single(incoming, outgoing, taken.sum(dim=1).tolist(), given)
    parts = iter(incoming.view(like.dtype).split(taken.flatten().tolist()))
    for number in range(size()):
        block = {keys[n]: next(parts) for n in wanted[rank()]}
        if number < count:
            yield block


def in_order(found: Iterator[tuple[tuple[int, ...], T]]) -> Iterator[T]:
    """What one process would find, on every rank, from what each of them found; by the places."""
    if size() == 1:
        yield from (item for _, item in found)
        return
    every = [item for part in from_all(list(found)) for item in part]
    yield from (item for _, item in sorted(every, key=lambda item: item[0]))


def _packed(batches: Round) -> list[Any]:
    return [[number, [[d.number, d.ids, d.kept] for d in window]] for number, window in batches]


def _unpacked(packed: list[Any]) -> Round:
    """Without the records, which activations do not depend on."""
    return [
        (number, [Document(place, ids, kept, Record()) for place, ids, kept in window])
        for number, window in packed
    ]
