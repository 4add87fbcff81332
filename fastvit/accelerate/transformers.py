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
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastvit import _seen
from fastvit.accelerate.attention_interface import NAME, is_capturing, register, wants_maps
from fastvit.accelerate.block import FastBlock, block_part, fast_class, library_class, original_of
from fastvit.accelerate.plan import Part
from fastvit.accelerate.single import find_single
from fastvit.accelerate.transformers_layers import EXACT, FAMILIES, OWN, calls_sdpa, family_of
from fastvit.obstacles import Obstacle, head_obstacle, layer_obstacle, package_of, wanted_by
from fastvit.parts import Parts

# after attention_interface, which imports transformers with what it needs
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel  # isort: skip

register()


# --------------------------------------------------------------------------- attention

# implementations that compute what ours does; another is the user's own
_SAME_ATTENTION = frozenset(
    {None, "eager", "sdpa", NAME, "flash_attention_2", "flash_attention_3", "flash_attention_4"}
)
_WITHOUT_MAPS = _SAME_ATTENTION - {"eager", NAME}
_OPTIONS = frozenset(  # those that change nothing in a layer, or that `FastLayer` deals with
    {"attention_mask", "relative_position_bias", "position_embeddings", "resolution",
     "interpolate_pos_encoding",
     "dataset_index", "output_attentions", "output_hidden_states", "return_dict", "use_cache",
     "num_items_in_batch"}
)  # fmt: skip


