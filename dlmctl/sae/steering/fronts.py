"""What steering gains at a given cost: the front of a feature over its amplitudes.

An amplitude of one model is not that of another, so models are compared at equal cost. The points
of a front, in the order of |amplitude|, are

    cost = mean log(ppl_after / ppl_before)        C, C_share, push (see `scores`)

and the first is amplitude 0, where all are 0. Between neighbours C and the others are linear in the
cost; the value at a level is taken where the front first reaches it. The errors are bootstrap
errors: prompts are drawn with replacement, the same for all fronts, and every front is drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.report.bootstrap import drawn_counts
from dlmctl.sae.steering.scores import Outcome, Prompt
from dlmctl.sae.steering.twins import Treatment

RESAMPLES = 1000
VALUES = ("C", "C_share", "push", "amplitude")
"""What is read off at the level."""

Row = dict[str, Any]


class Crossing(NamedTuple):
    """Where R fronts of A points first reach a level."""

    reached: Tensor
    """bool [R]."""
    segment: Tensor
    """int64 [R], the number of the point after which they do, if they do."""
    part: Tensor
    """float64 [R], how far into the segment, 0 to 1."""

    def read(self, values: Tensor) -> Tensor:
        """Values float64 [R, A] of the points, at the level: [R]."""
        low, high = (values.gather(1, (self.segment + n)[:, None])[:, 0] for n in (0, 1))
        return low + self.part * (high - low)


def crossing(cost: Tensor, level: float) -> Crossing:
    """Where fronts with these costs, float64 [R, A], first reach a level above 0; NaN never does.

    The first cost of each is 0.
    """
    above = cost[:, 1:] >= level
    reached, segment = above.any(dim=1), above.int().argmax(dim=1)
    low, high = (cost.gather(1, (segment + n)[:, None])[:, 0] for n in (0, 1))
    return Crossing(reached, segment, (level - low) / (high - low))


class _Front:
    """The sums of a feature by amplitude and prompt."""

    def __init__(self, groups: dict[Treatment, list[Outcome]], prompts: dict[Prompt, int]) -> None:
        ordered = sorted(groups.items(), key=lambda item: abs(item[0].amplitude))
        self.treatment = ordered[0][0]
        self.amplitudes = [treatment.amplitude for treatment, _ in ordered]
        names = ("gain", "room", "gains", "cost", "costs", "push", "pushes")
        self._sums = {
            name: torch.zeros(len(ordered), len(prompts), dtype=torch.float64) for name in names
        }  # [A, G]
        for number, (_, outcomes) in enumerate(ordered):
            for one in outcomes:
                place = number, prompts[one.prompt]
                for name, count, value in (
                    ("gain", "gains", one.gain),
                    ("cost", "costs", one.cost),
                    ("push", "pushes", one.push),
                ):
                    self._sums[name][place] += 0.0 if value is None else value
                    self._sums[count][place] += value is not None
                self._sums["room"][place] += one.room or 0.0
        self.among = len(prompts)
        """Prompts of all fronts, G."""
        self.prompts = int((self._sums["gains"] + self._sums["costs"]).any(dim=0).sum())

    def points(self, weights: Tensor) -> dict[str, Tensor]:
        """Costs and VALUES, float64 [R, A + 1] each, for weights of prompts [R, G]."""
        sums = {name: weights @ values.T for name, values in self._sums.items()}  # [R, A]
        amplitude = torch.tensor(self.amplitudes, dtype=torch.float64).expand_as(sums["gain"])
        points = {
            "cost": sums["cost"] / sums["costs"],
            "C": sums["gain"] / sums["gains"],
            "C_share": sums["gain"] / sums["room"],
            "push": sums["push"] / sums["pushes"],
            "amplitude": amplitude,
        }
        origin = torch.zeros(len(weights), 1, dtype=torch.float64)
        return {name: torch.cat([origin, value], dim=1) for name, value in points.items()}

    def at(self, level: float, weights: Tensor) -> dict[str, Tensor]:
        """VALUES at the level, float64 [R] each; NaN where the front does not reach it."""
        points = self.points(weights)
        where = crossing(points["cost"], level)
        return {n: where.read(points[n]).where(where.reached, torch.nan) for n in VALUES}


def front_rows(
    outcomes: Iterable[tuple[Treatment, Outcome]], at_cost: float, seed: int, bound: bool | None
) -> list[Row]:
    """A row for each front, and one for the mean of several features steered in the same way.

    A front takes two amplitudes of one sign, with concept and perplexity measured.

    Args:
        at_cost: the cost in perplexity, 0.2 for a fifth more.
        seed: of the bootstrap.
        bound: whether perplexities are upper bounds; None if that is not known.
    """
    level = math.log1p(at_cost)
    fronts = _fronts(outcomes)
    if not fronts:
        return []
    prompts = fronts[0].among
    once = torch.ones(1, prompts, dtype=torch.float64)
    weights = torch.cat([once, drawn_counts(prompts, RESAMPLES, seed)])  # [1 + R, G]
    common = {"at_cost": at_cost, "log_ppl_ratio": level}
    rows: list[Row] = []
    by_way: dict[Treatment, list[tuple[_Front, dict[str, Tensor]]]] = {}
    for front in fronts:
        values = front.at(level, weights)
        way = front.treatment._replace(feature=-1, amplitude=math.copysign(1, front.amplitudes[0]))
        by_way.setdefault(way, []).append((front, values))
        highest = max(front.points(weights[:1])["cost"][0].nan_to_num(0.0).tolist())
        reason = f"the highest cost is {math.expm1(highest):+.1%}"
        rows.append(_start(front) | common | _numbers(values, front.prompts, reason, bound))
    for members in by_way.values():
        if len(members) > 1:
            means = {n: torch.stack([v[n] for _, v in members]).mean(dim=0) for n in VALUES}
            missing = sum(bool(values["amplitude"][0].isnan()) for _, values in members)
            reason = f"{missing} of {len(members)} features do not reach this cost"
            start = _start(members[0][0]) | {"feature": "all", "features": len(members)}
            rows.append(start | common | _numbers(means, prompts, reason, bound))
    return rows


def _fronts(outcomes: Iterable[tuple[Treatment, Outcome]]) -> list[_Front]:
    """Those with two amplitudes; amplitude 0 is in each of them anyway."""
    groups: dict[Treatment, dict[Treatment, list[Outcome]]] = {}
    prompts: dict[Prompt, int] = {}
    for treatment, outcome in outcomes:
        if treatment.amplitude:
            front = treatment._replace(amplitude=math.copysign(1, treatment.amplitude))
            groups.setdefault(front, {}).setdefault(treatment, []).append(outcome)
            prompts.setdefault(outcome.prompt, len(prompts))
    fronts = []
    for group in groups.values():
        known = {t: members for t, members in group.items() if _measured(members)}
        if len(known) > 1:
            fronts.append(_Front(known, prompts))
    return fronts


def _measured(outcomes: Sequence[Outcome]) -> bool:
    gained = any(one.gain is not None for one in outcomes)
    return gained and any(one.cost is not None for one in outcomes)


def _start(front: _Front) -> Row:
    return {"row": "front", **front.treatment.fields(), "amplitudes": front.amplitudes}


def _numbers(values: dict[str, Tensor], prompts: int, reason: str, bound: bool | None) -> Row:
    """Fields of values [1 + R], the first of all prompts and the others of resamples."""
    row: Row = {}
    for name in VALUES:
        value, drawn = float(values[name][0]), values[name][1:]
        drawn = drawn[~drawn.isnan()]
        known = not math.isnan(value)
        row[name] = value if known else None
        if name != "amplitude":
            enough = known and prompts > 1 and len(drawn) > 1
            row[f"{name}_se"] = float(drawn.std()) if enough else None
    reached = ~values["amplitude"].isnan()
    return row | {
        "prompts": prompts,
        "reached": float(reached[1:].double().mean()),
        "reason": None if bool(reached[0]) else reason,
        "bound": bound,
    }
