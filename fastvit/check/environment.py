"""What a measurement was made on: hardware, versions, commit and settings."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent.parent


def environment() -> dict[str, Any]:
    """JSON-ready; what this machine does not have is None."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "fastvit": version("fastvit"),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": version("triton", "triton-rocm", "pytorch-triton-rocm"),
        "timm": version("timm"),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        **_gpu(),
        "FASTVIT_BACKEND": os.environ.get("FASTVIT_BACKEND"),
        "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET"),
    }


def version(*distributions: str) -> str | None:
    """Of the first of `distributions` that is installed; nothing is imported."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, ``-dirty`` if changed; else what
    ``FASTVIT_COMMIT`` says, as for an archive of one, or None."""
    # an installed copy may lie inside the checkout of another project
    if _output("git", "-C", str(PACKAGE), "rev-parse", "--show-toplevel") != str(PACKAGE.parent):
        return os.environ.get("FASTVIT_COMMIT")
    return _output(
        "git", "-C", str(PACKAGE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"
    )


def _output(*command: str) -> str | None:
    """First line a program prints, None if it is absent or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return dict.fromkeys(("gpu", "gpu_arch", "gpu_driver", "gpu_memory", "gpu_shared_memory"))
    from fastvit.kernels._device import architecture

    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": properties.name,
        "gpu_arch": architecture(device),
        "gpu_driver": _output(*query),
        "gpu_memory": properties.total_memory,  # bytes
        "gpu_shared_memory": getattr(properties, "shared_memory_per_block_optin", None),  # bytes
    }
