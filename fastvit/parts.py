"""A pre-norm encoder block taken apart into its layers, and run: ViT paper (arXiv:2010.11929),
equations 2 and 3, with all that blocks of this field add to it.

Shape legend: B batch, N tokens, D width, F hidden width, H heads, d head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvit import ops

Weights = tuple[Any, Any]  # of a linear, [N, K] and [N] or None
Scale = tuple[dict[str, Any], str]  # a LayerScale's parameters, and the name of its factor [D]
Rope = tuple[Tensor, Tensor]  # cosine and sine, as in `ops.attention`


def is_active(module: nn.Module) -> bool:
    """Whether a dropout or stochastic-depth module changes its input now."""
    return module.training and bool(drop_rate(module))


def drop_rate(module: Any) -> float:
    """Of a dropout or of stochastic depth."""
    rate = getattr(module, "p", None)
    return getattr(module, "drop_prob", 0.0) if rate is None else rate


def weights_of(layer: Any) -> Weights:
    """Weight and bias, with one Python call where two attributes take two."""
    own = layer._parameters
    if "weight" in own:
        return own["weight"], own.get("bias")
    return layer.weight, layer.bias  # FSDP's views of its flat parameter


def packed_weights_of(mha: Any) -> Weights:
    """Of queries, keys and values of an `nn.MultiheadAttention`."""
    return mha.in_proj_weight, mha.in_proj_bias


class Parts(NamedTuple):
    """The layers of a block and its options. Layers are modules, whose parameters are read at every
    run; None for a layer that does nothing, such as a dropout of rate 0."""

    norm1: Any
    attn: Any  # its `training` says whether `dropout` applies
    qkv: tuple[Any, ...]  # one layer, or those of queries, keys and values
    heads: int
    out: Any
    norm2: Any
    fc1: Any
    activation: str | None  # a name in `ops.ACTIVATIONS`
    fc2: Any

    attend: Callable[..., Tensor] | None = None  # all up to `out`, of (parts, x, mask)
    qkv_weights: Callable[[Any], Weights] = weights_of
    kv_heads: int | None = None  # where keys and values have fewer
    q_norm: Any = None
    k_norm: Any = None
    norms_heads: bool = True  # q_norm and k_norm take each head by itself, not all together
    scale: float | None = None  # of the scores; None for 1 / sqrt(d)
    dropout: float = 0.0  # of attention weights
    rotate_half: bool = False  # as in `ops.attention`
    out_norm: Any = None  # before `out`
    out_gate: Any = None  # a linear of the block's input, whose sigmoid multiplies `out`'s
    drop1: Any = None
    scale1: Scale | None = None
    drop_path1: Any = None

    gate: Any = None  # act(gate(h)) * fc1(h) is the hidden layer (SwiGLU, arXiv:2002.05202)
    gate_half: int | None = None  # which half of fc1's outputs is the gate, if one is
    hidden_drop: Any = None
    hidden_norm: Any = None
    drop2: Any = None
    scale2: Scale | None = None
    drop_path2: Any = None


def layer_or_none(module: nn.Module | None) -> nn.Module | None:
    """None for what passes its input on."""
    return None if type(module) is nn.Identity else module


def drop_or_none(module: nn.Module | None) -> nn.Module | None:
    """None for a dropout or stochastic depth of rate 0."""
    return module if module is not None and drop_rate(module) else None


def scale_of(module: nn.Module | None, name: str = "gamma") -> Scale | None:
    """A LayerScale's factor by the name of its parameter; None of a module without."""
    if module is None:
        return None
    # FSDP keeps views of its flat parameter among the attributes
    own = module._parameters if name in module._parameters else module.__dict__
    return (own, name) if isinstance(own.get(name), Tensor) else None


def run(parts: Parts, x: Tensor, mask: Tensor | None = None, rope: Rope | None = None) -> Tensor:
    """A block's output, [B, N, D] of its input.

    LayerScale, stochastic depth and the residual sum ride in the last linear of each half, and the
    backward computes norms and activations again; where dropout is active before the sum, that half
    runs its tail by itself, in the libraries' order.

    Args:
        x: [B, N, D].
        mask: as in `ops.attention`, broadcasts to [B, H, N, N].
        rope: turns the last tokens of queries and keys, as in `ops.attention`.
    """
    return add_mlp(parts, add_attention(parts, attend(parts, x, mask, rope), x))


