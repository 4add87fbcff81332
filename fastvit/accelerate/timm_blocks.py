# pyright: reportPrivateImportUsage=false
"""timm's blocks and attention pooling: what they are made of, what those compute that are not
pre-norm, with random numbers drawn in timm's order, and their fast classes.

Only exact classes count, since a subclass may compute something else. Classes that the installed
timm does not have are left out.

Shape legend: B batch, N tokens, D width, H heads, d head dimension.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from timm import layers as timm_layers
from timm.layers import AttentionPoolLatent, DropPath, GluMlp, LayerNorm, Mlp, RmsNorm, SwiGLU
from timm.models import beit, vision_transformer
from timm.models import vision_transformer_relpos as relpos
from timm.models.eva import AttentionRope, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Attention,
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor, nn

from fastvit import ops
from fastvit.accelerate import block as blocks
from fastvit.accelerate.block import fast, library_class
from fastvit.obstacles import Obstacle, head_obstacle, layer_obstacle, wanted_by, wanted_of
from fastvit.parts import (
    Parts,
    Rope,
    Scale,
    Weights,
    activation_name,
    add_attention,
    add_branch,
    add_mlp,
    apply_norm,
    attend,
    attend_projected,
    drop_or_none,
    drop_path_scale,
    drop_rate,
    factor,
    halves,
    last_linear,
    layer_or_none,
    scale_of,
    weights_of,
)

Kinds = frozenset[type[nn.Module]]


def _recent(module: Any, *names: str) -> Kinds:
    """The classes of these names in `module`, as far as this version of timm has them."""
    return frozenset(getattr(module, name) for name in names if hasattr(module, name))


DIFF_ATTENTION = _recent(timm_layers, "DiffAttention")
DIFF_PARALLEL = _recent(vision_transformer, "DiffParallelScalingBlock")
RMS_NORM: Kinds = frozenset({nn.RMSNorm, RmsNorm})
NORM: Kinds = RMS_NORM | {nn.LayerNorm, LayerNorm}
_LAYERS: dict[str, frozenset[type]] = {
    "NORM": NORM, "INNER_NORM": NORM, "MLP": frozenset({Mlp, GluMlp, SwiGLU}),
    "ACTIVATION": frozenset({timm_layers.GELU, timm_layers.GELUTanh, timm_layers.QuickGELU}),
    "DROP_PATH": frozenset({DropPath}),
    "LAYER_SCALE": frozenset().union(  # in older timm three classes
        *(_recent(module, "LayerScale") for module in (timm_layers, vision_transformer, relpos))
    ),
    "attns": frozenset({nn.ModuleList}), "ffns": frozenset({nn.ModuleList}),
}  # fmt: skip
_NO_GATE = () if "gated" in inspect.signature(Attention).parameters else ("gate",)  # older timm
_MAY_LINEAR = frozenset({nn.Linear, nn.Identity})
_PLAIN, _EVA = DIFF_ATTENTION | {Attention}, frozenset({EvaAttention, AttentionRope})
_REL_POS = frozenset({relpos.RelPosAttention})


def _none(*names: str) -> dict[str, frozenset[type]]:
    """Layers that a class does not call, and that are read here of another."""
    return {name: frozenset() for name in names}


_NO_LS = _none("ls1", "ls2")
_OF: dict[type, dict[str, frozenset[type]]] = {  # by the class that has the layer
    AttentionPoolLatent: {"q": _MAY_LINEAR, "proj": _MAY_LINEAR, "MLP": frozenset({Mlp})},
    Block: {"attn": _PLAIN}, ResPostBlock: {"attn": _PLAIN}, nn.Sequential: {"attn": _PLAIN},
    EvaBlock: {"attn": _EVA} | _NO_LS, EvaBlockPostNorm: {"attn": _EVA} | _NO_LS,
    beit.Block: {"attn": frozenset({beit.Attention})} | _NO_LS,
    relpos.RelPosBlock: {"attn": _REL_POS}, relpos.ResPostRelPosBlock: {"attn": _REL_POS},
    Attention: _none("sub_norm", *_NO_GATE),
    EvaAttention: _none("sub_norm", *_NO_GATE), AttentionRope: _none("sub_norm", *_NO_GATE),
    beit.Attention: _none("q_norm", "k_norm", "norm", "gate", "sub_norm"),
    relpos.RelPosAttention: _none("norm", "gate", "sub_norm"),
    ParallelScalingBlock: _none("sub_norm"),
} | {kind: _none("gate") for kind in DIFF_ATTENTION}  # fmt: skip
_WANTED = {kind: wanted_by(_LAYERS | own) for kind, own in _OF.items()}
_WANTED_ELSEWHERE = wanted_by(_LAYERS)


def _wanted(parent: nn.Module, name: str, kind: type[nn.Module]) -> str | None:
    if type(parent) is nn.ModuleList:
        return wanted_of((nn.Sequential,), kind)  # of attns and ffns
    return _WANTED.get(library_class(parent), _WANTED_ELSEWHERE)(parent, name, kind)


_NOTHING = Parts(None, None, (), 0, None, None, None, None, None)

# --------------------------------------------------------------------------- taking apart


def take_apart(block: Any) -> Parts | Obstacle:
    """A pre-norm block."""
    return _obstacle(block) or _parts(block)


def _obstacle(block: Any) -> Obstacle | None:
    found = layer_obstacle(block, _wanted)
    wide = (
        head_obstacle(_head_dim(attn)) for attn in block.modules() if hasattr(attn, "num_heads")
    )
    return found or next(filter(None, wide), None)


def _head_dim(attn: Any) -> int:
    if type(attn) is beit.Attention:
        return attn.qkv.out_features // (3 * attn.num_heads)
    return getattr(attn, "head_dim", 1)


def _parts(block: Any, norms: bool = True) -> Parts:
    found = with_mlp(with_attention(_NOTHING, block.attn), block.mlp)
    return found._replace(
        norm1=block.norm1 if norms else None,
        norm2=block.norm2 if norms else None,
        scale1=_scale(block, "1"),
        scale2=_scale(block, "2"),
        drop_path1=drop_or_none(block.drop_path1),
        drop_path2=drop_or_none(block.drop_path2),
    )


def with_attention(parts: Parts, attn: Any) -> Parts:
    """With the layers and options of one of timm's self-attentions."""
    inner = attn._modules
    parts = parts._replace(
        attn=attn,
        qkv=(inner.get("qkv"),),
        heads=attn.num_heads,
        out=inner["proj"],
        q_norm=layer_or_none(inner.get("q_norm")),
        k_norm=layer_or_none(inner.get("k_norm")),
        scale=None if attn.fused_attn else attn.scale,  # then PyTorch's own
        dropout=drop_rate(inner["attn_drop"]),
        rotate_half=getattr(attn, "rotate_half", False),
        out_norm=layer_or_none(inner.get("norm")),
        out_gate=inner.get("gate"),
        drop1=drop_or_none(inner["proj_drop"]),
    )
    if "sub_norm" in inner:
        return parts._replace(attend=differential)
    if getattr(attn, "q_bias", None) is not None:
        return parts._replace(qkv=(attn,), qkv_weights=_biased_weights)
    if inner.get("qkv") is None:
        qkv = (inner["q_proj"], inner["k_proj"], inner["v_proj"])
        return parts._replace(qkv=qkv, kv_heads=getattr(attn, "num_kv_heads", None))
    return parts


