"""The one seam between our ops and PyTorch.

`define_op` registers an op with `torch.library` once: schema, implementation, fake (shapes for
`torch.compile` and `torch.export`), autograd, autocast and FLOP formula. An op's arguments are its
tensors, the first of which decides where it runs, and then its options.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._C._functorch as functorch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import _profiler_enabled, forward_ad  # pyright: ignore
from torch.utils.flop_counter import register_flop_formula

from fastvit.kernels import _backend
from fastvit.kernels._backend import Grads, Meta, matmul_precision, run_triton, uses_triton
from fastvit.kernels._device import cached

_LIB = torch.library.Library("fastvit", "DEF")
_KINDS = frozenset({Tensor, torch.nn.Parameter})
OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Gradient:
    """How kernels differentiate an op.

    Args:
        backward: (grad, kept, args, needs) to the gradients of the op's tensors, in their order,
            each of its tensor's shape and dtype; those are read that `needs` (one entry an
            argument) asks for. `grad` may have any strides.
        forward: gives the output and the tensors that are kept for the backward, from the op's
            arguments; the op's own kernels, prepared with ``keep=True``, unless given.
        kept, fake_kept: how many tensors that is, and empty ones like them.
        unsaved: residual inputs, of the output's shape. The backward does not read them, so they
            are not kept; their gradient is `grad` itself.
        saves_output: the output is kept too, before the others.
        flops: FLOPs of the backward over those of the forward.
    """

    backward: Callable[[Tensor, Sequence[Tensor], Sequence[Any], Sequence[bool]], Grads]
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
    check: Callable[..., None]
    straight: Callable[..., Any]
    run: Callable[..., Any]
    launch: Callable[..., Any]  # kernels, from the op's arguments
    eager: Callable[..., Tensor]
    smooth: Callable[..., Tensor]  # `eager` for derivatives of any order and mode
    opaque: bool
    overload: Any
    training: Any  # gives the output and what its backward keeps
    gradient: Gradient | None

    def __call__(self, *args: Any) -> Tensor:
        if (
            self.training is not None
            and torch.is_grad_enabled()
            and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
            and not torch.compiler.is_exporting()
        ):
            return self.training(*args)[0]
        return self.overload(*args)

    def apply(self, tensors: tuple[Any, ...], *options: Any) -> Tensor:
        """The op by the shortest way: its kernels with nothing between, PyTorch's dispatcher where
        that has work to do, or the plain path.

        The dispatcher is needed for gradients, autocast, subclasses of tensors, modes (fake
        tensors, the FLOP counter), compilers, tracing and profilers; and kernels run on the current
        device. Function transforms and forward-mode gradients take the plain path.
        """
        first, path = tensors[0], _backend._path
        if not (
            torch.compiler.is_dynamo_compiling()
            or torch.compiler._is_compiling_flag
            or not (first.is_cuda or path == "interpret")
            or path == "torch"
            or torch._C._is_any_autocast_enabled()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0
            or torch._C._get_tracing_state() is not None
            or _profiler_enabled()
        ) and (
            path == "interpret"
            or not (
                first.dtype == torch.float64
                or _backend.gpu_problem() is not None
                or first.get_device() != torch._C._cuda_getDevice()
            )
        ):
            grad = torch.is_grad_enabled()
            metas: list[Meta | None] = []
            for t in tensors:
                if t is None:
                    metas.append(None)
                    continue
                if type(t) not in _KINDS or (grad and t.requires_grad):
                    break
                aligned = not t.data_ptr() & 15
                metas.append(_backend.new_meta((t.dtype, t.shape, t.stride(), t.device, aligned)))
            else:
                try:
                    return self.run(self.straight(*metas, *options, matmul_precision()), *tensors)
                except Exception as error:
                    if not _backend.is_compile_failure(error):
                        raise  # else the dispatcher's way warns, and runs plain PyTorch
        self.check(*tensors, *options)
        transformed = _transformed(*tensors)
        if transformed:
            return (self.smooth if transformed > 1 else self.eager)(*tensors, *options)
        compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if uses_triton(first) or (self.opaque and compiling):
            return self(*tensors, *options)
        return self.eager(*tensors, *options)


def define_op(
    name: str, arguments: str, check: Callable[..., None], prepare: Callable[..., Any],
    run: Callable[..., Any], *, eager: Callable[..., Tensor], fake: Callable[..., Tensor],
    smooth: Callable[..., Tensor] | None = None, flops: Callable[..., int] = lambda *args: 0,
    autocast: tuple[str, ...] = (), autocast_dtype: torch.dtype | None = None,
    gradient: Gradient | None = None, opaque: bool = False,
) -> Op:  # fmt: skip
    """Register ``fastvit::name`` and its gradient ``fastvit::name_backward``; where `gradient`
    keeps tensors also ``fastvit::name_training``, which returns the output and those.

    Args:
        arguments: in torch.library's notation, tensors first; the result is a Tensor.
        check: of the arguments, tensors or their metadata.
        prepare, run: the op's launcher, as `prepare_and_run` calls it.
        eager: the same computation in plain PyTorch, taken where Triton does not apply, and
            differentiated where it does not apply to the gradient.
        smooth: `eager` of functions with derivatives of any order, in forward mode too; `eager`
            itself unless given.
        fake: returns an empty contiguous result of the right shape and dtype.
        flops: FLOPs of one forward; by default none, as where no matrices are multiplied.
        autocast: arguments cast under autocast; by default all keep their dtypes.
        autocast_dtype: the dtype they are cast to; None for autocast's own.
        gradient: None for an op for inference, which has none.
        opaque: `torch.compile` cannot look into `eager`.
    """
    smooth = smooth or eager
    _LIB.define(f"{name}({arguments}) -> Tensor")
    overload = getattr(torch.ops.fastvit, name).default
    names = [argument.name for argument in overload._schema.arguments]
    tensors = sum("Tensor" in str(argument.type) for argument in overload._schema.arguments)

    @cached
    def straight(*args: Any) -> Any:
        check(*args[:-1])
        return prepare(*args)

    def launch(*args: Any, **wanted: Any) -> Any:
        options = (tuple(value) if isinstance(value, list) else value for value in args[tensors:])
        return _backend.prepare_and_run(prepare, run, args[:tensors], *options, **wanted)

    def plain(*args: Any) -> Tensor:
        return eager(*args).contiguous()

    def register(
        op_name: str, kernels: Callable[..., Any], plain: Callable[..., Any],
        fake: Callable[..., Any],
    ) -> Any:  # fmt: skip
        def forward(*args: Any) -> Any:
            return run_triton(name, kernels, plain, args) if uses_triton(args[0]) else plain(*args)

        registered = getattr(torch.ops.fastvit, op_name)
        _LIB.impl(op_name, forward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastvit::{op_name}", fake, lib=_LIB)
        torch.library.register_autograd(
            f"fastvit::{op_name}", backward, setup_context=setup_context, lib=_LIB
        )
        cast_at = [names.index(argument) for argument in autocast]
        for device_type, key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):
            if cast_at:
                rule = _autocast_rule(registered.default, device_type, key, cast_at, autocast_dtype)
                _LIB.impl(op_name, rule, key)
        register_flop_formula(registered, get_raw=True)(lambda *args, out_val, **_: flops(*args))
        return registered.default

    training = setup_context = None
    backward = _refusal(
        f"fastvit's {name} is for inference and has no gradient; run it under torch.no_grad()"
    )
    if gradient is not None:
        kernels = gradient.forward or functools.partial(launch, keep=True)
        setup_context, backward = _define_backward(
            name, arguments, names, tensors, kernels, eager, smooth, flops, gradient
        )
        fake_kept = gradient.fake_kept
        if gradient.kept:
            results = ", ".join(["Tensor"] * (1 + gradient.kept))
            _LIB.define(f"{name}_training({arguments}) -> ({results})")
            training = register(
                f"{name}_training", kernels,
                # its backward is PyTorch's too, and reads none of what is kept
                lambda *args: (plain(*args), *(kept.zero_() for kept in fake_kept(*args))),
                lambda *args: (fake(*args), *fake_kept(*args)),
            )  # fmt: skip
    register(name, launch, plain, fake)
    op = Op(
        name, check, straight, run, launch, eager, smooth, opaque, overload, training, gradient
    )  # fmt: skip
    OPS[name] = op
    return op


def _define_backward(
    name: str, arguments: str, names: list[str], tensors: int, kernels: Callable[..., Any],
    eager: Callable[..., Tensor], smooth: Callable[..., Tensor], flops: Callable[..., int],
    gradient: Gradient,
) -> tuple[Callable[..., None], Callable[..., Grads]]:  # fmt: skip
    """Register ``fastvit::name_backward``: (grad, the op's arguments, kept, needs). Gives what
    `torch.library.register_autograd` takes, of the op and of its training form."""
    for argument in gradient.unsaved:
        arguments = re.sub(rf"Tensor\?? {argument}\b", f"Tensor? {argument}", arguments)
    backward_name = f"{name}_backward"
    _LIB.define(
        f"{backward_name}(Tensor grad, {arguments}, Tensor[] kept, bool[] needs) -> Tensor[]"
    )

    def plain(grad: Tensor, kept: Any, args: list[Any], needs: list[bool]) -> list[Tensor]:
        # an argument that was not saved is a residual: any value has the same gradient
        zeros = grad.new_zeros(()).expand(grad.shape)
        args = [zeros if need and a is None else a for a, need in zip(args, needs, strict=True)]
        # a kernel runs below autograd: let autograd see this part again
        exclude = torch._C._dispatch_tls_local_exclude_set()
        exclude = exclude.remove(torch._C.DispatchKey.AutogradFunctionality)
        include = torch._C._dispatch_tls_local_include_set()
        with torch._C._ForceDispatchKeyGuard(include, exclude):
            return [g.contiguous() for g in _gradients(eager, grad, args, needs)]

    def launch(grad: Tensor, kept: Any, args: list[Any], needs: list[bool]) -> list[Any]:
        grads = gradient.backward(grad, kept, args, needs)
        return [g for g, need in zip(grads, needs, strict=False) if need]

    def differentiate(grad: Tensor, *rest: Any) -> list[Tensor]:
        *args, kept, needs = rest
        if not uses_triton(grad) or name in _backend.uncompiled:
            return plain(grad, kept, args, needs)
        if len(kept) < gradient.saves_output + gradient.kept:  # of the op, not of its training form
            output, *kept = kernels(*args)
            kept = [output] * gradient.saves_output + kept
        return run_triton(backward_name, launch, plain, (grad, kept, args, needs))

    def fake(grad: Tensor, *rest: Any) -> list[Tensor]:
        *args, _, needs = rest
        return [
            grad.new_empty(grad.shape) if arg is None else arg.new_empty(arg.shape)
            for arg, need in zip(args, needs, strict=True)
            if need
        ]

    _LIB.impl(backward_name, differentiate, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastvit::{backward_name}", fake, lib=_LIB)
    registered = getattr(torch.ops.fastvit, backward_name)
    register_flop_formula(registered, get_raw=True)(
        lambda grad, *args, out_val, **_: int(gradient.flops * flops(*args[:-2]))
    )
    differentiate_op = registered.default
    summands = {names.index(argument) for argument in gradient.unsaved}
    saved_at = [i for i in range(tensors) if i not in summands]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        results = (output,) if isinstance(output, Tensor) else output
        kept = results if gradient.saves_output else results[1:]
        ctx.save_for_backward(*kept, *(inputs[i] for i in saved_at))
        ctx.kept = len(kept)
        ctx.others = [None if i < tensors else value for i, value in enumerate(inputs)]

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Grads:
        args = list(ctx.others)
        if grad is None:
            return (None,) * len(args)
        saved = ctx.saved_tensors  # read once: checkpointing recomputes what it gives
        kept = saved[: ctx.kept]
        for i, tensor in zip(saved_at, saved[ctx.kept :], strict=True):
            args[i] = tensor
        wanted = ctx.needs_input_grad
        needs = [bool(need) and i not in summands for i, need in enumerate(wanted)]
        if torch.is_grad_enabled() or _transformed(grad, *saved):
            grads = iter(_gradients(smooth, grad, args, needs))  # to be differentiated, or mapped
        else:
            grads = iter(differentiate_op(grad, *args, kept, needs) if any(needs) else ())
        # an op may not return what it was given, and a copy of it would cost as much as a norm
        return tuple(
            next(grads) if need else grad if i in summands and wanted[i] else None
            for i, need in enumerate(needs)
        )

    return setup_context, backward


def _refusal(message: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(message)

    return refuse


def _transforms() -> int:
    """0 outside of function transforms; 1 within `vmap` and one `grad`; 2 where derivatives may be
    of a higher order or in forward mode."""
    kinds = [level.key().name for level in functorch.get_interpreter_stack() or ()]
    if forward_ad._current_level >= 0 or "Jvp" in kinds or kinds.count("Grad") > 1:
        return 2
    mapped = torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")  # by `is_grads_batched`
    return int(mapped or "Grad" in kinds or "Vmap" in kinds)  # the dispatcher knows Functionalize


# the compiler runs it while it traces, and compiles anew within other transforms
_transforms._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _transformed(*tensors: Tensor | None) -> int:
    """As `_transforms`, but 0 at a level of forward-mode gradients that has no tangent of these,
    and 2 where autograd differentiates a transform of these."""
    found = _transforms()
    if not found or torch.compiler.is_compiling():
        return found
    given = [t for t in tensors if t is not None]
    if peek_interpreter_stack() is None and forward_ad._current_level >= 0:
        tangents = (forward_ad.unpack_dual(t).tangent for t in given)
        return 0 if all(tangent is None for tangent in tangents) else found
    return 2 if any(_base(t).requires_grad for t in given) else found


def _base(x: Tensor) -> Tensor:
    """`x` outside of function transforms."""
    return _base(functorch.get_unwrapped(x)) if functorch.is_functorch_wrapped_tensor(x) else x


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


def _gradients(
    function: Callable[..., Tensor], grad: Tensor, args: Sequence[Any], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Of `function` at those `args` that need one; outside of autocast, whose rule has cast."""
    at = [i for i, need in enumerate(needs) if need]

    def of_wanted(*wanted: Tensor) -> Tensor:
        return function(*(dict(enumerate(args)) | dict(zip(at, wanted, strict=True))).values())

    with torch.autocast(grad.device.type, enabled=False):
        output, pull_back, *_ = torch.func.vjp(of_wanted, *(args[i] for i in at))
        return pull_back(grad.to(output.dtype))
