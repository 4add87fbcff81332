"""`fastvit finetune`: a trained model on new classes, at another resolution if wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastvit.cli import _training as options
from fastvit.cli.train import resumed_job


def finetune(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="A run's folder, demo (a trained DINOv2-S), or a model's name: its pretrained "
            "weights are fetched."
        ),
    ],
    *,
    data: options.DataName = "digits",
    checkpoint: options.Checkpoint = None,
    use_ema: options.UseEma = None,
    img_size: options.ImgSize = None,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="Train the new head only: a linear probe.")
    ] = False,
    drop_path: options.DropPath = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    accumulate: options.Accumulate = 1,
    optimizer: options.Optimizer = None,
    lr: options.Lr = None,
    weight_decay: options.WeightDecay = None,
    warmup_epochs: options.Warmup = None,
    clip: options.Clip = None,
    label_smoothing: options.Smoothing = None,
    mixup: options.Mixup = None,
    cutmix: options.Cutmix = None,
    ema: options.EmaDecay = None,
    amp: options.Amp = None,
    augment: options.Augment = None,
    hflip: options.Hflip = None,
    randaugment: options.RandAugment = None,
    held_out: options.HeldOut = None,
    seed: options.Seed = 0,
    eval_every: options.EvalEvery = None,
    save_every: options.SaveEvery = 0,
    out: options.Out = Path("fastvit-finetune"),
    resume: options.Resume = False,
    device: options.Device = "auto",
    parallel: options.Parallel = None,
    workers: options.Workers = 0,
    accelerate: options.Accelerate = True,
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune a trained model: a new, zero linear head for the data's classes (ViT paper,
    section 3.2), position embeddings interpolated to --img-size.

    Without --optimizer, SGD with momentum as in the paper, or with --freeze AdamW.
    """
    resume = resume or (options.restarted() and (out / "config.json").exists())
    stored = resume and not options.given(context) - {"source"}
    choices = dict(context.params)

    def job() -> options.Job:
        return resumed_job(out, accelerate) if stored else new_job(choices)

    options.run(
        "finetune", job, out=out, resume=resume, device=device, parallel=parallel, workers=workers,
        accelerate=accelerate, as_json=as_json,
    )  # fmt: skip


def new_job(choices: dict[str, Any]) -> options.Job:
    """A job from the command line."""
    import torch

    from fastvit.train import load_data
    from fastvit.train.models import load_source, prepare_finetuning

    name, frozen = choices["data"], choices["freeze"]
    optimizer = choices["optimizer"] or ("adamw" if frozen else "sgd")
    lr = 3e-3 if frozen else options.FINETUNE_LR[optimizer]
    defaults = options.defaults_for(name) | options.FINETUNE | (options.PROBE if frozen else {})
    defaults |= {"optimizer": optimizer, "lr": lr, "weight_decay": 0.0}
    recipe = options.make_recipe(choices, defaults, choices["device"])
    drop_path = choices["drop_path"]
    source = load_source(
        choices["source"],
        checkpoint=choices["checkpoint"],
        ema=choices["use_ema"],
        options={} if drop_path is None else {"drop_path_rate": drop_path},
        accelerated=choices["accelerate"],
    )
    if choices["img_size"] is not None:
        source = source.resized(choices["img_size"])
    data_config = options.make_data(name, choices, defaults | source.pixels(), source.model)
    data = load_data(data_config)
    torch.manual_seed(recipe.seed)
    config = prepare_finetuning(source, len(data.classes), freeze=frozen)
    extra = {"source": choices["source"], "frozen": frozen}
    return options.Job("finetune", source.model, config, data, data_config, recipe, extra)
