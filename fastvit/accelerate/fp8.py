"""A pre-norm block with its linears in e4m3, for inference. Its weights are its own (`derived.py`)
and it runs in eval mode without gradients; in every other case a block runs as without them.

Shape legend: B batch, N tokens, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from fastvit import parts as whole
from fastvit.accelerate.derived import Derived, Sources
from fastvit.kernels.linear_fp8.op import (
    E4M3,
    fp8_attention,
    fp8_layer_norm,
    fp8_linear,
    fp8_quantize,
)
from fastvit.kernels.linear_fp8.reference import E4M3_MAX
from fastvit.parts import Parts, Rope, Weights, apply_norm, factor, weights_of

QUANTIZED = "fastvit_quantized"  # attribute of a block that was given a `Form`
# inputs of a block's linears, by the names that timm has for those
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

_own_capture: ContextVar[bool] = ContextVar("own_capture", default=False)


@contextlib.contextmanager
def own_capture() -> Iterator[None]:
    """A with-block around the capture of a CUDA graph by its `Graphs`, which refreshes derived
    weights before each replay: blocks may use theirs here, as in no other capture."""
    token = _own_capture.set(True)
    try:
        yield
    finally:
        _own_capture.reset(token)


def in_own_capture() -> bool:
    """Whether this is within `own_capture`."""
    return _own_capture.get()


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


def _has_versions(parameters: Iterable[Tensor | None]) -> bool:
    """Whether changes of these are counted: not of those made in inference mode."""
    return not any(p is not None and p.is_inference() for p in parameters)


def can_quantize(parts: Parts) -> bool:
    """Whether a block has a form with e4m3 linears: with LayerNorms and the usual attention."""
    norms = parts.norm1, parts.norm2
    plain = parts.out_gate is None and parts.attend is None
    return plain and all(isinstance(norm, nn.LayerNorm) for norm in norms)


class Form:
    """Another form of one block, for inference, with weights of its own; `run` is a subclass's.
    Copies and pickles keep no derived weights."""

    def __init__(self) -> None:
        self.derived: dict[str, Derived] = {}

    def applies(self, block: nn.Module, parts: Parts, x: Tensor) -> bool:
        """Whether a block may run so for `x` now."""
        return may_derive(x) and self.fits(block, parts, x)

    def fits(self, block: nn.Module, parts: Parts, x: Tensor) -> bool:
        """Whether a block may where `may_derive`. Runs for every block in every forward."""
        drops = (
            parts.drop1, parts.drop_path1, parts.hidden_drop, parts.drop2, parts.drop_path2
        )  # fmt: skip
        layers = (parts.norm1, *parts.qkv, parts.out, parts.norm2, parts.fc1, parts.fc2)
        return (
            x.dtype != torch.float64
            and not block.training
            and not parts.attn.training
            and "_is_replica" not in block.__dict__  # of DataParallel, for one forward only
            and can_quantize(parts)
            and not any(drop is not None and drop.training for drop in drops)
            and all(_has_versions(layer._parameters.values()) for layer in layers)
            and _has_versions((factor(parts.scale1), factor(parts.scale2)))
        )

    def refresh(self) -> bool:
        """Whether a weight had new values; what is derived of it then has too."""
        return any([derived.refresh() for derived in self.derived.values()])

    def tensors(self) -> list[Sources | None]:
        """All that is derived now."""
        return [derived.tensors for derived in self.derived.values()]


# --------------------------------------------------------------------------- e4m3


class Quantized(Form):
    """The e4m3 form: weights of all its linears with a scale for each row, activations with one
    calibrated scale; quantised by the norm, the attention or the activation before, after a gate or
    an RMS norm by a small kernel. The residual stream keeps a half dtype: that of the block's
    input, bfloat16 for wider ones.

    Args:
        scales: of the inputs of `LINEARS`.
    """

    def __init__(self, scales: dict[str, float]) -> None:
        super().__init__()
        self.scales = scales

    def __reduce__(self) -> tuple[type[Quantized], tuple[dict[str, float]]]:
        return Quantized, (self.scales,)

    def run(
        self, parts: Parts, x: Tensor, mask: Tensor | None = None, rope: Rope | None = None
    ) -> Tensor:
        """[B, N, D] to the same in a half dtype."""
        scales = self.scales
        dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
        x = x.to(dtype)
        h = _normed(parts.norm1, x, scales["attn.qkv"])
        layers = map(parts.qkv_weights, parts.qkv)
        qkv = [self._linear("attn.qkv", i, w, h, dtype=dtype) for i, w in enumerate(layers)]
        h = self._attended(parts, qkv, mask, rope)
        x = self._linear(
            "attn.proj", 0, weights_of(parts.out), h, scale=factor(parts.scale1), residual=x,
            dtype=dtype,
        )  # fmt: skip
        h = self._hidden(parts, _normed(parts.norm2, x, scales["mlp.fc1"]), dtype)
        return self._linear(
            "mlp.fc2", 0, weights_of(parts.fc2), h, scale=factor(parts.scale2), residual=x,
            dtype=dtype,
        )  # fmt: skip

    def _attended(
        self, parts: Parts, qkv: list[Tensor], mask: Tensor | None, rope: Rope | None
    ) -> Tensor:
        """The output projection's input in e4m3, [B, N, H*d]."""
        out_scale = self.scales["attn.proj"]
        if parts.out_norm is not None:
            out = whole.attend_projected(parts._replace(out_norm=None), qkv, mask, rope)
            return _normed(parts.out_norm, out, out_scale)
        return fp8_attention(
            *whole.heads_of(parts, qkv), mask, num_heads=parts.heads, scale=parts.scale, rope=rope,
            rotate_half=parts.rotate_half, out_scale=out_scale,
        )  # fmt: skip

    def _hidden(self, parts: Parts, x: Tensor, dtype: torch.dtype) -> Tensor:
        """fc2's input in e4m3, [..., hidden]: fc1, its activation and gate."""
        out_scale, weights = self.scales["mlp.fc2"], weights_of(parts.fc1)
        options: dict[str, Any] = {"activation": parts.activation, "dtype": dtype}
        if parts.gate is not None:
            h = self._linear("mlp.fc1", 0, weights, x, dtype=dtype)
            h = h * self._linear("mlp.fc1", 1, weights_of(parts.gate), x, **options)
        elif parts.gate_half is not None:
            h = self._linear("mlp.fc1", 0, weights, x, dtype=dtype).chunk(2, dim=-1)
            activation = whole.ops.ACTIVATIONS[parts.activation or "none"]
            h = activation(h[parts.gate_half]) * h[1 - parts.gate_half]
        elif parts.hidden_norm is None:
            return self._linear("mlp.fc1", 0, weights, x, out_scale=out_scale, **options)
        else:
            h = self._linear("mlp.fc1", 0, weights, x, **options)
        return _normed(parts.hidden_norm, h, out_scale)

    def _linear(
        self, name: str, i: int, weights: Weights, x: Tensor, scale: Tensor | None = None,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        """The i-th of those linears that share an input; a LayerScale is derived into factor and
        bias."""
        x_scale, bias = self.scales[name], weights[1]
        derived = self.derived.setdefault(
            f"{name}.{i}", Derived(lambda weight, *scaled: quantize(weight, x_scale, *scaled))
        )
        if scale is None:
            weight, factor = derived.get(weights[0])
        else:
            weight, factor, bias = derived.get(*weights, scale)
        assert weight is not None
        assert factor is not None
        return fp8_linear(x, weight, factor, bias, **options)


def _normed(norm: Any, x: Tensor, out_scale: float) -> Tensor:
    """The norm of x in e4m3; None for none."""
    if not isinstance(norm, nn.LayerNorm):
        return fp8_quantize(apply_norm(norm, x), out_scale=out_scale)
    weight, bias = weights_of(norm)
    if weight is not None and weight.dtype != x.dtype:
        weight, bias = weight.float(), None if bias is None else bias.float()
    return fp8_layer_norm(x, weight, bias, norm.eps, out_scale=out_scale)


def quantize(weight: Tensor, x_scale: float, *scaled: Tensor | None) -> Sources:
    """[N, K] as e4m3 with a scale for each row, and float32 [N], those scales times `x_scale`.

    Args:
        scaled: a bias [N] or None, and a LayerScale [N] that multiplies both: the bias times it, in
            float32, is a third result.
    """
    weight = weight.float()
    largest = weight.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    values = (weight / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX)
    values, scale = values.to(E4M3).contiguous(), scale * x_scale
    if not scaled:
        return values, scale
    bias, layer_scale = scaled
    assert layer_scale is not None
    layer_scale = layer_scale.float()
    return values, scale * layer_scale, None if bias is None else bias.float() * layer_scale


class Watch:
    """In the place of a `Quantized` while `calibrate` looks on: the largest absolute value of the
    inputs of `LINEARS`."""

    def __init__(self) -> None:
        self.largest: dict[str, Tensor] = {}

    def applies(self, block: nn.Module, parts: Parts, x: Tensor) -> bool:
        """Always."""
        return True

    def run(
        self, parts: Parts, x: Tensor, mask: Tensor | None = None, rope: Rope | None = None
    ) -> Tensor:
        """[B, N, D] to [B, N, D], as `parts.run`, layer by layer."""
        h = self._seen("attn.qkv", apply_norm(parts.norm1, x))
        out = self._seen("attn.proj", whole.attend_normed(parts, h, mask, rope))
        x = whole.add_attention(parts, out, x)
        h = self._seen("mlp.fc1", apply_norm(parts.norm2, x))
        self._seen("mlp.fc2", whole.hidden(parts, h))
        return whole.add_mlp(parts, x)

    def _seen(self, name: str, x: Tensor) -> Tensor:
        found = x.detach().abs().amax().float()
        if name in self.largest:
            found = torch.maximum(self.largest[name], found)
        self.largest[name] = found
        return x


# --------------------------------------------------------------------------- running


class QuantizedSequential(nn.Sequential):
    """The blocks of a model, whose residual stream stays in a half dtype from one to the next."""

    fastvit_original = nn.Sequential

    def forward(self, input: Any) -> Any:
        if torch.compiler.is_compiling() or not may_derive(input):
            return super().forward(input)
        blocks: list[Any] = [*self.children()]
        parts = [_parts_to_run(block, input) for block in blocks]
        if not blocks or None in parts:
            return super().forward(input)
        x = input
        for block, own in zip(blocks, parts, strict=True):
            x = block.__dict__[QUANTIZED].run(own, x, block.bias())
        return x.to(input.dtype)


QuantizedSequential.__name__ = "Sequential"  # by which users find it


def _parts_to_run(block: Any, x: Tensor) -> Parts | None:
    """The `Parts` of a block that may run in e4m3 and has no hook; None of any other."""
    state = block.__dict__
    own = state.get(QUANTIZED)
    if (
        not isinstance(own, Quantized)
        or state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or "forward" in state
    ):
        return None
    parts = block.examine(x)
    return parts if parts is not None and own.fits(block, parts, x) else None


def attach(model: nn.Module, forms: Mapping[nn.Module, Form]) -> None:
    """Give each block its form, and the containers of those in e4m3 their loop."""
    for block, own in forms.items():
        setattr(block, QUANTIZED, own)
    quantized = {block for block, own in forms.items() if isinstance(own, Quantized)}
    for module in model.modules():
        children = list(module.children())
        if type(module) is nn.Sequential and children and quantized.issuperset(children):
            module.__class__ = QuantizedSequential  # pyright: ignore


def detach(module: nn.Module) -> None:
    """Take back what `attach` gave to one module."""
    module.__dict__.pop(QUANTIZED, None)
    if type(module) is QuantizedSequential:
        module.__class__ = nn.Sequential  # pyright: ignore
