"""`fastvit paper`: the ViT paper's experiments, each as a table and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from fastvit.cli._shared import console, errors, print_json, progress_bar

Name = Literal["ablation-pos", "pooling", "optimizer", "shape", "resolution", "self-supervised"]
COLOR = "#2e4057"


def paper(
    name: Annotated[Name, typer.Argument(help="The experiment.")],
    data: Annotated[Literal["mnist5k", "digits"], typer.Option(help="What to train on.")] = (
        "mnist5k"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each arm.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Of the (pre-)training.")] = 15,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at a time, a thread each.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder; fastvit-paper/NAME by default. Goes on there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Run one of the paper's experiments on a small set; write a table and a plot."""
    from fastvit.train import paper as experiments

    folder = out or Path("fastvit-paper") / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    known = json.loads(path.read_text())["runs"] if path.exists() else []
    with errors("paper"), progress_bar() as bar:
        task = bar.add_task(name, total=None)

        def report(runs: list[dict[str, Any]], total: int) -> None:
            bar.update(task, completed=len(runs), total=total)
            path.write_text(json.dumps(_record(name, data, seeds, epochs, runs), indent=1) + "\n")

        runs = experiments.run_experiment(
            name, data, seeds=seeds, epochs=epochs, jobs=jobs, known=known, report=report
        )
    record = _record(name, data, seeds, epochs, runs)
    path.write_text(json.dumps(record, indent=1) + "\n")
    (folder / "table.md").write_text(markdown(record))
    draw(record, folder / "plot.png")
    if as_json:
        print_json(record)
        return
    _print(record)
    console().print(f"Wrote {path}, table.md and plot.png.")


def _record(
    name: str, data: str, seeds: int, epochs: int, runs: list[dict[str, Any]]
) -> dict[str, Any]:
    from fastvit.check.environment import environment
    from fastvit.train import paper as experiments

    experiment = experiments.EXPERIMENTS[name]
    return {
        "experiment": name,
        "title": experiment.title,
        "source": experiment.source,
        "metric": experiment.metric,
        "command": f"fastvit paper {name} --data {data} --seeds {seeds} --epochs {epochs}",
        "data": data,
        "environment": environment(),
        **experiments.describe(name, data),
        "summary": experiments.summary(name, runs),
        "runs": runs,
    }


METRICS = {
    "top1": "top-1, %",
    "finetuned_top1": "top-1 after fine-tuning, %",
    "probe_top1": "top-1 of a linear probe, %",
}


def markdown(record: dict[str, Any]) -> str:
    """The table of a record, with its command."""
    lines = [
        f"# {record['title']}",
        "",
        f"ViT paper, {record['source']}; here on {record['data']}, mean ± standard deviation over"
        f" seeds of {METRICS[record['metric']].removesuffix(', %')} on held-out images:",
        "",
        f"| | {METRICS[record['metric']]} | seeds | MFLOP an image | parameters | s to train |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in _rows(record)]
    return "\n".join([*lines, "", f"`{record['command']}`", ""])


def _rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            row["arm"],
            f"{row['mean']:.2f} ± {row['std']:.2f}",
            str(row["seeds"]),
            f"{1000 * row['gflops']:.1f}",
            f"{row['parameters']:,}",
            f"{row['seconds']:.0f}",
        )
        for row in record["summary"]
    ]


def _print(record: dict[str, Any]) -> None:
    table = Table(title=f"{record['title']} ({record['source']}), {record['data']}")
    for heading in ("", METRICS[record["metric"]], "seeds", "MFLOP", "parameters", "s"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in _rows(record):
        table.add_row(*row)
    console().print(table)


def draw(record: dict[str, Any], path: Path) -> None:
    """Every seed as a dot, the mean as a line and its standard deviation as a bar."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = record["summary"]
    figure = Figure(figsize=(7.5, 0.55 * len(rows) + 1.4), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        axes.plot(row["values"], [y] * len(row["values"]), "o", color=COLOR, alpha=0.4, ms=5)
        axes.errorbar(row["mean"], y, xerr=row["std"], fmt="|", color="#d1495b", ms=18, capsize=4)
        text = f"{row['mean']:.1f}"
        axes.annotate(
            text, (row["mean"], y), (0, 12), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_xlabel(f"{METRICS[record['metric']]}, {record['data']}; dots are seeds", fontsize=9)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # of the figure, since it may be longer than the axes
    title = f"{record['title']}\nViT paper, {record['source']}"
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path)
