"""Which path a call takes, Triton or plain PyTorch, and what a launch depends on.

- CUDA (or ROCm) tensors take Triton, CPU tensors plain PyTorch;
- with ``TRITON_INTERPRET=1`` every tensor takes Triton, run by its interpreter;
- ``FASTVIT_BACKEND=auto|triton|torch`` (or `backend("torch")`) overrides.
"""

import contextlib
import functools
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
Grads = tuple[Tensor | None, ...]  # of an op's tensors


def _resolve(name: str) -> str:
    """`name`, or ``interpret`` where auto or triton meets ``TRITON_INTERPRET=1``."""
    if name not in BACKENDS:
        raise ValueError(f"FASTVIT_BACKEND must be one of {', '.join(BACKENDS)}; got {name!r}")
    if name != "torch" and os.environ.get("TRITON_INTERPRET") == "1":
        return "interpret"
    return name


_path = _resolve(os.environ.get("FASTVIT_BACKEND", "auto"))


def set_backend(name: str) -> None:
    """Choose ``auto``, ``triton`` or ``torch`` for every op from now on (see the module docstring);
    a ValueError for any other name."""
    global _path
    _path = _resolve(name)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """`set_backend` for the length of a with-block."""
    global _path
    before = _path
    set_backend(name)
    try:
        yield
    finally:
        _path = before


def current_path() -> str:
    """``auto``, ``triton``, ``torch`` or ``interpret``: what `uses_triton` goes by."""
    return _path


@functools.cache
def gpu_problem() -> str | None:
    """Why this machine's GPU cannot run our Triton kernels, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is available"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than sm_80"
    return None


def _gpu_ok() -> bool:
    problem = gpu_problem()
    if problem is not None:
        warn_once(f"fastvit: running plain PyTorch on this GPU: {problem}")
    return problem is None


# torch.compiler.assume_constant_result does just this, but imports the whole compiler (a second)
_gpu_ok._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def warn_once(message: str) -> None:
    """A RuntimeWarning, the first time that `message` is given."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def uses_triton(x: Tensor) -> bool:
    """Whether an op on `x` runs a Triton kernel (else plain PyTorch).

    float64 runs in Triton only under the interpreter: GPUs gain nothing from it.

    Raises:
        RuntimeError: ``FASTVIT_BACKEND=triton`` with a tensor that Triton cannot run on.
    """
    if _path == "torch" or x.device.type == "meta":
        return False
    if _path == "interpret":
        return True
    if x.is_cuda and x.dtype != torch.float64 and (_path == "triton" or _gpu_ok()):
        return True
    if _path == "triton":
        raise RuntimeError(
            f"FASTVIT_BACKEND=triton, but Triton cannot run {x.dtype} tensors on {x.device}; "
            "use a GPU and a dtype up to float32, or set TRITON_INTERPRET=1"
        )
    return False


class Meta(NamedTuple):
    """All that a launch depends on of a tensor but its address."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: torch.device
    aligned: bool  # 16 divides the address

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def is_floating_point(self) -> bool:
        """As of a tensor."""
        return self.dtype.is_floating_point


matmul_precision = torch._C._get_float32_matmul_precision  # with one Python call less

new_meta = functools.partial(tuple.__new__, Meta)  # without a Python call


def packed(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> Meta:
    """Of a new contiguous tensor."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return Meta(dtype, shape, tuple(reversed(strides)), device, True)


def describe(*tensors: Tensor | None) -> Any:
    """A tuple of a `Meta` for each tensor. One call for all, as this runs for every launch."""
    found = []
    for t in tensors:
        if t is None:
            found.append(None)
            continue
        # offline compile has no addresses; PyTorch's own allocations are aligned
        aligned = t.is_meta or not t.data_ptr() & 15
        found.append(new_meta((t.dtype, t.shape, t.stride(), t.device, aligned)))
    return tuple(found)


def prepare_and_run(
    prepare: Callable[..., Any], run: Callable[..., Any], tensors: tuple[Tensor | None, ...],
    *options: Any, **wanted: Any,
) -> Any:  # fmt: skip
    """An op's two functions one after the other: `prepare` of the tensors' metadata, the options
    and the precision of float32 products; `run` of what that gives and the tensors."""
    return run(prepare(*describe(*tensors), *options, matmul_precision(), **wanted), *tensors)


uncompiled: set[str] = set()  # ops whose Triton path failed to compile


def run_triton(
    name: str, launch: Callable[..., Any], eager: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    """Launch; where the compiler (not the kernel) fails, warn once and run plain PyTorch."""
    if _path == "interpret":
        return launch(*args)
    try:
        with torch.cuda.device_of(args[0]):
            return launch(*args)
    except Exception as error:
        if _path == "triton" or not is_compile_failure(error):
            raise
        uncompiled.add(name)
        message = re.sub(r"\s+", " ", str(error))[:300]
        warn_once(f"fastvit: Triton could not compile {name}, running plain PyTorch: {message}")
        return eager(*args)


def is_compile_failure(error: Exception) -> bool:
    """Whether `error` came from Triton's compiler; a fault of the launch itself is not one."""
    from triton.errors import TritonError

    return isinstance(error, TritonError) or "PassManager" in str(error)
