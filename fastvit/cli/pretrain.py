"""`fastvit pretrain`: a model without labels, for `fastvit finetune` to take."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastvit.cli import _training as options
from fastvit.cli._shared import console, fail, print_json, progress_bar

SELF_SUPERVISED = {"augment": "none", "epochs": 60, "batch_size": 100, "lr": 1e-3}


def pretrain(
    context: typer.Context,
    *,
    method: Annotated[
        Literal["mae", "masked-patch"],
        typer.Option(help="Masked autoencoding, or the ViT paper's masked patch prediction."),
    ] = "mae",
    data: options.DataName = "mnist5k",
    model: Annotated[str | None, typer.Option(help="vit_digits, vit_mnist, or a name.")] = None,
    img_size: options.ImgSize = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    optimizer: options.Optimizer = None,
    lr: options.Lr = None,
    weight_decay: options.WeightDecay = None,
    warmup_epochs: options.Warmup = None,
    clip: options.Clip = None,
    augment: options.Augment = None,
    seed: options.Seed = 0,
    probe: Annotated[
        bool, typer.Option(help="Measure a linear probe of the encoder before and after.")
    ] = True,
    out: options.Out = Path("fastvit-pretrain"),
    resume: options.Resume = False,
    device: options.Device = "auto",
    workers: options.Workers = 0,
    as_json: options.AsJson = False,
) -> None:
    """Train an encoder on images without labels; `fastvit finetune OUT` goes on from it.

    A linear probe is logistic regression on the mean over patch tokens.
    """
    import torch
    from safetensors.torch import save_file

    from fastvit.train import distributed, load_data
    from fastvit.train.models import ModelConfig, build_model
    from fastvit.train.paper import pretrain as run
    from fastvit.train.probe import linear_probe, mean_tokens
    from fastvit.vit import VisionTransformer

    choices = dict(context.params)
    defaults = {**options.defaults_for(data), **SELF_SUPERVISED}
    if (out / "model.safetensors").exists():
        fail("pretrain", f"{out} holds a finished pre-training; choose another --out")
    with options.interruptible("pretrain"):
        recipe = options.make_recipe(choices, defaults, device)
        size = {} if img_size is None else {"img_size": img_size}
        config = ModelConfig(model or defaults["model"], {"num_classes": 0, **size})
        torch.manual_seed(recipe.seed)
        encoder = build_model(config)
        if not isinstance(encoder, VisionTransformer):
            raise ValueError(
                f"{config.name} is not a model of fastvit's own; `fastvit list` has them"
            )
        data_config = options.make_data(data, choices, defaults, encoder)
        images = load_data(data_config)
        measured: dict[str, Any] = {"method": method, "model": config.name, "data": data}
        target = distributed.pick_device(device)
        encoder.to(target)

        def probed() -> float:
            with progress_bar() as bar:
                bar.add_task("linear probe", total=None)
                return linear_probe(mean_tokens(encoder.eval()), images)

        if probe:
            measured["probe_before"] = probed()
            encoder.train()
        steps = recipe.epochs * (len(images.train) // recipe.batch_size)
        with options.display(steps, True) as report:
            measured["seconds"] = run(
                encoder, images, recipe, method, out=out / "pretraining", resume=resume,
                device=device, workers=workers, report=report,
            )  # fmt: skip
        if probe:
            measured["probe_after"] = probed()
    weights = {name: value.cpu().contiguous() for name, value in encoder.state_dict().items()}
    save_file(weights, out / "model.safetensors")
    record = {
        "command": "pretrain",
        "model": dataclasses.asdict(config),
        "data": dataclasses.asdict(data_config),
        "classes": list(images.classes),
        "recipe": dataclasses.asdict(recipe),
        "result": measured,
    }
    (out / "config.json").write_text(json.dumps(record, indent=1) + "\n")
    if as_json:
        print_json({**measured, "out": str(out)})
        return
    printer = console()
    printer.print(f"{method} of {config.name} on {data}: {measured['seconds']:.0f} s")
    if probe:
        printer.print(
            f"linear probe, top-1 on held-out images: {measured['probe_before']:.2%} before, "
            f"{measured['probe_after']:.2%} after"
        )
    printer.print(f"wrote {out}", soft_wrap=True)
