"""Puzzles solved over masks and learning rates, algorithm by algorithm: tables and a picture.

Reads the runs of `make hour` or `make night`. Intervals are of 95 %, by Student's t over the seeds
that all compared cells have; with one seed there is none.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

NAME = re.compile(
    r"(?P<algorithm>[^_]+)_law[^_]+_k(?P<masks>\d+)_inner1(-sequence-(?P<lambda>[^-]+))?-(?P<seed>\d+)"
)
T = (math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t of 0.975 by degrees of freedom."""
NEAR = 5.0
"""Points below the best rate that still count as good."""

Seeds = dict[int, float]
"""Per cent solved, by seed."""
Surface = dict[tuple[str, int, float], Seeds]
"""By algorithm, masks and learning rate."""


def read(directory: Path) -> Surface:
    """The runs of one task."""
    surface: Surface = {}
    for path in sorted(directory.glob("*/*.json")):
        if named := NAME.fullmatch(path.stem):
            strength = f" {named['lambda']}" if named["lambda"] else ""
            cell = (named["algorithm"] + strength, int(named["masks"]), float(path.parent.name))
            solved = 100 * json.loads(path.read_bytes())["accuracy"]
            surface.setdefault(cell, {})[int(named["seed"])] = solved
    return dict(sorted(surface.items()))


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its interval; nan for one value."""
    mean = statistics.mean(values)
    if not 1 < len(values) <= len(T):
        return mean, math.nan
    return mean, T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def written(values: Iterable[float], sign: str = "") -> str:
    """Mean ± half width (number of values)."""
    values = list(values)
    if not values:
        return ""
    mean, half = interval(values)
    spread = "" if math.isnan(half) else f" ± {half:.1f}"
    return f"{mean:{sign}.1f}{spread} ({len(values)})"


def differences(a: Seeds, b: Seeds) -> list[float]:
    """a - b for the seeds that both have."""
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def good_rates(surface: Surface, algorithm: str, masks: int) -> list[float]:
    """The rates within NEAR points of the best."""
    means = {
        rate: statistics.mean(seeds.values())
        for (name, k, rate), seeds in surface.items()
        if (name, k) == (algorithm, masks)
    }
    return [rate for rate, mean in means.items() if mean >= max(means.values()) - NEAR]


def row(*cells: str) -> None:
    print("|", " | ".join(cells), "|")


def header(*cells: str) -> None:
    print()
    row(*cells)
    row(*("---" for _ in cells))


def tables(surface: Surface, compared: str = "rspo") -> None:
    """Solved in every cell; lost by few masks; one algorithm less the others."""
    algorithms, masks, rates = (
        list(dict.fromkeys(sorted(axis))) for axis in zip(*surface, strict=True)
    )
    few, many = masks[0], masks[-1]
    shown = [f"{rate:g}" for rate in rates]

    header("algorithm", "masks", *shown, f"rates within {NEAR:g} points of the best")
    for algorithm in algorithms:
        for k in masks:
            cells = [surface.get((algorithm, k, rate), {}) for rate in rates]
            if any(cells):
                good = ", ".join(f"{rate:g}" for rate in good_rates(surface, algorithm, k))
                row(algorithm, str(k), *(written(cell.values()) for cell in cells), good)

    header(f"lost from {many} masks to {few}", *shown)
    for algorithm in algorithms:
        pairs = [[surface.get((algorithm, k, rate), {}) for k in (many, few)] for rate in rates]
        row(algorithm, *(written(differences(*pair), "+") for pair in pairs))

    header(f"{compared} less", "masks", *shown)
    for other in algorithms:
        for k in masks if other != compared else ():
            pairs = [
                [surface.get((name, k, rate), {}) for name in (compared, other)] for rate in rates
            ]
            row(other, str(k), *(written(differences(*pair), "+") for pair in pairs))


def picture(surface: Surface, path: Path) -> None:
    """A panel for each rate, a line for each algorithm over the masks; dots are the seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "surface", "svg.fonttype": "none"})
    from matplotlib import pyplot

    algorithms, masks, rates = (
        list(dict.fromkeys(sorted(axis))) for axis in zip(*surface, strict=True)
    )
    size = (1 + 3.2 * len(rates), 3.4)
    figure, panels = pyplot.subplots(1, len(rates), figsize=size, sharey=True, squeeze=False)
    colours = pyplot.get_cmap("tab10").colors
    for panel, rate in zip(panels[0], rates, strict=True):
        for colour, algorithm in zip(colours, algorithms, strict=False):
            cells = {c[1]: s for c, s in surface.items() if (c[0], c[2]) == (algorithm, rate)}
            means = [statistics.mean(seeds.values()) for seeds in cells.values()]
            panel.plot([*cells], means, color=colour, marker="o", markersize=4, label=algorithm)
            dots = [(k, solved) for k, seeds in cells.items() for solved in seeds.values()]
            panel.plot(*zip(*dots, strict=True), ".", color=colour, alpha=0.35, markersize=4)
        panel.set(xscale="log", ylim=(0, None), title=f"rate {rate:.0e}".replace("e-0", "e-"))
        panel.set_xlabel("masks")
        panel.set_xticks(masks, [str(k) for k in masks])
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("solved, %")
    panels[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    found = read(Path(sys.argv[1]))
    if not found:
        sys.exit(f"no runs of the surface under {sys.argv[1]}")
    tables(found)
    picture(found, Path(sys.argv[2]))
