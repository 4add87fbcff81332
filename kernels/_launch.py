"""Launches of Triton kernels that cost little once a kernel is compiled.

A launcher of an op is two functions: `prepare`, pure and cached, decides all that follows from the
metadata of its tensors; `run` gives a `Prepared` launch their addresses. ``kernel[grid](...)``
binds and specialises every argument each time, which takes longer than most kernels of a small
batch; a `Prepared` keeps the compiled kernel and hands it to the driver.

Source: `triton.runtime.jit.JITFunction.run` and `triton.backends.nvidia.driver` of triton 3.6 and
3.7, whose last steps this repeats.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.kernels import _backend
from fastvit.kernels._backend import Meta
from fastvit.kernels._tuning import TileConfig

_MOST_MAPS = 256  # addresses of which one operand keeps the driver's descriptor, 128 bytes each


class Box:
    """An operand that a kernel reads through TMA descriptors.

    Args:
        make: a tensor to Triton's descriptor of it.
    """

    __slots__ = ("make", "maps")

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        self.make = make
        self.maps: dict[int, list[Any]] = {}  # the driver's, by address


class Prepared:
    """A launch of which all is decided but the addresses.

    Args:
        kernel: a Triton kernel.
        programs: how many of it run.
        tile: of which num_warps and num_stages are taken.
        arguments: gives the kernel's arguments, in its order, for the tensors that `run` is given.
        boxes: of the first arguments, given as tensors; None for one that is not there.
        spare: gives what to launch in its place where Triton cannot compile the kernel, and is told
            the error; ``FASTVIT_BACKEND=triton`` raises it instead.
        early: it may start before the launch ahead of it has ended (programmatic dependent launch):
            its kernel waits for that with ``gdc_wait``.
    """

    __slots__ = ("arguments", "boxes", "early", "kernel", "programs", "ready", "spare", "tile")

    def __init__(
        self, kernel: Any, programs: int, tile: TileConfig,
        arguments: Callable[..., tuple[Any, ...]], boxes: Sequence[Box | None] = (),
        spare: Callable[[Exception], Prepared] | None = None, *, early: bool = False,
    ) -> None:  # fmt: skip
        self.kernel, self.programs, self.tile = kernel, programs, tile
        self.arguments, self.boxes, self.spare, self.early = arguments, boxes, spare, early
        self.ready: _Ready | None = None

    def for_triton(self, *tensors: Tensor | None) -> tuple[Any, ...]:
        """The arguments as ``kernel[grid](...)`` takes them."""
        arguments = self.arguments(*tensors)
        pairs = zip(self.boxes, arguments, strict=False)
        described = [None if box is None else box.make(given) for box, given in pairs]
        return (*described, *arguments[len(described) :])


class _Ready:
    """A compiled kernel as the driver takes it, and the device that it is loaded on."""

    def __init__(self, compiled: Any, kernel: Any, device: int, *, boxes: bool) -> None:
        self.device = device
        self.watch(kernel.pre_run_hooks)
        self.function, self.metadata = compiled.function, compiled.packed_metadata
        self.compiled, self.launcher = compiled, compiled.run
        if boxes:
            # without the wrapper that would make descriptors anew
            self.launcher = copy.copy(compiled.run)
            self.launcher.launch = inspect.getclosurevars(compiled.run.launch).nonlocals["launcher"]

    def watch(self, hooks: list[Any]) -> None:
        """Know who wants to be told of launches, as profilers do."""
        from triton import knobs

        self.settings = knobs.runtime
        self.enter, self.leave = self.settings.launch_enter_hook, self.settings.launch_exit_hook
        chains = (getattr(hook, "calls", hook) for hook in (self.enter, self.leave))
        self.watchers = (*chains, hooks)

    def expand(self, boxes: Sequence[Box | None], arguments: tuple[Any, ...]) -> list[Any]:
        """`arguments` with the driver's descriptors of the first ones."""
        expanded: list[Any] = []
        described = 0
        for box, tensor in zip(boxes, arguments, strict=False):
            if box is None:
                expanded.append(None)
                continue
            address = tensor.data_ptr()
            found = box.maps.get(address)
            if found is None:
                from triton.backends.nvidia.driver import make_tensordesc_arg

                if len(box.maps) >= _MOST_MAPS:
                    box.maps.clear()
                settings = self.compiled.metadata.tensordesc_meta[described]
                found = box.maps[address] = make_tensordesc_arg(box.make(tensor), settings)
            expanded += found
            described += 1
        expanded += arguments[len(boxes) :]
        return expanded


def run(prepared: Prepared, *tensors: Tensor | None) -> None:
    """Launch on the current device and stream."""
    ready = prepared.ready
    if (
        ready is None
        or ready.device != _device()
        or any(ready.watchers)
        or ready.settings.launch_enter_hook is not ready.enter
        or ready.settings.launch_exit_hook is not ready.leave
    ):
        _run_first(prepared, tensors)
        return
    arguments = prepared.arguments(*tensors)
    ready.launcher(
        prepared.programs, 1, 1, _stream(ready.device), ready.function, ready.metadata,
        None, None, None,
        *(ready.expand(prepared.boxes, arguments) if prepared.boxes else arguments),
    )  # fmt: skip


