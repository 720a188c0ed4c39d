"""Ratios of sums over documents, such as means per token, with their standard errors.

With d_i and n_i of document i, such as its summed loss and its number of tokens, the ratio is
R = sum d_i / sum n_i. Its standard error treats the documents as independent (Cochran, Sampling
Techniques, on ratio estimators):

    se^2 = D / (D - 1) * sum (d_i - R n_i)^2 / (sum n_i)^2,  D documents with n_i != 0

Tokens of one document share their context and their mask, so that an error over tokens would be too
small. Of a difference between two numbers of the same documents d_i is the document's own
difference: the error is that of the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Ratios:
    """M ratios over a stream of documents."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._pivots = torch.full((len(names),), torch.nan, dtype=torch.float64)
        """[M], a first guess at each ratio: errors about it do not cancel."""
        self._moments = torch.zeros(6, len(names), dtype=torch.float64)
        """Sums over documents of e = d - pivot n, n, e^2, e n, n^2 and of one."""

    def add(self, d: Tensor, n: Tensor) -> None:
        """Take in B whole documents, float64 [M, B] each, on the CPU."""
        slopes = (d * n).sum(dim=1) / n.square().sum(dim=1)  # [M], nan without tokens
        self._pivots = self._pivots.where(self._pivots.isfinite(), slopes)
        e = d - self._pivots.nan_to_num()[:, None] * n
        parts = torch.stack([e, n, e * e, e * n, n * n, (n != 0).double()])  # [6, M, B]
        self._moments += parts.sum(dim=2)

    def row(self) -> dict[str, float | None]:
        """Each ratio by its name, and its standard error as NAME_se.

        None if there was no token; the error also if there was one document alone.
        """
        row: dict[str, float | None] = {}
        columns = zip(self.names, self._pivots.tolist(), self._moments.T.tolist(), strict=True)
        for name, pivot, (e, n, ee, en, nn, documents) in columns:
            row[name] = row[f"{name}_se"] = None
            if n:
                beyond = e / n
                row[name] = pivot + beyond
                if documents > 1:
                    residual = max(0.0, ee - 2 * beyond * en + beyond * beyond * nn)
                    error = math.sqrt(residual * documents / (documents - 1)) / abs(n)
                    row[f"{name}_se"] = error
        return row
