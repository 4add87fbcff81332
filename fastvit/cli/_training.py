"""What `train` and `finetune` share: options, defaults by data, the run itself, its display."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastvit.cli._shared import FILE_WIDTH, console, errors, print_json, progress_bar

if TYPE_CHECKING:
    from fastvit.train import Data, DataConfig, Recipe, Result
    from fastvit.train.models import ModelConfig

DataName = Annotated[
    str, typer.Option("--data", help="digits, mnist5k, or a folder with a subfolder a class.")
]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Weights to load instead: .safetensors or a torch file.")
]
UseEma = Annotated[
    bool | None,
    typer.Option("--use-ema/--no-use-ema", help="Of a run: averaged weights, if there are any."),
]
ImgSize = Annotated[int | None, typer.Option(min=1, help="Image side in pixels.")]
DropPath = Annotated[float | None, typer.Option(min=0, max=1, help="Stochastic depth's rate.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images a step, over all processes.")]
Accumulate = Annotated[int, typer.Option(min=1, help="Parts that a batch is run in.")]
Optimizer = Annotated[Literal["adam", "adamw", "sgd"] | None, typer.Option(help="Of the step.")]
Lr = Annotated[float | None, typer.Option(help="Highest learning rate.")]
WeightDecay = Annotated[float | None, typer.Option(help="Of matrices only.")]
Warmup = Annotated[float | None, typer.Option(help="Epochs of linear rise; then a cosine.")]
Clip = Annotated[float | None, typer.Option(help="Largest gradient norm; 0 for none.")]
Smoothing = Annotated[float | None, typer.Option(help="Label smoothing.")]
Mixup = Annotated[float | None, typer.Option(help="Alpha of mixup; 0 for none.")]
Cutmix = Annotated[float | None, typer.Option(help="Alpha of cutmix; 0 for none.")]
EmaDecay = Annotated[float | None, typer.Option("--ema", help="Decay of averaged weights.")]
Amp = Annotated[
    bool | None, typer.Option("--amp/--no-amp", help="bfloat16 autocast; by default on a GPU.")
]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Augment = Annotated[Literal["none", "affine", "crop"] | None, typer.Option(help="Augmentation.")]
Hflip = Annotated[float | None, typer.Option(min=0, max=1, help="Chance of a horizontal flip.")]
RandAugment = Annotated[int | None, typer.Option(min=0, max=30, help="Magnitude; 0 for none.")]
HeldOut = Annotated[float | None, typer.Option(help="Share held out, where there is no split.")]
EvalEvery = Annotated[int | None, typer.Option(min=1, help="Epochs between evaluations.")]
SaveEvery = Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: an epoch.")]
Out = Annotated[Path, typer.Option(help="Folder for weights, metrics and checkpoints; new.")]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on in --out, with its options or the same ones given again."),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto prefers a GPU.")]
Parallel = Annotated[
    Literal["none", "ddp", "fsdp"] | None,
    typer.Option(help="Under torchrun: replicated (ddp, the default) or sharded (fsdp)."),
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that load images, for each rank.")]
Accelerate = Annotated[
    bool,
    typer.Option("--accelerate/--no-accelerate", help="fastvit's kernels, or plain PyTorch."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

# how to run, as against what to compute: may change when a run is resumed
MACHINE = {"out", "resume", "device", "parallel", "workers", "accelerate", "as_json"}
RECIPE = {
    "epochs", "batch_size", "accumulate", "optimizer", "lr", "weight_decay", "warmup_epochs",
    "clip", "label_smoothing", "mixup", "cutmix", "ema", "amp", "seed", "eval_every", "save_every",
}  # fmt: skip
DATA = {"augment", "hflip", "randaugment", "held_out"}

SMALL = {
    "augment": "affine", "batch_size": 64, "lr": 2e-3, "weight_decay": 0.1, "warmup_epochs": 2.0,
    "eval_every": 5,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {  # of --data; the last for folders
    "digits": {**SMALL, "model": "vit_digits", "mean": 0.31, "std": 0.38, "epochs": 30},
    "mnist5k": {**SMALL, "model": "vit_mnist", "mean": 0.13, "std": 0.31, "epochs": 20},
    "": {
        "model": "vit_tiny_patch16_224", "augment": "crop", "hflip": 0.5, "randaugment": 9,
        "epochs": 100, "batch_size": 256, "label_smoothing": 0.1, "warmup_epochs": 5.0,
        "eval_every": 1,
    },
}  # fmt: skip
FINETUNE = {"epochs": 10, "warmup_epochs": 1.0, "eval_every": 1}
FINETUNE_LR = {"sgd": 0.01, "adam": 1e-4, "adamw": 1e-4}
PROBE = {"epochs": 20, "augment": "none", "hflip": 0.0, "randaugment": 0, "eval_every": 5}


def defaults_for(data: str) -> dict[str, Any]:
    """Of the options that depend on the data."""
    return DEFAULTS.get(data, DEFAULTS[""])


def given(context: typer.Context) -> set[str]:
    """Names of the options on the command line that say what to compute."""
    named = {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }
    return named - MACHINE


def chosen(options: dict[str, Any], defaults: dict[str, Any], fields: set[str]) -> dict[str, Any]:
    """`fields` of `options`, where None means the default, and no default leaves it out."""
    found = {name: options.get(name) for name in fields}
    found = {name: defaults.get(name) if v is None else v for name, v in found.items()}
    return {name: value for name, value in found.items() if value is not None}


def make_recipe(options: dict[str, Any], defaults: dict[str, Any], device: str) -> Recipe:
    """The recipe that the options ask for; autocast is for GPUs unless asked for."""
    from fastvit.train import Recipe
    from fastvit.train.distributed import pick_device

    if options.get("optimizer") not in (None, defaults.get("optimizer", "adamw")):
        defaults = {k: v for k, v in defaults.items() if k not in ("lr", "weight_decay")}
    chose = chosen(options, defaults, RECIPE)
    chose.setdefault("amp", pick_device(device).type == "cuda")
    if options.get("warmup_epochs") is None:
        chose["warmup_epochs"] = min(defaults.get("warmup_epochs", 2.0), chose["epochs"] / 10)
    return Recipe(**chose)


def make_data(
    name: str, options: dict[str, Any], defaults: dict[str, Any], model: Any
) -> DataConfig:
    """The data as `model` takes it; `defaults` may have some of `PIXELS`, else the model."""
    from fastvit.train import DataConfig
    from fastvit.train.models import PIXELS, image_channels, image_size, normalisation

    height, width = image_size(model)
    if height != width:
        raise ValueError(f"the model takes {height}x{width} images; squares are needed")
    stats = {k: defaults[k] for k in PIXELS if k in defaults}
    stats = normalisation(model) | stats
    chose = chosen(options, defaults, DATA)
    return DataConfig(name, height, image_channels(model), **stats, **chose)


@dataclasses.dataclass
class Job:
    """All that a run needs.

    Args:
        command: ``train`` or ``finetune``.
        model: to train, of `config`.
        data: loaded from `data_config`.
        recipe: how to train.
        extra: more for config.json.
    """

    command: str
    model: Any
    config: ModelConfig
    data: Data
    data_config: DataConfig
    recipe: Recipe
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """config.json, but for what `fit` adds."""
        return {
            "command": self.command,
            "model": {"name": self.config.name, "options": dict(self.config.options)},
            "data": dataclasses.asdict(self.data_config),
            "classes": list(self.data.classes),
            "images": self.data.contents(),
            **self.extra,
        }


def run(
    command: str,
    make_job: Callable[[], Job],
    *,
    out: Path,
    resume: bool,
    device: str,
    parallel: str | None,
    workers: int,
    accelerate: bool,
    as_json: bool,
) -> None:
    """Do a job in this process and those that torchrun started, and print the result."""
    from fastvit.train import distributed, fit

    with interruptible(command):
        target = distributed.pick_device(device)
        with distributed.process_group(target), kernels(accelerate):
            first, several = distributed.rank() == 0, distributed.world() > 1
            with progress_bar(show=first) as bar:
                bar.add_task("reading model and data", total=None)
                job = make_job()
            steps = job.recipe.epochs * (len(job.data.train) // job.recipe.batch_size)
            with display(steps, first) as report:
                result = fit(
                    job.model, job.data, job.recipe, out=out, resume=resume, config=job.record(),
                    device=device, parallel=parallel or ("ddp" if several else "none"),
                    workers=workers, report=report,
                )  # fmt: skip
            if first:
                _print(job, result, out, as_json)


@contextmanager
def interruptible(command: str) -> Iterator[None]:
    """`errors`, and a signal that a training stopped for becomes the exit status."""
    from fastvit.train import Interrupted

    with errors(command):
        try:
            yield
        except Interrupted as error:
            typer.echo(f"fastvit {command}: {error}", err=True)
            raise typer.Exit(128 + error.signum) from None


def kernels(accelerate: bool) -> AbstractContextManager[None]:
    """Our ops as they choose themselves, or on plain PyTorch."""
    from fastvit import ops

    return nullcontext() if accelerate else ops.backend("torch")


def restarted() -> bool:
    """Whether torchrun has started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def display(steps: int, show: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on standard error, and above it a line for every evaluation."""
    error = Console(stderr=True, width=None if sys.stderr.isatty() else FILE_WIDTH)
    columns = (
        TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=error, transient=True, disable=not show) as bar:
        task = bar.add_task("", total=steps, epoch=0, now="")

        def report(row: dict[str, Any]) -> None:
            if row["kind"] == "test":
                bar.console.print(f"epoch {row['epoch']:g}, held out: {_numbers(row)}")
                return
            now = f"{_numbers(row)} {row['images_per_s']:,.0f} images/s"
            bar.update(task, completed=row["step"], epoch=f"{row['epoch']:.1f}", now=now)

        yield report


def _numbers(row: dict[str, Any]) -> str:
    shares = ("accuracy", "top1", "top5")
    names = [n for n in row if n.removeprefix("ema_") in ("loss", *shares)]
    return ", ".join(
        f"{n} {row[n]:.2%}" if n.removeprefix("ema_") in shares else f"{n} {row[n]:.4f}"
        for n in names
    )


def _print(job: Job, result: Result, out: Path, as_json: bool) -> None:
    from fastvit.train.models import count_parameters

    steps = [row for row in result.history if row["kind"] == "train"]
    speed = sorted(row["images_per_s"] for row in steps)[len(steps) // 2]
    record = {
        "model": job.config.name,
        "data": job.data_config.name,
        "trained_parameters": count_parameters(result.model),
        "steps": steps[-1]["step"],
        "seconds": result.seconds,
        "images_per_s": speed,
        "test": result.test,
        "broken": result.broken,
        "out": str(out),
    }
    if as_json:
        print_json(record)
        return
    printer = console()
    printer.print(
        f"{job.config.name} on {job.data_config.name}: {_numbers(result.test)} "
        f"({result.test['images']} held-out images)"
    )
    printer.print(
        f"{record['trained_parameters'] / 1e6:.2f} M parameters, {record['steps']} steps in "
        f"{result.seconds:.0f} s, {speed:,.0f} images/s"
    )
    print_broken(result.broken)
    printer.print(f"wrote {out}", soft_wrap=True)


def print_broken(names: list[str]) -> None:
    """Say which images could not be read."""
    if names:
        typer.echo(f"skipped {len(names)} broken images:", err=True)
        for name in names:
            typer.echo(f"  {name}", err=True)