def _run_first(prepared: Prepared, tensors: tuple[Tensor | None, ...]) -> None:
    """Triton's own way, which compiles and tells hooks."""
    if _record is not None:
        _record.append((prepared, prepared.for_triton(*tensors)))
        return
    if _stub is not None:
        prepared.ready = _stub
        run(prepared, *tensors)
        return
    if _backend.current_path() == "interpret":
        from fastvit import interpreter

        interpreter.install_bfloat16()
    tile = prepared.tile
    early = {"launch_pdl": True} if prepared.early else {}
    try:
        compiled = prepared.kernel[(prepared.programs,)](
            *prepared.for_triton(*tensors), num_warps=tile.num_warps, num_stages=tile.num_stages,
            **early,
        )  # fmt: skip
    except Exception as error:
        spare = None if _backend.current_path() == "triton" else prepared.spare
        if spare is None or not _backend.is_compile_failure(error):
            raise
        other = spare(error)
        for name in Prepared.__slots__:
            setattr(prepared, name, getattr(other, name))
        return run(prepared, *tensors)
    # the interpreter gives None; on AMD the compiler also looks at how large a tensor's memory is
    if prepared.ready is None and hasattr(compiled, "packed_metadata") and not torch.version.hip:
        prepared.ready = _Ready(compiled, prepared.kernel, _device(), boxes=bool(prepared.boxes))


# without a Python call of their own; a build of PyTorch for CPUs has neither
_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


# --------------------------------------------------------------------------- for launchers


def maker(kind: type[tuple[Any, ...]]) -> Callable[[tuple[Any, ...]], Any]:
    """Makes a NamedTuple of a tuple without a Python call."""
    return functools.partial(tuple.__new__, kind)


def rows_of(matrix: Meta) -> tuple[int, int] | None:
    """Strides of a tensor [..., K] as a matrix of prod(...) rows; None where only a copy is one."""
    *outer, last = matrix.strides
    stride, span = None, 0
    for size, step in zip(reversed(matrix.shape[:-1]), reversed(outer), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != span:
            return None
        span = step * size
    return (matrix.shape[-1] if stride is None else stride), last


def row_count(x: Meta) -> int:
    """M of [..., K]."""
    return math.prod(x.shape[:-1])


def fits_tma(matrix: Meta) -> bool:
    """Whether the tensor memory accelerator can read it: 16-byte rows, last dimension packed."""
    strides = rows_of(matrix)
    if strides is None:  # will be copied
        strides = matrix.shape[-1], 1
    elif not matrix.aligned:
        return False
    row_bytes = strides[0] * matrix.dtype.itemsize
    return 0 not in matrix.shape and strides[1] == 1 and row_bytes > 0 and row_bytes % 16 == 0


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of values of `dtype` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulator(dtype: torch.dtype) -> Any:
    """`wide_dtype` as Triton names it."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def product_precision(dtype: torch.dtype, precision: str) -> str:
    """``ieee`` or ``tf32`` for a kernel's float32 products, from `matmul_precision`."""
    return "ieee" if precision == "highest" or dtype != torch.float32 else "tf32"


def packed_rows(matrix: Meta | None, width: int) -> tuple[int, int] | None:
    """`rows_of`; of no matrix, those of a packed one."""
    return (width, 1) if matrix is None else rows_of(matrix)


def is_packed(*vectors: Meta | None) -> bool:
    """Whether the values of each vector [..., N] lie side by side."""
    return all(v is None or rows_of(v) in ((v.shape[-1], 1), (1, 1)) for v in vectors)


def as_vector(vector: Tensor | None) -> Tensor | None:
    """Its values side by side."""
    return None if vector is None else vector.contiguous()


def as_rows(matrix: Tensor | None) -> Tensor | None:
    """[..., N] as [M, N]."""
    return None if matrix is None else matrix.reshape(-1, matrix.shape[-1])


class Output(NamedTuple):
    """A prepared op that gives one tensor, which its kernel takes after the op's own."""

    launch: Prepared | None  # None for an empty result
    shape: tuple[int, ...]
    dtype: torch.dtype
    adapt: Callable[..., tuple[Tensor | None, ...]] | None = None  # to tensors that a kernel reads


def run_to_output(prepared: Output, *tensors: Any) -> Tensor:
    """The result, contiguous."""
    launch, shape, dtype, adapt = prepared
    y = torch.empty(shape, dtype=dtype, device=tensors[0].device)
    if launch is not None:
        run(launch, *(tensors if adapt is None else adapt(*tensors)), y)
    return y


# set by `fastvit.check.launches`
_stub: _Ready | None = None  # launches in a GPU's place
_record: list[tuple[Prepared, tuple[Any, ...]]] | None = None  # keeps what would be launched


def idle() -> bool:
    """Whether launches are only kept: then PyTorch need compute nothing either."""
    return _record is not None
