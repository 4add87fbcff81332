"""`accelerate` on all of timm's ViT families: one architecture for every value of every axis in
which timm's 293 differ, in float32 on the CPU, against timm itself."""

import copy
import functools
from typing import Any

import pytest
import timm
import torch
from timm.layers import (  # pyright: ignore
    Attention,  # pyright: ignore
    AttentionPoolLatent,  # pyright: ignore
    DiffAttention,  # pyright: ignore
    GluMlp,  # pyright: ignore
    LayerScale,  # pyright: ignore
    SwiGLU,  # pyright: ignore
)
from timm.models import beit
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from timm.models.vision_transformer_relpos import RelPosBlock
from timm_models import TOLERANCE, classes, error, reseed
from torch import Tensor, nn

from fastvit.accelerate import accelerate, restore
from fastvit.accelerate.find import find_parts
from fastvit.accelerate.plan import Plan, make_plan
from fastvit.check.models import architectures, build_small, heads_of
from fastvit.numerics import randomise

# together they have every value of `axes`
ARCHITECTURES = [
    "aimv2_1b_patch14_224",  # RMSNorm, SwiGLU, no biases
    "beit3_giant_patch14_224",
    "beit_base_patch16_224",  # relative bias in each block, bias of queries and values
    "eva02_base_patch14_224",  # rotary, separate linears, inner norms
    "eva02_enormous_patch14_clip_224",  # post-norm
    "naflexvit_base_patch16_parfac_gap",  # padded patches, factorised positions
    "naflexvit_so400m_patch16_siglip",  # attention pooling, head dimension 72
    "test_vit",
    "test_vit3",
    "test_vit4",
    "vit_5b_patch16_sapiens2",  # grouped queries, q and k norms, head dimension 76
    "vit_7b_patch16_dinov3",  # half rotations
    "vit_base_patch14_reg1_tipsv2",
    "vit_base_patch16_18x2_224",  # ParallelThings
    "vit_base_patch16_gap_224",
    "vit_base_patch16_radio_v3",
    "vit_base_patch16_rope_mixed_224",  # learned frequencies a head
    "vit_base_patch16_rpn_224",  # ResPost
    "vit_base_patch32_clip_quickgelu_224",
    "vit_base_patch8_224",
    "vit_dpwee_patch16_reg1_gap_256",  # parallel-scaling with differential attention
    "vit_dwee_patch16_reg1_gap_256",  # differential attention
    "vit_gigantic_patch14_224",
    "vit_huge_patch14_xp_224",  # parallel-scaling
    "vit_huge_patch16_radio_v4",
    "vit_pe_core_base_patch16_224",  # rotary and attention pooling
    "vit_relpos_base_patch16_224",
    "vit_relpos_base_patch16_rpn_224",
    "vit_small_resnet26d_224",
    "vit_srelpos_small_patch16_224",
]
DROPOUT = {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.4}


def plan_of(model: nn.Module) -> Plan:
    return make_plan(model, find_parts(model))


def axes(model: Any) -> set[tuple[str, Any]]:
    """In what timm's ViTs differ, as pairs of an axis and a value."""
    found: dict[str, Any] = {}
    embeds = getattr(model, "embeds", model)
    found["embedding"] = type(getattr(model, "patch_embed", embeds)).__name__
    found["patch"] = embeds.patch_size if embeds is not model else model.patch_embed.patch_size
    has_cls = getattr(embeds, "cls_token", None) is not None
    found["prefix"] = has_cls, model.num_prefix_tokens - has_cls
    found["position"] = getattr(embeds, "pos_embed_type", model.__dict__.get("pos_embed") is None)
    found["rope"] = type(getattr(model, "rope", None))
    found["pool"] = model.global_pool, getattr(model, "pool_include_prefix", None)
    found["dynamic"] = getattr(model, "dynamic_img_size", None)
    found["no_embed_class"] = getattr(model, "no_embed_class", None)
    for name in ("norm_pre", "norm", "fc_norm"):
        found[name] = type(getattr(model, name, None))
    pairs = set(found.items())
    for block in model.blocks:
        pairs |= block_axes(block)
    return pairs


