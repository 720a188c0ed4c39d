"""Scores of steering: how much more of a concept there is, and what it costs in fluency.

    C = (c_after - c_before) / 100              c    concept in the text, as judged, 0..100
    P = (ppl_before - ppl_after) / ppl_before   ppl  perplexity of prompt and completion
    S = C + lambda P

(DLM-Scope, arXiv 2602.05859, equation 19 and its code.) Before and after are two completions of one
prompt with the same noise, the second steered. Averages are taken over the completions of a feature
first, then over features. P has no lower bound, so one nonsensical text outweighs all others;
therefore medians, and means of P clipped to [-1, 1], stand next to the means. Ours are

    C_share       = mean C / (1 - mean c_before / 100)    the share of the possible gain
    log_ppl_ratio = mean log(ppl_after / ppl_before)      what `fronts` are drawn against

Standard errors count prompts, as the completions of a prompt are not independent. With x_i the
value of completion i, or what it adds to first order if the score is a ratio, and G prompts,

    se^2 = G / (G - 1) sum_g (sum_{i in g} (x_i - mean x) / n)^2

The sums of a row over several features are means of theirs, prompt by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

from dlmctl.sae.steering.twins import Name, SampledText, Treatment, Twins

Prompt = str | int | None

MEANS = ("C", "C_share", "P", "P_clipped", "S", "S_clipped", "log_ppl_ratio")
"""Scores that have standard errors."""


class Outcome(NamedTuple):
    """Measurements of twins, before and after; None if they were not measured."""

    concept: tuple[float, float] | None
    """0..100."""
    perplexity: tuple[float, float] | None
    failed: int = 0
    """Answers of the judge without a number."""
    prompt: Prompt = None
    """Its id."""
    push: float | None = None
    """Mean |push| / |H|."""

    @property
    def gain(self) -> float | None:
        """C."""
        return None if self.concept is None else (self.concept[1] - self.concept[0]) / 100

    @property
    def room(self) -> float | None:
        """1 - c_before / 100."""
        return None if self.concept is None else 1 - self.concept[0] / 100

    @property
    def fluency(self) -> float | None:
        """P."""
        if self.perplexity is None:
            return None
        before, after = self.perplexity
        return (before - after) / before

    @property
    def cost(self) -> float | None:
        """log(ppl_after / ppl_before)."""
        if self.perplexity is None:
            return None
        before, after = self.perplexity
        return math.log(after / before)


def outcomes_of(
    twins: Iterable[Twins],
    concept: Callable[[SampledText, Treatment], tuple[float | None, int]] | None = None,
    perplexity: Mapping[Name, float | None] | None = None,
) -> Iterator[tuple[Treatment, Outcome]]:
    """Measurements of all twins.

    Args:
        concept: how strongly a text expresses the concept of a feature, 0..100, and how many
            answers about that failed; None: what the records say.
        perplexity: of each text; None: what the records say.
    """
    for pair in twins:
        both = (pair.before, pair.after)
        judged = [(c.concept, 0) if concept is None else concept(c, pair.treatment) for c in both]
        fluent = [c.perplexity if perplexity is None else perplexity[c.name] for c in both]
        failed = sum(lost for _, lost in judged)
        measured = _both([c for c, _ in judged]), _both(fluent)
        yield pair.treatment, Outcome(*measured, failed, pair.after.key[0], pair.after.push)


def rows_of(
    outcomes: Iterable[tuple[Treatment, Outcome]], weight: float, bound: bool | None = None
) -> list[dict[str, Any]]:
    """A row for each feature and way of steering, and one for each way over several features.

    Args:
        weight: lambda.
        bound: whether perplexities are upper bounds; None if that is not known.
    """
    by_treatment: dict[Treatment, list[Outcome]] = {}
    for treatment, outcome in outcomes:
        by_treatment.setdefault(treatment, []).append(outcome)
    made = {t: _FeatureRow(t, group, weight, bound) for t, group in by_treatment.items()}
    by_way: dict[Treatment, list[_FeatureRow]] = {}
    for treatment, row in made.items():
        by_way.setdefault(treatment._replace(feature=-1), []).append(row)
    summaries = [_summary_row(group) for group in by_way.values() if len(group) > 1]
    return [*(row.fields for row in made.values()), *summaries]


class _FeatureRow:
    """The row of a feature and way of steering, and what each prompt adds to its means."""

    def __init__(
        self, treatment: Treatment, outcomes: Sequence[Outcome], weight: float, bound: bool | None
    ) -> None:
        concepts = [o.concept for o in outcomes if o.concept is not None]
        perplexities = [o.perplexity for o in outcomes if o.perplexity is not None]
        gains = [(o.prompt, o.gain) for o in outcomes if o.gain is not None]
        fluent = [(o.prompt, o.fluency) for o in outcomes if o.fluency is not None]
        rooms = [o.room for o in outcomes if o.room is not None]
        C, P = [value for _, value in gains], [value for _, value in fluent]
        both = [(o.gain, o.fluency) for o in outcomes]
        S = [c + weight * p for c, p in both if c is not None and p is not None]
        means: dict[str, float | None] = {}
        self.sums: dict[str, Sums] = {}
        for name, values in {
            "C": gains,
            "P": fluent,
            "P_clipped": [(prompt, min(1.0, max(-1.0, value))) for prompt, value in fluent],
            "log_ppl_ratio": [(o.prompt, o.cost) for o in outcomes if o.cost is not None],
        }.items():
            means[name], self.sums[name] = _mean_by_prompt(values)
        # C_share is a ratio of means: to first order a completion adds (gain - ratio room) / room.
        gain, room = means["C"], _mean(rooms)
        share = means["C_share"] = gain / room if gain is not None and room else None
        if share is not None and room:
            pairs = zip(gains, rooms, strict=True)
            rest = [(prompt, (value - share * own) / room) for (prompt, value), own in pairs]
            self.sums["C_share"] = _mean_by_prompt(rest)[1]
        for name, part in (("S", "P"), ("S_clipped", "P_clipped")):
            fluency = means[part]
            means[name] = None if gain is None or fluency is None else gain + weight * fluency
            self.sums[name] = _weighted([(self.sums["C"], 1.0), (self.sums[part], weight)])
        ratio = means["log_ppl_ratio"]
        self.fields: dict[str, Any] = {
            "row": "amplitude",
            **treatment.fields(),
            "push": _mean([o.push for o in outcomes if o.push is not None]),
            "n": len(outcomes),
            "n_C": len(C),
            "n_P": len(P),
            "failed": sum(o.failed for o in outcomes),
            "c_before": _mean([before for before, _ in concepts]),
            "c_after": _mean([after for _, after in concepts]),
            **_with_errors(means, self.sums),
            "C_median": _median(C),
            "ppl_before": _median([before for before, _ in perplexities]),
            "ppl_after": _median([after for _, after in perplexities]),
            "ppl_ratio": None if ratio is None else math.exp(ratio),
            "P_median": _median(P),
            "S_median": _median(S),
            "bound": bound,
        }


def _summary_row(rows: Sequence[_FeatureRow]) -> dict[str, Any]:
    """Means and medians over the rows of features that have a value."""
    fields = [row.fields for row in rows]
    summary: dict[str, Any] = {**fields[0], "feature": "all", "features": len(rows)}
    for name in ("n", "n_C", "n_P", "failed"):
        summary[name] = sum(row[name] for row in fields)
    for name in ("push", "c_before", "c_after", *MEANS):
        summary[name] = _mean(_known(row[name] for row in fields))
    for name in MEANS:
        parts = [row.sums[name] for row in rows if row.fields[name] is not None]
        summary[f"{name}_se"] = _error(_weighted([(part, 1 / len(parts)) for part in parts]))
    for name in ("C_median", "P_median", "S_median", "ppl_before", "ppl_after"):
        source = name.removesuffix("_median")
        summary[name] = _median(_known(row[source] for row in fields))
    ratio = summary["log_ppl_ratio"]
    summary["ppl_ratio"] = None if ratio is None else math.exp(ratio)
    return summary


Sums = dict[Prompt, float]
"""By prompt, the sum of (x_i - mean x) / n over its completions."""


def _mean_by_prompt(values: Sequence[tuple[Prompt, float]]) -> tuple[float | None, Sums]:
    sums: Sums = {}
    if not values:
        return None, sums
    mean = fmean(value for _, value in values)
    for prompt, value in values:
        sums[prompt] = sums.get(prompt, 0.0) + (value - mean) / len(values)
    return mean, sums


def _weighted(parts: Iterable[tuple[Sums, float]]) -> Sums:
    total: Sums = {}
    for sums, weight in parts:
        for prompt, value in sums.items():
            total[prompt] = total.get(prompt, 0.0) + weight * value
    return total


def _error(sums: Sums) -> float | None:
    """The standard error; None for fewer than two prompts."""
    prompts = len(sums)
    if prompts < 2:
        return None
    return math.sqrt(prompts / (prompts - 1) * math.fsum(v * v for v in sums.values()))


def _with_errors(
    means: Mapping[str, float | None], sums: Mapping[str, Sums]
) -> dict[str, float | None]:
    """Each of MEANS, and its standard error behind it."""
    fields: dict[str, float | None] = {}
    for name in MEANS:
        error = None if means[name] is None else _error(sums[name])
        fields |= {name: means[name], f"{name}_se": error}
    return fields


def _both(values: Sequence[float | None]) -> tuple[float, float] | None:
    before, after = values
    return None if before is None or after is None else (before, after)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None
