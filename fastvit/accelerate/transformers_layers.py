"""transformers' ViT layers taken apart, family by family.

Shape legend: B batch, N tokens, D width, d head dimension.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import ops
from fastvit._compat import import_transformers
from fastvit.parts import (
    Parts,
    Rope,
    add_attention,
    add_mlp,
    apply_norm,
    attend,
    attend_projected,
    drop_or_none,
    drop_rate,
    layer_or_none,
    run,
    scale_of,
    split_heads,
    weights_of,
)

import_transformers()  # before all else of transformers

from transformers import activations  # noqa: E402

# --------------------------------------------------------------------------- by their parts


def _layers(
    norm1: nn.Module, attn: Any, qkv: tuple[Any, ...], out: nn.Module, norm2: nn.Module,
    fc1: nn.Module, act: Any, fc2: nn.Module,
) -> Parts:  # fmt: skip
    """Without what only some families have."""
    heads = attn.num_heads if hasattr(attn, "num_heads") else attn.num_attention_heads
    return Parts(
        norm1, attn, qkv, heads, out, norm2, fc1, _ACTIVATIONS.get(type(act)), fc2,
        q_norm=layer_or_none(attn._modules.get("q_norm")),
        k_norm=layer_or_none(attn._modules.get("k_norm")), norms_heads=False,
        scale=getattr(attn, "scaling", getattr(attn, "scale", None)), dropout=_dropout(attn),
        rotate_half=True,
    )  # fmt: skip


def _dropout(attn: Any) -> float:
    """The rate of attention weights; 0 where a family's attention has none."""
    found = (getattr(attn, name, None) for name in ("attention_dropout", "dropout", "dropout_prob"))
    rate = next((each for each in found if each is not None), 0.0)
    return drop_rate(rate) if isinstance(rate, nn.Module) else rate


def _vit(layer: Any) -> Parts:
    attn, mlp, dropout = layer.attention, layer.mlp, drop_or_none(layer.dropout)
    return _layers(
        layer.layernorm_before, attn, (attn.q_proj, attn.k_proj, attn.v_proj), attn.o_proj,
        layer.layernorm_after, mlp.fc1, mlp.activation_fn, mlp.fc2,
    )._replace(drop1=dropout, drop2=dropout)  # fmt: skip


def _beit(layer: Any, plain: Callable[[Any], Parts] = _vit) -> Parts:
    """BEiT's scales and stochastic depth around what `plain` finds."""
    drop_path = drop_or_none(layer.drop_path)
    return plain(layer)._replace(
        # without LayerScale both factors are the number 1
        scale1=scale_of(layer, "lambda_1"), scale2=scale_of(layer, "lambda_2"),
        drop_path1=drop_path, drop_path2=drop_path,
    )  # fmt: skip


def _dinov2(layer: Any) -> Parts:
    attn, mlp, drop_path = layer.attention, layer.mlp, drop_or_none(layer.drop_path)
    if "fc1" in mlp._modules:
        fc1, act, fc2, gate = mlp.fc1, mlp.activation_fn, mlp.fc2, None
    else:
        fc1, act, fc2 = mlp.up_proj, mlp.act_fn, mlp.down_proj
        gate = mlp._modules.get("gate_proj")
    return _layers(
        layer.norm1, attn, (attn.q_proj, attn.k_proj, attn.v_proj), attn.o_proj,
        layer.norm2, fc1, act, fc2,
    )._replace(
        gate=gate,
        scale1=scale_of(layer.layer_scale1, "lambda1"),
        scale2=scale_of(layer.layer_scale2, "lambda1"),
        drop_path1=drop_path, drop_path2=drop_path,
    )  # fmt: skip


def _clip(layer: Any) -> Parts:
    attn, mlp = layer.self_attn, layer.mlp
    return _layers(
        layer.layer_norm1, attn, (attn.q_proj, attn.k_proj, attn.v_proj), attn.out_proj,
        layer.layer_norm2, mlp.fc1, mlp.activation_fn, mlp.fc2,
    )  # fmt: skip


def _nested(layer: Any) -> Parts:
    attn, output = layer.attention.attention, layer.attention.output
    inner = "mlp" in layer._modules
    if inner:
        mlp: Any = (layer.mlp.fc1, layer.mlp.activation, layer.mlp.fc2)
    else:
        mlp = (layer.intermediate.dense, layer.intermediate.intermediate_act_fn, layer.output.dense)
    return _layers(
        layer.layernorm_before, attn, (attn.query, attn.key, attn.value), output.dense,
        layer.layernorm_after, *mlp,
    )._replace(
        drop1=drop_or_none(output.dropout),
        drop2=None if inner else drop_or_none(layer.output.dropout),
    )  # fmt: skip


def _data2vec(layer: Any) -> Parts:
    return _beit(layer, _nested)


def _aimv2(layer: Any) -> Parts:
    attn, mlp = layer.attention, layer.ffn
    return _layers(
        layer.rms_norm1, attn, (attn.q_proj, attn.k_proj, attn.v_proj), attn.out_proj,
        layer.rms_norm2, mlp.up_proj, mlp.act_fn, mlp.down_proj,
    )._replace(gate=mlp.gate_proj)  # fmt: skip