def _biased_weights(attn: Any) -> Weights:
    """EVA's and BEiT's keys have no bias."""
    return attn.qkv.weight, torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))


def with_mlp(parts: Parts, mlp: Any) -> Parts:
    """With the layers of one of timm's MLPs."""
    inner = mlp._modules
    gated = type(mlp) is SwiGLU
    half = None
    if hasattr(mlp, "gate_last"):
        half = 1 if mlp.gate_last else 0
    return parts._replace(
        fc1=inner["fc1_x" if gated else "fc1"],
        gate=inner["fc1_g"] if gated else None,
        gate_half=half,
        activation=activation_name(inner["act"]),
        hidden_drop=drop_or_none(inner["drop1"]),
        hidden_norm=layer_or_none(inner["norm"]),
        fc2=inner["fc2"],
        drop2=drop_or_none(inner["drop2"]),
    )


def _scale(block: Any, number: str) -> Scale | None:
    """LayerScale's factors, by the names that timm's blocks have for them."""
    if hasattr(block, f"ls{number}"):
        return scale_of(getattr(block, f"ls{number}"))
    return scale_of(block, f"gamma_{number}")


def differential(parts: Parts, x: Tensor, attn_mask: Tensor | None) -> Tensor:
    """`parts.attend` with two attentions in the place of one."""
    h = apply_norm(parts.norm1, x)
    return _difference(parts, parts.attn, ops.linear(h, *weights_of(parts.qkv[0])), attn_mask)


