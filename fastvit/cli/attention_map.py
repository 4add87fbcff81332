"""`fastvit attention-map`: what a ViT attends to in a photograph, drawn over it.

Shape legend: H heads, N tokens, gh x gw the grid of patches.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table
from torch import Tensor

from fastvit import samples
from fastvit.attention_maps import (
    AttentionMap,
    TokenLayout,
    attention_maps,
    attention_rollout,
    patch_attention,
    token_layout,
)
from fastvit.cli._models import CHECKPOINT_HELP, DEMO, MODEL_HELP, load_model
from fastvit.cli._picture import canvas, overlay, panel, pixels, write_lines
from fastvit.cli._shared import console, fail, finite, print_json, progress_bar
from fastvit.train.models import Source

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = 4


def attention_map(
    image: Annotated[
        str, typer.Argument(help=f"An image file, or a photograph: {', '.join(samples.PHOTOS)}.")
    ] = "chelsea",
    *,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = DEMO,
    checkpoint: Annotated[Path | None, typer.Option(help=CHECKPOINT_HELP)] = None,
    img_size: Annotated[
        int | None,
        typer.Option(min=1, help="Image side in pixels; the model's own by default."),
    ] = None,
    block: Annotated[
        int, typer.Option(help="Which block, counted from 0, or from the end by negatives.")
    ] = -1,
    head: Annotated[int | None, typer.Option(min=0, help="One head; all by default.")] = None,
    rollout: Annotated[
        bool, typer.Option("--rollout", help="Attention rollout through all blocks instead.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for attention.png and attention.json.")] = Path(
        "fastvit-attention"
    ),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print attention.json's content.")
    ] = False,
) -> None:
    """Draw what a ViT attends to: maps of every head of a block and their mean, or the rollout."""
    with progress_bar() as bar, torch.inference_mode():
        task = bar.add_task("reading weights", total=None)
        try:
            if rollout and head is not None:
                raise ValueError("--rollout takes the mean over heads: leave --head out")
            importlib.import_module("matplotlib")  # now rather than after the wait
            picture = samples.find_image(image)
            source = load_model(model, checkpoint, img_size)
            vit = source.model
            photograph, images = _images(picture, source)
            bar.update(task, description="looking")
            names, maps, layout, where = _look(vit, images, block, head, rollout)
            out.mkdir(parents=True, exist_ok=True)
        except ModuleNotFoundError as error:
            fail("attention-map", f"{error}: pip install 'fastvit[demo]'")
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            fail("attention-map", str(error))
        record = _record(names, maps, layout) | {
            "model": source.config.name if source.run is None else model,
            "image": image,
            "img_size": list(images.shape[2:]),
            "shown": where,
        }
        bar.update(task, description="drawing")
        grids = patch_attention(maps, layout)  # (H, gh, gw)
        draw(out / "attention.png", photograph, dict(zip(names, grids, strict=True)), record)
    text = json.dumps(finite(record), allow_nan=False)
    (out / "attention.json").write_text(text + "\n", encoding="utf-8")
    if as_json:
        print_json(record)
    else:
        _print(record, out)


def _images(picture: Image, source: Source) -> tuple[Image, Tensor]:
    """The photograph as the model sees it, and normalised."""
    size = source.model.patch_embed.img_size
    picture = samples.square(picture, size)
    cfg = source.pixels()
    mean, std = cfg.get("mean", samples.MEAN), cfg.get("std", samples.STD)
    return picture, samples.preprocess(picture, size, mean, std)


def _look(
    vit: Any, images: Tensor, block: int, head: int | None, rollout: bool
) -> tuple[list[str], Tensor, TokenLayout, str]:
    """Names and maps [n, Nq, Nk] to draw, where patches stand in Nk, and what the maps are."""
    if rollout:
        found = [AttentionMap("all blocks", attention_rollout(vit, images)[:, None])]
    else:
        found = attention_maps(vit, images, blocks=[block])
    (module, weights), *_ = found
    layout = token_layout(vit, images.shape[2:], weights.shape[-1])
    maps = weights[0]  # (H, Nq, Nk)
    source = "the class token" if layout.class_token else "the patches, on average,"
    source = "the pooling query" if maps.shape[-2] == 1 else source
    if rollout:
        return ["rollout"], maps, layout, f"rollout to {source.rstrip(',')} through all blocks"
    where = f"attention of {source} in {module}"
    if head is None:
        names = ["mean of heads", *(f"head {i}" for i in range(len(maps)))]
        return names, torch.cat([maps.mean(0, keepdim=True), maps]), layout, where
    if head >= len(maps):
        raise ValueError(f"--head {head}: {module} has heads 0 to {len(maps) - 1}")
    return [f"head {head}"], maps[head, None], layout, where


def _record(names: list[str], maps: Tensor, layout: TokenLayout) -> dict[str, Any]:
    """What attention.json says of the maps."""
    grids = patch_attention(maps, layout)
    entries = []
    for name, grid in zip(names, grids, strict=True):
        share = grid / grid.sum()
        entropy = -torch.special.xlogy(share, share).sum() / math.log(2)
        entries.append(
            {
                "name": name,
                "prefix_share": 1 - float(grid.sum()),
                "entropy_bits": float(entropy),
                "strongest_patch": list(divmod(int(grid.argmax()), layout.grid[1])),
                "weights": [[round(float(w), 7) for w in row] for row in grid],
            }
        )
    return {"grid": list(layout.grid), "prefix_tokens": layout.prefix, "maps": entries}


def draw(path: Path, picture: Image, maps: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write the photograph and maps [gh, gw] beside it to `path`, a PNG file, with a caption."""
    photograph = pixels(picture)  # (h, w, 3)
    panels = {"photograph": photograph} | {
        name: overlay(photograph, grid) for name, grid in maps.items()
    }
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    side = 3.0
    tall = side * photograph.shape[0] / photograph.shape[1]
    lines = caption(record)
    width, foot = columns * (side + 0.15) + 0.15, 0.25 + 0.27 * len(lines)
    width = max(width, 6.5)  # inches; room for the text
    height = rows * (tall + 0.4) + foot
    figure = canvas(width, height)
    for i, (name, image) in enumerate(panels.items()):
        row, column = divmod(i, columns)
        left = 0.15 + column * (side + 0.15)
        bottom = height - (row + 1) * (tall + 0.4)
        box_ = (left / width, bottom / height, side / width, tall / height)
        panel(figure.add_axes(box_), image, name)
    write_lines(figure, lines, left=0.15 / width)
    figure.savefig(path)


def caption(record: dict[str, Any]) -> list[str]:
    """The picture's lines of text."""
    height, width = record["img_size"]
    rows, columns = record["grid"]
    lines = [
        f"{record['model']}: {record['shown']}",
        f"{width}x{height} px, {columns}x{rows} patches",
    ]
    if record["prefix_tokens"]:
        first = record["maps"][0]
        lines[1] += f"; {first['name']}: {first['prefix_share']:.0%} goes to prefix tokens"
    return lines


def _print(record: dict[str, Any], out: Path) -> None:
    table = Table(title=f"{record['model']}: {record['shown']}", box=box.SIMPLE_HEAD)
    table.add_column("map")
    for header in ("to prefix tokens", "entropy (bits)", "strongest patch"):
        table.add_column(header, justify="right")
    for entry in record["maps"]:
        row, column = entry["strongest_patch"]
        table.add_row(
            entry["name"],
            f"{entry['prefix_share']:.1%}",
            f"{entry['entropy_bits']:.1f}",
            f"row {row}, column {column}",
        )
    console().print(table)
    console().print(f"wrote {out / 'attention.png'} and {out / 'attention.json'}", soft_wrap=True)
