"""Do features tell which proposals are right? A logistic probe on what the sampler saw.

A proposal is the token that the model finds likeliest for a masked position, in a step of a
completion that is being sampled. It is right if it is the token of the one right completion. The
probes read

    confidence             p, its log odds, margin and entropy
    codes                  the code of the autoencoder at the position
    activations            the residual stream that was encoded
    random                 its code under as many random unit directions, with the same K and b_dec
    confidence+codes, confidence+activations, confidence+random

They are trained on one half of the puzzles and tested on the other. The penalty is chosen within
the first half, by cross-validation over puzzles; where confidence is joined by others, it keeps the
penalty that it has alone, so that many columns do not crowd out few. A gain is what a probe has
over `confidence`, on the same test proposals, and over_random what it has over the same probe with
`random`: what is left then is due to the dictionary that was learnt. Errors come from a bootstrap
over the test puzzles, the same resamples for all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.noise import random_bits
from dlmctl.report.auroc import stratified_wins
from dlmctl.report.bootstrap import drawn_counts
from dlmctl.sae.chunks import encoded
from dlmctl.sae.logistic import Design, best_penalty, fit, losses
from dlmctl.sae.topk import Codes, TopKSae, random_directions

FOLDS = 5
GRID = tuple(10.0**-power for power in range(7))
"""Penalties that are tried, the largest first, for columns of variance about 1."""
RESAMPLES = 1000
FEWEST = 2 * FOLDS
"""Puzzles that a probe takes at least."""
MOST_ODDS = 30.0
"""Log odds of a confidence that rounds to 1."""


class Proposals(NamedTuple):
    """P proposals of a sampler."""

    right: Tensor
    """bool [P]."""
    unit: Tensor
    """int64 [P], the step of a completion that they were made in: a choice between positions."""
    puzzle: Tensor
    """int64 [P], a hash of the prompt's id."""
    numbers: Tensor
    """float64 [P, 3]: p, margin and minus entropy."""
    x: Tensor
    """[P, d], activations."""

    def chosen(self, which: Tensor) -> Proposals:
        """Those that are true in bool [P]."""
        return Proposals(*(column[which] for column in self))


class _Columns(NamedTuple):
    """What a probe reads besides confidence: dense, or codes of `sparse` features."""

    dense: Tensor
    """float64 [P, D]."""
    values: Tensor
    """float64 [P, K]."""
    indices: Tensor
    """int64 [P, K]."""
    sparse: int


def probe_rows(proposals: Proposals, sae: TopKSae, seed: int) -> list[dict[str, Any]]:
    """A row for each probe, or one that says why there is none.

    Args:
        seed: of the halves, the folds, the random directions and the bootstrap.
    """
    half, folds = _divided(proposals.puzzle, seed)
    train, test = proposals.chosen(half == 0), proposals.chosen(half == 1)
    if (reason := _unfit(train, test)) is not None:
        return [{"probe": None, "reason": reason}]
    results = _results(proposals, half == 0, folds, sae, seed)
    judged = _Judged(test, seed)
    measures = {probe: judged.measures(result.scores) for probe, result in results.items()}
    rows = []
    for probe, result in results.items():
        row: dict[str, Any] = {"probe": probe, "penalty": result.penalty}
        for measure, value in measures[probe].items():
            row |= _with_error(measure, value)
        control = None if probe == "confidence" else "random"
        if probe.startswith("confidence+"):
            control = "confidence+random"
        for name, other in (("gain", "confidence"), ("over_random", control)):
            # Above 0 is better, in both.
            for measure, sign in (("auroc", 1), ("nll", -1)):
                key = "auroc_choice" if measure == "auroc" else measure
                gain = None
                if other is not None and other != probe:
                    gain = sign * (measures[probe][key] - measures[other][key])
                row |= _with_error(f"{measure}_{name}", gain)
        rows.append(row | judged.counts(train, proposals))
    return rows


def _results(
    proposals: Proposals, inside: Tensor, folds: Tensor, sae: TopKSae, seed: int
) -> dict[str, _Result]:
    """Each probe, trained on the proposals inside, bool [P], and applied to the others."""
    study = _Study(proposals.right, inside, folds[inside])
    base = _standardized(_confidence(proposals.numbers), inside)
    codes = _encoded(sae, proposals.x)
    control = _encoded(_random(sae, codes, seed), proposals.x)
    parts = {
        "codes": _scaled(codes, sae.d_sae, inside),
        "activations": _standardized(proposals.x.double(), inside),
        "random": _scaled(control, sae.d_sae, inside),
    }
    alone = study.probed(base, None)
    joined = {
        f"confidence+{name}": study.probed(part, (base, alone.penalty))
        for name, part in parts.items()
    }
    own = {name: study.probed(part, None) for name, part in parts.items()}
    return {"confidence": alone, **own, **joined}


def _with_error(name: str, values: Tensor | None) -> dict[str, float | None]:
    """A value and its standard error, of values [1 + R]: the first is that of all puzzles."""
    if values is None:
        return {name: None, f"{name}_se": None}
    drawn = values[1:][~values[1:].isnan()]
    return {name: float(values[0]), f"{name}_se": float(drawn.std())}