def take_apart(layer: Any) -> Parts | Obstacle:
    """Of a class in `FAMILIES`."""
    kind = library_class(layer)
    found = layer_obstacle(layer, wanted_by(EXACT, OWN, kind.__module__), is_capturing)
    if found is not None:
        return found
    family = FAMILIES[family_of(kind)]
    parts = family.parts(layer)
    if parts.activation is None:
        return Obstacle("its activation has no fused form", lasting=True)
    found = head_obstacle(parts.out.in_features // parts.heads)
    if found is None and family.interface:
        found = _interface_obstacle(kind, parts.attn.config._attn_implementation)
    return found or parts


def _interface_obstacle(kind: type[nn.Module], implementation: str | None) -> Obstacle | None:
    """For an attention of the user's own, also in the place of a known one."""
    if implementation not in _SAME_ATTENTION:
        return Obstacle(f"its attention is set to {implementation!r}", lasting=False)
    if _is_replaced(kind, implementation):
        return Obstacle(f"attention {implementation!r} was replaced", lasting=False)
    return None


def _is_replaced(kind: type[nn.Module], implementation: str | None) -> bool:
    functions, name = _attention_function(kind, implementation)
    return package_of(functions.get(name, register)) not in ("transformers", "fastvit")


setattr(_is_replaced, "_dynamo_marked_constant", True)  # noqa: B010


def _attention_function(
    kind: type[nn.Module], implementation: str | None
) -> tuple[Mapping[str, Any], str]:
    """Where transformers keeps the function that a layer's attention calls, and its name there."""
    if implementation in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS, str(implementation)
    return vars(sys.modules[kind.__module__]), "eager_attention_forward"


def _implementation(layer: Any) -> list[_seen.Watched]:
    """Where transformers notes which attention a layer runs, and keeps its function."""
    kind = library_class(layer)
    configs = {id(c): c for m in layer.modules() if (c := m.__dict__.get("config")) is not None}
    watched: list[_seen.Watched] = []
    for config in configs.values() if FAMILIES[family_of(kind)].interface else ():
        functions, name = _attention_function(kind, config._attn_implementation)
        watched.append((config.__dict__, ("_attn_implementation_internal",)))
        watched += [(functions, (name,))] if name in functions else []
    return watched


class FastLayer(FastBlock):
    """The forward of every fast layer."""

    take_apart = take_apart
    watched = staticmethod(_implementation)
    options: ClassVar[tuple[str, ...]]  # its forward's arguments after the tokens
    beside: ClassVar[tuple[None, ...] | None]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[B, N, D] to [B, N, D], as `Family` says."""
        given = dict(zip(self.options, args, strict=False)) | kwargs
        if wants_maps() or given.get("output_attentions"):
            with _with_maps(self):
                return self.fastvit_original.forward(self, hidden_states, *args, **kwargs)
        parts = self.examine(hidden_states)
        if parts is None or not _understands(self, parts, given):
            return self.fastvit_original.forward(self, hidden_states, *args, **kwargs)
        mask = self._mask(parts.attn, hidden_states, given)
        out = self.run(parts, hidden_states, mask, given.get("position_embeddings"))
        return out if self.beside is None else (out, *self.beside)

    def spells_attention_out(self) -> bool:
        if not FAMILIES[family_of(self.fastvit_original)].interface:
            return not any(map(calls_sdpa, self.modules()))
        configs = (getattr(module, "config", None) for module in self.modules())
        return any(getattr(c, "_attn_implementation", None) == "eager" for c in configs)

    def _mask(self, attn: Any, hidden_states: Tensor, given: dict[str, Any]) -> Tensor | None:
        masks = [given.get("attention_mask"), given.get("relative_position_bias")]
        owner: Any = self if hasattr(self, "relative_position_bias") else attn
        bias = getattr(owner, "relative_position_bias", None)
        if bias is not None:
            patch = self.patch_size if owner is self else attn.config.patch_size
            (height, width) = given["resolution"]
            added = bias(
                (height // patch, width // patch),
                given.get("interpolate_pos_encoding", False),
                dim_size=hidden_states.shape[1],
            )
            masks.append(added)
        masks = [mask for mask in masks if mask is not None]
        return functools.reduce(torch.add, masks) if masks else None


@contextlib.contextmanager
def _with_maps(layer: nn.Module) -> Iterator[None]:
    """Within, the attention of `layer` gives its maps, which eager does by itself and sdpa does
    not."""
    attention: Any = next(filter(_gives_maps, [*layer.modules()][1:]), None)
    config = getattr(attention, "config", None)
    spelt_out = calls_sdpa(attention) and "forward" not in attention.__dict__
    if spelt_out:
        eager: Any = type(attention).__base__
        attention.forward = functools.partial(eager.forward, attention)
    elif config is not None and config._attn_implementation in _WITHOUT_MAPS:
        attention.config = copy.copy(config)
        attention.config._attn_implementation = NAME
    try:
        yield
    finally:
        if spelt_out:
            del attention.forward
        elif config is not None:
            attention.config = config


def _gives_maps(module: nn.Module) -> bool:
    return calls_sdpa(module) or any(map(is_capturing, module._forward_hooks.values()))


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
    if not FAMILIES[family_of(layer.fastvit_original)].takes_mask:
        return False
    # transformers' eager attention adds a bool mask as 0 and 1
    adds = parts.attn.config._attn_implementation == "eager"
    additive = isinstance(mask, Tensor) and mask.dim() == 4
    return additive and (mask.is_floating_point() or not adds)


# --------------------------------------------------------------------------- classes and the plan

FAST: dict[type[nn.Module], type[nn.Module]] = {}  # filled as families are met


def _fast_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The fast subclass of a layer's class, made once."""
    if kind not in FAST:
        options = tuple(inspect.signature(kind.forward).parameters)[2:]
        family = FAMILIES[family_of(kind)]
        members = {} if family.run is None else {"run": family.run}
        FAST[kind] = fast_class(
            kind, FastLayer, globals(), options=options, beside=family.beside, **members
        )
    return FAST[kind]


def __getattr__(name: str) -> Any:
    for name_of_file, family in FAMILIES.items():
        file = name_of_file if "." in name_of_file else f"{name_of_file}.modeling_{name_of_file}"
        path = f"transformers.models.{file}"
        if name == f"Fast_{path.replace('.', '__')}__{family.layer}":
            return _fast_class(getattr(importlib.import_module(path), family.layer))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find(model: nn.Module) -> list[Part]:
    """The layers, patch projections and last norms of transformers' ViTs inside `model`, in its
    order; text towers are left alone and have no row."""
    parts: list[Part] = []
    owners: dict[str, Any] = {"": None}
    for name, module in model.named_modules():
        kind = original_of(type(module))
        owners[name] = owner = module if family_of(kind) else owners.get(name.rpartition(".")[0])
        family = family_of(kind)
        if family in FAMILIES and kind.__name__ == FAMILIES[family].layer:
            if not _reads_text(module):
                fast = _fast_class(kind)  # which also gives its attention map
                part = block_part(name, module, fast, None, "transformers", always=True)
                parts.append(part)
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
    if family_of(kind) not in FAMILIES or _reads_text(owner):
        return False
    norm = isinstance(module, nn.LayerNorm) and isinstance(owner, PreTrainedModel)
    return norm or kind.__name__.endswith("Embeddings")
