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

from fastvit.kernels import _launch

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
class Gradient:
    """How kernels differentiate an op.

    Args:
        backward: (grad, output, kept, args, needs) to one gradient for each true entry of `needs`
            (one entry an argument), each of its input's shape and dtype. `grad` may have any
            strides; `output` is None unless `saves_output`.
        forward: as the op's `launch`, but gives the output and then the tensors kept for the
            backward; None where nothing is kept.
        kept: how many tensors that is.
        fake_kept: their empty stand-ins, from the op's arguments.
        unsaved: summands of the output's shape: the backward does not read them, so they are not
            kept, and where autograd asks, their gradient is `grad` itself.
        saves_output: the backward reads the output.
        flops: FLOPs of the backward over those of the forward.
    """

    backward: Callable[..., list[Tensor]]
    forward: Callable[..., tuple[Tensor, ...]] | None = None
    kept: int = 0
    fake_kept: Callable[..., tuple[Tensor, ...]] = lambda *args: ()
    unsaved: tuple[str, ...] = ()
    saves_output: bool = False
    flops: float = 2.0


@dataclass(frozen=True)
class Op:
    """A registered op. Calling it dispatches through PyTorch with every argument positional."""

    name: str
    launch: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    overload: Any
    training: Any = None  # gives the output and what its backward keeps
    gradient: Gradient | None = None

    def __call__(self, *args: Any) -> Tensor:
        if (
            self.training is not None
            and torch.is_grad_enabled()
            and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
            and not torch.compiler.is_exporting()
        ):
            return self.training(*args)[0]
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
    flops_of_values: bool = False,
    autocast: tuple[str, ...] = (),
    autocast_dtype: torch.dtype | None = None,
    gradient: Gradient | None = None,
) -> Op:
    """Register ``fastvit::name`` and its gradient ``fastvit::name_backward``; where `gradient`
    keeps tensors also ``fastvit::name_training``, which returns the output and those.

    Args:
        name: op name.
        schema: arguments in torch.library's notation, ``(Tensor x, ...)``; the result is a Tensor.
        launch: runs the Triton kernel; same positional arguments as the schema.
        eager: the same computation in plain PyTorch, taken where Triton does not apply.
        reference: differentiated for the gradient on a CPU; `eager` unless given.
        fake: returns an empty contiguous result of the right shape and dtype.
        flops: FLOPs of one forward from the positional arguments, tensors given as shapes.
        flops_of_values: `flops` reads values of tensors and is given the tensors themselves.
        autocast: arguments cast under autocast.
        autocast_dtype: the dtype they are cast to; None for autocast's own.
        gradient: the kernels of the gradient; without, PyTorch differentiates the plain path.
    """
    arguments = schema.strip()[1:-1]
    _LIB.define(f"{name}({arguments}) -> Tensor")
    overload = getattr(torch.ops.fastvit, name).default
    count = functools.partial(_count_flops, flops, flops_of_values)
    backward_op = _define_backward(name, arguments, eager, reference, count, gradient)

    def forward(*args: Any) -> Tensor:
        if not uses_triton(_decisive(args)):
            return eager(*args).contiguous()
        return _run_triton(name, launch, lambda *args: eager(*args).contiguous(), args)

    tensor_at = [i for i, a in enumerate(overload._schema.arguments) if "Tensor" in str(a.type)]
    names = [argument.name for argument in overload._schema.arguments]
    summands = {names.index(argument) for argument in gradient.unsaved} if gradient else set()
    saved_at = [i for i in tensor_at if i not in summands]
    saves_output = gradient is not None and gradient.saves_output

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        y, *kept = (output,) if isinstance(output, Tensor) else output
        ctx.save_for_backward(y if saves_output else None, *kept, *(inputs[i] for i in saved_at))
        ctx.kept = len(kept)
        ctx.others = [None if i in tensor_at else value for i, value in enumerate(inputs)]

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        args = list(ctx.others)
        if grad is None:
            return (None,) * len(args)
        output, *tensors = ctx.saved_tensors
        for i, tensor in zip(saved_at, tensors[ctx.kept :], strict=True):
            args[i] = tensor
        wanted = ctx.needs_input_grad
        needs = [bool(need) and i not in summands for i, need in enumerate(wanted)]
        kept = tensors[: ctx.kept]
        grads = iter(backward_op(grad, *args, output, kept, needs) if any(needs) else ())
        # an op may not return what it was given, and a copy of it would cost as much as a norm
        return tuple(
            next(grads) if need else grad if i in summands and wanted[i] else None
            for i, need in enumerate(needs)
        )

    def register(op_name: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
        registered = getattr(torch.ops.fastvit, op_name)
        _LIB.impl(op_name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastvit::{op_name}", fake, lib=_LIB)
        torch.library.register_autograd(
            f"fastvit::{op_name}", backward, setup_context=setup_context, lib=_LIB
        )
        cast_at = [names.index(argument) for argument in autocast]
        for device_type, key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):
            rule = _autocast_rule(registered.default, device_type, key, cast_at, autocast_dtype)
            _LIB.impl(op_name, rule, key)
        register_flop_formula(registered, get_raw=True)(lambda *args, out_val, **_: count(*args))
        return registered.default

    register(name, forward, fake)
    training = None
    if gradient is not None and gradient.forward is not None:
        kernels, fake_kept = gradient.forward, gradient.fake_kept

        def plain(*args: Any) -> tuple[Tensor, ...]:
            # the backward then is PyTorch's too, and reads none of what is kept
            return (eager(*args).contiguous(), *(kept.zero_() for kept in fake_kept(*args)))

        def forward_training(*args: Any) -> tuple[Tensor, ...]:
            if not uses_triton(_decisive(args)):
                return plain(*args)
            return _run_triton(name, kernels, plain, args)

        results = ", ".join(["Tensor"] * (1 + gradient.kept))
        _LIB.define(f"{name}_training({arguments}) -> ({results})")
        training = register(
            f"{name}_training", forward_training, lambda *args: (fake(*args), *fake_kept(*args))
        )
    op = Op(name, launch, eager, overload, training, gradient)
    OPS[name] = op
    return op


def _define_backward(
    name: str,
    arguments: str,
    eager: Callable[..., Tensor],
    reference: Callable[..., Tensor] | None,
    count: Callable[..., int],
    gradient: Gradient | None,
) -> Any:
    """Register ``fastvit::name_backward``: (grad, the op's arguments, output, kept, needs)."""
    for argument in gradient.unsaved if gradient else ():
        arguments = re.sub(rf"Tensor\?? {argument}\b", f"Tensor? {argument}", arguments)
    backward_name = f"{name}_backward"
    _LIB.define(
        f"{backward_name}(Tensor grad, {arguments}, Tensor? output, Tensor[] kept, bool[] needs)"
        " -> Tensor[]"
    )

    def plain(grad: Tensor, output: Any, kept: Any, args: list[Any], needs: list[bool]) -> Any:
        # an argument that was not saved is a summand: any value has the same gradient
        zeros = grad.new_zeros(()).expand(grad.shape)
        args = [zeros if need and a is None else a for a, need in zip(args, needs, strict=True)]
        # on a GPU the plain path, which keeps less in memory than a reference spelled out
        return _differentiate(eager if grad.is_cuda else reference or eager, grad, args, needs)

    def backward(grad: Tensor, *rest: Any) -> list[Tensor]:
        *args, output, kept, needs = rest
        if gradient is None or not uses_triton(grad) or name in _uncompiled:
            return plain(grad, output, kept, args, needs)
        if gradient.kept and not kept:  # of the op itself, not of its training form
            assert gradient.forward is not None
            output, *kept = gradient.forward(*args)
        return _run_triton(
            backward_name, gradient.backward, plain, (grad, output, kept, args, needs)
        )

    def fake(grad: Tensor, *rest: Any) -> list[Tensor]:
        *args, _, _, needs = rest
        return [
            grad.new_empty(grad.shape) if arg is None else arg.new_empty(arg.shape)
            for arg, need in zip(args, needs, strict=True)
            if need
        ]

    def no_second_derivative(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"fastvit.ops.{name} has no second derivative; use FASTVIT_BACKEND=torch for one"
        )

    _LIB.impl(backward_name, backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastvit::{backward_name}", fake, lib=_LIB)
    torch.library.register_autograd(f"fastvit::{backward_name}", no_second_derivative, lib=_LIB)
    # PyTorch's own differentiation runs the forward once more
    ratio = 3.0 if gradient is None else gradient.flops
    registered = getattr(torch.ops.fastvit, backward_name)
    register_flop_formula(registered, get_raw=True)(
        lambda grad, *args, out_val, **_: int(ratio * count(*args[:-3]))
    )
    return registered.default


def _count_flops(flops: Callable[..., int], of_values: bool, *args: Any) -> int:
    return flops(*args if of_values else (a.shape if isinstance(a, Tensor) else a for a in args))


def _decisive(args: tuple[Any, ...]) -> Tensor:
    """The tensor that decides where an op runs: the first floating one, as images may be uint8."""
    return next(a for a in args if isinstance(a, Tensor) and a.is_floating_point())


def define_inference_op(
    name: str,
    schema: str,
    *,
    returns: str = "Tensor",
    launch: Callable[..., Any],
    eager: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> Op:
    """Register ``fastvit::name`` without a gradient and without a rule for autocast: its operands
    keep the dtypes that they have. Arguments as in `define_op`.

    Args:
        returns: in torch.library's notation; ``(Tensor, Tensor)`` for two results.
    """
    _LIB.define(f"{name}({schema.strip()[1:-1]}) -> {returns}")
    overload = getattr(torch.ops.fastvit, name).default

    def plain(*args: Any) -> Any:
        result = eager(*args)
        if isinstance(result, Tensor):
            return result.contiguous()
        return tuple(tensor.contiguous() for tensor in result)

    def forward(*args: Any) -> Any:
        return _run_triton(name, launch, plain, args) if uses_triton(args[0]) else plain(*args)

    def no_gradient(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"fastvit's {name} is for inference and has no gradient; run it under torch.no_grad()"
        )

    _LIB.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastvit::{name}", fake, lib=_LIB)
    torch.library.register_autograd(f"fastvit::{name}", no_gradient, lib=_LIB)
    register_flop_formula(getattr(torch.ops.fastvit, name))(
        lambda *shapes, out_shape=None, **_: flops(*shapes)
    )
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


_uncompiled: set[str] = set()  # ops whose Triton path failed to compile


def _run_triton(
    name: str, launch: Callable[..., Any], eager: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
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
        _uncompiled.add(name)
        message = re.sub(r"\s+", " ", str(error))[:300]
        _warn_once(f"fastvit: Triton could not compile {name}, running plain PyTorch: {message}")
        return eager(*args)


launch = _launch.launch


def is_compile_failure(error: Exception) -> bool:
    """Whether `error` came from Triton's compiler; a fault of the launch itself is not one."""
    from triton.errors import TritonError

    return isinstance(error, TritonError) or "PassManager" in str(error)
