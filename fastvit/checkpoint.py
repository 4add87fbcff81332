"""Weights from files of any library, and from timm's hub, into a `VisionTransformer`."""

from __future__ import annotations

import argparse
import math
import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from fastvit._compat import import_timm
from fastvit.checkpoint_formats import read_npz, to_timm
from fastvit.pos_embed import (
    relative_prefix_rows,
    resample_axis,
    resample_patch_embed,
    resample_pos_embed,
    resample_rel_pos_table,
)
from fastvit.vit import VisionTransformer

SHOWN = 8  # keys named of each kind of problem


def load_checkpoint(
    model: VisionTransformer,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    source_grid: tuple[int, int] | None = None,
) -> None:
    """Load every weight, or none.

    Position embeddings made for another grid of patches are resampled to the model's, as timm does
    it, and so is a projection made for another patch size.

    Args:
        model: takes the weights, in its own dtype and on its own device.
        source: a .safetensors file, a file of torch.save, Google's .npz, or a state_dict, under the
            names of timm, transformers, torchvision, open_clip, DINO, DINOv2 or Google. A dict
            around it (``model``, ``state_dict``, DINO's ``teacher``) and DataParallel's prefix are
            taken off. Weights only: what the libraries set otherwise stays the model's, above all
            the eps of its norms (1e-6; transformers' ViT has 1e-12, torch's LayerNorm 1e-5).
        source_grid: rows and columns of patches that it was made for; None: the model's own where
            the count agrees, else a square.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, one that holds other things than tensors and so might run code,
            or missing keys, unexpected keys and wrong shapes, listed. The model is as it was.
    """
    state = _unwrap(read_checkpoint(source) if isinstance(source, str | os.PathLike) else source)
    not_tensors = [key for key, value in state.items() if not isinstance(value, Tensor)]
    library = None
    if not not_tensors:  # else they are named below, under the names that they have
        state, library = to_timm(state, model)
    state = adapt(model, state, source_grid)
    problems = _problems(model.state_dict(), state)
    if problems:
        origin = f" {source}" if isinstance(source, str | os.PathLike) else ""
        origin += f" of {library}" if library else ""
        raise ValueError(f"checkpoint{origin} does not fit the model:\n" + "\n".join(problems))
    model.load_state_dict(state)


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """What a .safetensors file, a .npz, or a file of torch.save holds; never runs code from it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one that holds other things than tensors.
    """
    path = os.fspath(path)
    with open(path, "rb"):
        pass  # the libraries below have various errors for a file that is not there
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        if path.endswith(".npz"):
            return read_npz(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its options so
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, and unpickling it might run code; "
            f"it was not loaded: {_first_line(error)}"
        ) from error
    except Exception as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _unwrap(state: Any) -> dict[str, Tensor]:
    """The state_dict within what training scripts save."""
    for key in ("state_dict", "model", "teacher"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ValueError(f"checkpoint is a {type(state).__name__}, not a state_dict")
    state = dict(state)
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # of compile and DDP, in either order
        consume_prefix_in_state_dict_if_present(state, prefix)
    return state


def adapt(
    model: VisionTransformer,
    state: Mapping[str, Tensor],
    source_grid: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """`state` with all that depends on image and patch size resampled to the model's; what cannot
    be is left as it is. Arguments as in `load_checkpoint`."""
    targets = model.state_dict()
    return {
        key: _resample(model, key, value, targets[key], source_grid) if key in targets else value
        for key, value in state.items()
    }


def _resample(
    model: VisionTransformer,
    key: str,
    value: Tensor,
    target: Tensor,
    source_grid: tuple[int, int] | None,
) -> Tensor:
    """One weight for the model's grid and patch size."""
    if not isinstance(value, Tensor) or value.dim() != target.dim():
        return value
    grid = model.patch_embed.grid_size
    if key == "patch_embed.proj.weight" and value.shape[:2] == target.shape[:2]:
        return resample_patch_embed(value, model.patch_embed.patch_size)
    if key in ("pos_embed_x", "pos_embed_y") and value.shape != target.shape:
        return resample_axis(value, target.shape[1])
    if key == "pos_embed":
        prefix = model.num_embedded_prefix
        old = _grid(value.shape[1] - prefix, grid, source_grid)
        return value if old is None else resample_pos_embed(value, grid, old, prefix)
    if key.endswith("relative_position_bias_table"):
        prefix = model.num_prefix_tokens
        offsets = len(value) - relative_prefix_rows(prefix)
        old = _grid(offsets, _offsets(grid), source_grid and _offsets(source_grid))
        if old is not None and old[0] % 2 and old[1] % 2:
            old = (old[0] + 1) // 2, (old[1] + 1) // 2
            return resample_rel_pos_table(value, grid, old, prefix)
    return value


def _offsets(grid: tuple[int, int]) -> tuple[int, int]:
    """How many row offsets and column offsets two patches of a grid can have."""
    return 2 * grid[0] - 1, 2 * grid[1] - 1


def _grid(
    count: int, own: tuple[int, int], source: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The rows and columns that `count` entries formed, or None if that cannot be told."""
    for known in (source, own):
        if known is not None and known[0] * known[1] == count:
            return known
    side = math.isqrt(max(count, 0))
    return (side, side) if side * side == count > 0 else None


def _problems(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """One line for each kind of misfit."""
    shapes, kinds = [], []
    for key in wanted.keys() & state.keys():
        value = state[key]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kinds.append(f"{key} is {getattr(value, 'dtype', type(value).__name__)}")
        elif value.shape != wanted[key].shape:
            shapes.append(f"{key} is {[*value.shape]}, the model's {[*wanted[key].shape]}")
    found = {
        "missing keys": wanted.keys() - state.keys(),
        "unexpected keys": state.keys() - wanted.keys(),
        "wrong shapes": shapes,
        "not floating tensors": kinds,
    }
    return [
        f"  {len(items)} {what}: {', '.join(sorted(map(str, items))[:SHOWN])}"
        + (", ..." if len(items) > SHOWN else "")
        for what, items in found.items()
        if items
    ]


def pretrained_cfg(name: str) -> dict[str, Any]:
    """timm's description of the weights for a name, with or without a tag.

    Raises:
        ImportError: timm is not installed.
        ValueError: an unknown tag, with the ones there are.
    """
    timm = import_timm()
    architecture, _, tag = name.partition(".")
    try:
        return timm.models.get_pretrained_cfg(name, allow_unregistered=False).to_dict()
    except RuntimeError as error:
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
        raise ValueError(
            f"unknown tag {tag!r} of {architecture}; there are: {', '.join(tags) or 'none'}"
        ) from error


def load_pretrained(model: VisionTransformer, name: str) -> None:
    """Weights from where timm keeps them for this name, fetched and converted by timm.

    Args:
        model: takes them; its head stays as it is where its number of classes is another.
        name: with or without a tag.

    Raises:
        ImportError: timm is not installed.
        RuntimeError: timm has no weights for this name.
        ValueError: they do not fit the model, as in `load_checkpoint`.
    """
    source = import_timm().create_model(
        name, pretrained=True, in_chans=model.in_chans, weight_init="skip"
    )
    state = source.state_dict()
    if source.num_classes != model.num_classes:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
        own = model.state_dict()
        state |= {key: own[key] for key in ("head.weight", "head.bias") if key in own}
    load_checkpoint(model, state, source_grid=source.patch_embed.grid_size)