def block_axes(block: Any) -> set[tuple[str, Any]]:
    attn, mlp = heads_of(block), getattr(block, "mlp", block)
    norms = {(type(m), m.eps) for m in block.modules() if hasattr(m, "eps")}
    scaled = [
        getattr(block, f"gamma_{i}", None) is not None
        or isinstance(getattr(block, f"ls{i}", None), LayerScale)
        for i in (1, 2)
    ]
    rel_pos = getattr(attn, "rel_pos", None) or getattr(attn, "relative_position_bias_table", None)
    return {
        ("block", type(block)),
        ("attention", type(attn)),
        ("head dimension", head_dim(attn)),
        ("qkv bias", qkv_bias(attn)),
        ("grouped", getattr(attn, "num_kv_heads", attn.num_heads) < attn.num_heads),
        ("qk norm", type(getattr(attn, "q_norm", None))),
        ("inner norm", type(getattr(attn, "norm", None))),
        ("half rotation", getattr(attn, "rotate_half", None)),
        ("relative", rel_pos is not None),
        ("norms", frozenset(norms)),
        ("MLP", type(mlp)),
        ("activation", type(getattr(mlp, "act", None) or getattr(block, "mlp_act", None))),
        ("MLP norm", type(getattr(mlp, "norm", None))),
        ("MLP bias", getattr(mlp, "fc2", nn.Linear(1, 1)).bias is not None),
        ("layer scale", (hasattr(block, "gamma_1"), *scaled)),
    }


def head_dim(attn: Any) -> int:
    return getattr(attn, "head_dim", 0) or attn.qkv.out_features // (3 * attn.num_heads)


def qkv_bias(attn: Any) -> tuple[bool, ...]:
    """Of one linear, or of queries, keys and values."""
    if hasattr(attn, "in_proj"):
        return (attn.in_proj.bias is not None,)
    if attn.qkv is None:
        return tuple(getattr(attn, f"{name}_proj").bias is not None for name in "qkv")
    if getattr(attn, "q_bias", None) is not None:
        return True, False, True
    return (attn.qkv.bias is not None,)


@pytest.mark.slow  # a minute to build them all
def test_every_axis_value_is_tested():
    of = {name: axes(timm.create_model(name, device="meta")) for name in architectures()}
    tested = set().union(*(of[name] for name in ARCHITECTURES))
    assert set().union(*of.values()) == tested


# --------------------------------------------------------------------------- same numbers


def run(call: Any, x: Any, model: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of `call`, which is `model` unless given, and gradients, with the same random numbers
    each time."""
    torch.manual_seed(1)
    y = call(x)
    target = torch.randn(y.shape)
    parameters = dict((call if model is None else model).named_parameters())
    grads = torch.autograd.grad(y, list(parameters.values()), target)
    return y.detach(), dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_numbers_gradients_and_randomness(name):
    theirs, x = build_small(name, seed=reseed(), **DROPOUT)  # pyright: ignore
    ours = accelerate(copy.deepcopy(theirs))
    assert not plan_of(ours).left_blocks
    with torch.no_grad():
        expected = theirs(x)
        assert error(ours(x), expected) <= TOLERANCE
    (y, grads), (our_y, our_grads) = run(theirs.train(), x), run(ours.train(), x)
    assert error(our_y, y) <= TOLERANCE
    assert error(y, expected) > 100 * TOLERANCE  # dropout did something
    assert_same_gradients(our_grads, grads)
    assert classes(restore(ours)) == classes(theirs)


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Relative to each one's largest, save for those that are zero but for rounding, such as of a
    key's bias; ten times the outputs' tolerance, since a backward pass adds up more."""
    floor = 1e-2 * max(grad.abs().max().item() for grad in theirs.values())
    for name, grad in theirs.items():
        limit = 10 * TOLERANCE * max(grad.abs().max().item(), floor)
        assert (ours[name] - grad).abs().max().item() <= limit, name


def block_with(attention: Any, dim: int, num_heads: int, **options: Any) -> Any:
    """A `Block` with an attention that its own arguments cannot ask for."""
    own = {name: options.pop(name) for name in ("gated", "dual_lambda") if name in options}
    block = Block(dim, num_heads, **options)
    rates = {name: options[name] for name in ("attn_drop", "proj_drop")}
    block.attn = attention(dim, num_heads, **own, **rates)
    return block


# what timm's blocks can be, beside what its 293 are
OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gated": (functools.partial(block_with, Attention, gated=True), {"qkv_bias": True}),
    "differential": (Block, {"attn_layer": "diff", "qk_norm": True, "scale_attn_norm": True}),
    "two lambdas": (functools.partial(block_with, DiffAttention, dual_lambda=True), {}),
    "torch's RMSNorm": (Block, {"norm_layer": nn.RMSNorm, "qk_norm": True}),
    "gate last": (Block, {"mlp_layer": functools.partial(GluMlp, gate_last=True)}),
    "split gate": (ResPostBlock, {"mlp_layer": SwiGLU, "scale_mlp_norm": True}),
    "one output": (ParallelScalingBlock, {"fuse_out_proj": True, "qk_norm": True}),
    "in_proj bias": (ParallelScalingBlock, {"qkv_bias": True, "init_values": 0.5}),
    "three things": (ParallelThingsBlock, {"num_parallel": 3, "init_values": 0.5}),
    "one key head": (EvaBlock, {"attn_type": "rope", "num_kv_heads": 1, "qkv_fused": False}),
    "eva, gated": (EvaBlock, {"gated_attn": True, "scale_attn_inner": True, "swiglu_mlp": True}),
    "eva, post-norm": (EvaBlockPostNorm, {"attn_type": "rope", "gated_attn": True}),
    "beit": (beit.Block, {"window_size": (2, 2), "qkv_bias": True, "swiglu_mlp": True}),
    "relative": (RelPosBlock, {"qk_norm": True, "init_values": 0.5}),
    "another head dimension": (EvaBlock, {"attn_type": "rope", "attn_head_dim": 24}),
}


