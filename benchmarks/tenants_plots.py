"""Line plots of the cases about many tenants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def lines(
    records: Sequence[Mapping[str, Any]],
    panel: str | None,
    x: str,
    series: Mapping[str, str],
    labels: tuple[str, str],
    title: str,
    path: Path,
) -> None:
    """Lines over a field in powers of two, both axes logarithmic, saved as PNG.

    Args:
        panel: field whose values get a plot each, side by side; None for one plot.
        x: field for the horizontal axis.
        series: label -> field; where a record has None the line breaks.
        labels: of both axes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = list(dict.fromkeys(record[panel] for record in records)) if panel else [None]
    figure, grid = pyplot.subplots(
        1, len(values), figsize=(4.6 * max(len(values), 1.4), 4.2), squeeze=False, sharey=True, layout="constrained"
    )
    for value, axes in zip(values, grid[0], strict=True):
        chosen = [record for record in records if panel is None or record[panel] == value]
        for label, field in series.items():
            heights = [float("nan") if record[field] is None else record[field] for record in chosen]
            axes.plot([record[x] for record in chosen], heights, "o-", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
        axes.set_xlabel(labels[0])
        if panel:
            axes.set_title(f"{panel} {value}", fontsize=10)
    grid[0][0].set_ylabel(labels[1])
    figure.suptitle(title)
    handles = grid[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(2, len(series)), frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
