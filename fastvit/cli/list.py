"""`fastvit list`: the models that can be created."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from fastvit.cli._shared import console, print_json, progress_bar


def list_models(
    pattern: Annotated[str, typer.Argument(help="Names to list; * stands for anything.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List model names with their shapes and parameters."""
    import fastvit

    names = fastvit.list_models(pattern)
    if not names:
        raise typer.BadParameter(f"no model matches {pattern!r}; `fastvit list` prints all")
    with progress_bar() as bar:
        models = [model_shape(name) for name in bar.track(names, description="reading shapes")]
    if as_json:
        print_json(models)
        return
    table = Table(title=f"{len(models)} models")
    table.add_column("model", overflow="fold")
    for header in ("image", "patch", "width", "depth", "heads", "parameters"):
        table.add_column(header, justify="right", no_wrap=True)
    for model in models:
        table.add_row(
            model["name"],
            "x".join(map(str, model["img_size"])),
            "x".join(map(str, model["patch_size"])),
            *(str(model[key]) for key in ("embed_dim", "depth", "num_heads")),
            f"{model['parameters'] / 1e6:,.1f} M",
        )
    console().print(table)


def model_shape(name: str) -> dict[str, Any]:
    """Sizes of one model, in timm's terms, from a copy without storage."""
    import fastvit

    with torch.device("meta"):
        model: Any = fastvit.create_model(name)
    return {
        "name": name,
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
