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
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from fastvit import _seen
from fastvit.accelerate.attention_interface import NAME, is_capturing, register, wants_maps
from fastvit.accelerate.block import FastBlock, block_part, fast_class, library_class, original_of
from fastvit.accelerate.plan import Part
from fastvit.accelerate.single import find_single
from fastvit.obstacles import Obstacle, head_obstacle, layer_obstacle, wanted_of
from fastvit.parts import Parts, drop_or_none, layer_or_none, scale_of

# after attention_interface, which imports transformers with what it needs
from transformers import activations  # isort: skip
from transformers.modeling_utils import PreTrainedModel  # isort: skip

register()


# --------------------------------------------------------------------------- layers by their parts


def _layers(
    norm1: nn.Module, attn: Any, qkv: tuple[Any, Any, Any], out: nn.Module, norm2: nn.Module,
    fc1: nn.Module, act: Any, fc2: nn.Module,
) -> Parts:  # fmt: skip
    """Without what only some families have."""
    heads = attn.num_heads if hasattr(attn, "num_heads") else attn.num_attention_heads
    return Parts(
        norm1, attn, qkv, heads, out, norm2, fc1, _ACTIVATIONS.get(type(act)), fc2,
        q_norm=layer_or_none(attn._modules.get("q_norm")),
        k_norm=layer_or_none(attn._modules.get("k_norm")), norms_heads=False,
        scale=attn.scaling if hasattr(attn, "scaling") else attn.scale, dropout=_dropout(attn),
        rotate_half=True,
    )  # fmt: skip


def _dropout(attn: Any) -> float:
    for name in ("attention_dropout", "dropout", "dropout_prob"):
        if hasattr(attn, name):
            return getattr(attn, name)
    raise AttributeError(f"{type(attn).__name__} has no dropout rate")


def _vit(layer: Any) -> Parts:
    attn, mlp, dropout = layer.attention, layer.mlp, drop_or_none(layer.dropout)
    return _layers(
        layer.layernorm_before, attn, (attn.q_proj, attn.k_proj, attn.v_proj), attn.o_proj,
        layer.layernorm_after, mlp.fc1, mlp.activation_fn, mlp.fc2,
    )._replace(drop1=dropout, drop2=dropout)  # fmt: skip


