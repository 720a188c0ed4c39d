"""Distances of tiles against a loop, cliques against brute force and networkx."""

import itertools

import pytest
import torch

from dlmctl.memorization.images.near_duplicates import largest_clique, tile_distances
from dlmctl.records.errors import UsageError


def images(count: int, channels: int, height: int, width: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, height, width)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("height", "width", "tiles"), [(8, 12, 4), (10, 7, 3), (5, 5, 1), (4, 4, 4)]
)
def test_the_distance_is_that_of_the_tiles_that_differ_most(height, width, tiles):
    drawn = images(5, 3, height, width)
    drawn[4] = drawn[1]
    drawn[4, :, -1, -1] = 255 - drawn[1, :, -1, -1]
    found = tile_distances(drawn, tiles)

    def edges(side):  # the first tiles are those with a pixel more
        sizes = [side // tiles + (n < side % tiles) for n in range(tiles)]
        return [0, *itertools.accumulate(sizes)]

    for i, j in itertools.product(range(5), repeat=2):
        far = 0.0
        for top, bottom in itertools.pairwise(edges(height)):
            for left, right in itertools.pairwise(edges(width)):
                a, b = (drawn[n, :, top:bottom, left:right].double() / 255 for n in (i, j))
                far = max(far, float((a - b).square().mean().sqrt()))
        assert found[i, j] == pytest.approx(far, abs=1e-12)
    assert (found.diagonal() == 0).all()
    assert torch.equal(found, found.T)


def test_a_common_background_makes_no_near_duplicates():
    drawn = torch.full((2, 3, 512, 512), 255, dtype=torch.uint8)
    drawn[1, :, :100, :100] = 0  # in the first of 16 tiles
    whole, tiled = tile_distances(drawn, 1)[0, 1], tile_distances(drawn, 4)[0, 1]
    assert whole == pytest.approx(100 / 512)
    assert tiled == pytest.approx(100 / 128)


def test_more_tiles_than_pixels_are_refused():
    with pytest.raises(UsageError, match="--tiles 5: images of 4 x 8 pixels have fewer"):
        tile_distances(images(2, 3, 4, 8), 5)


def graph(vertices: int, density: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    upper = (torch.rand(vertices, vertices, generator=generator) < density).triu(1)
    return upper | upper.T


def is_clique(adjacent, clique) -> bool:
    return all(bool(adjacent[i, j]) for i, j in itertools.combinations(clique, 2))


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_cliques_are_those_of_brute_force(density):
    for seed in range(12):
        count = 1 + seed % 10
        adjacent = graph(count, density, seed)
        largest = max(
            size
            for size in range(1, count + 1)
            for subset in itertools.combinations(range(count), size)
            if is_clique(adjacent, subset)
        )
        # What is on the diagonal does not matter.
        clique, certain = largest_clique(adjacent | torch.eye(count, dtype=torch.bool))
        assert (len(clique), certain) == (largest, True)
        assert is_clique(adjacent, clique)
        assert clique == sorted(set(clique))


def test_cliques_are_those_of_networkx():
    networkx = pytest.importorskip("networkx")
    for seed, density in itertools.product(range(3), (0.1, 0.5, 0.7)):
        adjacent = graph(60, density, seed)
        planted = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:12]
        adjacent[planted[:, None], planted] = True
        adjacent.fill_diagonal_(False)
        clique, certain = largest_clique(adjacent)
        known = networkx.from_numpy_array(adjacent.numpy())
        assert len(clique) == max(map(len, networkx.find_cliques(known)))
        assert certain
        assert is_clique(adjacent, clique)


def test_many_copies_are_one_clique():
    """1,200 images in two groups, more than a recursion could go through."""
    adjacent = torch.zeros(1200, 1200, dtype=torch.bool)
    adjacent[:700, :700] = True
    adjacent[700:, 700:] = True
    assert largest_clique(adjacent) == (list(range(700)), True)


def test_a_search_that_is_cut_off_says_so():
    adjacent = graph(60, 0.7, 5)
    whole, certain = largest_clique(adjacent)
    part, cut = largest_clique(adjacent, limit=20)
    assert (certain, cut) == (True, False)
    assert 0 < len(part) <= len(whole)
    assert is_clique(adjacent, part)
