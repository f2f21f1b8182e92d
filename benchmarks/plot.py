"""Draws the speed of every contender on every workload, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Row

BAR = 0.26
COLOURS = {"torch": "#9aa5b1", "dcp_fast": "#2f6fde", "ceiling": "#d9b44a"}


def draw(path: Path, rows: Sequence[Row], warning: str | None = None) -> str | None:
    """Write the plot, with a warning above it if there is one, or return why there is none."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FuncFormatter

    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.75 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        bars = {"torch": row.torch, "dcp_fast": row.dcp_fast, "ceiling": row.ceiling}
        for slot, (name, seconds) in enumerate(bars.items()):
            if seconds is None:
                continue
            speed = row.gigabytes / seconds
            y = place + (slot - 1) * BAR
            axes.barh(y, speed, height=BAR * 0.92, color=COLOURS[name])
            text = f" {speed:.2g}"
            if name == "dcp_fast" and row.speedup is not None:
                text += f"   {row.speedup:.1f}x"
            elif name == "ceiling":
                text += f"   {row.ceiling_name}"
            axes.text(speed, y, text, va="center", fontsize=8)
    if warning is not None:
        axes.set_title(warning, color="red")
    axes.set_yticks(range(len(rows)), [f"{row.label}, {row.cache}" for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.18)
    axes.set_xlabel("GB/s of the bytes this rank needs (median, log scale)")
    axes.spines[["top", "right"]].set_visible(False)
    labels = {
        "torch": "torch DCP",
        "dcp_fast": "dcp_fast, and how much faster than torch",
        "ceiling": "plain reads or copies",
    }
    handles = [Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in labels]
    figure.legend(handles, list(labels.values()), loc="outside upper center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return None
