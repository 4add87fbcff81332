"""Features of the images of a folder or of tar shards, in files that a later call need not repeat.

An input is cut into parts, and a part becomes a file, written under another name and renamed when
complete: what is there is done. Ranks share out the parts that are missing.

Shape legend: n images, C channels, D width of the features, S image side.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastvit.samples import load_image
from fastvit.train import distributed
from fastvit.train.data import (
    NO_LABEL,
    Batch,
    Data,
    DataConfig,
    Sample,
    make_loader,
    started,
    transform,
)
from fastvit.train.models import PIXELS, features
from fastvit.train.recipe import read_config
from fastvit.train.state import barrier, write_text

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
SHARD = 4096  # images of a folder that become one file
ROW_GROUP = 1024  # rows of a Parquet file that are read at a time
SHOWN = 3  # names of each kind of change
Format = Literal["parquet", "safetensors"]
Inputs = dict[str, list[int]]  # bytes and time of change of each file, by path within the input


@dataclass(frozen=True)
class Embedded:
    """What `embed` wrote.

    Args:
        images: n, rows of all files.
        width: D.
        broken: why each image that could not be read was left out.
        reused: files that an earlier call had made.
        files: with the rows, in the order of the input.
    """

    images: int
    width: int
    broken: list[str]
    reused: int
    files: list[str]


class Entry(NamedTuple):
    """One image: the name of its row, and the file that it is, or `size` bytes of a tar."""

    name: str
    file: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> Any:
        """The picture; a ValueError where it cannot be read."""
        if self.size is None:
            return load_image(self.file)
        with open(self.file, "rb") as tar:
            tar.seek(self.offset)
            return load_image(self.file.parent / self.name, tar.read(self.size))


class _Decoded(Dataset[Sample]):
    """Entries to pixels, in the loader's workers; black with `NO_LABEL` where one is broken."""

    def __init__(self, config: DataConfig) -> None:
        self.transform = transform(config, train=False)
        self.shape = (config.in_chans, config.img_size, config.img_size)

    def __getitem__(self, entry: Entry) -> Sample:
        try:
            return Sample(self.transform(entry.read()), 0)
        except ValueError as error:
            return Sample(torch.zeros(self.shape, dtype=torch.uint8), NO_LABEL, (str(error),))


def list_inputs(source: Path) -> Inputs:
    """Images of a folder at any depth, sorted; or tar shards, of a folder or one file.

    Raises:
        ValueError: there are none, or both kinds.
    """
    if source.suffix == ".tar" and source.is_file():
        return {source.name: _stamp(source)}
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder, and no .tar file")
    found = sorted(
        path for path in source.rglob("*") if path.suffix.lower() in EXTENSIONS | {".tar"}
    )
    inputs = {path.relative_to(source).as_posix(): _stamp(path) for path in found if path.is_file()}
    kinds = {name.endswith(".tar") for name in inputs}
    if len(kinds) != 1:
        kinds = ", ".join(sorted(EXTENSIONS))
        raise ValueError(
            f"{source} has {'both' if inputs else 'neither'} images ({kinds}) and .tar"
        )
    return inputs


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _entries(root: Path, names: list[str]) -> Iterator[Entry]:
    """Images of a part in order; a ValueError at a damaged tar."""
    for name in names:
        if not name.endswith(".tar"):
            yield Entry(name, root / name)
            continue
        try:
            with tarfile.open(root / name, "r:") as tar:
                for member in tar:
                    if member.isfile() and Path(member.name).suffix.lower() in EXTENSIONS:
                        place = (member.offset_data, member.size)
                        yield Entry(f"{name}/{member.name}", root / name, *place)
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"cannot read {root / name} as a tar: {error}") from error


