"""Scores of steering: how much more of a concept there is, and what it costs in fluency.

    C = (c_after - c_before) / 100              c    concept in the text, as judged, 0..100
    P = (ppl_before - ppl_after) / ppl_before   ppl  perplexity of prompt and completion
    S = C + lambda P

(DLM-Scope, arXiv 2602.05859, equation 19 and its code.) Before and after are two completions of one
prompt with the same noise, the second steered. Averages are taken over the completions of a feature
first, then over features. P has no lower bound, so one nonsensical text outweighs all others;
therefore medians, and means of P clipped to [-1, 1], stand next to the means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

from dlmctl.sae.steering.twins import Name, SampledText, Treatment, Twins


class Outcome(NamedTuple):
    """Measurements of twins, before and after; None if they were not measured."""

    concept: tuple[float, float] | None
    """0..100."""
    perplexity: tuple[float, float] | None
    failed: int = 0
    """Answers of the judge without a number."""

    @property
    def gain(self) -> float | None:
        """C."""
        return None if self.concept is None else (self.concept[1] - self.concept[0]) / 100

    @property
    def fluency(self) -> float | None:
        """P."""
        if self.perplexity is None:
            return None
        before, after = self.perplexity
        return (before - after) / before


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
        yield pair.treatment, Outcome(_both([c for c, _ in judged]), _both(fluent), failed)


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
    rows = {t: _feature_row(t, group, weight, bound) for t, group in by_treatment.items()}
    by_way: dict[Treatment, list[dict[str, Any]]] = {}
    for treatment, row in rows.items():
        by_way.setdefault(treatment._replace(feature=-1), []).append(row)
    return [*rows.values(), *(_summary_row(group) for group in by_way.values() if len(group) > 1)]


def _feature_row(
    treatment: Treatment, outcomes: Sequence[Outcome], weight: float, bound: bool | None
) -> dict[str, Any]:
    concepts = [o.concept for o in outcomes if o.concept is not None]
    perplexities = [o.perplexity for o in outcomes if o.perplexity is not None]
    C, P = _known(o.gain for o in outcomes), _known(o.fluency for o in outcomes)
    both = [(o.gain, o.fluency) for o in outcomes]
    S = [c + weight * p for c, p in both if c is not None and p is not None]
    c_mean, p_mean, p_clipped = _mean(C), _mean(P), _mean([min(1.0, max(-1.0, p)) for p in P])
    return {
        **treatment.fields(),
        "n": len(outcomes),
        "n_C": len(C),
        "n_P": len(P),
        "failed": sum(o.failed for o in outcomes),
        "c_before": _mean([before for before, _ in concepts]),
        "c_after": _mean([after for _, after in concepts]),
        "C": c_mean,
        "C_median": _median(C),
        "ppl_before": _median([before for before, _ in perplexities]),
        "ppl_after": _median([after for _, after in perplexities]),
        "P": p_mean,
        "P_median": _median(P),
        "P_clipped": p_clipped,
        "S": None if c_mean is None or p_mean is None else c_mean + weight * p_mean,
        "S_median": _median(S),
        "S_clipped": None if c_mean is None or p_clipped is None else c_mean + weight * p_clipped,
        "bound": bound,
    }


def _summary_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and medians over the rows of features that have a value."""
    summary: dict[str, Any] = {**rows[0], "feature": "all", "features": len(rows)}
    for name in ("n", "n_C", "n_P", "failed"):
        summary[name] = sum(row[name] for row in rows)
    for name in ("c_before", "c_after", "C", "P", "P_clipped", "S", "S_clipped"):
        summary[name] = _mean(_known(row[name] for row in rows))
    for name in ("C_median", "P_median", "S_median", "ppl_before", "ppl_after"):
        source = name.removesuffix("_median")
        summary[name] = _median(_known(row[source] for row in rows))
    return summary


def _both(values: Sequence[float | None]) -> tuple[float, float] | None:
    before, after = values
    return None if before is None or after is None else (before, after)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None
