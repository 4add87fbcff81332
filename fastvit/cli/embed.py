"""`fastvit embed`: features of a folder of images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from fastvit.cli import _training as options
from fastvit.cli._shared import console, fail, print_json, progress_bar


def embed(
    folder: Annotated[Path, typer.Argument(help="Images at any depth.")],
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
        Path, typer.Option(help="Folder for features.safetensors and names.json; new.")
    ] = Path("fastvit-embed"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --out.")] = False,
    device: options.Device = "auto",
    workers: options.Workers = 0,
    accelerate: options.Accelerate = True,
    as_json: options.AsJson = False,
) -> None:
    """Write what the model's classifier would take for every image, and the images' names.

    Under torchrun the images are shared out. An interrupted run goes on with --resume; images that
    cannot be read are left out and named.
    """
    from fastvit.train import distributed

    try:
        target = distributed.pick_device(device)
        with distributed.process_group(target), options.kernels(accelerate), progress_bar() as bar:
            task = bar.add_task("reading weights", total=None)
            result = _embed(
                folder, source, checkpoint, use_ema, img_size, batch_size, amp, out, resume, target,
                workers, accelerate,
                lambda done, total: bar.update(
                    task, description="images", completed=done, total=total
                ),
            )  # fmt: skip
            first = distributed.rank() == 0
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        fail("embed", str(error))
    if not first:
        return
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    printer = console()
    printer.print(f"{result.images} images, {result.width} features each")
    options.print_broken(result.broken)
    printer.print(f"wrote {', '.join(result.files)}", soft_wrap=True)


def _embed(
    folder: Path, source: str, checkpoint: Path | None, use_ema: bool | None, img_size: int | None,
    batch_size: int, amp: bool, out: Path, resume: bool, device: Any, workers: int,
    accelerate: bool, progress: Any,
) -> Any:  # fmt: skip
    from fastvit.train.embed import embed_folder
    from fastvit.train.models import load_source

    found = load_source(source, checkpoint=checkpoint, ema=use_ema, accelerated=accelerate)
    if img_size is not None:
        found = found.resized(img_size)
    config = options.make_data(str(folder), {"augment": "none"}, found.pixels(), found.model)
    about = {
        "model": source,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "use_ema": use_ema,
        "img_size": config.img_size,
    }
    return embed_folder(
        found.model.to(device).eval(), config, out, about=about, device=device, resume=resume,
        batch_size=batch_size, workers=workers, amp=amp, progress=progress,
    )  # fmt: skip
