"""Curves of a run as figures of a page: SVG that scales with its column, in the page's colours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlmctl.report.page import escaped
from dlmctl.report.text_curves import spread
from dlmctl.report.watched_run import Series

WIDE, HIGH = 300, 100
"""Units of a picture, and the most points of a curve."""


def figures(fields: Mapping[str, Series]) -> list[Any]:
    """A figure for each field, as markup."""
    return [_figure(name, series) for name, series in fields.items()]


def _figure(name: str, series: Series) -> Any:
    from markupsafe import Markup

    xs = [x for points in series.values() for x, _ in points]
    lines = {key: spread(points, min(xs), max(xs), WIDE + 1) for key, points in series.items()}
    ys = [y for values in lines.values() for y in values if y is not None]
    low, high = (min(ys), max(ys)) if ys else (0.0, 0.0)
    drawn = []
    for number, (key, values) in enumerate(lines.items()):
        points = " ".join(
            f"{x},{HIGH * (1 - (y - low) / (high - low) if high > low else 0.5):.1f}"
            for x, y in enumerate(values)
            if y is not None
        )
        if " " not in points:  # a single point would not be seen
            points = f"0,{points.partition(',')[2]} {WIDE},{points.partition(',')[2]}"
        label = f"<title>{escaped(key)}</title>" if key else ""
        drawn.append(f'<polyline class="l{number % 6}" points="{points}">{label}</polyline>')
    last = ", ".join(f"{points[-1][1]:.4g}" for points in series.values() if points)
    return Markup(
        f"<figure><figcaption><b>{escaped(name)}</b> {last}</figcaption>"
        f'<svg viewBox="0 -2 {WIDE} {HIGH + 4}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escaped(name)} from step {min(xs):g} to {max(xs):g}">{"".join(drawn)}</svg>'
        f'<div class="axis"><span>{low:.4g} – {high:.4g}</span>'
        f"<span>step {min(xs):,.0f} – {max(xs):,.0f}</span></div></figure>"
    )
