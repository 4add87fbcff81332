"""`fastvit train`: a model from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastvit.cli import _training as options


def train(
    context: typer.Context,
    *,
    data: options.DataName = "digits",
    model: Annotated[
        str | None, typer.Option(help="vit_digits, vit_mnist, or a name of fastvit or timm.")
    ] = None,
    img_size: options.ImgSize = None,
    patch_size: Annotated[int | None, typer.Option(min=1, help="In pixels.")] = None,
    embed_dim: Annotated[int | None, typer.Option(min=1, help="Width of the tokens.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Number of blocks.")] = None,
    num_heads: Annotated[int | None, typer.Option(min=1, help="Attention heads.")] = None,
    mlp_ratio: Annotated[float | None, typer.Option(help="Hidden width over width.")] = None,
    pos_embed: Annotated[
        Literal["none", "learned", "2d", "relative"] | None, typer.Option(help="Positions.")
    ] = None,
    pool: Annotated[
        Literal["token", "avg"] | None,
        typer.Option(help="The class token, or the mean of patches without a class token."),
    ] = None,
    head: Annotated[
        Literal["linear", "mlp"] | None, typer.Option(help="mlp is the paper's for pre-training.")
    ] = None,
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
    out: options.Out = Path("fastvit-train"),
    resume: options.Resume = False,
    device: options.Device = "auto",
    parallel: options.Parallel = None,
    workers: options.Workers = 0,
    accelerate: options.Accelerate = True,
    as_json: options.AsJson = False,
) -> None:
    """Train a Vision Transformer from scratch.

    Options left out take defaults that suit the data; config.json in --out has them all. SIGTERM
    and Ctrl-C save a checkpoint, and --resume goes on from it. For several GPUs or processes:
    torchrun --nproc-per-node 8 -m fastvit train ...
    """
    resume = resume or (options.restarted() and (out / "config.json").exists())
    stored = resume and not options.given(context)
    choices = dict(context.params)

    def job() -> options.Job:
        return resumed_job(out, accelerate) if stored else new_job(choices)

    options.run(
        "train", job, out=out, resume=resume, device=device, parallel=parallel, workers=workers,
        accelerate=accelerate, as_json=as_json,
    )  # fmt: skip


def model_options(choices: dict[str, Any]) -> dict[str, Any]:
    """What the command line says about the model, for its constructor."""
    names = {
        "img_size": "img_size", "patch_size": "patch_size", "embed_dim": "embed_dim",
        "depth": "depth", "num_heads": "num_heads", "mlp_ratio": "mlp_ratio",
        "pos_embed": "pos_embed", "pool": "global_pool", "head": "head",
        "drop_path": "drop_path_rate",
    }  # fmt: skip
    found = {theirs: choices[ours] for ours, theirs in names.items() if choices[ours] is not None}
    if found.get("global_pool") == "avg":
        found["class_token"] = False
    return found


def new_job(choices: dict[str, Any]) -> options.Job:
    """A job from the command line."""
    import torch

    from fastvit.train import load_data
    from fastvit.train.models import ModelConfig, build_model

    name = choices["data"]
    defaults = options.defaults_for(name)
    recipe = options.make_recipe(choices, defaults, choices["device"])
    config = ModelConfig(choices["model"] or defaults["model"], model_options(choices))
    with torch.device("meta"):
        shape = build_model(config, accelerated=False)
    data_config = options.make_data(name, choices, defaults, shape)
    data = load_data(data_config)
    config = ModelConfig(config.name, {**config.options, "num_classes": len(data.classes)})
    torch.manual_seed(recipe.seed)
    model = build_model(config, accelerated=choices["accelerate"])
    return options.Job("train", model, config, data, data_config, recipe)


def resumed_job(out: Path, accelerated: bool) -> options.Job:
    """The job that a run folder is of."""
    from fastvit.train import DataConfig, Recipe, load_data
    from fastvit.train.models import build_model, freeze_all_but_head, read_run

    run = read_run(out)
    data_config = DataConfig(**run.config["data"])
    data = load_data(data_config)
    model = build_model(run.model, accelerated=accelerated)
    if run.config.get("frozen"):
        freeze_all_but_head(model)
    recipe = Recipe(**run.config["recipe"])
    return options.Job(run.config["command"], model, run.model, data, data_config, recipe)