def embed(
    model: Any,
    source: Path,
    config: DataConfig,
    out: Path,
    *,
    about: dict[str, Any],
    device: torch.device,
    resume: bool = False,
    skip_broken: bool = False,
    batch_size: int = 64,
    workers: int = 1,
    amp: bool = False,
    shard_size: int = SHARD,
    file_format: Format = "parquet",
    progress: Callable[[float, int], None] | None = None,
) -> Embedded:
    """What a model's classifier would take, for every image.

    Args:
        model: in eval mode, on `device`.
        source: a folder of images, a folder of tar shards (as webdataset has them, not compressed),
            or one such shard.
        config: how images are made ready; augmentation is left out.
        out: a new folder for features-000000.parquet and so on (columns ``name`` and ``features``,
            float32), or .safetensors (`read_features` reads both); inputs.json; and embed.json,
            which has the key ``files`` when all is done.
        about: what decides the features beside weights and `config`; kept in embed.json.
        device: of `model`.
        resume: go on in `out`, which was made from the same inputs, weights and options, on any
            number of ranks.
        skip_broken: leave images and tars out that cannot be read, and list them.
        batch_size, workers: of this rank; images are decoded in processes of the loader.
        amp: bfloat16 autocast.
        shard_size: images of a folder that become one file; a tar shard becomes one file.
        file_format: Parquet needs pyarrow.
        progress: called with the share of this rank's work that is done, and images of this call.

    Raises:
        ValueError: no images, `out` is not new, `resume` of something else with what has changed,
            or a broken image or tar, unless `skip_broken`.
        ImportError: pyarrow is needed and not installed.
    """
    if file_format == "parquet":
        _pyarrow()
    about = {
        **about, **{key: getattr(config, key) for key in ("img_size", "in_chans", *PIXELS)},
        "weights": fingerprint(model), "amp": amp, "shard_size": shard_size,
        "file_format": file_format,
    }  # fmt: skip
    about = json.loads(json.dumps(about))  # as it is read again

    def prepare() -> tuple[Inputs, list[int]]:
        inputs = list_inputs(source)
        _open(out, about, inputs, resume)
        count = len(_parts(inputs, shard_size))
        return inputs, [i for i in range(count) if not _file(out, i, file_format).exists()]

    inputs, missing = distributed.on_first(prepare)
    parts = _parts(inputs, shard_size)
    mine = missing[distributed.rank() :: distributed.world()]
    listed = _Listed(source if source.is_dir() else source.parent, parts, batch_size)
    decoded: Any = _Decoded(config)
    encode = _Encoder(model, Data(decoded, decoded, (), *config.stats()), device, amp)
    width = encode(Batch(torch.zeros(1, *decoded.shape), torch.zeros(1))).shape[1]
    keys = (keys for number in mine for keys in listed.batches(number))
    loader = make_loader(decoded, keys, workers=workers, pin=device.type == "cuda")
    # an image weighs 1, a tar its bytes
    weights = {i: sum(inputs[n][0] if n.endswith(".tar") else 1 for n in parts[i]) for i in mine}
    report = progress or (lambda share, images: None)
    report(0, 0)
    done, images = 0, 0
    with started(loader) as batches:
        for number in mine:
            entries, broken = listed[number]
            _refuse(broken, skip_broken)
            names: list[str] = []
            found = [torch.empty(0, width)]
            for first, chunk in enumerate(listed.batches(number)):
                batch = next(batches)
                _refuse(batch.broken, skip_broken)
                broken.extend(batch.broken)
                kept = (batch.targets != NO_LABEL).tolist()
                found.append(encode(batch)[kept])
                names += [entry.name for entry, keep in zip(chunk, kept, strict=True) if keep]
                images += len(chunk)
                share = (first * batch_size + len(chunk)) / len(entries)
                report((done + weights[number] * share) / sum(weights.values()), images)
            _write(_file(out, number, file_format), names, torch.cat(found), broken)
            done += weights[number]
            del listed[number]
    barrier()
    files = [_file(out, number, file_format) for number in range(len(parts))]

    def finish() -> Embedded:
        rows, problems = zip(*map(_contents, files), strict=True)
        broken = [line for lines in problems for line in lines]
        by_name = {file.name: count for file, count in zip(files, rows, strict=True)}
        record = {**about, "width": width, "files": by_name, "broken": broken}
        write_text(out / "embed.json", json.dumps(record, indent=1) + "\n")
        reused = len(files) - len(missing)
        return Embedded(sum(rows), width, broken, reused, [str(file) for file in files])

    return distributed.on_first(finish)


class _Listed(dict[int, tuple[list[Entry], list[str]]]):
    """Entries of a part, and a damaged tar of it: listed once, by the loader, which is ahead, or by
    the loop that writes."""

    def __init__(self, root: Path, parts: list[list[str]], batch_size: int) -> None:
        super().__init__()
        self.root, self.parts, self.batch_size = root, parts, batch_size

    def __missing__(self, number: int) -> tuple[list[Entry], list[str]]:
        try:
            self[number] = list(_entries(self.root, self.parts[number])), []
        except ValueError as error:
            self[number] = [], [str(error)]
        return self[number]

    def batches(self, number: int) -> list[list[Entry]]:
        """The part's entries, as the loader takes them."""
        entries, size = self[number][0], self.batch_size
        return [entries[first : first + size] for first in range(0, len(entries), size)]


