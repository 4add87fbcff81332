"""`fastvit embed`: features of a folder of images or of tar shards."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fastvit.cli import _training as options
from fastvit.cli._shared import console, errors, print_json, progress_bar
from fastvit.train.embed import SHARD, Format

MOST_WORKERS = 8  # by default, for each rank


def embed(
    images: Annotated[
        Path,
        typer.Argument(
            help="A folder of images at any depth or of .tar shards, or one such shard."
        ),
    ],
    *,
    source: Annotated[
        str,
        typer.Option(
            "--model",
            help="A run's folder, demo (a trained DINOv2-S that needs no download), or a model's "
            "name: its pretrained weights are fetched.",
        ),
    ] = "demo",
    checkpoint: options.Checkpoint = None,
    use_ema: options.UseEma = None,
    img_size: options.ImgSize = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time, for each rank.")] = 64,
    amp: Annotated[bool, typer.Option("--amp", help="bfloat16 autocast.")] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for features-000000.parquet, ... and embed.json; new.")
    ] = Path("fastvit-embed"),
    file_format: Annotated[
        Format, typer.Option("--format", help="Of the files; Parquet needs pyarrow.")
    ] = "parquet",
    shard_size: Annotated[
        int, typer.Option(min=1, help="Images of a folder in a file; a .tar becomes one.")
    ] = SHARD,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out what cannot be read, and list it.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --out.")] = False,
    device: options.Device = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that decode images, for each rank.")
    ] = None,
    accelerate: options.Accelerate = True,
    as_json: options.AsJson = False,
) -> None:
    """Write what the model's classifier would take for every image, and the images' names.

    Under torchrun the files are shared out. Whatever stops it, --resume goes on with the files that
    are missing, on any number of ranks, and refuses where inputs, weights or options have changed.
    """
    from fastvit.train import distributed
    from fastvit.train import embed as embedding
    from fastvit.train.models import load_source

    with errors("embed"):
        target = distributed.pick_device(device)
        with (
            distributed.process_group(target),
            options.kernels(accelerate),
            progress_bar(
                TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                TextColumn("{task.fields[now]}"), TimeRemainingColumn(),
                show=distributed.rank() == 0,
            ) as bar,
        ):  # fmt: skip
            task = bar.add_task("reading weights", total=None, now="")
            found = load_source(source, checkpoint=checkpoint, ema=use_ema, accelerated=accelerate)
            if img_size is not None:
                found = found.resized(img_size)
            bar.update(task, description="listing images")
            world = distributed.world()
            whose = f"rank 0 of {world}" if world > 1 else "embedding"
            start = time.perf_counter()

            def progress(share: float, count: int) -> None:
                nonlocal start
                if count == 0:
                    start = time.perf_counter()
                speed = count / max(time.perf_counter() - start, 1e-9)
                now = f"{count:,} images, {speed:,.0f} images/s"
                bar.update(task, description=whose, completed=share, total=1, now=now)

            result = embedding.embed(
                found.model.to(target).eval(),
                images,
                options.make_data("", {}, found.pixels(), found.model),
                out,
                about={"model": source, "checkpoint": checkpoint and str(checkpoint)},
                device=target,
                resume=resume,
                skip_broken=skip_broken,
                batch_size=batch_size,
                workers=workers or _workers(),
                amp=amp,
                shard_size=shard_size,
                file_format=file_format,
                progress=progress,
            )
            first = distributed.rank() == 0
    if not first:
        return
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    printer = console()
    printer.print(f"{result.images} images, {result.width} features each")
    options.print_broken(result.broken)
    printer.print(f"wrote {len(result.files)} files to {out}", soft_wrap=True)


def _workers() -> int:
    """This rank's share of the cores."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // ranks))