def _difference(parts: Parts, attn: Any, qkv: Tensor, attn_mask: Tensor | None) -> Tensor:
    """The difference of two attentions with the same values, of twice a query's width, and a norm
    of every head: [B, N, 3*H*2*d] to [B, N, H*2*d]. Source: arXiv:2410.05258, equations 1 to 3."""
    q, k, v = qkv.chunk(3, dim=2)
    q, k = (t.unflatten(2, (parts.heads, 2, -1)) for t in (q, k))  # (B, N, H, 2, d)
    q, k = apply_norm(parts.q_norm, q), apply_norm(parts.k_norm, k)
    # zeros make queries and keys as wide as the values, and leave their products
    d, dropout_p = q.shape[-1], parts.dropout if attn.training else 0.0
    q, k = (F.pad(t, (0, d)).transpose(1, 2).unbind(3) for t in (q, k))
    v = v.unflatten(2, (parts.heads, -1)).transpose(1, 2)  # (B, H, N, 2*d)
    scale = d**-0.5 if parts.scale is None else parts.scale
    one, other = (ops.attention(q[i], k[i], v, attn_mask, dropout_p, scale) for i in (0, 1))
    out = one - attn._compute_lambda().type_as(one) * other
    out = (apply_norm(attn.sub_norm, out.transpose(1, 2)) * (1 - attn.lambda_init)).flatten(2)
    return out if parts.out_norm is None else apply_norm(parts.out_norm, out)


def relative_bias(attn: Any, shared: Tensor | None) -> Tensor | None:
    """Relative positions, added to attention's scores: [1, H, N, N] or [H, N, N]."""
    if hasattr(attn, "rel_pos"):
        return shared if attn.rel_pos is None else attn.rel_pos.get_bias()
    if attn.relative_position_bias_table is None:
        return shared
    own = attn._get_rel_pos_bias()
    return own if shared is None else own + shared


# --------------------------------------------------------------------------- post-norm


def take_post_norm_apart(block: Any) -> tuple[Parts, Any, Any] | Obstacle:
    """Parts without norms, and the two norms."""
    return _obstacle(block) or (_parts(block, norms=False), block.norm1, block.norm2)


def run_post_norm(
    block: Any, found: Any, x: Tensor, mask: Tensor | None = None, rope: Rope | None = None
) -> Tensor:
    """Attention and norm, MLP and norm, each with a residual around: arXiv:2111.09883, figure 1."""
    parts, norm1, norm2 = found
    linear = functools.partial(ops.linear, attend(parts, x, mask, rope), *weights_of(parts.out))
    x = _add_normed(x, linear, parts.drop1, norm1, parts.drop_path1)
    return _add_normed(x, last_linear(parts, x), parts.drop2, norm2, parts.drop_path2)


def _add_normed(x: Tensor, linear: Any, drop: Any, norm: Any, drop_path: Any) -> Tensor:
    out = linear() if drop is None else drop(linear())
    out = apply_norm(norm, out)
    return x + (out if drop_path is None else drop_path(out))


# --------------------------------------------------------------------------- parallel


def take_parallel_apart(block: Any) -> Parts | Obstacle:
    """Of `Parts`, those of the attention, which is the block's own."""
    inner = block._modules
    return _obstacle(block) or _NOTHING._replace(
        norm1=block.in_norm,
        attn=block.attn_drop,  # whose mode is the block's
        heads=block.num_heads,
        q_norm=layer_or_none(inner.get("q_norm")),
        k_norm=layer_or_none(inner.get("k_norm")),
        scale=None if block.fused_attn else block.scale,
        dropout=drop_rate(block.attn_drop),
        activation=activation_name(block.mlp_act),
        scale1=scale_of(block.ls),
        drop_path1=drop_or_none(block.drop_path),
    )


