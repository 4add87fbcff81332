"""The record of a run: JSON, a PNG chart, a self-contained HTML page."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch

from fastvit.bench.timing import Race, is_ours, reason
from fastvit.kernels._backend import gpu_problem
from fastvit.numerics import Report

CPU_NOTE = (
    "On a CPU fastvit runs plain PyTorch: these are speeds of that path. Triton kernels are timed "
    "on a GPU only."
)


@dataclass(frozen=True)
class Result:
    """One case: its numerics and the times of all contenders."""

    kind: str  # op, model or train
    name: str
    case: str
    dtype: str
    race: Race
    numerics: dict[str, Any]  # of `checked_numerics`
    flops: int
    bytes: int | None = None
    batch: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    # of a contender: what is switched on, in the order of the waterfall that `fastvit report` draws
    techniques: dict[str, list[str]] = field(default_factory=dict)


def checked_numerics(check: Callable[[], Report]) -> dict[str, Any]:
    """``passed``, ``ratio`` (the worst) or ``error``: why the check itself did not run."""
    try:
        report = check()
    except Exception as error:
        return {"passed": False, "ratio": None, "error": reason(error)}
    worst = max(row.ratio for row in report.rows)
    return {"passed": report.passed, "ratio": worst, "error": None}


def as_json(result: Result, roof: dict[str, float]) -> dict[str, Any]:
    """JSON-ready; times in seconds, ``roof_s`` the least time the measured roof allows."""
    race = result.race
    least = roof_seconds(result, roof)
    peer = race.timings[race.fastest_peer].median if race.fastest_peer else None
    contenders = {
        name: {
            **dataclasses.asdict(timing),
            "first_call": race.first_call[name],
            "peak_bytes": race.peak_bytes.get(name),
            "flops_per_s": result.flops / timing.median,
            "share_of_roof": least / timing.median,
            "images_per_s": result.batch / timing.median if result.batch else None,
            "speedup": peer / timing.median if peer else None,
        }
        for name, timing in race.timings.items()
    }
    plain = {key: value for key, value in vars(result).items() if key != "race"}
    return {
        **plain,
        "contenders": contenders,
        "failed": race.failed,
        "bounds": race.bounds,
        "fastest_peer": race.fastest_peer,
        "speedup": race.speedup,
        "roof_s": least,
    }


def roof_seconds(result: Result, roof: dict[str, float]) -> float:
    """The longest of computing at the measured matmul rate, moving at the measured copy rate and,
    on a GPU, one empty launch."""
    moving = (result.bytes or 0) / roof["copy_bytes_per_s"]
    return max(result.flops / roof["matmul_flops_per_s"], moving, roof.get("launch_s", 0.0))


def notes(device: torch.device) -> list[str]:
    """What a reader has to know about the path that is timed."""
    if device.type != "cuda":
        return [CPU_NOTE]
    problem = gpu_problem()
    return [f"fastvit runs plain PyTorch here: {problem}."] if problem else []


# --------------------------------------------------------------------------- files


def stem(record: dict[str, Any]) -> str:
    """File name that carries the conditions: what, device, dtype, torch, date."""
    environment = record["environment"]
    device = environment["gpu"] if record["device"] == "cuda" else "cpu"
    date = re.sub(r"[-:]", "", environment["date"][:19])
    kinds = "+".join(dict.fromkeys(result["kind"] for result in record["results"]))
    parts = (kinds, device, record["dtype"], f"torch{environment['torch'].split('+')[0]}", date)
    return "_".join(re.sub(r"[^A-Za-z0-9.+]+", "-", part) for part in parts)


def write(record: dict[str, Any], out: Path) -> list[Path]:
    """JSON, PNG (where matplotlib is installed and something was timed) and HTML under `out`."""
    out.mkdir(parents=True, exist_ok=True)
    base = out / stem(record)
    paths = [Path(f"{base}.json")]
    paths[0].write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    chart = Path(f"{base}.png")
    if any(result["speedup"] for result in record["results"]) and draw(record, chart):
        paths.append(chart)
    page = Path(f"{base}.html")
    page.write_text(_html(record, chart if chart in paths else None), encoding="utf-8")
    return [*paths, page]


def conditions(record: dict[str, Any]) -> str:
    """One line: device, dtype, versions, threads, seed, date."""
    environment = record["environment"]
    device = (
        environment["gpu"]
        if record["device"] == "cuda"
        else f"{environment['cpu']}, {environment['threads']} threads"
    )
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton", "timm"))
    return f"{device}; {record['dtype']}; {versions}; seed {record['seed']}; {environment['date']}"


def seconds(value: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Contender, median, p10 to p90, rate, share of roof, times the fastest peer's speed."""
    table = []
    for name, timing in result["contenders"].items():
        images = timing["images_per_s"]
        rate = (
            f"{images:,.{0 if images >= 100 else 2}f} img/s"
            if images
            else flops_rate(timing["flops_per_s"])
        )
        table.append(
            (
                name,
                seconds(timing["median"]),
                f"{seconds(timing['p10'])} - {seconds(timing['p90'])}",
                rate,
                f"{timing['share_of_roof']:.0%}",
                f"{timing['speedup']:.2f}x" if timing["speedup"] else "",
            )
        )
    return table


