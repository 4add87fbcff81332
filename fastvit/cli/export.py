"""`fastvit export`: a ViT as a file that runs without fastvit, loaded again and compared."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from fastvit.cli._models import CHECKPOINT_HELP, DEMO, MODEL_HELP, load_model
from fastvit.cli._shared import console, errors, print_json, progress_bar


def export(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = DEMO,
    *,
    to: Annotated[
        Literal["torch", "aoti", "onnx"],
        typer.Option(help="torch.export program, AOTInductor package (compiled) or ONNX."),
    ] = "torch",
    out: Annotated[
        Path | None, typer.Option(help="The file; MODEL.pt2, MODEL.aoti.pt2 or MODEL.onnx.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help=CHECKPOINT_HELP)] = None,
    img_size: Annotated[
        int | None, typer.Option(min=1, help="Image side in pixels; the model's own by default.")
    ] = None,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Let height and width vary by whole patches.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Write a ViT to a file for any batch size, load it again and compare it with the model.

    Exits with status 1 if the two disagree.
    """
    endings = {"torch": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx"}
    path = out or Path(model + endings[to])
    with errors("export"), progress_bar() as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the exporters' own making
        task = bar.add_task("reading weights", total=None)
        from fastvit.export import export_model

        overrides = {"dynamic_img_size": True} if dynamic_size else {}
        vit = load_model(model, checkpoint, img_size, **overrides).model
        bar.update(task, description=f"exporting to {to}")
        done = export_model(vit, path, to, dynamic_size=dynamic_size)
    if as_json:
        print_json({**dataclasses.asdict(done), "path": str(path), "passed": done.passed})
    else:
        table = Table(title=f"{model} in {path} ({path.stat().st_size / 1e6:.1f} MB)")
        table.add_column("images")
        table.add_column("error", justify="right")
        table.add_column("verdict")
        for check in done.checks:
            verdict = "agrees" if check.passed else "[bold red]differs"
            table.add_row("x".join(map(str, check.shape)), f"{check.max_error:.1e}", verdict)
        console().print(table)
        console().print(
            "error: largest difference of the loaded file from the model, over the largest output"
        )
    raise typer.Exit(0 if done.passed else 1)