def run_parallel(block: Any, parts: Parts, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention and MLP beside one another on one norm: arXiv:2302.05442, section 2."""
    h, hidden, bias = apply_norm(parts.norm1, x), block.in_split[0], block.in_proj.bias
    if getattr(block, "qkv_bias", None) is not None:
        bias = torch.cat((block.qkv_bias, block.mlp_bias))  # in older timm, and in this order
    (w_mlp, b_mlp), (w_qkv, b_qkv) = halves(block.in_proj.weight, bias, hidden)
    b_mlp = block.mlp_bias if bias is None else b_mlp
    qkv = ops.linear(h, w_qkv, b_qkv)
    if hasattr(block, "sub_norm"):
        out = _difference(parts, block, qkv, mask)
    else:
        out = attend_projected(parts, (qkv,), mask, None)
    h = ops.linear(h, w_mlp, b_mlp, activation=parts.activation)
    h = block.mlp_drop(h)

    if getattr(block, "out_proj", None) is None:
        attn_out, mlp_out = weights_of(block.attn_out_proj), weights_of(block.mlp_out_proj)
    else:
        weight, width = block.out_proj.weight, out.shape[-1]
        attn_out, mlp_out = (weight[:, :width], None), (weight[:, width:], block.out_proj.bias)
    options: dict[str, Any] = {
        "scale": factor(parts.scale1),
        "row_scale": drop_path_scale(parts.drop_path1, x),
    }
    x = ops.linear(out, *attn_out, residual=x, **options)
    return ops.linear(h, *mlp_out, residual=x, **options)


def take_things_apart(block: Any) -> tuple[list[Parts], list[Parts]] | Obstacle:
    """Of each attention, and of each MLP."""
    found = _obstacle(block)
    if found is not None:
        return found

    def branch(parts: Parts, layers: Any) -> Parts:
        scale, drop_path = scale_of(layers.ls), drop_or_none(layers.drop_path)
        return parts._replace(
            norm1=layers.norm, norm2=layers.norm, scale1=scale, scale2=scale,
            drop_path1=drop_path, drop_path2=drop_path,
        )  # fmt: skip

    attns = [branch(with_attention(_NOTHING, layers.attn), layers) for layers in block.attns]
    return attns, [branch(with_mlp(_NOTHING, layers.mlp), layers) for layers in block.ffns]


def run_things(block: Any, found: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """A sum of attentions, then a sum of MLPs: arXiv:2203.09795, section 3."""
    attns, mlps = found
    total = x
    for parts in attns:
        total = add_attention(parts, attend(parts, x, mask, None), total)
    x = total
    for parts in mlps:
        linear = last_linear(parts, x)
        total = add_branch(total, linear, parts.drop2, parts.scale2, parts.drop_path2)
    return total


# --------------------------------------------------------------------------- pooling


def take_pool_apart(attn: Any) -> Parts | Obstacle:
    """`Parts` of an attention pooling: its MLP after the norm, its norms of queries and keys."""
    found = _obstacle(attn)
    if found is not None:
        return found
    inner = attn._modules
    parts = _NOTHING if attn.mlp is None else with_mlp(_NOTHING, attn.mlp)
    return parts._replace(
        norm2=layer_or_none(attn.norm),
        heads=attn.num_heads,
        q_norm=layer_or_none(inner.get("q_norm")),
        k_norm=layer_or_none(inner.get("k_norm")),
        scale=None if attn.fused_attn else attn.scale,
    )


def pool(attn: Any, parts: Parts, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """timm's `AttentionPoolLatent`: [B, N, D] to [B, D], or [B, latents, D] without a pool type."""
    if attn.pos_embed is not None:
        x = x + attn.pos_embed.unsqueeze(0).to(x.dtype)
    kv = ops.linear(x, *weights_of(attn.kv)).unflatten(2, (2, parts.heads, -1))
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, d)
    q = attn.latent if type(attn.q) is nn.Identity else ops.linear(attn.latent, *weights_of(attn.q))
    q = q.unflatten(2, (parts.heads, -1)).transpose(1, 2).expand(len(x), -1, -1, -1)
    q, k = apply_norm(parts.q_norm, q), apply_norm(parts.k_norm, k)
    x = ops.attention(q, k, v, attn_mask, scale=parts.scale).transpose(1, 2).flatten(2)
    if type(attn.proj) is not nn.Identity:
        x = ops.linear(x, *weights_of(attn.proj))
    x = attn.proj_drop(x)
    if parts.fc2 is not None:
        x = add_mlp(parts, x)
    return x[:, 0] if attn.pool == "token" else x.mean(1) if attn.pool == "avg" else x