def _divided(puzzle: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Half of each puzzle (0 or 1) and its fold, int64 [P] each, at random but evenly."""
    puzzles, place = puzzle.unique(return_inverse=True)
    rank = random_bits(puzzles, torch.full_like(puzzles, seed)).argsort().argsort()
    return (rank % 2)[place], (rank // 2 % FOLDS)[place]


def _unfit(train: Proposals, test: Proposals) -> str | None:
    """Why nothing can be trained or tested; None if it can."""
    for part in (train, test):
        if len(puzzles := part.puzzle.unique()) < FEWEST:
            return f"a half has {len(puzzles)} puzzles, and a probe takes at least {FEWEST}"
        if part.right.all() or not part.right.any():
            return f"all proposals are {'right' if part.right.all() else 'wrong'}"
    if not stratified_wins(test.right.double(), test.right, test.unit)[1].any():
        return "no choice has both a right and a wrong proposal"
    return None


def _confidence(numbers: Tensor) -> Tensor:
    """p, its log odds, margin and minus entropy, float64 [P, 4]."""
    odds = numbers[:, :1].logit().clamp(-MOST_ODDS, MOST_ODDS)
    return torch.cat([numbers, odds], dim=1)


def _standardized(x: Tensor, train: Tensor) -> _Columns:
    """Dense columns, with mean 0 and variance 1 in the training half; constant ones are 0."""
    mean, deviation = x[train].mean(dim=0), x[train].std(dim=0)
    scaled = (x - mean) / deviation.where(deviation > 1e-12 * mean.abs(), torch.inf)
    none = x.new_zeros(len(x), 0)
    return _Columns(scaled, none, none.long(), 0)


def _scaled(codes: Codes, sparse: int, train: Tensor) -> _Columns:
    """Codes, with a mean square of 1 over the active ones of the training half."""
    values = codes.values.double()
    active = values[train][values[train] > 0]
    scale = active.square().mean().sqrt() if len(active) else 1.0
    return _Columns(values.new_zeros(len(values), 0), values / scale, codes.indices, sparse)


def _encoded(sae: TopKSae, x: Tensor) -> Codes:
    """Codes of x [P, d], on the CPU."""
    codes = encoded(sae, x.to(sae.W_enc.device, sae.W_enc.dtype))
    return Codes(*(part.cpu() for part in codes))


@torch.no_grad()
def _random(sae: TopKSae, codes: Codes, seed: int) -> TopKSae:
    """A dictionary of random unit directions, with the size, K and centre of another.

    Args:
        codes: of the other, whose mean number of active latents is K if it does not know its own.
    """
    active = sae.k or max(1, round(float((codes.values > 0).sum(dim=1).double().mean())))
    control = TopKSae(sae.d_in, sae.d_sae, active).to(sae.W_enc.device, sae.W_enc.dtype)
    control.W_enc.copy_(random_directions(sae.d_sae, sae.d_in, seed).T)
    control.b_dec.copy_(sae.b_dec)
    return control.requires_grad_(False)


class _Result(NamedTuple):
    """A probe: its penalty, and its log odds of the test proposals, float64 [N]."""

    penalty: float
    scores: Tensor


class _Study:
    """Probes trained on one half and applied to the other."""

    def __init__(self, right: Tensor, inside: Tensor, folds: Tensor) -> None:
        self.right, self.inside, self.folds = right, inside, folds

    def probed(self, part: _Columns, before: tuple[_Columns, float] | None) -> _Result:
        """The probe of these columns, and of dense ones before them with a penalty of their own."""
        dense, fixed = part.dense, torch.zeros(0, dtype=torch.float64)
        if before is not None:
            dense = torch.cat([before[0].dense, dense], dim=1)
            fixed = torch.full((before[0].dense.shape[1],), before[1], dtype=torch.float64)
        design = Design(dense, part.values, part.indices, part.sparse)
        free = design.width - len(fixed)
        grid = [torch.cat([fixed, torch.full((free,), p, dtype=torch.float64)]) for p in GRID]
        train, labels = design.rows(self.inside), self.right[self.inside]
        best, _ = best_penalty(train, labels, self.folds, grid)
        fitted = fit(train, labels, grid[best])
        return _Result(GRID[best], fitted.scores(design.rows(~self.inside)))


class _Judged:
    """Measures of scores on the test half: of all its puzzles, and of resamples of them."""

    def __init__(self, test: Proposals, seed: int) -> None:
        self.test = test
        puzzles, self._place = test.puzzle.unique(return_inverse=True)  # [N]
        _, unit = test.unit.unique(return_inverse=True)
        # The puzzle of each choice, [U].
        self._owner = self._place.new_zeros(int(unit.max()) + 1).scatter_(0, unit, self._place)
        once = torch.ones(1, len(puzzles), dtype=torch.float64)
        self._counts = torch.cat([once, drawn_counts(len(puzzles), RESAMPLES, seed)])

    def measures(self, scores: Tensor) -> dict[str, Tensor]:
        """AUROC within choices, and mean loss in nats; float64 [1 + R]."""
        wins, pairs = stratified_wins(scores, self.test.right, self.test.unit)  # [U]
        loss = losses(scores, self.test.right)
        return {
            "auroc_choice": self._total(wins, self._owner) / self._total(pairs, self._owner),
            "nll": self._total(loss, self._place) / self._total(torch.ones_like(loss), self._place),
        }

    def _total(self, values: Tensor, owner: Tensor) -> Tensor:
        puzzles = self._counts.shape[1]
        sums = values.new_zeros(puzzles).index_add_(0, owner, values)
        return self._counts @ sums

    def counts(self, train: Proposals, every: Proposals) -> dict[str, Any]:
        """What was trained and tested on."""
        return {
            "train": len(train.right),
            "test": len(self.test.right),
            "puzzles": len(every.puzzle.unique()),
            "test_puzzles": self._counts.shape[1],
            "right": float(self.test.right.double().mean()),
            "reason": None,
        }
