# pyright: reportPrivateImportUsage=false
"""What timm's blocks are made of: the classes in which our ops may stand in for calling a layer.

Only exact classes count, since a subclass may compute something else. Classes that the installed
timm does not have are left out.
"""

from __future__ import annotations

import inspect
from typing import Any

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
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
)
from torch import nn

from fastvit.accelerate.block import library_class
from fastvit.obstacles import Obstacle, module_obstacle, wanted_of

Kinds = frozenset[type[nn.Module]]
Expected = dict[str, Kinds]  # classes each submodule may have in the fused form, by its name


def _recent(module: Any, *names: str) -> Kinds:
    """The classes of these names in `module`, as far as this version of timm has them."""
    return frozenset(getattr(module, name) for name in names if hasattr(module, name))


DIFF_ATTENTION = _recent(timm_layers, "DiffAttention")
DIFF_PARALLEL = _recent(vision_transformer, "DiffParallelScalingBlock")
BLOCKS = DIFF_PARALLEL | {
    Block, ResPostBlock, ParallelScalingBlock, ParallelThingsBlock, EvaBlock, EvaBlockPostNorm,
    beit.Block, RelPosBlock, ResPostRelPosBlock,
}  # fmt: skip
RMS_NORM: Kinds = frozenset({nn.RMSNorm, RmsNorm})
NORM = RMS_NORM | {nn.LayerNorm, LayerNorm}
IDENTITY: Kinds = frozenset({nn.Identity})
CONV: Kinds = frozenset({nn.Conv2d})
LINEAR: Kinds = frozenset({nn.Linear})

_MAY_NORM = NORM | IDENTITY
_DROPOUT: Kinds = frozenset({nn.Dropout})
_MAY_DROP = _DROPOUT | IDENTITY
_DROP_PATH: Kinds = frozenset({DropPath, nn.Identity})
_LAYER_SCALE = IDENTITY.union(  # in older timm three classes
    *(_recent(module, "LayerScale") for module in (timm_layers, vision_transformer, relpos))
)
_ACTIVATION: Kinds = frozenset(
    {nn.GELU, nn.ReLU, nn.SiLU, timm_layers.GELU, timm_layers.GELUTanh, timm_layers.QuickGELU}
)
_ANY_MLP: Kinds = frozenset({Mlp, GluMlp, SwiGLU})
_LIST: Kinds = frozenset({nn.ModuleList})

_QKV: Expected = {
    "qkv": LINEAR, "attn_drop": _DROPOUT, "proj": LINEAR, "proj_drop": _MAY_DROP,
}  # fmt: skip
_QK_NORM: Expected = {"q_norm": _MAY_NORM, "k_norm": _MAY_NORM}
_GATE: Expected = {"gate": LINEAR} if "gated" in inspect.signature(Attention).parameters else {}
_ATTENTION: Expected = _QKV | _QK_NORM | _GATE | {"norm": _MAY_NORM}
_SPLIT_ATTENTION: Expected = _ATTENTION | {"q_proj": LINEAR, "k_proj": LINEAR, "v_proj": LINEAR}
_FC2: Expected = {
    "act": _ACTIVATION, "drop1": _MAY_DROP, "norm": _MAY_NORM, "fc2": LINEAR, "drop2": _MAY_DROP,
}  # fmt: skip
_BLOCK: Expected = {
    "norm1": NORM, "drop_path1": _DROP_PATH, "norm2": NORM, "mlp": _ANY_MLP,
    "drop_path2": _DROP_PATH,
}  # fmt: skip
_LS: Expected = {"ls1": _LAYER_SCALE, "ls2": _LAYER_SCALE}
_EVA: Expected = _BLOCK | {"attn": frozenset({EvaAttention, AttentionRope})}
_REL_POS: Expected = _BLOCK | {"attn": frozenset({RelPosAttention})}
_PARALLEL: Expected = _QK_NORM | {
    "in_norm": NORM, "in_proj": LINEAR, "attn_drop": _DROPOUT, "mlp_drop": _DROPOUT,
    "mlp_act": _ACTIVATION, "out_proj": LINEAR, "attn_out_proj": LINEAR, "mlp_out_proj": LINEAR,
    "ls": _LAYER_SCALE, "drop_path": _DROP_PATH,
}  # fmt: skip
PARTS: dict[type[nn.Module], Expected] = {
    Attention: _ATTENTION,
    EvaAttention: _SPLIT_ATTENTION,
    AttentionRope: _SPLIT_ATTENTION,
    beit.Attention: _QKV,
    RelPosAttention: _QKV | _QK_NORM,
    AttentionPoolLatent: _QK_NORM | {
        "q": LINEAR | IDENTITY, "kv": LINEAR, "proj": LINEAR | IDENTITY, "proj_drop": _DROPOUT,
        "norm": _MAY_NORM, "mlp": frozenset({Mlp}),
    },
    Mlp: _FC2 | {"fc1": LINEAR},
    GluMlp: _FC2 | {"fc1": LINEAR},
    SwiGLU: _FC2 | {"fc1_g": LINEAR, "fc1_x": LINEAR},
    Block: _BLOCK | _LS | {"attn": DIFF_ATTENTION | {Attention}},
    ResPostBlock: _BLOCK | {"attn": DIFF_ATTENTION | {Attention}},
    EvaBlock: _EVA,
    EvaBlockPostNorm: _EVA,
    beit.Block: _BLOCK | {"attn": frozenset({beit.Attention})},
    RelPosBlock: _REL_POS | _LS,
    ResPostRelPosBlock: _REL_POS,
    ParallelScalingBlock: _PARALLEL,
    ParallelThingsBlock: {"attns": _LIST, "ffns": _LIST},
    nn.ModuleList: {"*": frozenset({nn.Sequential})},  # of attns and ffns
    nn.Sequential: {
        "norm": NORM, "attn": DIFF_ATTENTION | {Attention}, "mlp": _ANY_MLP, "ls": _LAYER_SCALE,
        "drop_path": _DROP_PATH,
    },
}  # fmt: skip
for _kind in DIFF_ATTENTION:
    PARTS[_kind] = _QKV | _QK_NORM | {"norm": _MAY_NORM, "sub_norm": NORM}
for _kind in DIFF_PARALLEL:
    PARTS[_kind] = _PARALLEL | {"sub_norm": NORM}


def wanted(parent: nn.Module, name: str, kind: type[nn.Module]) -> str | None:
    """As `obstacles.layer_obstacle` asks."""
    parts = PARTS.get(library_class(parent), {})
    return wanted_of(parts.get(name, parts.get("*", frozenset())), kind)


def single_obstacle(module: nn.Module, expected: Kinds) -> Obstacle | None:
    """Why an op may not stand in for calling `module`, which should be of one class `expected`."""
    return module_obstacle(module, wanted_of(expected, type(module)))
