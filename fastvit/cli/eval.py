"""`fastvit eval`: how often a trained model is right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import Progress
from rich.table import Table

from fastvit.cli import _training as options
from fastvit.cli._shared import console, errors, print_json, progress_bar


def evaluate(
    source: Annotated[
        str, typer.Argument(help="A run's folder, or a model's name: pretrained weights.")
    ],
    *,
    data: Annotated[
        str | None,
        typer.Option(help="digits, mnist5k or a folder; by default what the run was trained on."),
    ] = None,
    split: Annotated[
        Literal["held-out", "all"], typer.Option(help="all: a folder of classes as it is.")
    ] = "held-out",
    checkpoint: options.Checkpoint = None,
    use_ema: options.UseEma = None,
    img_size: options.ImgSize = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    amp: Annotated[bool, typer.Option("--amp", help="bfloat16 autocast.")] = False,
    device: options.Device = "auto",
    workers: options.Workers = 0,
    accelerate: options.Accelerate = True,
    as_json: options.AsJson = False,
) -> None:
    """Measure a classifier: top-1, top-5, loss, and accuracy for every class.

    Under torchrun the images are shared out, each counted once.
    """
    from fastvit.train import distributed

    with errors("eval"):
        target = distributed.pick_device(device)
        with distributed.process_group(target), options.kernels(accelerate):
            first = distributed.rank() == 0
            with progress_bar(show=first) as bar:
                record = _evaluate(
                    source, data, split, checkpoint, use_ema, img_size, batch_size, amp, target,
                    workers, accelerate, bar,
                )  # fmt: skip
    if not first:
        return
    if as_json:
        print_json(record)
    else:
        _print(record)


def _evaluate(
    source: str, data: str | None, split: str, checkpoint: Path | None, use_ema: bool | None,
    img_size: int | None, batch_size: int, amp: bool, device: Any, workers: int, accelerate: bool,
    bar: Progress,
) -> dict[str, Any]:  # fmt: skip
    import torch

    from fastvit.train import DataConfig, distributed
    from fastvit.train.data import eval_batches, load_all, load_data, make_loader
    from fastvit.train.models import load_source
    from fastvit.train.objectives import classification_metrics

    task = bar.add_task("reading weights", total=None)
    found = load_source(source, checkpoint=checkpoint, ema=use_ema, accelerated=accelerate)
    if img_size is not None:
        found = found.resized(img_size)
    stored: dict[str, Any] = found.run.config.get("data", {}) if found.run else {}
    name = data or stored.get("name")
    if name is None:
        raise ValueError(f"--data is needed: {source} does not say what it was trained on")
    kept = {"held_out": stored["held_out"]} if name == stored.get("name") else {}
    fresh: DataConfig = options.make_data(name, {"augment": "none"}, found.pixels(), found.model)
    config = DataConfig(**{**vars(fresh), **kept})
    images = load_data(config) if split == "held-out" else load_all(config)
    classes = tuple(found.run.config["classes"]) if found.run else images.classes
    images = images.relabelled(classes)
    outputs = found.model.num_classes
    if outputs != len(classes):
        raise ValueError(f"the model has {outputs} classes, {name} has {len(classes)}")

    model = found.model.to(device).eval()
    keys = eval_batches(len(images.test), batch_size, distributed.rank(), distributed.world())
    loader = make_loader(images.test, keys, workers=workers, pin=device.type == "cuda")
    broken: set[str] = set()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, amp):

        def batches() -> Any:
            bar.update(task, description="batches")
            for batch in bar.track(loader, total=len(keys), task_id=task):
                broken.update(batch.broken)
                yield images.to_model(batch, device)

        metrics = classification_metrics(model, batches())
    right = dict(zip(classes, metrics.pop("per_class"), strict=True))
    return {
        "source": source,
        "data": name,
        "split": split,
        "img_size": config.img_size,
        **metrics,
        "per_class": right,
        "broken": distributed.gather_names(broken),
    }


WORST = 10  # classes shown where there are more


def _print(record: dict[str, Any]) -> None:
    per_class = {name: share for name, share in record["per_class"].items() if share is not None}
    shown = sorted(per_class.items(), key=lambda item: item[1])[:WORST]
    few = len(per_class) <= WORST
    table = Table("class" if few else f"class, {WORST} worst of {len(per_class)}", "top-1")
    for name, share in per_class.items() if few else shown:
        table.add_row(name, f"{share:.2%}")
    printer = console()
    printer.print(table)
    printer.print(
        f"{record['source']} on {record['data']}, {record['images']} images of "
        f"{record['img_size']} px: top-1 {record['top1']:.2%}, top-5 {record['top5']:.2%}, "
        f"loss {record['loss']:.4f}"
    )
    options.print_broken(record["broken"])
