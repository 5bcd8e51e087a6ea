"""Plots as files."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rxt_dist.files import write_atomic

_DOTS_PER_INCH = 120


def save_plot(path: Path, draw: Callable[[Axes], None]) -> Path:
    """Draw into a PNG file, without pyplot's global state and without a display."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    buffer = BytesIO()
    canvas.print_figure(buffer, format="png", dpi=_DOTS_PER_INCH)
    write_atomic(path, buffer.getvalue())
    return path