def _beit(layer: Any) -> Parts:
    drop_path = drop_or_none(layer.drop_path)
    return _vit(layer)._replace(
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


_NO_MASK = (_nested, _internvl)  # families whose layers take none
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
_WITHOUT_MAPS = _SAME_ATTENTION - {"eager", NAME}
_OPTIONS = frozenset(  # those that change nothing in a layer, or that `FastLayer` deals with
    {"attention_mask", "position_embeddings", "resolution", "interpolate_pos_encoding",
     "dataset_index", "output_attentions", "output_hidden_states", "return_dict", "use_cache",
     "num_items_in_batch"}
)  # fmt: skip


def take_apart(layer: Any) -> Parts | Obstacle:
    """Of a class in `FAMILIES`."""
    kind = library_class(layer)
    found = layer_obstacle(layer, functools.partial(_wanted, kind.__module__), is_capturing)
    if found is not None:
        return found
    parts = FAMILIES[_family(kind)][1](layer)
    if parts.activation is None:
        return Obstacle("its activation has no fused form", lasting=True)
    found = head_obstacle(parts.qkv[0].out_features // parts.heads)
    if found is not None:
        return found
    implementation = parts.attn.config._attn_implementation
    if implementation not in _SAME_ATTENTION:
        return Obstacle(f"its attention is set to {implementation!r}", lasting=False)
    return parts


def _implementation(layer: Any) -> list[_seen.Watched]:
    """Where transformers notes which attention a layer runs."""
    configs = {id(c): c for m in layer.modules() if (c := m.__dict__.get("config")) is not None}
    return [(config.__dict__, ("_attn_implementation_internal",)) for config in configs.values()]


def _wanted(module: str, parent: nn.Module, name: str, kind: type[nn.Module]) -> str | None:
    exact, own = _KINDS.get(name, _NOTHING)
    family = kind.__module__ == module and not kind.__name__.endswith("MoeMLP")
    if family and kind.__name__.endswith(own):
        return None
    return wanted_of(exact, kind) and " or ".join(
        [*(f"the family's {end}" for end in own), *sorted(k.__name__ for k in exact)]
        or ["nothing of that name"]
    )


class FastLayer(FastBlock):
    """The forward of every fast layer."""

    take_apart = take_apart
    watched = staticmethod(_implementation)
    options: ClassVar[tuple[str, ...]]  # its forward's arguments after the tokens

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        given = dict(zip(self.options, args, strict=False)) | kwargs
        if wants_maps():
            with _with_maps(self):
                return self.fastvit_original.forward(self, hidden_states, *args, **kwargs)
        parts = self.examine(hidden_states)
        if parts is None or not _understands(self, parts, given):
            return self.fastvit_original.forward(self, hidden_states, *args, **kwargs)
        mask = self._mask(hidden_states, given)
        return self.run(parts, hidden_states, mask, given.get("position_embeddings"))

    def spells_attention_out(self) -> bool:
        configs = (getattr(module, "config", None) for module in self.modules())
        return any(getattr(c, "_attn_implementation", None) == "eager" for c in configs)

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


@contextlib.contextmanager
def _with_maps(layer: nn.Module) -> Iterator[None]:
    """Within, the attention of `layer` gives its maps, which eager does by itself and sdpa does
    not."""
    attention: Any = next(filter(_is_captured, list(layer.modules())[1:]), None)
    config = getattr(attention, "config", None)
    if config is None or config._attn_implementation not in _WITHOUT_MAPS:
        yield
        return
    attention.config = copy.copy(config)
    attention.config._attn_implementation = NAME
    try:
        yield
    finally:
        attention.config = config


def _is_captured(module: nn.Module) -> bool:
    return any(map(is_capturing, module._forward_hooks.values()))


def _understands(layer: Any, parts: Parts, given: dict[str, Any]) -> bool:
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
    takes_mask = FAMILIES[_family(layer.fastvit_original)][1] not in _NO_MASK
    return takes_mask and additive and (mask.is_floating_point() or not adds)


# --------------------------------------------------------------------------- classes and the plan

FAST: dict[type[nn.Module], type[nn.Module]] = {}  # filled as families are met


def _family(kind: type) -> str:
    """``vit`` for a class of transformers.models.vit.modeling_vit, ``""`` outside transformers."""
    path = kind.__module__.split(".")
    if path[:2] != ["transformers", "models"] or len(path) != 4:
        return ""
    return path[2] if path[3] == f"modeling_{path[2]}" else f"{path[2]}.{path[3]}"


def _fast_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The fast subclass of a layer's class, made once."""
    if kind not in FAST:
        options = tuple(inspect.signature(kind.forward).parameters)[2:]
        FAST[kind] = fast_class(kind, FastLayer, globals(), options=options)
    return FAST[kind]


def __getattr__(name: str) -> Any:
    for family, (layer, _) in FAMILIES.items():
        path = f"transformers.models.{family}.modeling_{family}"
        if name == f"Fast_{path.replace('.', '__')}__{layer}":
            return _fast_class(getattr(importlib.import_module(path), layer))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find(model: nn.Module) -> list[Part]:
    """The layers, patch projections and last norms of transformers' ViTs inside `model`, in its
    order; text towers are left alone and have no row."""
    parts: list[Part] = []
    owners: dict[str, Any] = {"": None}
    for name, module in model.named_modules():
        kind = original_of(type(module))
        owners[name] = owner = module if _family(kind) else owners.get(name.rpartition(".")[0])
        family = _family(kind)
        if family in FAMILIES and kind.__name__ == FAMILIES[family][0]:
            if not _reads_text(module):
                fast = _fast_class(kind)  # which also gives its attention map
                part = block_part(name, module, fast, None, "transformers", always=True)
                parts.append(part)
        elif family in LEFT and kind.__name__ == LEFT[family][0]:
            obstacle = Obstacle(LEFT[family][1], lasting=True)
            parts.append(block_part(name, module, obstacle, None, "transformers"))
        elif owner is not None and owner is not module and _is_ours(owner, module):
            single = find_single(name, module, "transformers")
            if single is not None:
                parts.append(single)
    return parts


def _reads_text(module: nn.Module) -> bool:
    """Whether a model or a layer is of a text tower, by the first config in it."""
    config = next((m.config for m in module.modules() if hasattr(m, "config")), None)
    return type(config).__name__.endswith("TextConfig")


def _is_ours(owner: Any, module: nn.Module) -> bool:
    """Whether a norm or a convolution, direct child of a family's `owner`, is a ViT's."""
    kind = original_of(type(owner))
    if _family(kind) not in FAMILIES or _reads_text(owner):
        return False
    norm = isinstance(module, nn.LayerNorm) and isinstance(owner, PreTrainedModel)
    return norm or kind.__name__.endswith("Embeddings")
