"""Several processes, on torch.distributed alone; with one process everything here is a no-op."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Result = TypeVar("Result")
PARALLEL = ("none", "ddp", "fsdp")
THREADS_LET_GO = 0.3  # seconds


def rank() -> int:
    """Of this process, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` prefers a GPU; under torchrun each process gets its own.

    Raises:
        ValueError: an unknown name, or a GPU that is not there.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name!r} is not one of auto, cpu, cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device='cuda': no CUDA or ROCm device is available")
    if name == "cpu" or not available:
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise ValueError(f"local rank {local} has no GPU: there are {torch.cuda.device_count()}")
    return torch.device("cuda", local)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, nccl on GPUs and gloo on CPUs; alone, nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        gc.collect()  # a wrapper that outlives the group may wait for the group's threads for ever
        dist.destroy_process_group()
        # DDP and FSDP leave gloo's threads running: one that lets go of a tensor takes the GIL, and
        # if that is when Python ends, it aborts the process (pytorch issue 190489)
        time.sleep(THREADS_LET_GO)


def all_sum(values: Tensor) -> Tensor:
    """`values` summed over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_names(names: set[str]) -> list[str]:
    """All ranks' names, sorted."""
    if not dist.is_initialized():
        return sorted(names)
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, names)
    return sorted(set().union(*found))


def on_first(job: Callable[[], Result]) -> Result:
    """What `job` gives in rank 0, in every rank; an OSError or ValueError of its too."""
    if not dist.is_initialized():
        return job()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = job()
        except (OSError, ValueError) as error:
            box[1] = error
    dist.broadcast_object_list(box, 0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def wrap(model: nn.Module, parallel: str, device: torch.device) -> nn.Module:
    """The module to call in training.

    Args:
        model: on `device`. With ``fsdp`` it is sharded in place, block by block.
        parallel: ``none``, ``ddp`` (every rank has all weights) or ``fsdp`` (FSDP2: each has a
            share of weights, gradients and optimizer state).

    Raises:
        ValueError: an unknown choice, or one that does not fit the number of processes.
    """
    if parallel not in PARALLEL:
        raise ValueError(f"parallel={parallel!r} is not one of {', '.join(PARALLEL)}")
    if parallel == "none":
        if world() > 1:
            raise ValueError(f"parallel='none' with {world()} processes: choose ddp or fsdp")
        return model
    if not dist.is_initialized():
        raise ValueError(f"parallel={parallel!r} needs torchrun, which starts the processes")
    if parallel == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(
            model, device_ids=[device] if device.index is not None else None
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for value in model.state_dict().values():
        dist.broadcast(value, 0)
    mesh = init_device_mesh(device.type, (world(),))
    blocks = getattr(model, "blocks", None)
    for block in blocks if isinstance(blocks, nn.Sequential | nn.ModuleList) else ():
        fully_shard(block, mesh=mesh)
    # the root too, or an evaluation would leave it unsharded
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


@contextlib.contextmanager
def gradient_sync(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether the backward within adds gradients over ranks: a step's last micro-batch does."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(enabled)  # pyright: ignore[reportCallIssue]
        yield
    elif not enabled and hasattr(module, "no_sync"):
        with module.no_sync():  # pyright: ignore[reportCallIssue]
            yield
    else:
        yield
