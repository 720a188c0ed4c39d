"""What pictures drawn by matplotlib share: how they begin, how axes look, how they are saved."""

from __future__ import annotations

import io
from typing import Any

from dlmctl.records.errors import missing_package


def new_figure(width: float, height: float, purpose: str) -> Any:
    """An empty figure, sized in inches.

    Args:
        purpose: what needs matplotlib, for the message.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_package("matplotlib", "plot", purpose) from None
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def dress(axis: Any, title: str, x: str) -> None:
    """Title, label, light grid and no frame at the top and right."""
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(visible=True, alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.02)


def saved(figure: Any, kind: str) -> bytes:
    """The picture as PNG or SVG, without a date, so that the same data give the same bytes."""
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return picture.getvalue()