# --------------------------------------------------------------------------- attention


def attend(parts: Parts, x: Tensor, mask: Tensor | None, rope: Rope | None) -> Tensor:
    """Norm and attention up to the output projection: [B, N, D] to [B, N, H*d]."""
    if parts.attend is not None:
        return parts.attend(parts, x, mask)
    if len(parts.qkv) == 1 and parts.out_gate is None:
        return attend_projected(parts, (_norm_qkv(parts, x),), mask, rope)
    return attend_normed(parts, apply_norm(parts.norm1, x), mask, rope)


def _norm_qkv(parts: Parts, x: Tensor) -> Tensor:
    norm, weights = parts.norm1, parts.qkv_weights(parts.qkv[0])
    if isinstance(norm, nn.LayerNorm):
        return ops.norm_linear(x, *weights_of(norm), *weights, eps=norm.eps)
    return ops.linear(apply_norm(norm, x), *weights)


def attend_normed(parts: Parts, h: Tensor, mask: Tensor | None, rope: Rope | None) -> Tensor:
    """As `attend`, of an input that the norm has been applied to."""
    projected = [ops.linear(h, *parts.qkv_weights(layer)) for layer in parts.qkv]
    out = attend_projected(parts, projected, mask, rope)
    if parts.out_gate is not None:
        out = out * ops.linear(h, *weights_of(parts.out_gate)).sigmoid()
    return out


def attend_projected(
    parts: Parts, qkv: Sequence[Tensor], mask: Tensor | None, rope: Rope | None
) -> Tensor:
    """Of one tensor [B, N, 3*H*d] or of queries, keys and values, to [B, N, H*d]."""
    q, k, v = heads_of(parts, qkv)
    dropout = parts.dropout if parts.attn.training else 0.0
    options = mask, dropout, parts.scale, rope, parts.rotate_half
    if k is None or v is None:
        out = ops.attention_qkv(q, parts.heads, *options)
    else:
        out = ops.attention(q, k, v, *options).transpose(1, 2).flatten(2)
    return out if parts.out_norm is None else apply_norm(parts.out_norm, out)