def _internvl(layer: Any) -> Parts:
    attn, mlp = layer.attention, layer.mlp
    return _layers(
        layer.layernorm_before, attn, (attn.q_proj, attn.k_proj, attn.v_proj),
        attn.projection_layer,
        layer.layernorm_after, mlp.fc1, mlp.activation_fn, mlp.fc2,
    )._replace(
        drop1=drop_or_none(attn.projection_dropout), scale1=scale_of(layer, "lambda_1"),
        drop2=drop_or_none(layer.dropout), scale2=scale_of(layer, "lambda_2"),
    )  # fmt: skip


# --------------------------------------------------------------------------- attention of their own


def _sam(layer: Any) -> Parts:
    attn, mlp = layer.attn, layer.mlp
    parts = _layers(
        layer.layer_norm1, attn, (attn.qkv,), attn.proj,
        layer.layer_norm2, mlp.lin1, mlp.act, mlp.lin2,
    )  # fmt: skip
    return parts._replace(
        attend=functools.partial(_attend_map, layer.window_size),
        dropout=0.0 if calls_sdpa(attn) else attn.dropout,  # which leaves it out
    )


def _vitdet(layer: Any) -> Parts:
    attn, mlp, drop_path = layer.attention, layer.mlp, drop_or_none(layer.drop_path)
    drop = drop_or_none(mlp.drop)
    return _layers(
        layer.norm1, attn, (attn.qkv,), attn.proj, layer.norm2, mlp.fc1, mlp.act, mlp.fc2
    )._replace(
        attend=functools.partial(_attend_map, layer.window_size),
        drop_path1=drop_path, hidden_drop=drop, drop2=drop, drop_path2=drop_path,
    )  # fmt: skip


