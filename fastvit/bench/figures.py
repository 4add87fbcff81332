"""Pictures of measured records: latency against batch, the roofline, waterfalls of techniques.

Bars beside peers are `report.draw`'s. Each function draws into a file and returns False where the
record has nothing to draw.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from fastvit.bench import records, report
from fastvit.bench.timing import is_ours

OURS_COLOR, PEER_COLOR, DARK = "#d1495b", "#b4bec9", "#333333"
OUR_COLORS = (OURS_COLOR, "#7a1f3d", "#f08a4b")
PEER_COLORS = ("#2e4057", "#66a182", "#8d96a3", "#edae49", "#00798c", "#9c6644", "#7b5ea7")
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")


def _figure(width: float, height: float, heading: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    figure.suptitle(heading, fontsize=8, x=0.02, ha="left")
    return figure


def _log_y(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


# --------------------------------------------------------------------------- latency


def latency(record: dict[str, Any], path: Path) -> bool:
    """Time of a call against batch, both logarithmic, a panel for each model; bands from p10 to
    p90."""
    models: dict[str, list[dict[str, Any]]] = {}
    for result in record["results"]:
        if result["kind"] == "model":
            models.setdefault(result["name"], []).append(result)
    models = {name: results for name, results in models.items() if len(results) > 1}
    if not models:
        return False
    heading = f"time of a forward against batch; {report.conditions(record)}"
    figure = _figure(9, 4.2 * len(models) + 0.4, heading)
    for axes, (name, results) in zip(
        figure.subplots(len(models), 1, squeeze=False)[:, 0], models.items(), strict=True
    ):
        _latency_panel(axes, name, sorted(results, key=lambda result: result["batch"]))
    figure.savefig(path)
    return True


def _latency_panel(axes: Axes, name: str, results: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for result in results for name in result["contenders"]))
    styles = _styles(names)
    for contender in names:
        points = [
            (result["batch"], result["contenders"][contender])
            for result in results
            if contender in result["contenders"]
        ]
        batches = [batch for batch, _ in points]
        low, middle, high = (
            [1e3 * timing[key] for _, timing in points] for key in ("p10", "median", "p90")
        )
        color, line, marker = styles[contender]
        axes.plot(batches, middle, line, color=color, marker=marker, markersize=4, label=contender)
        axes.fill_between(batches, low, high, color=color, alpha=0.15, linewidth=0)
    roof = [1e3 * result["roof_s"] for result in results]
    batches = [result["batch"] for result in results]
    axes.plot(batches, roof, color=DARK, linewidth=0.8, linestyle="--", label="measured roof")
    axes.set_xscale("log", base=2)
    _log_y(axes)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_title(name, fontsize=9, loc="left", weight="bold")
    axes.set_xlabel("images in a batch", fontsize=8)
    axes.set_ylabel("milliseconds", fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(which="major", color="#e8ecf0")
    _tidy(axes)


def _styles(names: list[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, line and marker of each contender, all different: ours in reds, peers in others."""
    styles = {}
    for mine, colors in ((True, OUR_COLORS), (False, PEER_COLORS)):
        looks = itertools.product(zip(LINES, MARKERS, strict=True), colors)
        for name in (name for name in names if is_ours(name) == mine):
            (line, marker), color = next(looks)
            styles[name] = (color, line, marker)
    return styles


# --------------------------------------------------------------------------- roofline


def roofline(record: dict[str, Any], path: Path) -> bool:
    """Every op's place under the measured roof, and its share of the roof beside the fastest
    peer's. Intensities are least bytes by arithmetic, rates are measured."""
    results = [r for r in record["results"] if r["kind"] == "op" and "fastvit" in r["contenders"]]
    if not results:
        return False
    heading = f"ops under the measured roof; {report.conditions(record)}"
    figure = _figure(11, max(4.5, 0.23 * len(results) + 1.6), heading)
    left, right = figure.subplots(1, 2, width_ratios=(1, 0.8))
    _roof_panel(left, results, record["roof"])
    _share_panel(right, results)
    figure.savefig(path)
    return True


