# pyright: reportPrivateImportUsage=false
"""What timm's layers compute, on our ops, with random numbers drawn in timm's order.

Shape legend: B batch, N tokens, P prefix tokens, D width, H heads, d head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, SwiGLU
from torch import Tensor, nn

from fastvit import ops
from fastvit.layers import (
    activation_name,
    apply_norm,
    drop_path_scale,
    is_active,
    norm_in_front,
)

LastLinear = Callable[..., Tensor]  # takes `scale` and `residual`, as `ops.linear` does


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or type(module) is nn.Identity


# --------------------------------------------------------------------------- attention


def attend(
    attn: Any,
    x: Tensor,
    norm: nn.Module | None = None,
    attn_mask: Tensor | None = None,
    rope: Tensor | None = None,
) -> Tensor:
    """Everything of one of timm's self-attentions before its output projection.

    Args:
        attn: without obstacles.
        x: [B, N, D].
        norm: of x, before all else.
        attn_mask: as in `ops.attention`, broadcasts to [B, H, N, N].
        rope: as timm's module takes it: sine beside cosine, [N-P, 2*d], perhaps of each head.

    Returns:
        [B, N, H*d].
    """
    gate = getattr(attn, "gate", None)
    if norm is not None and (attn.qkv is None or gate is not None):
        x, norm = apply_norm(norm, x), None  # several linears read it
    if attn.qkv is None:
        out = _multi_head(attn, *_split_qkv(attn, x), attn_mask, rope)
    else:
        qkv = _norm_linear(norm, x, attn.qkv.weight, _qkv_bias(attn))
        out = _packed(attn, qkv, attn_mask, rope)
    if hasattr(attn, "norm"):
        out = apply_norm(attn.norm, out)
    return out if gate is None else out * ops.linear(x, gate.weight, gate.bias).sigmoid()


def _norm_linear(norm: nn.Module | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        return ops.norm_linear(x, norm.weight, norm.bias, weight, bias, eps=norm.eps)
    return ops.linear(x if norm is None else apply_norm(norm, x), weight, bias)


def _qkv_bias(attn: Any) -> Tensor | None:
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv.bias
    return torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))  # EVA's and BEiT's keys have none


def _split_qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, N, d], keys and values, of H heads or fewer, from three linears."""

    def heads(linear: nn.Linear, count: int) -> Tensor:
        return ops.linear(x, linear.weight, linear.bias).unflatten(2, (count, -1)).transpose(1, 2)

    kv_heads = getattr(attn, "num_kv_heads", attn.num_heads)
    return (
        heads(attn.q_proj, attn.num_heads),
        heads(attn.k_proj, kv_heads),
        heads(attn.v_proj, kv_heads),
    )


def _packed(attn: Any, qkv: Tensor, attn_mask: Tensor | None, rope: Tensor | None) -> Tensor:
    """[B, N, 3*H*d] to [B, N, H*d]."""
    if hasattr(attn, "sub_norm"):
        return _differential(attn, qkv, attn_mask)
    norms = (getattr(attn, "q_norm", None), getattr(attn, "k_norm", None))
    if all(map(_is_identity, norms)):
        options = _rope_options(attn, rope)
        return ops.attention_qkv(qkv, attn.num_heads, attn_mask, _dropout_p(attn), **options)
    heads = qkv.unflatten(2, (3, attn.num_heads, -1))  # (B, N, 3, H, d)
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    return _multi_head(attn, q, k, v, attn_mask, rope)


def _multi_head(
    attn: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, rope: Tensor | None
) -> Tensor:
    """[B, H, N, d] each, keys and values of H heads or fewer, to [B, N, H*d]."""
    q, k = apply_norm(attn.q_norm, q), apply_norm(attn.k_norm, k)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    options = _rope_options(attn, rope)
    out = ops.attention(q, k, v, attn_mask, _dropout_p(attn), **options)
    return out.transpose(1, 2).flatten(2)


def _rope_options(attn: Any, rope: Tensor | None) -> dict[str, Any]:
    if rope is None:
        return {}
    sin, cos = rope.chunk(2, dim=-1)
    return {"rope": (cos, sin), "rotate_half": getattr(attn, "rotate_half", False)}


def _dropout_p(attn: Any) -> float:
    return attn.attn_drop.p if attn.training else 0.0


