"""Small bar charts as SVG within a page, in the page's colours."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT = 220, 64


def bars(
    values: Sequence[float | None], titles: Sequence[str], labels: tuple[str, str], what: str
) -> str:
    """A bar for each value, None for a gap.

    Args:
        values: at least 0.
        titles: shown when a bar is pointed at; escaped, as are the others.
        labels: below the left end and the right end.
        what: the heading.
    """
    highest = max((value for value in values if value is not None), default=0) or 1
    what += f", up to {highest:,.0f}" if highest >= 100 else f", up to {highest:.3g}"
    step = WIDTH / max(1, len(values))
    drawn = []
    for number, (value, title) in enumerate(zip(values, titles, strict=True)):
        if value:
            height = max(1.0, HEIGHT * value / highest)
            drawn.append(
                f'<rect x="{number * step + 0.5:.1f}" y="{HEIGHT - height:.1f}" '
                f'width="{max(1.0, step - 1):.1f}" height="{height:.1f}">'
                f"<title>{title}</title></rect>"
            )
    low, high = labels
    return (
        f'<figure><figcaption>{what}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT + 14}" '
        f'role="img" aria-label="{what}"><line x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}"/>'
        f'{"".join(drawn)}<text x="0" y="{HEIGHT + 12}">{low}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 12}" text-anchor="end">{high}</text></svg></figure>'
    )
