"""The best of a stream, beside sorting all of it."""

import pytest
import torch

from dlmctl.sae.features.reservoir import Reservoir

SLOTS, SIZE = 7, 4


def candidates(levels: int) -> list[tuple[int, float, int, int]]:
    """Slot, score, document, and a name; few levels of score make many ties."""
    generator = torch.Generator().manual_seed(levels)
    return [
        (
            int(torch.randint(SLOTS - 1, (1,), generator=generator)),  # the last slot gets none
            float(torch.randint(levels, (1,), generator=generator)) - 3,
            name // 5,
            name,
        )
        for name in range(400)
    ]


def kept(items: list[tuple[int, float, int, int]], batch: list[list[int]]) -> list[list[int]]:
    reservoir = Reservoir(SLOTS, SIZE)
    for documents in batch:
        part = [item for item in items if item[2] in documents]
        slot, score, number, name = (torch.tensor(column) for column in zip(*part, strict=True))
        reservoir.offer(slot, score, number, lambda taken, name=name: {"name": name[taken]})
    names = reservoir.content["name"]
    return [[int(names[place]) for place in reservoir.places(slot)] for slot in range(SLOTS)]


@pytest.mark.parametrize("levels", [3, 10**6])
def test_what_is_kept_is_the_best_of_everything_whatever_the_batches(levels):
    items = candidates(levels)
    expected = []
    for slot in range(SLOTS):
        best = {}
        for item in items:
            if item[0] == slot and item[1] > best.get(item[2], (0, -9.0))[1]:
                best[item[2]] = item
        order = sorted(best.values(), key=lambda item: (-item[1], item[2]))
        expected.append([item[3] for item in order[:SIZE]])
    everything = list(range(80))
    assert kept(items, [everything]) == expected
    assert kept(items, [[n] for n in everything]) == expected
    assert kept(items, [everything[50:], everything[:13], everything[13:50]]) == expected
    assert expected[-1] == []
