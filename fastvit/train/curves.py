"""A picture of a training's metrics."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

_LABELS = {  # key in the rows: what the curve is called
    "train": {"loss": "training", "accuracy": "training", "lr": "learning rate"},
    "test": {
        "loss": "held out", "top1": "held out",
        "ema_loss": "held out, EMA", "ema_top1": "held out, EMA",
    },
}  # fmt: skip
_PANELS = {
    "loss": (("train", "loss"), ("test", "loss"), ("test", "ema_loss")),
    "accuracy": (("train", "accuracy"), ("test", "top1"), ("test", "ema_top1")),
    "learning rate": (("train", "lr"),),
}
_COLOURS = {
    "training": "#9aa5b1",
    "held out": "#0b6e99",
    "held out, EMA": "#d1603d",
    "learning rate": "#555555",
}


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Loss, accuracy and learning rate over epochs, as PNG; without matplotlib, a warning.

    Args:
        history: rows of metrics.jsonl.
        path: of the picture.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        warnings.warn(f"no {path.name}: pip install matplotlib", RuntimeWarning, stacklevel=2)
        return
    panels: dict[str, list[tuple[str, list[tuple[float, float]]]]] = {}
    for title, series in _PANELS.items():
        for kind, key in series:
            points = [(r["epoch"], r[key]) for r in history if r["kind"] == kind and key in r]
            if points:
                panels.setdefault(title, []).append((_LABELS[kind][key], points))
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves) in zip(grid, panels.items(), strict=True):
        for label, points in curves:
            axes.plot(*zip(*points, strict=True), label=label, color=_COLOURS[label], lw=1.4)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
