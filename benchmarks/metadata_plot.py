"""Draws how time and memory for metadata grow with the ranks that wrote it, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.metadata import Measurement, Stage
from benchmarks.plot import COLOURS

STYLES = {Stage.READ: "-", Stage.PLAN: "--"}


def draw(path: Path, measurements: Sequence[Measurement]) -> str | None:
    """Write the plot, or return why there is none."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    def memory(measurement: Measurement, stage: Stage, name: str) -> float | None:
        peak = measurement.peak_bytes(stage, name)
        return None if peak is None else peak / 1e9

    panels: list[tuple[str, Sequence[Stage], Callable[[Measurement, Stage, str], float | None]]] = [
        ("seconds", (Stage.READ, Stage.PLAN), Measurement.seconds),
        ("GB of memory above what the process had", (Stage.READ,), memory),
    ]
    growing = [measurement for measurement in measurements if not measurement.with_plans]
    figure, both = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axes, (title, stages, value_of) in zip(both, panels, strict=True):
        for stage in stages:
            for name in ("torch", "dcp_fast"):
                values = [(m.ranks, value) for m in growing if (value := value_of(m, stage, name)) is not None]
                if values:
                    label = f"{'torch DCP' if name == 'torch' else name}, {stage.value}"
                    axes.plot(*zip(*values, strict=True), STYLES[stage], marker="o", color=COLOURS[name], label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ranks = [measurement.ranks for measurement in growing]
        axes.set_xticks(ranks, [f"{count:,}" for count in ranks])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(f"ranks that wrote {measurements[0].tensors:,} tensors (log scales)")
        axes.set_title(title)
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return None
