"""Ratios over documents and their errors, against the formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlmctl.sae.ratios import Ratios


def _of(d: Tensor, n: Tensor, size: int) -> dict[str, float | None]:
    ratios = Ratios(["a"])
    for first in range(0, len(d), size):
        ratios.add(d[None, first : first + size], n[None, first : first + size])
    return ratios.row()


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_ratio_is_that_of_sums_and_its_error_is_over_documents(offset: float) -> None:
    """With a large offset, every ratio is nearly the same, and the errors must not cancel."""
    generator = torch.Generator().manual_seed(0)
    n = torch.randint(0, 5, (30,), generator=generator).double()  # some documents have no token
    d = (torch.randn(30, dtype=torch.float64, generator=generator) + offset) * n
    ratio = float(d.sum() / n.sum())
    squares = (d - ratio * n)[n > 0].square()
    error = (squares.sum() * len(squares) / (len(squares) - 1)).sqrt() / n.sum()
    for size in (1, 7, 30):
        row = _of(d, n, size)
        assert row["a"] == pytest.approx(ratio, rel=1e-12)
        assert row["a_se"] == pytest.approx(float(error), rel=1e-6)


def test_what_is_the_same_in_all_documents_has_no_error() -> None:
    n = torch.tensor([3.0, 1.0, 7.0, 2.0], dtype=torch.float64)
    assert _of(0.1 * n, n, 2) == {"a": pytest.approx(0.1), "a_se": pytest.approx(0.0, abs=1e-16)}


def test_a_document_alone_has_no_error_and_none_no_ratio() -> None:
    one, nothing = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert _of(2 * one, one, 1) == {"a": 2.0, "a_se": None}
    assert _of(nothing, nothing, 1) == {"a": None, "a_se": None}