def _differential(attn: Any, qkv: Tensor, attn_mask: Tensor | None) -> Tensor:
    """The difference of two attentions with the same values, of twice a query's width, and a norm
    of every head: [B, N, 3*H*2*d] to [B, N, H*2*d]. Source: arXiv:2410.05258, equations 1 to 3."""
    q, k, v = qkv.chunk(3, dim=2)
    q, k = (t.unflatten(2, (attn.num_heads, 2, -1)) for t in (q, k))  # (B, N, H, 2, d)
    q, k = apply_norm(attn.q_norm, q), apply_norm(attn.k_norm, k)
    # zeros make queries and keys as wide as the values, and leave their products
    q, k = (F.pad(t, (0, attn.head_dim)).transpose(1, 2).unbind(3) for t in (q, k))
    v = v.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)  # (B, H, N, 2*d)
    one, other = (
        ops.attention(q[i], k[i], v, attn_mask, _dropout_p(attn), attn.head_dim**-0.5)
        for i in (0, 1)
    )
    out = one - attn._compute_lambda().type_as(one) * other
    return (apply_norm(attn.sub_norm, out.transpose(1, 2)) * (1 - attn.lambda_init)).flatten(2)


def relative_bias(attn: Any, shared: Tensor | None) -> Tensor | None:
    """What attention with relative positions adds to its scores: [1, H, N, N] or [H, N, N]."""
    if hasattr(attn, "rel_pos"):
        return shared if attn.rel_pos is None else attn.rel_pos.get_bias()
    if attn.relative_position_bias_table is None:
        return shared
    own = attn._get_rel_pos_bias()
    return own if shared is None else own + shared


def pool(attn: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """timm's `AttentionPoolLatent`: [B, N, D] to [B, D], or [B, latents, D] without a pool type."""
    if attn.pos_embed is not None:
        x = x + attn.pos_embed.unsqueeze(0).to(x.dtype)
    kv = ops.linear(x, attn.kv.weight, attn.kv.bias).unflatten(2, (2, attn.num_heads, -1))
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, d)
    q = attn.latent
    if not _is_identity(attn.q):
        q = ops.linear(q, attn.q.weight, attn.q.bias)
    q = q.unflatten(2, (attn.num_heads, -1)).transpose(1, 2).expand(len(x), -1, -1, -1)
    q, k = apply_norm(attn.q_norm, q), apply_norm(attn.k_norm, k)
    x = ops.attention(q, k, v, attn_mask).transpose(1, 2).flatten(2)
    if not _is_identity(attn.proj):
        x = ops.linear(x, attn.proj.weight, attn.proj.bias)
    x = attn.proj_drop(x)
    if attn.mlp is not None:
        x = add_branch(x, last_linear(attn.mlp, x, attn.norm), attn.mlp.drop2)
    return x[:, 0] if attn.pool == "token" else x.mean(1) if attn.pool == "avg" else x


# --------------------------------------------------------------------------- mlp


def last_linear(mlp: Any, x: Tensor, norm: nn.Module | None = None) -> LastLinear:
    """One of timm's MLPs of x [B, N, D], after a norm, up to its last linear, left to call."""
    plain = type(mlp) is Mlp and _is_identity(mlp.norm) and not is_active(mlp.drop1)
    if plain:
        x, options = (x, {}) if norm is None else norm_in_front(norm, x)
        return functools.partial(
            ops.mlp, x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
            activation=activation_name(mlp.act), **options,
        )  # fmt: skip
    hidden = _hidden(mlp, x if norm is None else apply_norm(norm, x))
    hidden = apply_norm(mlp.norm, mlp.drop1(hidden))
    return functools.partial(ops.linear, hidden, mlp.fc2.weight, mlp.fc2.bias)


