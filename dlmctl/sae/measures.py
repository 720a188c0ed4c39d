"""How well an autoencoder reconstructs activations: measures summed over a stream of tokens.

With the error e = xhat - x:

fve         1 - sum |e|^2 / sum |x - mean|^2
fve_var     1 - sum_j Var(e_j) / sum_j Var(x_j), as in the published figures: it forgives a constant
            error
fve_dim     mean over dimensions of 1 - Var(e_j) / Var(x_j): every dimension counts the same, except
            that those without variance (`constant` is their number) are left out
fve_normal  fve without tokens whose norm is above 10 times the median: a few such tokens
            (`massive`) can have nearly all of the variance
nmse        sum |e|^2 / sum |x|^2
mse         mean over tokens of |e|^2
cos         mean cosine of x and xhat
l2_norm_in, l2_norm_out, l2_ratio
            mean |x|, mean |xhat|, mean |xhat| / |x|
relative_reconstruction_bias
            sum |xhat|^2 / sum <x, xhat>: below 1 if a shorter xhat is fitted than the best of its
            direction (Rajamanoharan et al. 2024, arXiv 2404.16014, equation 10)
l0, l1      mean number of active latents, mean sum of activations
dead        share of the latents that were active on no token
freq_over_1_percent, freq_over_10_percent
            share of the latents that were active on more than that share of the tokens
density     number of latents by the share of tokens on which they were active, in half decades
average_max_decoder_cosine_sim, average_max_encoder_cosine_sim
            mean over latents of the largest cosine of their decoder row (encoder column) with
            another latent's

The names are those of SAELens and of SAEBench's `core` measures, except that fve is SAELens's
explained_variance, cos their cossim, and dead 1 - frac_alive. (SAEBench's own explained_variance
subtracts squares of mean squares, and its mse divides by the number of tokens once more.) A number
with `_se` is the standard error of another, over documents (`sae/ratios`). None is a share of
nothing: of the variance of a single token, or of tokens that are all the same.

A new measure is a class like `Latents`, and its name in `MEASURES`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.models.float32_products import whole_products
from dlmctl.sae.ratios import Ratios
from dlmctl.sae.topk import Codes, TopKSae

MASSIVE = 10.0
"""Times the median norm above which a token is left out of `fve_normal`."""
CONSTANT = 1e-6
"""A dimension whose standard deviation is at most this share of its root mean square has no
variance; rounding a constant to float32 stays below that."""
GROUPS = 256
"""Documents whose sums are kept apart, for the errors of `fve` and its kin; further documents are
added to these in turn."""
HALF_DECADES = 12
"""Bins of `density`, which begins at 1e-6."""
ROWS = 1024
"""Latents that are compared with all others at once."""


class Tokens(NamedTuple):
    """N tokens of B documents, N > 0."""

    x: Tensor
    """float64 [N, d], their activations."""
    reconstruction: Tensor
    """float64 [N, d]."""
    codes: Codes
    row: Tensor
    """int64 [N], the document of each, counted from 0."""
    numbers: Tensor
    """int64 [B], the number of each document in its corpus."""

    def by_document(self, values: Tensor) -> Tensor:
        """Sums of values [N, M] over the tokens of each document, float64 [B, M] on the CPU.

        A product with ones and zeros: an index_add of CUDA has no fixed order.
        """
        documents = torch.arange(len(self.numbers), device=self.row.device)
        belongs = (documents[:, None] == self.row).double()  # [B, N]
        return (belongs @ values.double()).cpu()


class Measure(Protocol):
    """One or more numbers about an autoencoder."""

    def __init__(self, d_in: int, d_sae: int) -> None: ...

    def add(self, tokens: Tokens) -> None:
        """Take in tokens."""

    def row(self) -> dict[str, Any]:
        """The numbers by name."""


class _Moments:
    """Mean and spread of vectors, by dimension and by group of documents.

    Sums are about the mean of the first rows, so that nothing cancels, as it would in
    sum x^2 - (sum x)^2 / N with a large mean.
    """

    def __init__(self, width: int) -> None:
        self._centre: Tensor | None = None
        self._squares = torch.zeros(width, dtype=torch.float64)
        """[d], sum (x - centre)^2."""
        self._groups = torch.zeros(GROUPS, width + 2, dtype=torch.float64)
        """Sums of x - centre [d], of its squares and of one, by group."""

    def add(self, rows: Tensor, tokens: Tokens, wanted: Tensor | None = None) -> None:
        """Take in rows, float64 [N, d], of tokens; only the `wanted` ones, bool [N]."""
        if wanted is not None:
            if not bool(wanted.any()):
                return
            rows, tokens = rows[wanted], tokens._replace(row=tokens.row[wanted])
        if self._centre is None:
            self._centre = rows.mean(dim=0)
        rows = rows - self._centre
        squares = rows.square()
        self._squares += squares.sum(dim=0).cpu()
        norms, one = squares.sum(dim=1, keepdim=True), torch.ones_like(rows[:, :1])
        found = tokens.by_document(torch.cat([rows, norms, one], dim=1))
        self._groups.index_add_(0, tokens.numbers.cpu() % GROUPS, found)

    @property
    def count(self) -> int:
        return int(self._groups[:, -1].sum())

    @property
    def _shift(self) -> Tensor:
        """[d], the mean less the centre."""
        return self._groups[:, :-2].sum(dim=0) / max(1, self.count)

    @property
    def mean(self) -> Tensor:
        """[d]."""
        return self._shift if self._centre is None else self._centre.cpu() + self._shift

    @property
    def spread(self) -> Tensor:
        """[d], sum (x - mean)^2."""
        return (self._squares - self.count * self._shift.square()).clamp(min=0)

    @property
    def squares(self) -> Tensor:
        """[d], sum x^2."""
        return self.spread + self.count * self.mean.square()

    @property
    def varies(self) -> Tensor:
        """bool [d], dimensions with variance."""
        return self.spread > CONSTANT**2 * self.squares

    def about(self, point: Tensor | float) -> Tensor:
        """[G], sum |x - point|^2 by group of documents."""
        if self._centre is None:
            return torch.zeros(GROUPS, dtype=torch.float64)
        beyond = point - self._centre.cpu()  # [d]
        sums, squares, counts = self._groups.split([len(beyond), 1, 1], dim=1)
        return (squares + counts * beyond.square().sum())[:, 0] - 2 * sums @ beyond


class Variance:
    """The variance explained, by all definitions."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        self._x, self._e = _Moments(d_in), _Moments(d_in)
        self._normal_x, self._normal_e = _Moments(d_in), _Moments(d_in)
        self._limit: float | None = None

    def add(self, tokens: Tokens) -> None:
        norms, error = tokens.x.norm(dim=1), tokens.reconstruction - tokens.x
        if self._limit is None:  # from the first tokens, since a stream has no median
            self._limit = MASSIVE * float(norms.median())
        normal = norms <= self._limit
        self._x.add(tokens.x, tokens)
        self._e.add(error, tokens)
        self._normal_x.add(tokens.x, tokens, normal)
        self._normal_e.add(error, tokens, normal)

    def row(self) -> dict[str, Any]:
        x, e, varies = self._x, self._e, self._x.varies
        by_dimension = e.spread[varies] / x.spread[varies]
        normal = self._normal_e.about(0.0)
        return {
            "tokens": x.count,
            **_explained("fve", e.about(0.0), x),
            **_explained("fve_var", e.about(e.mean), x),
            "fve_dim": 1 - float(by_dimension.mean()) if len(by_dimension) else None,
            "constant": int((~varies).sum()),
            **_explained("fve_normal", normal, self._normal_x),
            "massive": x.count - self._normal_x.count,
        }


