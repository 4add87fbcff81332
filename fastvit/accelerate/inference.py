"""Two forms of a pre-norm block for inference: its norms folded into the linears after them, and
linears in e4m3. Both have weights of their own (`derived.py`) and run in eval mode without
gradients; in every other case a block runs as without them.

Shape legend: B batch, N tokens, D width, T parts of a row's statistics.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from fastvit import layers, ops
from fastvit.accelerate.derived import Derived, Sources
from fastvit.kernels._library import uses_triton
from fastvit.kernels.layer_norm.inference import (
    E4M3,
    E4M3_MAX,
    fp8_layer_norm,
    fp8_quantize,
    row_statistics,
)
from fastvit.kernels.linear.inference import fold, folded_linear, fp8_linear, linear_statistics

INFERENCE = "fastvit_inference"  # attribute of a block that was given one of the two forms
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

_own_capture: ContextVar[bool] = ContextVar("own_capture", default=False)


@contextlib.contextmanager
def own_capture() -> Iterator[None]:
    """Within, a CUDA graph is captured whose owner refreshes derived weights before a replay."""
    token = _own_capture.set(True)
    try:
        yield
    finally:
        _own_capture.reset(token)


class Form:
    """What one block keeps for inference. Copies and pickles keep no derived weights."""

    runs: ClassVar[str]
    when: ClassVar[str]

    def __init__(self) -> None:
        self.derived: dict[str, Derived] = {}

    def fits(self, block: Any, x: Tensor) -> bool:
        """Whether `block`, which `layers.fused_block` could run, takes this form for `x` where
        `may_derive`. Runs for every block in every forward."""
        parts = block._modules
        attn, mlp = parts["attn"]._modules, parts["mlp"]._modules
        norms = parts["norm1"], parts["norm2"]
        dropouts = (
            attn["proj_drop"], parts["drop_path1"], mlp["drop1"], mlp["drop2"],
            parts["drop_path2"],
        )  # fmt: skip
        return (
            not block.training
            and "_is_replica" not in block.__dict__  # of DataParallel, for one forward only
            and all(isinstance(norm, nn.LayerNorm) for norm in norms)
            and not any(drop.training and layers.is_active(drop) for drop in dropouts)
            and all(map(_has_versions, (*norms, *_linears(block))))
        )

    def run(
        self, block: Any, x: Tensor, attn_mask: Tensor | None, carried: Tensor | None, last: bool
    ) -> tuple[Tensor, Tensor | None]:
        """[B, N, D] to the same, perhaps of another dtype, and what the next block takes as
        `carried` unless `last`."""
        raise NotImplementedError

    def refresh(self) -> bool:
        """Whether a weight had new values; what is derived of it then has too."""
        return any([derived.refresh() for derived in self.derived.values()])

    def tensors(self) -> list[Sources | None]:
        """All that is derived now."""
        return [derived.tensors for derived in self.derived.values()]


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def may_derive(x: object) -> bool:
    """Whether weights may be derived in the forward of `x`: nothing is differentiated, traced or
    captured."""
    return (
        type(x) is Tensor  # neither fake nor a subclass
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and peek_interpreter_stack() is None  # vmap, jvp
        # whoever replays another's graph would not refresh the weights that it reads
        and (_own_capture.get() or not _capturing(x))
    )


def _linears(block: Any) -> tuple[nn.Module, ...]:
    attn, mlp = block._modules["attn"]._modules, block._modules["mlp"]._modules
    return attn["qkv"], attn["proj"], mlp["fc1"], mlp["fc2"]


def _has_versions(layer: nn.Module) -> bool:
    """Whether changes of its parameters are counted: not of those made in inference mode."""
    return not any(p is not None and p.is_inference() for p in layer._parameters.values())


# --------------------------------------------------------------------------- norms folded


class Folded(Form):
    """norm1 is part of qkv and norm2 of fc1; the statistics of their rows come from the linear
    before, or from a small kernel where there is none.

    Args:
        dtype: of the residual stream and the folded weights, which are rounded once from the
            parameters as they are; None for the dtype of both.
    """

    runs = "linear with norms folded in, attention"
    when = (
        "norms are folded into the linears after them in eval mode without gradients, where Triton "
        "runs; not under torch.compile, nor under an autocast that accelerate did not ask for"
    )

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype

    def __reduce__(self) -> tuple[type[Folded], tuple[torch.dtype | None]]:
        return Folded, (self.dtype,)

    def fits(self, block: Any, x: Tensor) -> bool:
        if not super().fits(block, x):
            return False
        if self.dtype is not None:
            return x.is_floating_point() and uses_triton(x)
        linears: tuple[Any, ...] = _linears(block)
        return (
            all(linear.weight.dtype == x.dtype for linear in linears)
            and not torch.is_autocast_enabled(x.device.type)
            and uses_triton(x)
        )

    def _after(self, name: str, norm: Any, linear: Any) -> Any:
        """The folded weight, its colsum and the folded bias."""
        build = functools.partial(fold, dtype=self.dtype)
        derived = self.derived.setdefault(name, Derived(build))
        return derived.get(linear.weight, linear.bias, norm.weight, norm.bias)

    def _weight(self, name: str, linear: Any) -> Tensor:
        dtype = self.dtype
        if dtype is None or linear.weight.dtype == dtype:
            return linear.weight
        derived = self.derived.setdefault(name, Derived(lambda weight: (weight.to(dtype),)))
        (weight,) = derived.get(linear.weight)
        assert weight is not None
        return weight

    def run(
        self, block: Any, x: Tensor, attn_mask: Tensor | None, carried: Tensor | None, last: bool
    ) -> tuple[Tensor, Tensor | None]:
        attn, mlp = block.attn, block.mlp
        x = x.to(self.dtype or x.dtype)
        statistics = row_statistics(x) if carried is None else carried
        weight, colsum, bias = self._after("qkv", block.norm1, attn.qkv)
        qkv = folded_linear(x, statistics, weight, colsum, bias, eps=block.norm1.eps)
        out = layers.attend(attn, qkv, attn_mask).to(x.dtype)  # autocast's norms give float32
        scale = getattr(block.ls1, "gamma", None)
        weight = self._weight("proj", attn.proj)
        x, statistics = linear_statistics(out, weight, attn.proj.bias, scale=scale, residual=x)
        weight, colsum, bias = self._after("fc1", block.norm2, mlp.fc1)
        activation = layers.activation_name(mlp.act)
        h = folded_linear(
            x, statistics, weight, colsum, bias, activation=activation, eps=block.norm2.eps
        )
        h = layers.apply_norm(mlp.norm, h).to(x.dtype)
        scale = getattr(block.ls2, "gamma", None)
        weight = self._weight("fc2", mlp.fc2)
        if last and self.dtype is None:
            return ops.linear(h, weight, mlp.fc2.bias, scale=scale, residual=x), None
        return linear_statistics(h, weight, mlp.fc2.bias, scale=scale, residual=x)


# --------------------------------------------------------------------------- e4m3


class Quantized(Form):
    """All four linears in e4m3, weights with a scale for each row, activations with one that was
    calibrated; quantised by the norm, the activation or a small kernel before. The residual stream
    keeps a half dtype: that of the block's input, bfloat16 for wider ones.

    Args:
        scales: of the inputs of `LINEARS`.
    """

    runs = "layer_norm, linear and attention, e4m3 operands in linear"
    when = (
        "linears of the blocks run in e4m3 in eval mode without gradients; not under torch.compile "
        "(patch embedding, norms, attention and head keep their dtypes)"
    )

    def __init__(self, scales: dict[str, float]) -> None:
        super().__init__()
        self.scales = scales

    def __reduce__(self) -> tuple[type[Quantized], tuple[dict[str, float]]]:
        return Quantized, (self.scales,)

    def fits(self, block: Any, x: Tensor) -> bool:
        return x.dtype != torch.float64 and super().fits(block, x)

    def _linear(self, name: str, linear: Any, x: Tensor, **options: Any) -> Tensor:
        scale = self.scales[name]
        derived = self.derived.setdefault(name, Derived(lambda weight: quantize(weight, scale)))
        weight, factor = cast(tuple[Tensor, Tensor], derived.get(linear.weight))
        return fp8_linear(x, weight, factor, linear.bias, **options)

    def run(
        self, block: Any, x: Tensor, attn_mask: Tensor | None, carried: Tensor | None, last: bool
    ) -> tuple[Tensor, Tensor | None]:
        attn, mlp, scales = block.attn, block.mlp, self.scales
        dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
        x = x.to(dtype)
        h = _normed(block.norm1, x, scales["attn.qkv"])
        qkv = self._linear("attn.qkv", attn.qkv, h, dtype=dtype)
        h = fp8_quantize(layers.attend(attn, qkv, attn_mask), out_scale=scales["attn.proj"])
        scale = getattr(block.ls1, "gamma", None)
        x = self._linear("attn.proj", attn.proj, h, scale=scale, residual=x, dtype=dtype)
        h = _normed(block.norm2, x, scales["mlp.fc1"])
        plain = isinstance(mlp.norm, nn.Identity)
        h = self._linear(
            "mlp.fc1", mlp.fc1, h, activation=layers.activation_name(mlp.act), dtype=dtype,
            out_scale=scales["mlp.fc2"] if plain else None,
        )  # fmt: skip
        if not plain:
            h = fp8_quantize(layers.apply_norm(mlp.norm, h), out_scale=scales["mlp.fc2"])
        scale = getattr(block.ls2, "gamma", None)
        return self._linear("mlp.fc2", mlp.fc2, h, scale=scale, residual=x, dtype=dtype), None


def _normed(norm: Any, x: Tensor, out_scale: float) -> Tensor:
    weight, bias = norm.weight, norm.bias
    if weight is not None and weight.dtype != x.dtype:
        weight, bias = weight.float(), None if bias is None else bias.float()
    return fp8_layer_norm(x, weight, bias, norm.eps, out_scale=out_scale)


def quantize(weight: Tensor, x_scale: float) -> tuple[Tensor, Tensor]:
    """[N, K] as e4m3 with a scale for each row, and float32 [N], those scales times `x_scale`."""
    weight = weight.float()
    largest = weight.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    values = (weight / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return values.to(E4M3).contiguous(), scale * x_scale


# --------------------------------------------------------------------------- running


def run_block(block: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """`layers.fused_block`, in the form that `block` was given where it applies."""
    form: Form | None = None if torch.compiler.is_compiling() else block.__dict__.get(INFERENCE)
    if form is None or not may_derive(x) or not form.fits(block, x):
        return layers.fused_block(block, x, attn_mask)
    return form.run(block, x, attn_mask, None, last=True)[0].to(x.dtype)


class InferenceSequential(nn.Sequential):
    """The blocks of a model, which hand on the statistics of their rows."""

    def forward(self, input: Any) -> Any:
        if torch.compiler.is_compiling() or not may_derive(input) or not _runs_as_one(self, input):
            return super().forward(input)
        x, carried = input, None
        blocks: list[Any] = list(self.children())
        for i, block in enumerate(blocks):
            add_rel_pos = getattr(block.attn, "add_rel_pos", None)
            mask = None if add_rel_pos is None else add_rel_pos(None)
            form: Form = block.__dict__[INFERENCE]
            x, carried = form.run(block, x, mask, carried, last=i == len(blocks) - 1)
        return x.to(input.dtype)


def _runs_as_one(blocks: nn.Sequential, x: Tensor) -> bool:
    """Whether no block needs to be called by itself: all have a form that fits, and no hook."""
    for block in blocks.children():
        state = block.__dict__
        form = state.get(INFERENCE)
        if (
            form is None
            or state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or "forward" in state
            or not block.fuses(x)  # type: ignore[operator]
            or not form.fits(block, x)
        ):
            return False
    return len(blocks) > 0


ORIGINAL: dict[type[nn.Module], type[nn.Module]] = {InferenceSequential: nn.Sequential}


def attach(model: nn.Module, forms: dict[nn.Module, Form]) -> None:
    """Give each block its form, and the containers of such blocks their loop."""
    for block, form in forms.items():
        setattr(block, INFERENCE, form)
    for module in model.modules():
        children = list(module.children())
        if type(module) is nn.Sequential and children and all(c in forms for c in children):
            module.__class__ = InferenceSequential  # pyright: ignore


def detach(module: nn.Module) -> None:
    """Take back what `attach` gave to one module."""
    module.__dict__.pop(INFERENCE, None)
    if type(module) is InferenceSequential:
        module.__class__ = nn.Sequential  # pyright: ignore