def _hidden(mlp: Any, x: Tensor) -> Tensor:
    activation = activation_name(mlp.act)
    if type(mlp) is Mlp:
        return ops.linear(x, mlp.fc1.weight, mlp.fc1.bias, activation=activation)
    if type(mlp) is SwiGLU:
        gate, value = ((fc.weight, fc.bias) for fc in (mlp.fc1_g, mlp.fc1_x))
    else:
        first, second = _split(mlp.fc1.weight, mlp.fc1.bias, mlp.fc1.out_features // 2)
        gate, value = (second, first) if mlp.gate_last else (first, second)
    return ops.linear(x, *gate, activation=activation) * ops.linear(x, *value)


def _split(
    weight: Tensor, bias: Tensor | None, at: int
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """Weight and bias of a linear's first `at` outputs, and of the others."""
    if bias is None:
        return (weight[:at], None), (weight[at:], None)
    return (weight[:at], bias[:at]), (weight[at:], bias[at:])


# --------------------------------------------------------------------------- blocks


def add_branch(
    x: Tensor,
    linear: LastLinear,
    drop: nn.Module,
    drop_path: nn.Module | None = None,
    *,
    scale: Tensor | None = None,
    post_norm: nn.Module | None = None,
) -> Tensor:
    """x + drop_path(scale * post_norm(drop(linear()))): in the linear's epilogue, unless a norm or
    dropout comes between."""
    if post_norm is None and not is_active(drop):
        row_scale = None if drop_path is None else drop_path_scale(drop_path, x)
        return linear(scale=scale, residual=x, row_scale=row_scale)
    out = drop(linear())
    if post_norm is not None:
        out = apply_norm(post_norm, out)
    if scale is not None:
        out = out * scale
    return x + (out if drop_path is None else drop_path(out))


def _scale(block: Any, number: str) -> Tensor | None:
    """LayerScale's factors, by the names that timm's blocks have for them."""
    layer = getattr(block, f"ls{number}", None)
    return getattr(block, f"gamma_{number}", None) if layer is None else _gamma(layer)


def _gamma(layer_scale: nn.Module) -> Tensor | None:
    return getattr(layer_scale, "gamma", None)


def _project(linear: nn.Linear, x: Tensor) -> LastLinear:
    return functools.partial(ops.linear, x, linear.weight, linear.bias)


def pre_norm_block(
    block: Any, x: Tensor, attn_mask: Tensor | None = None, rope: Tensor | None = None
) -> Tensor:
    """Norm and attention, norm and MLP: ViT paper (arXiv:2010.11929), equations 2 and 3."""
    attn, mlp = block.attn, block.mlp
    out = _project(attn.proj, attend(attn, x, block.norm1, attn_mask, rope))
    x = add_branch(x, out, attn.proj_drop, block.drop_path1, scale=_scale(block, "1"))
    out = last_linear(mlp, x, block.norm2)
    return add_branch(x, out, mlp.drop2, block.drop_path2, scale=_scale(block, "2"))


def post_norm_block(
    block: Any, x: Tensor, attn_mask: Tensor | None = None, rope: Tensor | None = None
) -> Tensor:
    """Attention and norm, MLP and norm, each with a residual around: arXiv:2111.09883, figure 1."""
    attn, mlp = block.attn, block.mlp
    out = _project(attn.proj, attend(attn, x, None, attn_mask, rope))
    x = add_branch(x, out, attn.proj_drop, block.drop_path1, post_norm=block.norm1)
    out = last_linear(mlp, x)
    return add_branch(x, out, mlp.drop2, block.drop_path2, post_norm=block.norm2)


def parallel_block(block: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Attention and MLP beside one another on one norm: arXiv:2302.05442, section 2."""
    h, hidden, bias = apply_norm(block.in_norm, x), block.in_split[0], block.in_proj.bias
    if getattr(block, "qkv_bias", None) is not None:
        bias = torch.cat((block.qkv_bias, block.mlp_bias))  # in older timm, and in this order
    (w_mlp, b_mlp), (w_qkv, b_qkv) = _split(block.in_proj.weight, bias, hidden)
    b_mlp = block.mlp_bias if bias is None else b_mlp
    out = _packed(block, ops.linear(h, w_qkv, b_qkv), attn_mask, None)
    h = ops.linear(h, w_mlp, b_mlp, activation=activation_name(block.mlp_act))
    h = block.mlp_drop(h)

    if getattr(block, "out_proj", None) is None:
        attn_out, mlp_out = (
            (linear.weight, linear.bias) for linear in (block.attn_out_proj, block.mlp_out_proj)
        )
    else:
        weight, width = block.out_proj.weight, out.shape[-1]
        attn_out, mlp_out = (weight[:, :width], None), (weight[:, width:], block.out_proj.bias)
    options: dict[str, Any] = {
        "scale": _gamma(block.ls),
        "row_scale": drop_path_scale(block.drop_path, x),
    }
    x = ops.linear(out, *attn_out, residual=x, **options)
    return ops.linear(h, *mlp_out, residual=x, **options)


def parallel_things_block(block: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """A sum of attentions, then a sum of MLPs: arXiv:2203.09795, section 3."""
    total = x
    for branch in block.attns:
        attn = branch.attn
        out = _project(attn.proj, attend(attn, x, branch.norm, attn_mask))
        scale = _gamma(branch.ls)
        total = add_branch(total, out, attn.proj_drop, branch.drop_path, scale=scale)
    x = total
    for branch in block.ffns:
        out = last_linear(branch.mlp, x, branch.norm)
        scale = _gamma(branch.ls)
        total = add_branch(total, out, branch.mlp.drop2, branch.drop_path, scale=scale)
    return total
