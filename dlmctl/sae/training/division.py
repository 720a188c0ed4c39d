"""How the ranks of a training run under torchrun divide its work.

The batches of the corpus are dealt out to the ranks in rounds, and each rank runs the model on its
own batch. Each autoencoder is trained by one rank, which receives the activations of all batches in
their order: its steps are those of a single process, and its weights, gradients and moments are in
one place. Autoencoders of one kind of activations share a shuffle buffer and go to the same or
neighbouring ranks, so that the buffers are divided too if there are as many kinds as ranks.

The selected activations are sent once to each rank that trains on them. The alternative, to shard
each autoencoder over all ranks, would send its gradients at every step.
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
from dlmctl.train.distributed import all_gather, all_reduce_sum, broadcast_items, rank, world_size

T = TypeVar("T")

Round = list[tuple[int, list[Document]]]
"""A batch for each rank, fewer in the last round: the number of each, and its documents."""
Takers = Mapping[Key, Collection[int]]
"""The ranks that train on each kind of activations."""


def divided(keys: Sequence[Key], ks: Sequence[int]) -> dict[Key, dict[int, int]]:
    """The rank that trains each autoencoder, by its activations and its K."""
    every = [(key, k) for key in keys for k in ks]
    owners: dict[Key, dict[int, int]] = {key: {} for key in keys}
    for number, (key, k) in enumerate(every):
        owners[key][k] = number * world_size() // max(world_size(), len(every))
    return owners


def own_batches(
    windows: Iterable[list[Document]],
    make: Callable[[list[Document], int], MaskedBatch],
    start: int,
) -> Iterator[tuple[MaskedBatch, int]]:
    """This rank's batch of each round, and the number of batches in the round.

    If there is none left for a rank it gets the last one, since all ranks of a sharded model must
    take part in a forward pass.

    Args:
        windows: the documents of each batch; only the first rank reads them.
        make: makes a batch of its documents and its number.
        start: number of the first batch.
    """
    numbered = islice(enumerate(windows), start, None)
    rounds = iter(lambda: list(islice(numbered, world_size())), [])
    for batches in broadcast_items(rounds, _packed, _unpacked):
        number, window = batches[min(rank(), len(batches) - 1)]
        yield make(window, number), len(batches)


def shared_out(rows: ActivationBatch, count: int, takers: Takers) -> Iterator[ActivationBatch]:
    """The activations of each batch of a round, in order; only those that this rank trains on.

    Args:
        rows: activations of this rank's batch.
        count: number of batches in the round; those of ranks from `count` on are copies.
    """
    if world_size() == 1:
        yield rows
        return
    keys = list(rows)
    # 1. How many rows each rank has of each kind.
    lengths = torch.zeros(world_size(), len(keys), dtype=torch.int64)  # [ranks, kinds]
    if rank() < count:
        lengths[rank()] = torch.tensor([len(rows[key]) for key in keys])
    all_reduce_sum(lengths)
    # 2. Send each rank the kinds that it takes, as bytes, which every backend can send.
    wanted = [[n for n, key in enumerate(keys) if r in takers[key]] for r in range(world_size())]
    sent = [rows[keys[n]][: int(lengths[rank(), n])].contiguous() for part in wanted for n in part]
    given = [int(lengths[rank(), part].sum()) for part in wanted]
    taken = lengths[:, wanted[rank()]]  # [ranks that send, kinds taken here]
    like = rows[keys[0]]
    outgoing = torch.cat([*sent, like[:0]]).view(torch.uint8)
    incoming = outgoing.new_empty(int(taken.sum()), outgoing.shape[1])
    dist.all_to_all_single(incoming, outgoing, taken.sum(dim=1).tolist(), given)
    # 3. Cut what came in by sender and kind.
    parts = iter(incoming.view(like.dtype).split(taken.flatten().tolist()))
    for number in range(world_size()):
        block = {keys[n]: next(parts) for n in wanted[rank()]}
        if number < count:
            yield block


def in_order(found: Iterator[tuple[tuple[int, ...], T]]) -> Iterator[T]:
    """Merge what each rank yields, sorted by the tuples, as a single process would yield it."""
    if world_size() == 1:
        yield from (item for _, item in found)
        return
    every = [item for part in all_gather(list(found)) for item in part]
    yield from (item for _, item in sorted(every, key=lambda item: item[0]))


def _packed(batches: Round) -> list[Any]:
    return [[number, [[d.number, d.ids, d.kept] for d in window]] for number, window in batches]


def _unpacked(packed: list[Any]) -> Round:
    """Without the records, which activations do not depend on."""
    return [
        (number, [Document(place, ids, kept, Record()) for place, ids, kept in window])
        for number, window in packed
    ]