def heads_of(parts: Parts, qkv: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What attention takes of `attend_projected`'s input: one tensor [B, N, 3*H*d] as it is, or
    three of [B, H, N, d], with norms of queries and keys applied; keys and values of fewer heads
    are repeated."""
    q_norm, k_norm, heads = parts.q_norm, parts.k_norm, parts.heads
    if len(qkv) == 1 and q_norm is None and k_norm is None:
        return qkv[0], None, None
    q, k, v = qkv[0].chunk(3, dim=-1) if len(qkv) == 1 else qkv
    kv_heads = heads if parts.kv_heads is None else parts.kv_heads
    if not parts.norms_heads:
        q, k = apply_norm(q_norm, q), apply_norm(k_norm, k)
    q, k, v = split_heads(q, heads), split_heads(k, kv_heads), split_heads(v, kv_heads)
    if parts.norms_heads:
        q, k = apply_norm(q_norm, q), apply_norm(k_norm, k)
    if heads > kv_heads:
        groups = heads // kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return q, k, v


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H*d] to [B, H, N, d], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def add_attention(parts: Parts, out: Tensor, x: Tensor) -> Tensor:
    """x [B, N, D] and the output projection of `out` [B, N, H*d]."""
    linear = functools.partial(ops.linear, out, *weights_of(parts.out))
    return add_branch(x, linear, parts.drop1, parts.scale1, parts.drop_path1)


def add_branch(
    x: Tensor, linear: Callable[..., Tensor], drop: Any, scale: Scale | None, drop_path: Any
) -> Tensor:
    """x + drop_path(scale * drop(linear())): in the linear's epilogue, unless dropout comes
    between. `linear` takes the options of `ops.linear`."""
    gamma = None if scale is None else scale[0][scale[1]]
    if drop is None or not drop.training:
        row_scale = None if drop_path is None else drop_path_scale(drop_path, x)
        return linear(scale=gamma, residual=x, row_scale=row_scale)
    out = drop(linear())
    out = out if gamma is None else out * gamma
    return x + (out if drop_path is None else drop_path(out))


# --------------------------------------------------------------------------- mlp


def add_mlp(parts: Parts, x: Tensor) -> Tensor:
    """x [B, N, D] and the MLP of its norm."""
    return add_branch(x, last_linear(parts, x), parts.drop2, parts.scale2, parts.drop_path2)


def last_linear(parts: Parts, x: Tensor) -> Callable[..., Tensor]:
    """Norm and MLP of x [B, N, D] up to the last linear, which is left to call."""
    drop, weights = parts.hidden_drop, weights_of(parts.fc2)
    if (
        parts.gate is None
        and parts.gate_half is None
        and parts.hidden_norm is None
        and (drop is None or not drop.training)
    ):
        h, norm = norm_in_front(parts.norm2, x)
        return functools.partial(
            ops.mlp, h, *weights_of(parts.fc1), *weights, activation=parts.activation, **norm
        )
    return functools.partial(ops.linear, hidden(parts, apply_norm(parts.norm2, x)), *weights)


def hidden(parts: Parts, h: Tensor) -> Tensor:
    """[B, N, D] to what the MLP's last linear takes, [B, N, F]."""
    weights, activation = weights_of(parts.fc1), parts.activation
    if parts.gate is None and parts.gate_half is None:
        h = ops.linear(h, *weights, activation=activation)
    else:
        gate, weights = gate_weights(parts)
        h = ops.linear(h, *gate, activation=activation) * ops.linear(h, *weights)
    if parts.hidden_drop is not None:
        h = parts.hidden_drop(h)
    return h if parts.hidden_norm is None else apply_norm(parts.hidden_norm, h)


def gate_weights(parts: Parts) -> tuple[Weights, Weights]:
    """Of a gated MLP's gate, and of what it multiplies."""
    weights = weights_of(parts.fc1)
    if parts.gate is not None:
        return weights_of(parts.gate), weights
    first, second = halves(*weights, len(weights[0]) // 2)
    return (first, second) if parts.gate_half == 0 else (second, first)


def halves(weight: Tensor, bias: Tensor | None, at: int) -> tuple[Weights, Weights]:
    """Weight and bias of a linear's first `at` outputs, and of the others."""
    if bias is None:
        return (weight[:at], None), (weight[at:], None)
    return (weight[:at], bias[:at]), (weight[at:], bias[at:])


# --------------------------------------------------------------------------- layers


def factor(scale: Scale | None) -> Tensor | None:
    """A LayerScale's factor [D]."""
    return None if scale is None else scale[0][scale[1]]


def apply_norm(norm: Any, x: Tensor) -> Tensor:
    """A LayerNorm's or RMSNorm's arithmetic on our kernel; any other norm as it is, None for none.

    timm, torch and transformers each have RMSNorms of their own, so those go by name.
    """
    if isinstance(norm, nn.LayerNorm):
        return ops.layer_norm(x, *weights_of(norm), norm.eps)
    if norm is None or type(norm) is nn.Identity:
        return x
    if type(norm).__name__.endswith(("RMSNorm", "RmsNorm")):
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        return ops.rms_norm(x, norm.weight, torch.finfo(x.dtype).eps if eps is None else eps)
    return norm(x)


def norm_in_front(norm: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Input and options of `ops.mlp`, which applies the norm itself where it can."""
    if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
        weight, bias = weights_of(norm)
        return x, {"norm_weight": weight, "norm_bias": bias, "eps": norm.eps}
    return apply_norm(norm, x), {}


def drop_path_scale(drop_path: nn.Module | None, x: Tensor) -> Tensor | None:
    """Stochastic depth as a factor for each token of x [B, N, D], [B, N]: one for each sample,
    drawn by the module itself. None where it is inactive."""
    if drop_path is None or not is_active(drop_path):
        return None
    ones = x.new_ones(x.shape[0], *(1,) * (x.dim() - 1))
    return drop_path(ones).squeeze(-1).expand(x.shape[:-1])


def activation_name(act: nn.Module) -> str | None:
    """The name in `ops.ACTIVATIONS` of what an activation module computes, or None.

    Goes by class name, since timm, transformers and torch each have classes of their own.
    """
    kind = type(act).__name__
    if kind == "GELU":
        return "gelu" if getattr(act, "approximate", "none") == "none" else "gelu_tanh"
    names = {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu", "ReLU": "relu"}
    return names.get(kind)
