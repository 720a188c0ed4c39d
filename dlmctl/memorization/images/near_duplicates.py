"""Near duplicates among images of one prompt, and the largest set of them (Carlini et al. 2023,
arXiv 2301.13188, section 4.2).

Images are cut into tiles, and two are near duplicates if even the tiles that differ most are
alike: images with the same background alone are not. A prompt is memorized if enough of its images
are near duplicates of each other, a clique of the graph that connects near duplicates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlmctl.records.errors import UsageError

LIMIT = 1_000_000
"""Branches after which the search for the largest clique ends, less than a minute for 500 images.
Graphs of near duplicates need few: their cliques hardly overlap."""


def tile_distances(images: Tensor, tiles: int) -> Tensor:
    """float64 [N, N] on the CPU: the largest distance of two tiles at the same place.

    That of d numbers is sqrt(sum of (a - b)^2 / d), pixels in [0, 1], as in the paper.

    Args:
        images: uint8 [N, C, H, W].
        tiles: along each side; those of a side that they do not divide differ by a pixel (ours).

    Raises:
        UsageError: images have fewer pixels than tiles along a side.
    """
    if min(images.shape[2:]) < tiles:
        size = " x ".join(map(str, images.shape[2:]))
        raise UsageError(f"--tiles {tiles}: images of {size} pixels have fewer along a side")
    largest = torch.zeros(len(images), len(images), dtype=torch.float64, device=images.device)
    for band in images.tensor_split(tiles, dim=2):
        for tile in band.tensor_split(tiles, dim=3):
            x = tile.flatten(1).double()  # whole numbers, so that products are exact
            products = x @ x.T
            norms = products.diagonal()
            squares = (norms[:, None] + norms - 2 * products) / x.shape[1]
            largest = torch.maximum(largest, squares)
    return (largest.sqrt() / 255).cpu()


def largest_clique(adjacent: Tensor, limit: int = LIMIT) -> tuple[list[int], bool]:
    """A largest set of vertices that are all adjacent, and whether it is certain that it is one.

    Branch and bound with a greedy colouring: vertices of one colour are not adjacent, so that a
    clique has at most as many vertices as there are colours (Tomita and Seki 2003).

    Args:
        adjacent: bool [N, N], symmetric; the diagonal is not looked at.
        limit: branches after which the largest clique so far is returned.
    """
    matrix = adjacent.cpu() & ~torch.eye(len(adjacent), dtype=torch.bool)
    order = matrix.sum(1).argsort(descending=True, stable=True)
    rows = matrix[order][:, order].tolist()
    neighbours = [sum(1 << n for n, known in enumerate(row) if known) for row in rows]
    everything = (1 << len(rows)) - 1
    best: list[int] = []
    clique: list[int] = []
    # For each vertex of the clique: what may follow it, and in which order it is tried.
    stack = [(everything, _coloured(everything, neighbours))]
    for _ in range(limit):
        if not stack:
            break
        candidates, tried = stack[-1]
        if not tried or len(clique) + tried[-1][1] <= len(best):
            stack.pop()
            del clique[-1:]
            continue
        vertex, _ = tried.pop()
        clique.append(vertex)
        stack[-1] = candidates & ~(1 << vertex), tried
        if len(clique) > len(best):
            best = list(clique)
        inner = candidates & neighbours[vertex]
        stack.append((inner, _coloured(inner, neighbours)))
    return sorted(order[best].tolist()), not stack


def _coloured(vertices: int, neighbours: list[int]) -> list[tuple[int, int]]:
    """Vertices of a bit mask by colour, each with the number of colours up to its own."""
    coloured: list[tuple[int, int]] = []
    colour = 0
    while vertices:
        colour += 1
        free = vertices
        while free:
            vertex = (free & -free).bit_length() - 1
            vertices &= ~(1 << vertex)
            free &= ~neighbours[vertex] & ~(1 << vertex)
            coloured.append((vertex, colour))
    return coloured
