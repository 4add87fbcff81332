"""transformers' Vision Transformers: their layers on our kernels, and the attention by itself.

Each fast class is a subclass of the layer whose place it takes, so that transformers' hooks for
``hidden_states`` and ``attentions`` find it. It looks at its submodules at every forward, and
leaves the call to the library's forward where they carry hooks of the user or have been replaced.
When ``output_attentions=True`` asks for maps, the layer computes them in plain PyTorch, whatever
the attention implementation is; transformers itself gives none with ``sdpa``.

Importing this module (or `fastvit.register_transformers`, or the first `accelerate` of a model of
transformers) makes ``attn_implementation="fastvit"`` known.

Shape legend: B batch, N tokens, D width, H heads, d head dimension.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastvit import ops
from fastvit.accelerate import common
from fastvit.accelerate.attention_interface import NAME, is_capturing, register, wants_maps
from fastvit.accelerate.common import Obstacle, join_heads, split_heads
from fastvit.accelerate.plan import Part

# after attention_interface, which imports transformers with what it needs
from transformers import activations  # isort: skip
from transformers.modeling_utils import PreTrainedModel  # isort: skip

register()


# --------------------------------------------------------------------------- layers by their parts


class Parts(NamedTuple):
    """A pre-norm layer of any family."""

    norm1: Any
    attn: Any  # has the three linears, and transformers' hook for its maps
    qkv: tuple[Any, Any, Any]
    out: Any  # the output projection
    norm2: Any
    fc1: Any
    act: nn.Module
    fc2: Any
    gate: Any = None  # of a gated MLP
    out_in_attn: bool = True  # the attention's own result is after the output projection
    drop1: nn.Module | None = None  # after the output projection
    scale1: Tensor | None = None
    drop2: nn.Module | None = None  # after the MLP
    scale2: Tensor | None = None
    drop_path: nn.Module | None = None
    takes_mask: bool = True


def _vit(layer: Any) -> Parts:
    attn, mlp = layer.attention, layer.mlp
    return Parts(
        layer.layernorm_before, attn, (attn.q_proj, attn.k_proj, attn.v_proj), attn.o_proj,
        layer.layernorm_after, mlp.fc1, mlp.activation_fn, mlp.fc2,
        drop1=layer.dropout, drop2=layer.dropout,
    )  # fmt: skip


def _beit(layer: Any) -> Parts:
    parameters = layer._parameters  # without LayerScale both factors are the number 1
    return _vit(layer)._replace(
        scale1=parameters.get("lambda_1"),
        scale2=parameters.get("lambda_2"),
        drop_path=layer.drop_path,
    )


def _dinov2(layer: Any) -> Parts:
    attn = layer.attention
    return Parts(
        layer.norm1, attn, (attn.q_proj, attn.k_proj, attn.v_proj), attn.o_proj,
        layer.norm2, *_mlp(layer.mlp),
        scale1=layer.layer_scale1.lambda1, scale2=layer.layer_scale2.lambda1,
        drop_path=layer.drop_path,
    )  # fmt: skip


def _mlp(mlp: Any) -> tuple[Any, nn.Module, Any, Any]:
    if "fc1" in mlp._modules:
        return mlp.fc1, mlp.activation_fn, mlp.fc2, None
    return mlp.up_proj, mlp.act_fn, mlp.down_proj, mlp._modules.get("gate_proj")


def _clip(layer: Any) -> Parts:
    attn, mlp = layer.self_attn, layer.mlp
    return Parts(
        layer.layer_norm1, attn, (attn.q_proj, attn.k_proj, attn.v_proj), attn.out_proj,
        layer.layer_norm2, mlp.fc1, mlp.activation_fn, mlp.fc2,
    )  # fmt: skip


def _nested(layer: Any) -> Parts:
    attn, output = layer.attention.attention, layer.attention.output
    modules = layer._modules
    if "mlp" in modules:
        mlp: Any = (layer.mlp.fc1, layer.mlp.activation, layer.mlp.fc2)
    else:
        mlp = (layer.intermediate.dense, layer.intermediate.intermediate_act_fn, layer.output.dense)
    return Parts(
        layer.layernorm_before, attn, (attn.query, attn.key, attn.value), output.dense,
        layer.layernorm_after, *mlp,
        out_in_attn=False, drop1=output.dropout, takes_mask=False,
        drop2=None if "mlp" in modules else layer.output.dropout,
    )  # fmt: skip


def _aimv2(layer: Any) -> Parts:
    attn, mlp = layer.attention, layer.ffn
    return Parts(
        layer.rms_norm1, attn, (attn.q_proj, attn.k_proj, attn.v_proj), attn.out_proj,
        layer.rms_norm2, mlp.up_proj, mlp.act_fn, mlp.down_proj, mlp.gate_proj,
    )  # fmt: skip


def _internvl(layer: Any) -> Parts:
    attn, mlp = layer.attention, layer.mlp
    return Parts(
        layer.layernorm_before, attn, (attn.q_proj, attn.k_proj, attn.v_proj),
        attn.projection_layer,
        layer.layernorm_after, mlp.fc1, mlp.activation_fn, mlp.fc2,
        drop1=attn.projection_dropout, scale1=layer.lambda_1,
        drop2=layer.dropout, scale2=layer.lambda_2, takes_mask=False,
    )  # fmt: skip


# the modeling file of a family -> its layer, and how that is taken apart
FAMILIES: dict[str, tuple[str, Callable[[Any], Parts]]] = {
    "vit": ("ViTLayer", _vit),
    "deit": ("DeiTLayer", _vit),
    "vit_mae": ("ViTMAELayer", _vit),
    "vit_msn": ("ViTMSNLayer", _vit),
    "ijepa": ("IJepaLayer", _vit),
    "vivit": ("VivitLayer", _vit),
    "beit": ("BeitLayer", _beit),
    "dinov2": ("Dinov2Layer", _dinov2),
    "dinov2_with_registers": ("Dinov2WithRegistersLayer", _dinov2),
    "dinov3_vit": ("DINOv3ViTLayer", _dinov2),
    "clip": ("CLIPEncoderLayer", _clip),
    "siglip": ("SiglipEncoderLayer", _clip),
    "siglip2": ("Siglip2EncoderLayer", _clip),
    "metaclip_2": ("MetaClip2EncoderLayer", _clip),
    "videomae": ("VideoMAELayer", _nested),
    "yolos": ("YolosLayer", _nested),
    "dpt": ("DPTViTLayer", _nested),
    "vitpose_backbone": ("VitPoseBackboneLayer", _nested),
    "aimv2": ("Aimv2EncoderLayer", _aimv2),
    "internvl": ("InternVLVisionLayer", _internvl),
}
LEFT: dict[str, tuple[str, str]] = {
    "sam": ("SamVisionLayer", "its windowed attention adds decomposed relative positions"),
    "hiera": ("HieraLayer", "its attention pools queries within mask units"),
    "vitdet": ("VitDetLayer", "its windowed attention works on maps, with relative positions"),
    "data2vec.modeling_data2vec_vision": (
        "Data2VecVisionLayer",
        "its attention does not go through transformers' attention functions",
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
_IDENTITY = frozenset({nn.Identity})
_DROPOUT = (_IDENTITY | {nn.Dropout}, ())
_NORM = (_IDENTITY | {nn.LayerNorm}, ("RMSNorm",))
_LINEAR = (frozenset({nn.Linear}), ())
_ACT = (frozenset(_ACTIVATIONS), ())
_ATTENTION = (frozenset(), ("Attention",))
_MLP = (frozenset(), ("MLP", "SwiGLUFFN"))
_NOTHING = (frozenset(), ())
# what each submodule of a layer may be, by its name: exact classes, and how the name of one of the
# family's own ends
_KINDS: dict[str, tuple[frozenset[type], tuple[str, ...]]] = {
    "layernorm_before": _NORM, "layernorm_after": _NORM, "norm1": _NORM, "norm2": _NORM,
    "layer_norm1": _NORM, "layer_norm2": _NORM, "rms_norm1": _NORM, "rms_norm2": _NORM,
    "q_norm": _NORM, "k_norm": _NORM,
    "attention": _ATTENTION, "self_attn": _ATTENTION,
    "q_proj": _LINEAR, "k_proj": _LINEAR, "v_proj": _LINEAR, "o_proj": _LINEAR, "query": _LINEAR,
    "key": _LINEAR, "value": _LINEAR, "out_proj": _LINEAR, "projection_layer": _LINEAR,
    "mlp": _MLP, "ffn": _MLP, "fc1": _LINEAR, "fc2": _LINEAR, "up_proj": _LINEAR,
    "gate_proj": _LINEAR, "down_proj": _LINEAR, "dense": _LINEAR,
    "intermediate": (frozenset(), ("Intermediate",)), "output": (frozenset(), ("Output",)),
    "activation_fn": _ACT, "act_fn": _ACT, "activation": _ACT, "intermediate_act_fn": _ACT,
    "dropout": _DROPOUT, "projection_dropout": _DROPOUT,
    "drop_path": (_IDENTITY, ("DropPath",)),
    "layer_scale1": (frozenset(), ("LayerScale",)), "layer_scale2": (frozenset(), ("LayerScale",)),
    "relative_position_bias": (frozenset(), ("RelativePositionBias",)),
}  # fmt: skip
# implementations that compute what ours does; another is the user's own
_SAME_ATTENTION = frozenset(
    {None, "eager", "sdpa", NAME, "flash_attention_2", "flash_attention_3", "flash_attention_4"}
)
_OPTIONS = frozenset(  # those that change nothing in a layer, or that `FastLayer` deals with
    {"attention_mask", "position_embeddings", "resolution", "interpolate_pos_encoding",
     "dataset_index", "output_attentions", "output_hidden_states", "return_dict", "use_cache",
     "num_items_in_batch"}
)  # fmt: skip


class FastLayer(nn.Module):
    """The forward of every fast layer; each family's class has the library's class beside it."""

    original: ClassVar[Any]  # the library's class
    options: ClassVar[tuple[str, ...]]  # its forward's arguments after the tokens
    library: ClassVar[Any]  # its module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        given = dict(zip(self.options, args, strict=False)) | kwargs
        parts = examine(self) if isinstance(hidden_states, Tensor) else None
        if isinstance(parts, Parts) and _understands(parts, given):
            mask = self._mask(hidden_states, given)
            return self._fused(parts, hidden_states, mask, given.get("position_embeddings"))
        with _maps_if_wanted(self):
            return self.original.forward(self, hidden_states, *args, **kwargs)

    def _mask(self, hidden_states: Tensor, given: dict[str, Any]) -> Tensor | None:
        mask = given.get("attention_mask")
        bias = getattr(self, "relative_position_bias", None)
        if bias is None:
            return mask
        (height, width), patch = given["resolution"], self.patch_size
        added = bias(
            (height // patch, width // patch),
            given.get("interpolate_pos_encoding", False),
            dim_size=hidden_states.shape[1],
        )
        return added if mask is None else added + mask

    def _fused(self, parts: Parts, x: Tensor, mask: Tensor | None, rope: Any) -> Tensor:
        attn = parts.attn
        heads = _heads(attn)
        h = _norm(parts.norm1, x)
        q, k, v = (ops.linear(h, linear.weight, linear.bias) for linear in parts.qkv)
        if "q_norm" in attn._modules:
            q, k = _norm(attn.q_norm, q), _norm(attn.k_norm, k)
        q, k, v = (split_heads(t, heads) for t in (q, k, v))
        if rope is not None:
            q, k = self.library.apply_rotary_pos_emb(q, k, *rope)
        scale, dropout_p = _scale(attn), _dropout(attn) if attn.training else 0.0
        if wants_maps():
            x = x + self._with_maps(parts, q, k, v, mask, scale, dropout_p)
        else:
            out = join_heads(ops.attention(q, k, v, mask, dropout_p, scale))
            x = common.add_branch(
                x, out, parts.out,
                dropout=parts.drop1, scale=parts.scale1, drop_path=parts.drop_path,
            )  # fmt: skip
        return common.add_mlp(
            x, _norm(parts.norm2, x), parts.fc1, _ACTIVATIONS[type(parts.act)], parts.fc2,
            gate=parts.gate, dropout=parts.drop2, scale=parts.scale2, drop_path=parts.drop_path,
        )  # fmt: skip

    def _with_maps(
        self,
        parts: Parts,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        dropout_p: float,
    ) -> Tensor:
        """The attention's branch, its maps handed to transformers' hooks as its own call would."""
        out, weights = common.attention_maps(q, k, v, mask, scale, dropout_p)
        out = join_heads(out)
        result = ops.linear(out, parts.out.weight, parts.out.bias)
        for hook in parts.attn._forward_hooks.values():  # all are transformers'
            hook(parts.attn, (), (result if parts.out_in_attn else out, weights))
        result = result if parts.drop1 is None else parts.drop1(result)
        result = result if parts.scale1 is None else result * parts.scale1
        return result if parts.drop_path is None else parts.drop_path(result)


@contextlib.contextmanager
def _maps_if_wanted(layer: nn.Module) -> Iterator[None]:
    """Within, the attention of `layer` gives maps if they were asked for."""
    attention: Any = (
        next(filter(_is_captured, list(layer.modules())[1:]), None) if wants_maps() else None
    )
    if attention is None or not hasattr(attention, "config"):
        yield
        return
    config = attention.config
    attention.config = copy.copy(config)
    attention.config._attn_implementation = NAME
    try:
        yield
    finally:
        attention.config = config


def _is_captured(module: nn.Module) -> bool:
    return any(map(is_capturing, module._forward_hooks.values()))


def _understands(parts: Parts, given: dict[str, Any]) -> bool:
    """Whether every option of a call means to `FastLayer` what it means to the library."""
    if any(
        name not in _OPTIONS and not (value is None or value is False)
        for name, value in given.items()
    ):
        return False
    mask = given.get("attention_mask")
    if mask is None:
        return True
    # transformers' eager attention adds a bool mask as 0 and 1
    adds = parts.attn.config._attn_implementation == "eager"
    additive = isinstance(mask, Tensor) and mask.dim() == 4
    return parts.takes_mask and additive and (mask.is_floating_point() or not adds)


def _heads(attn: Any) -> int:
    return attn.num_heads if hasattr(attn, "num_heads") else attn.num_attention_heads


def _scale(attn: Any) -> float:
    return attn.scaling if hasattr(attn, "scaling") else attn.scale


def _dropout(attn: Any) -> float:
    for name in ("attention_dropout", "dropout", "dropout_prob"):
        if hasattr(attn, name):
            return getattr(attn, name)
    raise AttributeError(f"{type(attn).__name__} has no dropout rate")


def _norm(norm: Any, x: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
    if isinstance(norm, nn.Identity):
        return x
    return ops.rms_norm(x, norm.weight, norm.variance_epsilon)


def examine(layer: Any) -> Parts | Obstacle:
    """The parts of a layer, of a class in `FAMILIES`, or why it runs transformers' forward now."""
    if _has_any_global_hook():
        return common.GLOBAL_HOOK
    kind = ORIGINAL.get(type(layer), type(layer))
    found = common.layer_obstacle(layer, _known_in(kind.__module__), is_capturing)
    if found is not None:
        return found
    parts = FAMILIES[_family(kind)][1](layer)
    if type(parts.act) not in _ACTIVATIONS:  # a function, which is no module
        return Obstacle(f"its activation is {parts.act}", lasting=True)
    found = common.head_obstacle(parts.qkv[0].out_features // _heads(parts.attn))
    if found is not None:
        return found
    implementation = parts.attn.config._attn_implementation
    if implementation not in _SAME_ATTENTION:
        return Obstacle(f"its attention is set to {implementation!r}", lasting=False)
    return parts


def _known_in(module: str) -> Callable[[str, type], bool]:
    def knows(name: str, kind: type) -> bool:
        exact, own = _KINDS.get(name, _NOTHING)
        family = kind.__module__ == module and not kind.__name__.endswith("MoeMLP")
        return kind in exact or (family and kind.__name__.endswith(own))

    return knows


# --------------------------------------------------------------------------- classes and the plan

FAST: dict[type[nn.Module], type[nn.Module]] = {}  # filled as families are met
ORIGINAL: dict[type[nn.Module], type[nn.Module]] = dict(common.ORIGINAL)


def _family(kind: type) -> str:
    """``vit`` for a class of transformers.models.vit.modeling_vit, ``""`` outside transformers."""
    path = kind.__module__.split(".")
    if path[:2] != ["transformers", "models"] or len(path) != 4:
        return ""
    return path[2] if path[3] == f"modeling_{path[2]}" else f"{path[2]}.{path[3]}"


def _fast_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The fast subclass of a layer's class, made once; under its name in this module, where
    unpickling finds it."""
    if kind not in FAST:
        name = f"Fast{kind.__name__}"
        members = {
            "__module__": __name__,
            "__doc__": f"transformers' `{kind.__name__}` on our kernels.",
            "original": kind,
            "options": tuple(inspect.signature(kind.forward).parameters)[2:],
            "library": sys.modules[kind.__module__],
        }
        FAST[kind] = type(name, (FastLayer, kind), members)
        ORIGINAL[FAST[kind]] = kind
        globals()[name] = FAST[kind]
    return FAST[kind]


def __getattr__(name: str) -> Any:
    for family, (layer, _) in FAMILIES.items():
        if name == f"Fast{layer}":
            module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
            return _fast_class(getattr(module, layer))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find(model: nn.Module) -> list[Part]:
    """The layers, patch projections and last norms of transformers' ViTs inside `model`, in its
    order; text towers are left alone and have no row."""
    parts: list[Part] = []
    owners: dict[str, Any] = {"": None}
    for name, module in model.named_modules():
        kind = ORIGINAL.get(type(module), type(module))
        owners[name] = owner = module if _family(kind) else owners.get(name.rpartition(".")[0])
        family = _family(kind)
        if family in FAMILIES and kind.__name__ == FAMILIES[family][0]:
            if not _reads_text(module):
                parts.append(_layer_part(name, module, kind))
        elif family in LEFT and kind.__name__ == LEFT[family][0]:
            obstacle = Obstacle(LEFT[family][1], lasting=True)
            row = common.make_row(name, kind, "", "transformers", obstacle, block=True)
            parts.append(Part(module, None, row))
        elif owner is not None and owner is not module and _is_ours(owner, module):
            single = common.find_single(name, module, "transformers")
            if single is not None:
                parts.append(single)
    return parts


def _layer_part(name: str, layer: nn.Module, kind: type[nn.Module]) -> Part:
    found = examine(layer)
    obstacle = None if isinstance(found, Parts) else found
    gated = isinstance(found, Parts) and found.gate is not None
    runs = f"norm, linear, attention, {'linear' if gated else 'mlp'}"
    row = common.make_row(name, kind, runs, "transformers", obstacle, block=True)
    stays = obstacle is not None and obstacle.lasting
    return Part(layer, None if stays else _fast_class(kind), row)


def _reads_text(module: nn.Module) -> bool:
    """Whether a model or a layer is of a text tower, by the first config in it."""
    config = next((m.config for m in module.modules() if hasattr(m, "config")), None)
    return type(config).__name__.endswith("TextConfig")


def _is_ours(owner: Any, module: nn.Module) -> bool:
    """Whether a norm or a convolution, direct child of a family's `owner`, is a ViT's."""
    kind = ORIGINAL.get(type(owner), type(owner))
    if _family(kind) not in FAMILIES or _reads_text(owner):
        return False
    norm = isinstance(module, nn.LayerNorm) and isinstance(owner, PreTrainedModel)
    return norm or kind.__name__.endswith("Embeddings")