def _roof_panel(axes: Axes, results: list[dict[str, Any]], roof: dict[str, float]) -> None:
    peak, bandwidth = roof["matmul_flops_per_s"], roof["copy_bytes_per_s"]
    ridge = peak / bandwidth
    intensities = [result["flops"] / result["bytes"] for result in results if result["flops"]]
    low, high = min([*intensities, ridge]) / 3, max([*intensities, ridge]) * 3
    roof_line = [bandwidth * low / 1e12, peak / 1e12, peak / 1e12]
    axes.plot([low, ridge, high], roof_line, color=DARK, linewidth=1)
    for number, result in enumerate(results, 1):
        if not result["flops"]:
            continue
        x = result["flops"] / result["bytes"]
        ours = result["contenders"]["fastvit"]["flops_per_s"] / 1e12
        peer = result["contenders"].get(result["fastest_peer"])
        if peer:
            rate = peer["flops_per_s"] / 1e12
            axes.plot([x, x], [ours, rate], color=PEER_COLOR, linewidth=0.8)
            axes.plot(x, rate, "o", markerfacecolor="white", markeredgecolor=DARK, markersize=5)
        axes.plot(x, ours, "o", color=OURS_COLOR, markersize=5)
        axes.annotate(str(number), (x, ours), (4, 3), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    _log_y(axes)
    axes.set_xlabel("FLOP for each byte that has to move", fontsize=8)
    axes.set_ylabel("TFLOP/s, measured", fontsize=8)
    axes.set_title(
        f"roof {peak / 1e12:.3g} TFLOP/s, {bandwidth / 1e12:.3g} TB/s; red: fastvit, "
        "white: fastest peer",
        fontsize=8,
        loc="left",
    )
    axes.grid(which="major", color="#e8ecf0")
    _tidy(axes)


def _share_panel(axes: Axes, results: list[dict[str, Any]]) -> None:
    for y, result in enumerate(results):
        axes.barh(y, result["contenders"]["fastvit"]["share_of_roof"], color=OURS_COLOR)
        peer = result["contenders"].get(result["fastest_peer"])
        if peer:
            axes.plot(peer["share_of_roof"], y, "|", color=DARK, markersize=10, markeredgewidth=2)
    labels = [f"{report.title(result)} [{i}]" for i, result in enumerate(results, 1)]
    axes.set_yticks(range(len(results)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.05)
    axes.axvline(1, color=DARK, linewidth=0.8, linestyle="--")
    axes.set_xlabel("share of the roof; black: fastest peer", fontsize=8)
    _tidy(axes)


# --------------------------------------------------------------------------- waterfall


def waterfall(record: dict[str, Any], path: Path) -> bool:
    """What each technique of a record takes off the time, a panel for each case."""
    panels = []
    for result in record["results"]:
        steps, left_out = records.waterfall(result)
        if len(steps) + len(left_out) > 1:
            panels.append((result, steps, left_out))
    if not panels:
        return False
    heights = [len(steps) + len(left_out) + 1.5 for _, steps, left_out in panels]
    heading = f"what each technique brings; {report.conditions(record)}"
    figure = _figure(9, 0.34 * sum(heights) + 0.8, heading)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        _waterfall_panel(axes, *panel)
    figure.savefig(path)
    return True


def _waterfall_panel(
    axes: Axes,
    result: dict[str, Any],
    steps: list[tuple[str, str]],
    left_out: list[tuple[str, str]],
) -> None:
    times = {name: timing["median"] * 1e3 for name, timing in result["contenders"].items()}
    labels, before = [], 0.0
    last = times[steps[-1][1]]
    for y, (label, contender) in enumerate(steps):
        time = times[contender]
        if y:
            axes.barh(y, time - before, left=before, color=OURS_COLOR if time < before else DARK)
            labels.append(f"+ {label}")
        else:
            axes.barh(y, time, color=PEER_COLOR)
            labels.append(label)
        text = f"{report.seconds(time / 1e3)}" + (f"  ({before / time:.2f}x)" if y else "")
        axes.text(max(time, before), y, f"  {text}", va="center", fontsize=8)
        before = time
    for y, (label, contender) in enumerate(left_out, len(steps)):
        extra = times[contender] - last
        axes.barh(y, extra, left=last, color=PEER_COLOR, hatch="//", edgecolor="white")
        text = f"  {report.seconds(times[contender] / 1e3)}"
        axes.text(max(last, times[contender]), y, text, va="center", fontsize=8)
        labels.append(f"all without {label}")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(times[name] for _, name in (*steps, *left_out)))
    axes.set_xlabel("milliseconds", fontsize=8)
    axes.set_title(report.title(result), fontsize=9, loc="left", weight="bold")
    _tidy(axes)