def flops_rate(rate: float) -> str:
    """TFLOP/s or GFLOP/s; nothing for an op that multiplies no matrices."""
    if rate >= 1e12:
        return f"{rate / 1e12:.0f} TFLOP/s"
    return f"{rate / 1e9:.3g} GFLOP/s" if rate else ""


def remarks(result: dict[str, Any]) -> list[str]:
    """Why something is missing from a result."""
    checked = result["numerics"]
    notes = [f"{name}: {why}" for name, why in result["failed"].items()]
    notes += [f"{name}: not the whole job, so no peer" for name in result["bounds"]]
    if checked["error"]:
        notes.append(f"not timed, numerics could not be checked: {checked['error']}")
    elif not checked["passed"]:
        notes.append("not timed: numerics fail, see fastvit numerics")
    return notes


def draw(record: dict[str, Any], path: Path) -> bool:
    """Bars of speed beside the fastest peer's, each with its median; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    results = [result for result in record["results"] if result["speedup"]]
    lines = sum(len(result["contenders"]) + 2 for result in results)
    figure = Figure(figsize=(9, 0.24 * lines + 1.2), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    beside = axes.get_yaxis_transform()  # x in parts of the width, y in bars
    ticks: dict[float, str] = {}
    y, widest = 0.0, 1.0
    for result in results:
        peer = result["contenders"][result["fastest_peer"]]["median"]
        axes.text(0, y, title(result), transform=beside, va="center", fontsize=9, weight="bold")
        for name, timing in result["contenders"].items():
            y += 1
            speed, slow, fast = (peer / timing[key] for key in ("median", "p90", "p10"))
            color = "#d1495b" if is_ours(name) else "#b4bec9"
            axes.barh(y, speed, color=color, height=0.8)
            axes.plot([slow, fast], [y, y], color="#333333", linewidth=1, marker="|", markersize=5)
            axes.text(1.01, y, seconds(timing["median"]), transform=beside, va="center", fontsize=8)
            ticks[y] = name
            widest = max(widest, speed)
        y += 2
    axes.axvline(1, color="#333333", linewidth=0.8, linestyle="--")
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 1, -1)
    axes.set_xlim(0, 1.5 * widest)  # a long whisker may run out of the picture
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("speed over the fastest peer's median; line from p10 to p90", fontsize=8)
    heading = (f"fastvit bench: {conditions(record)}", *record["notes"])
    wrapped = "\n".join(line for text in heading for line in textwrap.wrap(text, 120))
    figure.suptitle(wrapped, fontsize=8, x=0.02, ha="left")
    figure.savefig(path)
    return True


def title(result: dict[str, Any]) -> str:
    """Name and case, ``training step`` where it is one."""
    step = ", training step" if result["kind"] == "train" else ""
    return f"{result['name']}, {result['case']}{step}"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2733; }
table { border-collapse: collapse; margin: 0 0 1.5rem; width: 100%; }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid #dde3ea; }
th:first-child, td:first-child { text-align: left; }
tr.ours { font-weight: 600; background: #fbeef0; }
h3 { margin: 1.2rem 0 .3rem; font-size: 1rem; }
img { max-width: 100%; margin: .5rem 0 1rem; }
.note { color: #566573; }
"""


def _html(record: dict[str, Any], chart: Path | None) -> str:
    body = [
        "<h1>fastvit bench</h1>",
        f"<p>{escape(conditions(record))}</p>",
        *(html_note(note) for note in record["notes"]),
        *([html_picture(chart, "speeds as bars")] if chart else []),
        *html_results(record["results"]),
        *html_environment(record),
    ]
    return html_page("fastvit bench", body)


def html_note(text: str) -> str:
    """A paragraph in grey."""
    return f'<p class="note">{escape(text)}</p>'


def html_picture(path: Path, alt: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def html_table(headers: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A table; lines of ours stand out."""
    table = [f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in headers)}</tr>"]
    for line in lines:
        kind = ' class="ours"' if is_ours(line[0]) else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in line)
        table.append(f"<tr{kind}>{cells}</tr>")
    return [*table, "</table>"]


def html_results(results: list[dict[str, Any]]) -> list[str]:
    """A table of contenders for each result."""
    headers = ("contender", "median", "p10 to p90", "rate", "of roof", "vs fastest peer")
    body = []
    for result in results:
        body.append(f"<h3>{escape(title(result))}</h3>")
        if result["contenders"]:
            body += html_table(headers, rows(result))
        body += [html_note(note) for note in remarks(result)]
    return body


def html_environment(record: dict[str, Any]) -> list[str]:
    """What the record was made on, and its roof."""
    facts = record["environment"] | record["roof"]
    known = [(key, str(value)) for key, value in facts.items() if value is not None]
    return ["<h2>Environment</h2>", *html_table(("what", "value"), known)]


def html_page(name: str, body: list[str]) -> str:
    """A whole page that needs no other file."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(name)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