@pytest.mark.parametrize(("kind", "options"), OPTIONS.values(), ids=OPTIONS)
def test_bare_blocks(kind, options):
    seed = reseed()
    dropout = {"proj_drop": 0.2, "attn_drop": 0.2, "drop_path": 0.4}
    theirs = kind(**{"dim": 32, "num_heads": 2} | dropout | options)
    randomise(theirs, seed)
    ours = accelerate(copy.deepcopy(theirs), strict=True)
    x = torch.randn(4, 5, 32)
    with torch.no_grad():
        assert error(ours.eval()(x), theirs.eval()(x)) <= TOLERANCE
    (y, grads), (our_y, our_grads) = run(theirs.train(), x), run(ours.train(), x)
    assert error(our_y, y) <= TOLERANCE
    assert_same_gradients(our_grads, grads)


POOLS: dict[str, dict[str, Any]] = {
    "queries normed": {"qk_norm": True, "norm_layer": nn.LayerNorm},
    "latents themselves": {"q_proj": False, "latent_len": 3, "pool_type": "avg"},
    "no pool": {"latent_len": 3, "pool_type": "", "qkv_bias": False},
    "positions": {"pos_embed": "abs", "feat_size": 5, "drop": 0.2},
    "no output": {"out_features": 0},
    "another width": {"out_features": 48, "mlp_ratio": 2.0},
}


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_pooling(options, masked):
    seed = reseed()
    theirs = AttentionPoolLatent(32, **{"num_heads": 2} | options)
    randomise(theirs, seed)
    ours = accelerate(copy.deepcopy(theirs), strict=True)
    x = torch.randn(4, 5, 32)
    mask = torch.randn(4, 1, 1, 5) if masked else None
    (y, grads), (our_y, our_grads) = (
        run(functools.partial(pool.train(), attn_mask=mask), x, pool) for pool in (theirs, ours)
    )
    assert error(our_y, y) <= TOLERANCE
    assert_same_gradients(our_grads, grads)


@pytest.mark.slow  # two minutes
def test_all_architectures():
    """None raises, every error is within the tolerance, at least 286 of 293 have all blocks fused;
    here all have."""
    left: dict[str, Any] = {}
    for name in architectures():
        model, x = build_small(name)
        with torch.no_grad():
            theirs = model(x)
            plan = plan_of(accelerate(model))
            assert error(model(x), theirs) <= TOLERANCE, name
        if plan.left_blocks or not plan.fused_blocks:
            left[name] = plan.rows
    assert len(architectures()) >= 293
    assert not left
