"""Launches of Triton kernels that cost little once a kernel is compiled.

``kernel[grid](...)`` binds and specialises every argument each time, which takes longer than most
kernels of a small batch. Here the compiled kernel is kept under all that the compiler looks at, and
then run directly. Whatever is not plainly the same as before goes the ordinary way.

Source: `triton.runtime.jit.JITFunction.run` of triton 3.6 and 3.7, whose last step this repeats.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.kernels._tuning import TileConfig

_PLAIN = frozenset({int, bool, float, str, NoneType})
_MOST = 4096  # kept at a time: sizes are part of the key, so varying ones could fill the memory


class _Ready(NamedTuple):
    """A compiled kernel, the device that it is loaded on, Triton's settings and its arguments'
    order."""

    kernel: Any  # kept alive, since its id is in the key
    compiled: Any
    device: int
    settings: Any
    in_order: Callable[[dict[str, Any]], tuple[Any, ...]]


_ready: dict[tuple[Any, ...], _Ready] = {}


def launch(kernel: Any, programs: int, tile: TileConfig, **arguments: Any) -> None:
    """Run `programs` instances of a Triton kernel; `arguments` are the kernel's own."""
    key = _key(kernel, tile, arguments)
    ready = _ready.get(key)
    if ready is not None and ready.device == _device() and not _watched(ready):
        compiled = ready.compiled
        compiled.run(
            programs, 1, 1, _stream(ready.device), compiled.function, compiled.packed_metadata,
            None, None, None, *ready.in_order(arguments),
        )  # fmt: skip
        return
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = kernel[(programs,)](**arguments, **options)
    if ready is None and _can_keep(kernel, compiled, arguments):
        from triton import knobs

        if len(_ready) >= _MOST:
            _ready.clear()
        in_order = itemgetter(*kernel.arg_names)
        _ready[key] = _Ready(kernel, compiled, _device(), knobs.runtime, in_order)


def _key(kernel: Any, tile: TileConfig, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """All that a compiled kernel depends on: of tensors what the compiler looks at, of the rest the
    value and (since 1 == True) the type."""
    values = arguments.values()
    looked_at = [value if type(value) in _PLAIN else _seen(value) for value in values]
    options = (id(kernel), tile.num_warps, tile.num_stages)
    return (*options, *arguments, *map(type, values), *looked_at)


def _seen(value: Any) -> Any:
    """What Triton's compiler looks at of a tensor or of the host's descriptor of one."""
    if isinstance(value, Tensor):
        return value.dtype, value.get_device(), value.data_ptr() % 16 == 0
    base = getattr(value, "base", None)
    if isinstance(base, Tensor):
        return base.dtype, base.get_device(), *value.block_shape, value.padding
    return value  # such as tl.float32


def _watched(ready: _Ready) -> bool:
    """Whether somebody wants to be told of launches, as a profiler does."""
    enter, leave = ready.settings.launch_enter_hook, ready.settings.launch_exit_hook
    hooks = getattr(enter, "calls", enter), getattr(leave, "calls", leave)
    return any(hooks) or bool(ready.kernel.pre_run_hooks)


def _can_keep(kernel: Any, compiled: Any, arguments: dict[str, Any]) -> bool:
    """Whether a launch of `compiled` (None from the interpreter) may be repeated with other tensors
    of the same kind. On AMD the compiler also looks at how large a tensor's memory is."""
    if torch.version.hip is not None or not hasattr(compiled, "packed_metadata"):
        return False
    tensors = [getattr(value, "base", value) for value in arguments.values()]
    devices = {value.get_device() for value in tensors if isinstance(value, Tensor)}
    return devices == {_device()} and {*kernel.arg_names} == {*arguments}


def _device() -> int:
    return torch._C._cuda_getDevice()


def _stream(device: int) -> int:
    return torch._C._cuda_getCurrentRawStream(device)
