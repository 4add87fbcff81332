"""Features of a folder of images, shared over ranks, in pieces that a later call need not repeat.

Shape legend: n images, D width of the features.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvit.samples import load_image
from fastvit.train import distributed
from fastvit.train.data import NO_LABEL, Data, DataConfig, Images, make_loader, transform
from fastvit.train.models import features
from fastvit.train.recipe import read_config
from fastvit.train.state import barrier, write_text

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
PIECE = 1024  # images a file of intermediate results


@dataclass(frozen=True)
class Embedded:
    """What `embed_folder` wrote.

    Args:
        images: n, rows of the result.
        width: D.
        broken: why each file that could not be read was left out.
        reused: pieces that an earlier call had made.
        files: that were written.
    """

    images: int
    width: int
    broken: list[str]
    reused: int
    files: list[str]


def list_images(folder: Path) -> list[str]:
    """Image files at any depth, as paths within `folder`, sorted.

    Raises:
        ValueError: there are none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    names = sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())
    if not names:
        raise ValueError(f"{folder} has no images ({', '.join(sorted(EXTENSIONS))})")
    return names


class _Numbered:
    """Source of `Images`: files, and as label the number of each."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return load_image(self.folder / self.names[i]), i


def embed_folder(
    model: Any,
    config: DataConfig,
    out: Path,
    *,
    about: dict[str, Any],
    device: torch.device,
    resume: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    amp: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Embedded:
    """What a model's classifier would take, for every image that can be read.

    Args:
        model: in eval mode, on `device`.
        config: its name is the folder; augmentation is left out.
        out: a new folder for features.safetensors (``features``, float32 [n, D]), names.json (of
            the n rows, paths within the folder), features.parquet where pyarrow is installed
            (columns ``name``, ``features``), and embed.json.
        about: what decides the features, such as the weights; kept in embed.json.
        device: of `model`.
        resume: go on in `out`, which was made from the same images and `about`.
        batch_size, workers: of this rank.
        amp: bfloat16 autocast.
        progress: called with images done and in all, of this rank.

    Raises:
        ValueError: no images, `out` is not new, or `resume` of something else.
    """
    from safetensors.torch import save_file

    folder = Path(config.name)
    names = list_images(folder)
    listing = hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()
    about = {**about, "images": len(names), "listing": listing, "amp": amp}
    _open(out, about, resume)

    images = Images(_Numbered(folder, names), transform(config, train=False))
    data = Data(images, images, (), *config.stats())
    pieces = [range(i, min(i + PIECE, len(names))) for i in range(0, len(names), PIECE)]
    mine = list(enumerate(pieces))[distributed.rank() :: distributed.world()]
    total, done, reused = sum(len(rows) for _, rows in mine), 0, 0
    for number, rows in mine:
        path = _piece(out, number)
        if path.exists():
            reused += 1
        else:
            keys = [
                [(i, None) for i in rows[first : first + batch_size]]
                for first in range(0, len(rows), batch_size)
            ]
            found, index, broken = [], [], []
            loader = make_loader(images, keys, workers=workers, pin=device.type == "cuda")
            for batch in loader:
                broken += batch.broken
                batch = data.to_model(batch, device)  # noqa: PLW2901
                kept = batch.targets != NO_LABEL
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, amp):
                    values: Tensor = features(model, batch.images)
                found.append(values[kept].float().cpu())
                index.append(batch.targets[kept].cpu())
                if progress is not None:
                    progress(done + min(len(found) * batch_size, len(rows)), total)
            tensors = {"features": torch.cat(found), "index": torch.cat(index)}
            temporary = path.with_suffix(".tmp")
            save_file(tensors, temporary, metadata={"broken": json.dumps(broken)})
            os.replace(temporary, path)
        done += len(rows)
    barrier()
    counts = torch.tensor([reused], dtype=torch.float64, device=device)
    reused = int(distributed.all_sum(counts)[0])
    result = _merge(out, names, len(pieces), reused) if distributed.rank() == 0 else None
    barrier()
    return result or Embedded(0, 0, [], reused, [])


def _piece(out: Path, number: int) -> Path:
    return out / f"piece-{number:06d}.safetensors"


def _open(out: Path, about: dict[str, Any], resume: bool) -> None:
    file = out / "embed.json"
    if resume:
        if not file.exists():
            raise ValueError(f"nothing to resume in {out}: it has no embed.json")
        old = read_config(file)
        changed = [key for key in about if old.get(key) != about[key]]
        if changed:
            raise ValueError(f"{out} was made otherwise: {', '.join(changed)} changed")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty: resume it or choose another")
    barrier()  # every rank has looked
    if distributed.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(about, indent=2) + "\n")
    barrier()


def _merge(out: Path, names: list[str], count: int, reused: int) -> Embedded:
    """One file of all pieces, which are then removed."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    final, kept = out / "features.safetensors", out / "names.json"
    pieces = [_piece(out, number) for number in range(count)]
    broken: list[str] = []
    for path in pieces:
        with safe_open(path, "pt") as file:
            broken += json.loads(file.metadata()["broken"])
    loaded = [load_file(path) for path in pieces]
    values = torch.cat([piece["features"] for piece in loaded])
    rows = [names[i] for piece in loaded for i in piece["index"].tolist()]
    write_text(kept, json.dumps(rows, indent=0) + "\n")
    temporary = final.with_suffix(".tmp")
    save_file({"features": values}, temporary, metadata={"broken": json.dumps(broken)})
    os.replace(temporary, final)
    files = [str(final), str(kept)]
    if find_spec("pyarrow") is not None:
        files.append(_write_parquet(out / "features.parquet", rows, values))
    for path in pieces:
        path.unlink()
    return Embedded(len(rows), values.shape[1], broken, reused, files)


def _write_parquet(path: Path, names: list[str], values: Tensor) -> str:
    import pyarrow  # pyright: ignore[reportMissingImports]
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    flat = pyarrow.array(values.flatten().numpy())
    columns = {
        "name": pyarrow.array(names),
        "features": pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)