def _explained(name: str, error: Tensor, x: _Moments) -> dict[str, float | None]:
    """1 - sum of an error [G] / spread of the activations, and its standard error."""
    if not bool(x.varies.any()):
        return {name: None, f"{name}_se": None}
    ratio = Ratios([name])
    ratio.add(error[None], x.about(x.mean)[None])
    row = ratio.row()
    left = row[name]
    return {**row, name: None if left is None else 1 - left}


PER_TOKEN = (
    *("nmse", "mse", "cos", "l2_norm_in", "l2_norm_out", "l2_ratio"),
    *("relative_reconstruction_bias", "l0", "l1"),
)


class PerToken:
    """Means over tokens, and ratios of such means."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        self._ratios = Ratios(PER_TOKEN)

    def add(self, tokens: Tokens) -> None:
        x, made, values = tokens.x, tokens.reconstruction, tokens.codes.values.double()
        error, size, out = (made - x).square().sum(dim=1), x.norm(dim=1), made.norm(dim=1)
        cosine = functional.cosine_similarity(x, made, dim=1)
        one, there = torch.ones_like(size), (size > 0).double()
        ratio = out / size.where(size > 0, 1.0) * there
        active, total = (values > 0).sum(dim=1).double(), values.sum(dim=1)
        along = (x * made).sum(dim=1)
        tops = [error, error, cosine, size, out, ratio, out**2, active, total]
        bottoms = [size**2, one, one, one, one, there, along, one, one]
        sums = tokens.by_document(torch.stack([*tops, *bottoms], dim=1))  # [B, 2 M]
        top, bottom = sums.T.split(len(PER_TOKEN))
        self._ratios.add(top, bottom)

    def row(self) -> dict[str, Any]:
        return self._ratios.row()


class Latents:
    """How often latents are active: `dead`, the shares of frequent ones, and `density`."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        self._counts = torch.zeros(d_sae, dtype=torch.int64)
        self._tokens = 0

    def add(self, tokens: Tokens) -> None:
        codes = tokens.codes
        used = codes.indices[codes.values > 0].cpu()
        self._counts.index_add_(0, used, torch.ones_like(used))
        self._tokens += len(tokens.x)

    def row(self) -> dict[str, Any]:
        density = self._counts.double() / max(1, self._tokens)  # [F]
        edges = [10 ** ((place - HALF_DECADES) / 2) for place in range(HALF_DECADES + 1)]
        # Of the outer edges none counts: the first bin has all that are rarer, but for dead ones.
        inner = torch.tensor(edges[1:-1], dtype=torch.float64)
        places = torch.bucketize(density[density > 0], inner, right=True)
        return {
            "dead": float((density == 0).double().mean()),
            "freq_over_1_percent": float((density > 0.01).double().mean()),
            "freq_over_10_percent": float((density > 0.1).double().mean()),
            "density": {
                "edges": [float(f"{edge:.5g}") for edge in edges],
                "counts": torch.bincount(places, minlength=HALF_DECADES).tolist(),
            },
        }


