"""The one seam between our ops and PyTorch.

`define_op` registers an op with `torch.library` once: schema, implementation, fake (shapes for
`torch.compile` and `torch.export`), autograd, autocast and FLOP formula. The choice between Triton
and plain PyTorch is made here too, by `uses_triton`:

- CUDA (or ROCm) tensors take Triton, CPU tensors plain PyTorch;
- with ``TRITON_INTERPRET=1`` every tensor takes Triton, run by its interpreter;
- ``FASTVIT_BACKEND=auto|triton|torch`` (or `backend("torch")`) overrides.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastvit.kernels._tuning import TileConfig

BACKENDS = ("auto", "triton", "torch")
_LIB = torch.library.Library("fastvit", "DEF")
OPS: dict[str, Op] = {}


# --------------------------------------------------------------------------- which path


def _resolve(name: str) -> str:
    """`name`, or ``interpret`` where auto or triton meets ``TRITON_INTERPRET=1``."""
    if name not in BACKENDS:
        raise ValueError(f"FASTVIT_BACKEND must be one of {', '.join(BACKENDS)}; got {name!r}")
    if name != "torch" and os.environ.get("TRITON_INTERPRET") == "1":
        return "interpret"
    return name


_path = _resolve(os.environ.get("FASTVIT_BACKEND", "auto"))


def set_backend(name: str) -> None:
    """Choose ``auto``, ``triton`` or ``torch`` for every op from now on (see the module docstring).

    Raises:
        ValueError: for any other name.
    """
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
        _warn_once(f"fastvit: running plain PyTorch on this GPU: {problem}")
    return problem is None


# torch.compiler.assume_constant_result does just this, but imports the whole compiler (a second)
_gpu_ok._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def _warn_once(message: str) -> None:
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


# --------------------------------------------------------------------------- registration


@dataclass(frozen=True)
class Op:
    """A registered op. Calling it dispatches through PyTorch with every argument positional."""

    name: str
    launch: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    overload: Any

    def __call__(self, *args: Any) -> Tensor:
        return self.overload(*args)


def define_op(
    name: str,
    schema: str,
    *,
    launch: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    reference: Callable[..., Tensor] | None = None,
    fake: Callable[..., Tensor],
    flops: Callable[..., int],
    autocast: tuple[str, ...] = (),
    autocast_dtype: torch.dtype | None = None,
) -> Op:
    """Register ``fastvit::name`` and its gradient ``fastvit::name_backward``.

    Args:
        name: op name.
        schema: arguments in torch.library's notation, ``(Tensor x, ...)``; the result is a Tensor.
        launch: runs the Triton kernel; same positional arguments as the schema.
        eager: the same computation in plain PyTorch, taken where Triton does not apply.
        reference: differentiated for the gradient on a CPU; `eager` unless given.
        fake: returns an empty contiguous result of the right shape and dtype.
        flops: FLOPs of one forward from the positional arguments, tensors given as shapes.
        autocast: arguments cast under autocast.
        autocast_dtype: the dtype they are cast to; None for autocast's own.
    """
    arguments = schema.strip()[1:-1]
    _LIB.define(f"{name}({arguments}) -> Tensor")
    backward_name = f"{name}_backward"
    _LIB.define(f"{backward_name}(Tensor grad, {arguments}, bool[] needs) -> Tensor[]")
    overload = getattr(torch.ops.fastvit, name).default
    backward_overload = getattr(torch.ops.fastvit, backward_name).default
    arg_names = [argument.name for argument in overload._schema.arguments]
    tensor_at = [
        i for i, argument in enumerate(overload._schema.arguments) if "Tensor" in str(argument.type)
    ]
    cast_at = [arg_names.index(argument) for argument in autocast]

    def forward(*args: Any) -> Tensor:
        # the first floating tensor decides: images may be uint8
        decisive = next(a for a in args if isinstance(a, Tensor) and a.is_floating_point())
        if not uses_triton(decisive):
            return eager(*args).contiguous()
        return _run_triton(name, launch, eager, args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(inputs[i] for i in tensor_at))
        ctx.others = [None if i in tensor_at else value for i, value in enumerate(inputs)]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        args = list(ctx.others)
        for i, tensor in zip(tensor_at, ctx.saved_tensors, strict=True):
            args[i] = tensor
        needs = [bool(ctx.needs_input_grad[i]) for i in range(len(args))]
        grads = iter(backward_overload(grad, *args, needs))
        return tuple(next(grads) if need else None for need in needs)

    def backward_kernel(grad: Tensor, *rest: Any) -> list[Tensor]:
        # on a GPU the plain path, which keeps less in memory than a reference spelled out
        forward = eager if grad.is_cuda else reference or eager
        return _differentiate(forward, grad, list(rest[:-1]), rest[-1])

    def backward_fake(grad: Tensor, *rest: Any) -> list[Tensor]:
        args, needs = rest[:-1], rest[-1]
        return [arg.new_empty(arg.shape) for arg, need in zip(args, needs, strict=True) if need]

    def no_second_derivative(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"fastvit.ops.{name} has no second derivative; use FASTVIT_BACKEND=torch for one"
        )

    _LIB.impl(name, forward, "CompositeExplicitAutograd")
    _LIB.impl(backward_name, backward_kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastvit::{name}", fake, lib=_LIB)
    torch.library.register_fake(f"fastvit::{backward_name}", backward_fake, lib=_LIB)
    torch.library.register_autograd(
        f"fastvit::{name}", backward, setup_context=setup_context, lib=_LIB
    )
    torch.library.register_autograd(f"fastvit::{backward_name}", no_second_derivative, lib=_LIB)
    for device_type, key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):
        rule = _autocast_rule(overload, device_type, key, cast_at, autocast_dtype)
        _LIB.impl(name, rule, key)

    def forward_flops(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return flops(*shapes)

    def backward_flops(grad_shape: Any, *shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
        # the gradient runs the forward once more, and two products for each of its products
        return 3 * flops(*shapes[:-1])

    register_flop_formula(getattr(torch.ops.fastvit, name))(forward_flops)
    register_flop_formula(getattr(torch.ops.fastvit, backward_name))(backward_flops)
    op = Op(name=name, launch=launch, eager=eager, overload=overload)
    OPS[name] = op
    return op


def _autocast_rule(
    overload: Any, device_type: str, key: str, cast_at: list[int], dtype: torch.dtype | None
) -> Callable[..., Tensor]:
    """What autocast does on one device: cast the named arguments, then call the op below it."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def rule(*args: Any) -> Tensor:
        target = dtype or torch.get_autocast_dtype(device_type)
        cast = list(args)
        for i in cast_at:
            value = cast[i]
            if isinstance(value, Tensor) and value.is_floating_point():
                cast[i] = value if value.dtype == torch.float64 else value.to(target)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return overload(*cast)

    return rule


