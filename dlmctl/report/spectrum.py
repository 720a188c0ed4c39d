"""A picture of the random-feature model: its spectrum, errors over training time, and what students
keep of their teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dlmctl.report.figures import dress, new_figure, saved

BULK_COLOURS = {"gen": "#3c887e", "mem": "#d1495b", "null": "#7a7a7a"}
BULK_NAMES = {"gen": "generalization", "mem": "memorization", "null": "null"}
LINE_COLOURS = ("#1b6ca8", "#d98200", "#66508f", "#8a5a2b", "#2f2f2f")
"""Colours of the teacher and its students; no bulk has them."""
MARKERS = "os^Dv"
"""Of the students."""
BINS_PER_DECADE = 12
WIDE, HIGH = 21.0, 4.0


def draw_theory(
    header: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    eigenvalues: Sequence[float],
    limit: tuple[Sequence[float], Sequence[float]],
    kept: Sequence[tuple[Sequence[float], Sequence[float]]],
    kind: str,
) -> bytes:
    """A picture, PNG or SVG, of what `dlmctl memo-eval theory` writes.

    Args:
        header: its first record.
        rows: the other records.
        eigenvalues: in descending order.
        limit: eigenvalues, and their density in the limit of many dimensions.
        kept: for each student kappa, and the share of the teacher that is kept, of every direction.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    figure = new_figure(WIDE, HIGH, "--plot")
    spectrum, loss, gap, error, shares = figure.subplots(1, 5)
    _spectrum(spectrum, header["bulks"], eigenvalues, limit)
    lines = _lines(rows)
    for axis, (solid, dashed), title in (
        (loss, ("test", "train"), "teacher's loss: fresh data (solid), training set"),
        (gap, ("gap", None), "nearer to training than to fresh data"),
        (error, ("map_err", "score_err"), "error: student's map (solid), teacher's score"),
    ):
        _times(axis, header["bulks"])
        _curves(axis, lines, solid, dashed)
        _dress(axis, title, "training time")
    error.set_yscale("log")
    _shares(shares, header, kept)
    handles, labels = gap.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return saved(figure, kind)


def _spectrum(
    axis: Any,
    bulks: Mapping[str, Mapping[str, Any]],
    eigenvalues: Sequence[float],
    limit: tuple[Sequence[float], Sequence[float]],
) -> None:
    """Shares per decade, so that a logarithmic axis shows all bulks."""
    from numpy import asarray, histogram, log, log10, logspace

    values, (at, rho) = asarray(eigenvalues), map(asarray, limit)
    low, high = log10(values.min()) - 0.2, log10(values.max()) + 0.2
    edges = logspace(low, high, round((high - low) * BINS_PER_DECADE) + 1)
    decades = log10(edges[1] / edges[0])
    begin = 0
    for name, bulk in bulks.items():
        part = values[begin : begin + bulk["count"]]
        begin += bulk["count"]
        counts, _ = histogram(part, edges)
        label = f"{BULK_NAMES[name]}: {bulk['count']}"
        shares = counts / len(values) / decades
        axis.stairs(shares, edges, fill=True, alpha=0.35, color=BULK_COLOURS[name], label=label)
    shown = at * rho * log(10)
    axis.plot(at, shown, color="black", linewidth=1.1, label="limit of many dimensions")
    if "null" in bulks:
        atom = bulks["null"]["expected"][0]
        axis.axvline(atom, color="black", linewidth=1.1, linestyle=":", label="its atom")
    axis.set_yscale("log")
    axis.set_ylim(bottom=3e-3)
    axis.set_xlim(edges[0], edges[-1])
    _dress(axis, "eigenvalues of U: share per decade", "eigenvalue")
    axis.legend(fontsize=8, frameon=False, loc="upper right")


def _shares(
    axis: Any,
    header: Mapping[str, Any],
    kept: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> None:
    """What each student keeps of its teacher, by how much a step of the teacher moves it."""
    for number, (kappa, share) in enumerate(kept):
        begin = 0
        for name, bulk in header["bulks"].items():
            part = slice(begin, begin + bulk["count"])
            begin = part.stop
            style = {"color": BULK_COLOURS[name], "marker": MARKERS[number % len(MARKERS)]}
            axis.scatter(kappa[part], share[part], s=6, linewidths=0, alpha=0.6, **style)
    axis.axhline(header["kept_by_perfect"], color="black", linewidth=1.1, linestyle=":")
    axis.set_ylim(0, 1)
    _dress(axis, "kept by students (dotted: perfect ones)", "instability kappa of a direction")


def _times(axis: Any, bulks: Mapping[str, Mapping[str, Any]]) -> None:
    """Shade the times at which the teacher learns each bulk."""
    for name in ("gen", "mem"):
        label = f"teacher learns the {BULK_NAMES[name]} bulk"
        axis.axvspan(*bulks[name]["tau"], color=BULK_COLOURS[name], alpha=0.12, lw=0, label=label)


def _curves(axis: Any, lines: Mapping[str, Any], solid: str, dashed: str | None) -> None:
    for number, (label, rows) in enumerate(lines.items()):
        colour, taus = LINE_COLOURS[number % len(LINE_COLOURS)], [row["tau"] for row in rows]
        style = {"color": colour, "linewidth": 1.6}
        for name, line in ((solid, {"label": label}), (dashed, {"linestyle": "--"})):
            if name in rows[0]:  # a student has no loss, a teacher is no map
                axis.plot(taus, [row[name] for row in rows], **style, **line)


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        of = f" of the teacher at {row['teacher_tau']:,.7g}" if "teacher_tau" in row else ""
        lines.setdefault(f"{row['role']}{of}", []).append(row)
    return lines


def _dress(axis: Any, title: str, x: str) -> None:
    axis.set_xscale("log", nonpositive="mask")
    dress(axis, title, x)