MEASURES: tuple[type[Measure], ...] = (Variance, PerToken, Latents)
"""In the order of a record."""


class Reconstruction:
    """All measures of an autoencoder of d_sae latents."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        self.tokens = 0
        self._measures = [measure(d_in, d_sae) for measure in MEASURES]

    @torch.no_grad()
    def add(
        self, x: Tensor, reconstruction: Tensor, codes: Codes, row: Tensor, numbers: Tensor
    ) -> None:
        """Take in activations [N, d], their reconstructions and codes; the rest as in `Tokens`.

        All tokens of a document must come at once, or the errors are too small.
        """
        self.tokens += len(x)
        if len(x):
            tokens = Tokens(x.double(), reconstruction.double(), codes, row, numbers)
            for measure in self._measures:
                measure.add(tokens)

    def row(self) -> dict[str, Any]:
        """The numbers of all measures by name."""
        return {name: n for measure in self._measures for name, n in measure.row().items()}


def average_max_cosines(sae: TopKSae) -> dict[str, float | None]:
    """How similar latents are; as costly as encoding as many tokens as there are latents."""
    sides = {"decoder": sae.W_dec.detach(), "encoder": sae.W_enc.detach().T}
    return {f"average_max_{name}_cosine_sim": _nearest(rows) for name, rows in sides.items()}


def _nearest(rows: Tensor) -> float | None:
    """Mean over rows [F, d] of the largest cosine with another; None of a single row."""
    if len(rows) < 2:
        return None
    rows, best = functional.normalize(rows, dim=1), []
    with whole_products():
        for first in range(0, len(rows), ROWS):
            cosines = rows[first : first + ROWS] @ rows.T  # [ROWS, F]
            cosines.diagonal(first).fill_(-torch.inf)
            best.append(cosines.amax(dim=1))
    return float(torch.cat(best).double().mean())