@dataclass(frozen=True)
class _Encoder:
    """From a loader's batch to features [B, D], float32 on the CPU."""

    model: Any
    data: Data
    device: torch.device
    amp: bool

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, self.amp):
            images = self.data.to_model(batch, self.device).images
            return features(self.model, images).float().cpu()


def read_features(out: Path) -> tuple[list[str], Tensor]:
    """Names and features [n, D] of all files that `embed` has written to `out`, in order."""
    names: list[str] = []
    values: list[Tensor] = []
    for file in sorted(out.glob("features-*.parquet")):
        table = _pyarrow().parquet.read_table(file)
        names += table["name"].to_pylist()
        flat = table["features"].combine_chunks().flatten().to_numpy()
        values.append(torch.from_numpy(flat.copy()).view(len(table), -1))
    from safetensors import safe_open

    for file in sorted(out.glob("features-*.safetensors")):
        with safe_open(file, "pt") as opened:
            names += json.loads(opened.metadata()["names"])
            values.append(opened.get_tensor("features"))
    return names, torch.cat([value for value in values if len(value)])


def fingerprint(model: nn.Module) -> str:
    """Of all weights, the same on every device: sums of their bits have no order."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {
        name: [*value.shape, int(value.flatten().view(integers[value.element_size()]).sum())]
        for name, value in model.state_dict().items()
    }
    return hashlib.blake2b(json.dumps(sums).encode(), digest_size=8).hexdigest()


def _refuse(broken: Sequence[str], skip: bool) -> None:
    if broken and not skip:
        raise ValueError(f"{broken[0]} (--skip-broken leaves it out)")


def _parts(inputs: Inputs, shard_size: int) -> list[list[str]]:
    names = list(inputs)
    size = 1 if names[0].endswith(".tar") else shard_size
    return [names[i : i + size] for i in range(0, len(names), size)]


def _file(out: Path, number: int, file_format: Format) -> Path:
    return out / f"features-{number:06d}.{file_format}"


def _open(out: Path, about: dict[str, Any], inputs: Inputs, resume: bool) -> None:
    """Start in a new folder, or compare with what is there."""
    file, listed = out / "embed.json", out / "inputs.json"
    if not resume:
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} exists and is not empty: resume it or choose another")
        out.mkdir(parents=True, exist_ok=True)
        write_text(listed, json.dumps(inputs, indent=0) + "\n")
        write_text(file, json.dumps(about, indent=1) + "\n")
        return
    if not file.exists():
        raise ValueError(f"nothing to resume in {out}: it has no embed.json")
    old, before = read_config(file), read_config(listed)
    changed = [f"{key} changed" for key in about if old.get(key) != about[key]]
    both = inputs.keys() & before.keys()
    for what, names in {
        "gone": before.keys() - both,
        "new": inputs.keys() - both,
        "changed": {name for name in both if inputs[name] != before[name]},
    }.items():
        if names:
            shown = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            changed.append(f"{len(names)} {what}: {shown}")
    if changed:
        raise ValueError(f"{out} was made otherwise: {'; '.join(changed)}")


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ImportError(
            "Parquet needs pyarrow, which is not installed: pip install pyarrow, or choose "
            "--format safetensors"
        ) from error
    return pyarrow


def _write(path: Path, names: list[str], values: Tensor, broken: list[str]) -> None:
    """One file, replaced in one step."""
    temporary = path.with_name(path.name + ".tmp")
    about = {"broken": json.dumps(broken)}
    if path.suffix == ".parquet":
        pyarrow = _pyarrow()
        flat = pyarrow.array(values.flatten().numpy())
        lists = pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
        rows = pyarrow.array(names, pyarrow.string())
        table = pyarrow.table({"name": rows, "features": lists}).replace_schema_metadata(about)
        pyarrow.parquet.write_table(table, temporary, row_group_size=ROW_GROUP)
    else:
        from safetensors.torch import save_file

        about |= {"names": json.dumps(names), "rows": str(len(names))}
        save_file({"features": values}, temporary, metadata=about)
    os.replace(temporary, path)


def _contents(path: Path) -> tuple[int, list[str]]:
    """Rows of a file, and what was broken in its part."""
    if path.suffix == ".parquet":
        found = _pyarrow().parquet.read_metadata(path)
        return found.num_rows, json.loads(found.metadata[b"broken"])
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        about = opened.metadata()
    return int(about["rows"]), json.loads(about["broken"])