def _differentiate(
    reference: Callable[..., Tensor], grad: Tensor, args: list[Any], needs: list[bool]
) -> list[Tensor]:
    """Gradients of `reference` at `args` for those inputs that need one."""
    # a kernel runs below autograd: let autograd see this part again
    exclude = torch._C._dispatch_tls_local_exclude_set()
    exclude = exclude.remove(torch._C.DispatchKey.AutogradFunctionality)
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        leaves = [
            arg.detach().requires_grad_(need) if isinstance(arg, Tensor) else arg
            for arg, need in zip(args, needs, strict=True)
        ]
        output = reference(*leaves)
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        grads = torch.autograd.grad(output, wanted, grad.to(output.dtype))
    return [g.contiguous() for g in grads]


def _run_triton(
    name: str, launch: Callable[..., Tensor], eager: Callable[..., Tensor], args: tuple[Any, ...]
) -> Tensor:
    """Launch; where the compiler (not the kernel) fails, warn once and run plain PyTorch."""
    if _path == "interpret":
        from fastvit.kernels import _interpreter

        _interpreter.install_bfloat16()
        return launch(*args)
    try:
        with torch.cuda.device_of(args[0]):
            return launch(*args)
    except Exception as error:
        if _path == "triton" or not is_compile_failure(error):
            raise
        message = re.sub(r"\s+", " ", str(error))[:300]
        _warn_once(f"fastvit: Triton could not compile {name}, running plain PyTorch: {message}")
        return eager(*args).contiguous()


def launch(kernel: Any, programs: int, tile: TileConfig, **arguments: Any) -> None:
    """Run `programs` instances of a Triton kernel; `arguments` are the kernel's own."""
    kernel[(programs,)](**arguments, num_warps=tile.num_warps, num_stages=tile.num_stages)


def is_compile_failure(error: Exception) -> bool:
    """Whether `error` came from Triton's compiler; a fault of the launch itself is not one."""
    from triton.errors import TritonError

    return isinstance(error, TritonError) or "PassManager" in str(error)