def _run_vitdet(
    layer: Any, parts: Parts, x: Tensor, mask: Tensor | None = None, rope: Rope | None = None
) -> Tensor:
    """Maps [B, D, H, W], after which some layers have convolutions."""
    x = run(parts, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return layer.residual(x) if layer.use_residual_block else x


def _attend_map(size: int, parts: Parts, x: Tensor, mask: Tensor | None) -> Tensor:
    """`parts.attend` of a map [B, H, W, D], within windows of `size` (0 for the whole map), which
    are filled up with zeros after the norm. Source: arXiv:2203.16527, section 3."""
    h = apply_norm(parts.norm1, x)
    windows, (height, width) = h.shape[:1], h.shape[1:3]
    if size > 0:
        h = F.pad(h, (0, 0, 0, -width % size, 0, -height % size))
        h = h.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
        windows = h.shape[:3]  # (B, rows, columns)
        h = h.flatten(0, 2)
    grid = h.shape[1:3]
    qkv = ops.linear(h.flatten(1, 2), *weights_of(parts.qkv[0]))
    out = attend_projected(parts, (qkv,), _decomposed(parts, qkv, grid), None).unflatten(1, grid)
    if size > 0:
        out = out.unflatten(0, windows).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out[:, :height, :width]


def _decomposed(parts: Parts, qkv: Tensor, grid: torch.Size) -> Tensor | None:
    """A row's and a column's relative position, each a product with the query: the bias [B, heads,
    N, N] of N = h * w tokens. Source: arXiv:2112.01526, equation 4."""
    attn = parts.attn
    if not hasattr(attn, "rel_pos_h"):
        return None
    q = split_heads(qkv.chunk(3, dim=-1)[0], parts.heads).unflatten(2, grid)
    library: Any = attn if hasattr(attn, "get_rel_pos") else sys.modules[type(attn).__module__]
    rows, columns = (  # (h, h, d) and (w, w, d)
        library.get_rel_pos(n, n, table)
        for n, table in zip(grid, (attn.rel_pos_h, attn.rel_pos_w), strict=True)
    )
    rows = torch.einsum("bnhwd,hkd->bnhwk", q, rows)
    columns = torch.einsum("bnhwd,wkd->bnhwk", q, columns)
    return (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(4).flatten(2, 3)


def _hiera(layer: Any) -> Parts:
    attn, mlp, drop_path = layer.attn, layer.mlp, drop_or_none(layer.drop_path)
    return _layers(
        layer.layernorm_before, attn, (attn.qkv,), attn.proj,
        layer.layernorm_after, mlp.fc1, mlp.activation_fn, mlp.fc2,
    )._replace(attend=_attend_units, drop_path1=drop_path, drop_path2=drop_path)  # fmt: skip


def _run_hiera(
    layer: Any, parts: Parts, x: Tensor, mask: Tensor | None = None, rope: Rope | None = None
) -> Tensor:
    """Where a stage begins, the residual is made as wide as it and pooled as its queries are."""
    out = attend(parts, x, None, None)
    if layer.hidden_size != layer.hidden_size_output:
        x = ops.linear(apply_norm(parts.norm1, x), *weights_of(layer.proj))
        x = x.unflatten(1, (layer.query_stride, -1)).max(dim=1).values
    return add_mlp(parts, add_attention(parts, out, x))


def _attend_units(parts: Parts, x: Tensor, mask: Tensor | None) -> Tensor:
    """`parts.attend` within mask units, whose tokens lie apart by the number of units, or globally;
    queries are pooled. Source: arXiv:2306.00989, section 3.2."""
    attn, batch = parts.attn, len(x)
    qkv = ops.linear(apply_norm(parts.norm1, x), *weights_of(parts.qkv[0]))
    length = attn.query_stride * attn.window_size if attn.use_mask_unit_attn else x.shape[1]
    qkv = qkv.unflatten(2, (3, parts.heads, -1)).unflatten(1, (length, -1))
    q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # each (B * units, heads, length, d)
    if attn.query_stride > 1:
        q = q.unflatten(2, (attn.query_stride, -1)).max(dim=2).values
    out = ops.attention(q, k, v, scale=parts.scale).unflatten(0, (batch, -1))
    return out.permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2)


def calls_sdpa(module: Any) -> bool:
    """Whether this is an attention outside transformers' interface, of a class that calls PyTorch's
    attention where its base spells it out."""
    return "Sdpa" in type(module).__name__


# --------------------------------------------------------------------------- families


class Family(NamedTuple):
    """The layers of a modeling file."""

    layer: str  # its class
    parts: Callable[[Any], Parts]  # how it is taken apart
    takes_mask: bool = True
    interface: bool = True  # its attention goes through transformers' attention functions
    run: Callable[..., Tensor] | None = None  # in the place of `FastBlock.run`
    beside: tuple[None, ...] | None = None  # what its forward gives after the tokens, in a tuple


FAMILIES: dict[str, Family] = {  # by the modeling file
    "vit": Family("ViTLayer", _vit),
    "deit": Family("DeiTLayer", _vit),
    "vit_mae": Family("ViTMAELayer", _vit),
    "vit_msn": Family("ViTMSNLayer", _vit),
    "ijepa": Family("IJepaLayer", _vit),
    "vivit": Family("VivitLayer", _vit),
    "beit": Family("BeitLayer", _beit),
    "dinov2": Family("Dinov2Layer", _dinov2),
    "dinov2_with_registers": Family("Dinov2WithRegistersLayer", _dinov2),
    "dinov3_vit": Family("DINOv3ViTLayer", _dinov2),
    "clip": Family("CLIPEncoderLayer", _clip),
    "siglip": Family("SiglipEncoderLayer", _clip),
    "siglip2": Family("Siglip2EncoderLayer", _clip),
    "metaclip_2": Family("MetaClip2EncoderLayer", _clip),
    "videomae": Family("VideoMAELayer", _nested, takes_mask=False),
    "yolos": Family("YolosLayer", _nested, takes_mask=False),
    "dpt": Family("DPTViTLayer", _nested, takes_mask=False),
    "vitpose_backbone": Family("VitPoseBackboneLayer", _nested, takes_mask=False),
    "aimv2": Family("Aimv2EncoderLayer", _aimv2),
    "internvl": Family("InternVLVisionLayer", _internvl, takes_mask=False),
    "data2vec.modeling_data2vec_vision": Family(
        "Data2VecVisionLayer", _data2vec, takes_mask=False, interface=False, beside=(None,)
    ),
    "sam": Family("SamVisionLayer", _sam, takes_mask=False, interface=False),
    "vitdet": Family(
        "VitDetLayer", _vitdet, takes_mask=False, interface=False, run=_run_vitdet, beside=()
    ),
    "hiera": Family(
        "HieraLayer", _hiera, takes_mask=False, interface=False, run=_run_hiera, beside=(None,)
    ),
}
_ACTIVATIONS: dict[type, str] = {nn.ReLU: "relu", nn.SiLU: "silu"} | {
    getattr(activations, name): ours
    for name, ours in {
        "GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh",
        "NewGELUActivation": "gelu_tanh", "FastGELUActivation": "gelu_tanh",
        "QuickGELUActivation": "quick_gelu", "SiLUActivation": "silu",
    }.items()
    if hasattr(activations, name)
}  # fmt: skip
# what layers may be, for `obstacles.wanted_by`
EXACT = {"NORM": frozenset({nn.Identity}), "ACTIVATION": frozenset(_ACTIVATIONS)}
OWN = {
    "NORM": ("RMSNorm",), "INNER_NORM": ("RMSNorm",), "ATTENTION": ("Attention",),
    "MLP": ("MLP", "MLPBlock", "Mlp", "SwiGLUFFN"), "DROP_PATH": ("DropPath",),
    "LAYER_SCALE": ("LayerScale",), "intermediate": ("Intermediate",), "output": ("Output",),
}  # fmt: skip


def family_of(kind: type) -> str:
    """``vit`` for a class of transformers.models.vit.modeling_vit, ``""`` outside transformers."""
    path = kind.__module__.split(".")
    if path[:2] != ["transformers", "models"] or len(path) != 4:
        return ""
    return path[2] if path[3] == f"modeling_{path[2]}" else f"{path[2]}.{path[3]}"