# --------------------------------------------------------------------------- fast classes


class _MaskedBlock(blocks.FastBlock):
    take_apart = take_apart

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, D] to [B, N, D]; `attn_mask` as in `ops.attention`."""
        if is_causal is not False:
            return super().forward(x, attn_mask, is_causal)
        parts = self.examine(x)
        return super().forward(x, attn_mask) if parts is None else self.run(parts, x, attn_mask)


class _RotaryBlock(blocks.FastBlock):
    take_apart = take_apart

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """[B, N, D] to [B, N, D]; `rope` as timm gives it, `attn_mask` as in `ops.attention`."""
        if is_causal is not False:
            return super().forward(x, rope, attn_mask, is_causal)
        parts = self.examine(x)
        if parts is None:
            return super().forward(x, rope, attn_mask)
        return self.run(parts, x, attn_mask, _rope(rope))


def _rope(rope: Tensor | None) -> Rope | None:
    """Of timm's sine beside cosine, [N-P, 2*d], perhaps of each head."""
    if rope is None:
        return None
    sin, cos = rope.chunk(2, dim=-1)
    return cos, sin


class _BiasedBlock(blocks.FastBlock):
    take_apart = take_apart

    def bias(self) -> Tensor | None:
        return relative_bias(self.attn, None)

    def _biased(self, x: Tensor, shared: Tensor | None) -> Tensor:
        parts = self.examine(x)
        if parts is None:
            return super().forward(x, shared)
        return self.run(parts, x, relative_bias(self.attn, shared))


class _RelPosBlock(_BiasedBlock):
    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """[B, N, D] to [B, N, D]; `shared_rel_pos` is added to the scores, [1, H, N, N]."""
        return self._biased(x, shared_rel_pos)


class _BeitBlock(_BiasedBlock):
    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """[B, N, D] to [B, N, D]; `shared_rel_pos_bias` is added to the scores, [H, N, N]."""
        return self._biased(x, shared_rel_pos_bias)


_POST_NORM: dict[str, Any] = {
    "take_apart": take_post_norm_apart, "run": run_post_norm,
}  # fmt: skip
_PARALLEL: dict[str, Any] = {
    "take_apart": take_parallel_apart, "run": run_parallel,
}  # fmt: skip
_THINGS: dict[str, Any] = {"take_apart": take_things_apart, "run": run_things}
# timm's class, whose forward it has, and what is not as in `block.FastBlock`
_BLOCKS: list[tuple[type[nn.Module], type[nn.Module], dict[str, Any]]] = [
    (Block, _MaskedBlock, {}),
    (ResPostBlock, _MaskedBlock, _POST_NORM),
    (ParallelScalingBlock, _MaskedBlock, _PARALLEL),
    (ParallelThingsBlock, _MaskedBlock, _THINGS),
    (EvaBlock, _RotaryBlock, {}),
    (EvaBlockPostNorm, _RotaryBlock, _POST_NORM),
    (relpos.RelPosBlock, _RelPosBlock, {}),
    (relpos.ResPostRelPosBlock, _RelPosBlock, _POST_NORM),
    (beit.Block, _BeitBlock, {}),
    *((kind, _MaskedBlock, _PARALLEL) for kind in DIFF_PARALLEL),
]


@fast(AttentionPoolLatent)
class FastAttentionPoolLatent(blocks.FastBlock, AttentionPoolLatent):
    """timm's `AttentionPoolLatent`."""

    take_apart = take_pool_apart

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """[B, N, D] to [B, D]; `attn_mask` as in `ops.attention`."""
        parts = self.examine(x)
        if parts is not None:
            return pool(self, parts, x, attn_mask)
        timm: Any = super()
        return timm.forward(x) if attn_mask is None else timm.forward(x, attn_mask)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    kind: blocks.fast_class(kind, base, globals(), **members) for kind, base, members in _BLOCKS
}
FastBlock, BLOCKS = FAST[Block], frozenset(FAST)
FAST |= {AttentionPoolLatent: FastAttentionPoolLatent}
