"""`fastvit predict`: the likeliest classes of images."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fastvit import samples
from fastvit.cli import _training as options
from fastvit.cli._shared import console, errors, print_json, progress_bar

BATCH = 64  # images at a time, where there are more


def predict(
    images: Annotated[
        list[str], typer.Argument(help=f"Image files, or {', '.join(samples.PHOTOS)}.")
    ],
    *,
    source: Annotated[
        str,
        typer.Option(
            "--model",
            help="A run's folder, a checkpoint folder of transformers, or a model's name: its "
            "pretrained weights are fetched.",
        ),
    ],
    checkpoint: options.Checkpoint = None,
    use_ema: options.UseEma = None,
    top: Annotated[int, typer.Option(min=1, help="Classes of each image.")] = 5,
    device: options.Device = "auto",
    accelerate: options.Accelerate = True,
    as_json: options.AsJson = False,
) -> None:
    """Name the likeliest classes of images, with their probabilities.

    Images are made ready as the model's own config says; several run as one batch.
    """
    with errors("predict"), progress_bar() as bar, options.kernels(accelerate):
        from fastvit.train.classifier import load_classifier
        from fastvit.train.distributed import pick_device

        task = bar.add_task("reading images", total=None)
        target = pick_device(device)
        pictures = [samples.find_image(image) for image in images]
        bar.update(task, description="reading weights")
        found = load_classifier(source, checkpoint=checkpoint, ema=use_ema, accelerated=accelerate)
        bar.update(task, description="images", total=len(images))
        rows: list[dict[str, Any]] = []
        for first in range(0, len(pictures), BATCH):
            shares, indices = found.probabilities(pictures[first : first + BATCH], target).topk(
                min(top, len(found.labels))
            )
            for image, values, classes in zip(
                images[first : first + BATCH], shares.tolist(), indices.tolist(), strict=True
            ):
                likeliest = [
                    {"class": index, "label": found.labels[index], "probability": value}
                    for index, value in zip(classes, values, strict=True)
                ]
                rows.append({"image": image, "top": likeliest})
            bar.update(task, completed=len(rows))
    if as_json:
        print_json({"model": source, "labels_from": found.labels_from, "images": rows})
    else:
        _print(rows, source, found.labels_from)


def _print(rows: list[dict[str, Any]], source: str, labels_from: str) -> None:
    table = Table(title=source)
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    for row in rows:
        table.add_section()
        table.add_row(Text(row["image"], "bold"), "")
        for each in row["top"]:
            table.add_row(each["label"], f"{each['probability']:.2%}")
    console().print(table)
    console().print(f"labels: {labels_from}")
