"""Plots shared by the cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    y_label: str,
    title: str,
    path: Path,
    *,
    log: bool = False,
) -> None:
    """Grouped bars, saved as PNG; a line at 1, or a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.1 * len(groups)), 4.5), layout="constrained")
    width = 0.8 / len(series)
    for place, (name, values) in enumerate(series.items()):
        axes.bar(
            [index + (place - (len(series) - 1) / 2) * width for index in range(len(groups))], values, width, label=name
        )
    if log:
        axes.set_yscale("log")
    else:
        axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
