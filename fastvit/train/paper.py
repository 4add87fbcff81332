"""The ViT paper's experiments (arXiv:2010.11929), small enough for a laptop.

An experiment is a set of arms that differ in one thing; every arm is trained with several seeds.
Accuracies are those of images held out from training.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvit.train.data import Data, DataConfig, load_data
from fastvit.train.loop import fit
from fastvit.train.models import PRESETS
from fastvit.train.pretrain import MaskedAutoencoder, MaskedPatchPrediction
from fastvit.train.probe import linear_probe, mean_tokens
from fastvit.train.recipe import Recipe
from fastvit.vit import VisionTransformer

SETS: dict[str, dict[str, Any]] = {
    # what all arms start from: 16 patches, three blocks
    "digits": PRESETS["vit_digits"],
    "mnist5k": {
        **PRESETS["vit_mnist"], "patch_size": 7, "embed_dim": 64, "depth": 3, "num_heads": 2,
    },
}  # fmt: skip
STATISTICS = {"digits": (0.31, 0.38), "mnist5k": (0.13, 0.31)}  # mean and deviation of the pixels
OTHER = {"digits": "mnist5k", "mnist5k": "digits"}  # what is transferred to


@dataclass(frozen=True)
class Finetune:
    """A second training, of all weights, with a new linear head that starts at zero.

    Args:
        data: another set; None for the same.
        scale: of the image side, with the patch size kept.
        positions: ``interpolated`` in 2-D, or ``new``: drawn afresh.
        recipe: fields of `Recipe`.
    """

    data: str | None = None
    scale: float = 1.0
    positions: str = "interpolated"
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One training.

    Args:
        model: fields of `ViTConfig` that replace the set's.
        recipe: fields of `Recipe`.
        finetune: what comes after.
        method: ``""`` for classification; ``none``, ``mae`` or ``masked-patch`` for a linear probe
            of an encoder that was so pre-trained, without labels.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    finetune: Finetune | None = None
    method: str = ""


@dataclass(frozen=True)
class Experiment:
    """Arms to compare, by name.

    Args:
        title: what is asked.
        source: where the paper does it.
        arms: from what all of them share, a set's model.
        metric: of `run_arm`, the one that answers.
    """

    title: str
    source: str
    arms: Callable[[Mapping[str, Any]], dict[str, Arm]]
    metric: str = "top1"


def _positions(base: Mapping[str, Any]) -> dict[str, Arm]:
    names = {"none": "none", "1-D": "learned", "2-D": "2d", "relative": "relative"}
    return {name: Arm(model={"pos_embed": value}) for name, value in names.items()}


def _pooling(base: Mapping[str, Any]) -> dict[str, Arm]:
    pools = {"CLS": {"global_pool": "token"}, "GAP": {"global_pool": "avg", "class_token": False}}
    return {
        f"{name}, lr {lr:g}": Arm(model=options, recipe={"lr": lr})
        for name, options in pools.items()
        for lr in (3e-4, 1e-3, 3e-3)
    }


def _optimizers(base: Mapping[str, Any]) -> dict[str, Arm]:
    # fine-tuning with SGD and momentum in both, as in the paper
    tune = Finetune(data="other", recipe={"optimizer": "sgd"})
    choices = {
        "Adam, lr 0.001": ("adam", 1e-3),
        "SGD, lr 0.03": ("sgd", 0.03),
        "SGD, lr 0.1": ("sgd", 0.1),
    }
    return {
        name: Arm(recipe={"optimizer": optimizer, "lr": lr}, finetune=tune)
        for name, (optimizer, lr) in choices.items()
    }


def _shapes(base: Mapping[str, Any]) -> dict[str, Arm]:
    wide = {name: 2 * base[name] for name in ("embed_dim", "num_heads")}
    patch = base["patch_size"] - base["patch_size"] // 2
    return {
        "base": Arm(),
        "depth x2": Arm(model={"depth": 2 * base["depth"]}),
        "width x2": Arm(model=wide),
        "MLP x2": Arm(model={"mlp_ratio": 8.0}),
        f"patch {base['patch_size']} to {patch}": Arm(model={"patch_size": patch}),
    }


def _resolutions(base: Mapping[str, Any]) -> dict[str, Arm]:
    # pre-trained on shrunken images with a patch that leaves the grid 4x4, fine-tuned on whole ones
    patch = base["img_size"] // 7 or 1
    small, scale = 4 * patch, base["img_size"] / (4 * patch)
    model = {"head": "mlp", "img_size": small, "patch_size": patch}
    stages = {
        f"{small} px": Finetune(),
        f"{base['img_size']} px, interpolated": Finetune(scale=scale),
        f"{base['img_size']} px, new positions": Finetune(scale=scale, positions="new"),
    }
    return {f"fine-tuned at {name}": Arm(model, finetune=stage) for name, stage in stages.items()}


def _self_supervised(base: Mapping[str, Any]) -> dict[str, Arm]:
    names = {"random": "none", "masked patch prediction": "masked-patch", "MAE": "mae"}
    return {name: Arm(method=method) for name, method in names.items()}


EXPERIMENTS = {
    "ablation-pos": Experiment("Position embedding", "appendix D.4, table 8", _positions),
    "pooling": Experiment("Class token against global average pooling", "appendix D.3", _pooling),
    "optimizer": Experiment(
        "Pre-training with Adam against SGD", "appendix D.1, table 7", _optimizers, "finetuned_top1"
    ),
    "shape": Experiment("Scaling depth, width, MLP and patch", "appendix D.2, figure 8", _shapes),
    "resolution": Experiment(
        "MLP head swapped for a zero linear one, fine-tuned at a higher resolution", "section 3.2",
        _resolutions, "finetuned_top1",
    ),
    "self-supervised": Experiment(
        "Pre-training without labels: a linear probe", "appendix B.1.2 and MAE (arXiv:2111.06377)",
        _self_supervised, "probe_top1",
    ),
}  # fmt: skip


def data_config(name: str, img_size: int) -> DataConfig:
    """Grey images, without augmentation."""
    mean, std = STATISTICS[name]
    return DataConfig(name, img_size=img_size, in_chans=1, mean=mean, std=std)


def run_arm(arm: Arm, data_name: str, *, seed: int, epochs: int) -> dict[str, float]:
    """One arm with one seed, on one thread.

    Args:
        arm: what to train.
        data_name: ``digits`` or ``mnist5k``.
        seed: of weights, order and dropout.
        epochs: of the pre-training; fine-tuning takes half of them.

    Returns:
        ``top1`` after the (pre-)training, or ``probe_top1``; ``finetuned_top1``; ``gflops`` of one
        image's forward; ``parameters``; ``seconds`` and ``finetune_seconds``.
    """
    torch.set_num_threads(1)
    options = {**SETS[data_name], **arm.model}
    torch.manual_seed(seed)
    model = VisionTransformer(**options)
    data = load_data(data_config(data_name, options["img_size"]))
    recipe = _recipe(epochs, seed, arm.recipe)
    result: dict[str, float] = {
        "gflops": _gflops(model, options),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if arm.method:
        seconds = pretrain(model, data, recipe, arm.method)
        return {
            **result,
            "probe_top1": linear_probe(mean_tokens(model.eval()), data),
            "seconds": seconds,
        }
    trained = fit(model, data, recipe, device="cpu")
    result |= {"top1": trained.test["top1"], "seconds": trained.seconds}
    if arm.finetune is not None:
        result |= _finetune(model, options, data_name, arm.finetune, seed, max(1, epochs // 2))
    return result


def pretrain(
    model: VisionTransformer, data: Data, recipe: Recipe, method: str, **options: Any
) -> float:
    """Pre-train an encoder in place without labels.

    Args:
        model: the encoder.
        data: its labels are not read.
        recipe: how.
        method: ``mae``, ``masked-patch``, or ``none`` for nothing.
        options: of `fit`.

    Returns:
        Seconds that it took.

    Raises:
        ValueError: an unknown method.
    """
    if method == "none":
        return 0.0
    if method == "mae":
        module: torch.nn.Module = MaskedAutoencoder(model)
    elif method == "masked-patch":
        mean, std = data.mean.flatten().tolist(), data.std.flatten().tolist()
        channels = model.in_chans
        module = MaskedPatchPrediction(
            model, mean=mean * (channels // len(mean)), std=std * (channels // len(std))
        )
    else:
        raise ValueError(f"method={method!r} is not one of mae, masked-patch, none")
    loss = lambda module, batch: (module(batch.images), {})  # noqa: E731
    return fit(module, data, recipe, loss=loss, **options).seconds


def _recipe(epochs: int, seed: int, options: Mapping[str, Any]) -> Recipe:
    base = {"epochs": epochs, "warmup_epochs": min(2, epochs), "eval_every": epochs, "seed": seed}
    return Recipe(**{**base, **options})


def _gflops(model: VisionTransformer, options: Mapping[str, Any]) -> float:
    side = options["img_size"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, options["in_chans"], side, side))
    return counter.get_total_flops() / 1e9


def _finetune(
    model: VisionTransformer, options: Mapping[str, Any], data_name: str, tune: Finetune,
    seed: int, epochs: int,
) -> dict[str, float]:  # fmt: skip
    name = OTHER[data_name] if tune.data == "other" else data_name
    patch = options["patch_size"]
    size = round(options["img_size"] * tune.scale / patch) * patch
    data = load_data(data_config(name, size))
    if tune.scale != 1:
        model.set_input_size(size)
    model.reset_classifier(len(data.classes), zero_init=True)
    if tune.positions == "new":
        torch.nn.init.trunc_normal_(model.pos_embed, std=0.02)  # pyright: ignore
    tuned = fit(model, data, _recipe(epochs, seed, tune.recipe), device="cpu")
    return {"finetuned_top1": tuned.test["top1"], "finetune_seconds": tuned.seconds}


# --------------------------------------------------------------------------- all of it


def run_experiment(
    name: str,
    data_name: str,
    *,
    seeds: int,
    epochs: int,
    jobs: int = 1,
    known: list[dict[str, Any]] | None = None,
    report: Callable[[list[dict[str, Any]], int], None] = lambda runs, total: None,
) -> list[dict[str, Any]]:
    """Every arm with every seed.

    Args:
        name: of `EXPERIMENTS`.
        data_name: of `SETS`.
        seeds: how many, from 0 on.
        epochs: of the first training of each arm.
        jobs: processes at a time.
        known: runs that need not be done again: those with the same data and epochs.
        report: told all runs so far and how many there will be, after each.

    Returns:
        Runs, in the order of arms and seeds: ``arm``, ``seed``, ``data``, ``epochs`` and what
        `run_arm` gives.
    """
    arms = EXPERIMENTS[name].arms(SETS[data_name])
    wanted = [(arm, seed) for arm in arms for seed in range(seeds)]
    runs = {
        (run["arm"], run["seed"]): run
        for run in known or ()
        if (run["data"], run["epochs"]) == (data_name, epochs)
    }
    runs = {key: run for key, run in runs.items() if key in wanted}
    left = [key for key in wanted if key not in runs]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        calls = {
            pool.submit(run_arm, arms[arm], data_name, seed=seed, epochs=epochs): (arm, seed)
            for arm, seed in left
        }
        for call in as_completed(calls):
            arm, seed = calls[call]
            row = {"arm": arm, "seed": seed, "data": data_name, "epochs": epochs}
            runs[arm, seed] = {**row, **call.result()}
            report([runs[key] for key in wanted if key in runs], len(wanted))
    return [runs[key] for key in wanted]


def summary(name: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each arm the mean and the standard deviation over seeds of its metric, in percent."""
    metric = EXPERIMENTS[name].metric
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        values = [100 * run[metric] for run in mine]
        rows.append(
            {
                "arm": arm,
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                "seeds": len(values),
                "values": values,
                "gflops": mine[0]["gflops"],
                "parameters": mine[0]["parameters"],
                "seconds": statistics.mean(run["seconds"] for run in mine),
            }
        )
    return rows


def describe(name: str, data_name: str) -> dict[str, Any]:
    """The arms as JSON, for a record."""
    arms = EXPERIMENTS[name].arms(SETS[data_name])
    return {
        "base": SETS[data_name],
        "arms": {arm: dataclasses.asdict(value) for arm, value in arms.items()},
    }
