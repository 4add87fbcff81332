"""Checkpoints of a training, whole or sharded, and what of a process's state they hold.

A checkpoint is a folder of torch.distributed.checkpoint, written under another name and renamed
when complete. It loads with any number of ranks, under any `parallel`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastvit.train.distributed import rank

TEMPORARY = "writing"


class Ema:
    """Exponential moving average of the parameters that train.

    Args:
        model: sharded already, if it is to be.
        decay: per step; early on (1 + t) / (10 + t) where that is less.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.shadow = {name: p.detach().clone() for name, p in self._trained()}

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After a step, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        average = get_ema_multi_avg_fn(decay)
        values = [_local(p.detach()) for _, p in self._trained()]
        average([_local(value) for value in self.shadow.values()], values, 0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages for a while."""
        kept = {name: p.detach().clone() for name, p in self._trained()}
        self._put(self.shadow)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._trained():
            parameter.copy_(values[name])


def _local(value: Tensor) -> Tensor:
    """This rank's share of a sharded tensor."""
    return value.to_local() if hasattr(value, "to_local") else value  # pyright: ignore


def rng_state(device: torch.device) -> dict[str, Any]:
    """Of torch, the GPU, Python and numpy in this process."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    state = {
        "torch": torch.get_rng_state(),
        "python": json.dumps([version, words, gauss]),
        "numpy": json.dumps([numpy[0], numpy[1].tolist(), *numpy[2:]]),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Take up what `rng_state` gave."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = json.loads(state["python"])
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(json.loads(state["numpy"]))  # noqa: NPY002
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_everything(seed: int) -> None:
    """torch on every device, Python and numpy."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def _contents(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None
) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "ema": {} if ema is None else ema.shadow,
    }


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = [path for path in folder.glob("*") if path.name.isdigit()]
    return max(found, key=lambda path: int(path.name), default=None)


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    device: torch.device,
) -> Path:
    """Write a checkpoint of all ranks, then remove older ones.

    Args:
        folder: gets ``<step>/``.
        model: not wrapped by DDP.

    Returns:
        The checkpoint's folder.
    """
    from torch.distributed.checkpoint.state_dict_saver import save as save_shards

    path, temporary = folder / f"{step:08d}", folder / TEMPORARY
    if path.exists():
        return path
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    barrier()
    state = _contents(model, optimizer, ema)
    state[f"rng{rank()}"] = rng_state(device)
    with _alone_is_fine():
        save_shards(state, checkpoint_id=temporary)
    barrier()
    if rank() == 0:
        os.replace(temporary, path)
        for old in folder.glob("*"):
            if old.name.isdigit() and int(old.name) < step:
                shutil.rmtree(old)
    barrier()
    return path


def load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    device: torch.device,
) -> int:
    """Take up a checkpoint; arguments as in `save`.

    A rank that was not there when it was written keeps its own random state.

    Returns:
        The number of steps done.

    Raises:
        ValueError: the checkpoint is damaged or of another model.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict import (
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    state, mine = _contents(model, optimizer, ema), f"rng{rank()}"
    try:
        keys = FileSystemReader(path).read_metadata().state_dict_metadata
        if f"{mine}.torch" in keys:
            state[mine] = rng_state(device)
            if f"{mine}.cuda" not in keys:
                state[mine].pop("cuda", None)
        with _alone_is_fine():
            load_shards(state, checkpoint_id=path)
    except (Exception, CheckpointException) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"checkpoint {path} cannot be read: {reason[-1]}") from error
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    if mine in state:
        set_rng_state(state[mine], device)
    return int(path.name)


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Without the warning that there is one process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights on the CPU, gathered where they are sharded; empty on other ranks than 0."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    sharded = any(hasattr(p, "to_local") for p in model.parameters())
    options = StateDictOptions(full_state_dict=sharded, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return {} if rank() else {name: value.contiguous() for name, value in state.items()}


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_weights(path: Path, model: nn.Module) -> None:
    """All weights as safetensors, replaced in one step; a call for every rank."""
    from safetensors.torch import save_file

    state = full_state(model)
    if rank() == 0:
        temporary = path.with_name(path.name + ".tmp")
        save_file(state, temporary, metadata={"format": "pt"})
        os.replace(temporary, path)
    barrier()
