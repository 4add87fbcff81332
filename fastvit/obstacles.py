"""Why an op may not stand in for calling a layer: what users hook, replace, patch or quantise."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastvit.kernels.attention.op import MAX_HEAD_DIM

PLAIN = frozenset({nn.Parameter, Tensor, type(None)})  # parameters not quantised, not sharded
# by every block, so may be what they like
CALLED = frozenset({"rel_pos", "relative_position_bias", "residual"})

# parent, name and class of a layer -> what it should be in words, None for what it is
Wanted = Callable[[nn.Module, str, type[nn.Module]], str | None]
_NONE: frozenset[type] = frozenset()
_NAMES = {  # what libraries call the layers of a block, by what they are
    "NORM": (
        "norm1 norm2 ln_1 ln_2 layernorm_before layernorm_after layer_norm1 layer_norm2 rms_norm1 "
        "rms_norm2 in_norm sub_norm"
    ),
    "INNER_NORM": "q_norm k_norm norm",
    "LINEAR": (
        "qkv q_proj k_proj v_proj q kv query key value proj o_proj out_proj projection_layer gate "
        "fc1 fc2 fc1_g fc1_x w12 w3 lin1 lin2 up_proj gate_proj down_proj c_fc c_proj dense "
        "in_proj attn_out_proj mlp_out_proj"
    ),
    "DROPOUT": "attn_drop proj_drop mlp_drop drop drop1 drop2 dropout projection_dropout",
    "ACTIVATION": "act mlp_act gelu activation activation_fn act_fn intermediate_act_fn",
    "DROP_PATH": "drop_path drop_path1 drop_path2",
    "LAYER_SCALE": "ls ls1 ls2 ls_1 ls_2 layer_scale1 layer_scale2",
    "ATTENTION": "attn attention self_attn self_attention",
    "MLP": "mlp ffn",
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}
_TORCH: dict[str, frozenset[type]] = {  # torch's own, in every library
    "NORM": frozenset({nn.LayerNorm}),
    "INNER_NORM": frozenset({nn.LayerNorm, nn.Identity}),
    "LINEAR": frozenset({nn.Linear}),
    "DROPOUT": frozenset({nn.Dropout, nn.Identity}),
    "ACTIVATION": frozenset({nn.GELU, nn.ReLU, nn.SiLU}),
    "DROP_PATH": frozenset({nn.Identity}),
    "LAYER_SCALE": frozenset({nn.Identity}),
}


class Obstacle(NamedTuple):
    """Why a module runs its library's forward."""

    reason: str
    lasting: bool  # False for a hook, which can be taken away again

    def within(self, name: str) -> Obstacle:
        """The same, of a module inside."""
        return Obstacle(f"{name} {self.reason}" if name else self.reason, self.lasting)


def no_hook_is_inert(hook: object) -> bool:
    """For `is_inert` below."""
    return False


def layer_obstacle(
    module: nn.Module,
    wanted: Wanted,
    is_inert: Callable[[Any], bool] = no_hook_is_inert,
    prefix: str = "",
) -> Obstacle | None:
    """Why ops may not stand in for calling the layers below `module`.

    Args:
        module: a block; its own hooks run around it either way and do not count.
        wanted: which layers have arithmetic that the ops have.
        is_inert: forward hooks that may be there.
        prefix: of the names given in reasons.
    """
    for name, child in module._modules.items():
        if child is None or name in CALLED:
            continue
        found = module_obstacle(child, wanted(module, name, type(child)), is_inert)
        if found is not None:
            return found.within(prefix + name)
        found = layer_obstacle(child, wanted, is_inert, f"{prefix}{name}.")
        if found is not None:
            return found
    return None


def module_obstacle(
    module: nn.Module, wanted: str | None, is_inert: Callable[[Any], bool] = no_hook_is_inert
) -> Obstacle | None:
    """Why an op may not stand in for calling `module` itself, which should be `wanted` unless that
    is None."""
    kind = type(module)
    if wanted is not None:
        name = kind.__name__
        if name in wanted.split(" or "):
            name = f"{kind.__module__}.{kind.__qualname__}"
        return Obstacle(f"is {name}; fused is {wanted}", lasting=True)
    state = module.__dict__
    hooks = state["_forward_hooks"]
    if (
        state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or (hooks and not all(map(is_inert, hooks.values())))
    ):
        return Obstacle("has a hook or a forward of its own", lasting=False)
    for key, parameter in state["_parameters"].items():
        # torch.export puts fake tensors in the place of parameters
        if type(parameter) not in PLAIN and not torch.compiler.is_exporting():
            return Obstacle(f"has a {key} of class {type(parameter).__name__}", lasting=True)
    return patched(kind)


def wanted_of(kinds: Iterable[type], kind: type) -> str | None:
    """`kinds` in words, None if `kind` is one of them."""
    return None if kind in kinds else _in_words(_names(kinds))


def _names(kinds: Iterable[type]) -> list[str]:
    return sorted({each.__name__ for each in kinds})


def _in_words(names: list[str]) -> str:
    return " or ".join(names) or "nothing of that name"


def wanted_by(
    exact: dict[str, frozenset[type]], own: dict[str, tuple[str, ...]] | None = None, home: str = ""
) -> Wanted:
    """What the layers of a library's blocks may be, for `layer_obstacle`.

    Args:
        exact: classes by what a layer is (`_NAMES`), beside torch's own, or by its name.
        own: by what a layer is, how the names of classes end that the library defines.
        home: how the names of the modules begin where it does.
    """

    def wanted(parent: nn.Module, name: str, kind: type[nn.Module]) -> str | None:
        role = _ROLES.get(name, name)
        kinds = exact.get(name)
        if kinds is None:
            kinds = exact.get(role, _NONE) | _TORCH.get(role, _NONE)
        ends = () if own is None else own.get(role, ())
        if kind in kinds or (kind.__name__.endswith(ends) and kind.__module__.startswith(home)):
            return None
        return _in_words([*(f"the library's {end}" for end in ends), *_names(kinds)])

    return wanted


def own_forward(module: nn.Module) -> Obstacle | None:
    """A forward that a user gave to `module` alone, in which nothing of ours is called."""
    if "forward" in module.__dict__:
        return Obstacle("has a forward of its own", lasting=False)
    return None


def patched(kind: type[nn.Module], *methods: str) -> Obstacle | None:
    """A method of a library's class, by default its forward, or of a base of it, in whose place
    somebody put another."""
    for name in methods or ("forward",):
        if (owner := _patched_owner(kind, name)) is not None:
            return Obstacle(f"is of a class whose {owner}.{name} was replaced", lasting=False)
    return None


def _patched_owner(kind: type, name: str) -> str | None:
    """Which of a class and its bases has a method that was not defined in its own package under its
    own name; decorators of the same package count as that."""
    for owner in kind.__mro__:
        method = owner.__dict__.get(name)
        if method is not None and owner is not nn.Module and not _belongs(owner, name, method):
            return owner.__name__
    return None


setattr(_patched_owner, "_dynamo_marked_constant", True)  # noqa: B010


@functools.lru_cache(maxsize=4096)
def _belongs(owner: type, name: str, method: Any) -> bool:
    package = owner.__module__.partition(".")[0]
    return package_of(method) == package and method.__qualname__ == f"{owner.__qualname__}.{name}"


def package_of(function: Any) -> str:
    """Where a function was defined, whatever a decorator says."""
    return getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0]


def is_traced() -> bool:
    """Whether torch.jit.trace or torch.onnx.export is looking on: what they write down has to run
    without us."""
    return torch._C._get_tracing_state() is not None or _is_onnx_exporting()


def _is_onnx_exporting() -> bool:
    flags: Any = sys.modules.get("torch.onnx._internal.exporter._flags")
    return getattr(flags, "_is_onnx_exporting", False)


# what torch.compiler.assume_constant_result does, which imports torch._dynamo
setattr(_is_onnx_exporting, "_dynamo_marked_constant", True)  # noqa: B010


def global_hook() -> Obstacle | None:
    """A hook on every module of the process, which calls of our ops would not trigger."""
    if _has_any_global_hook():
        return Obstacle("a hook on every module is registered", lasting=False)
    return None


def head_obstacle(head_dim: int) -> Obstacle | None:
    """For heads wider than the attention kernel takes."""
    if head_dim > MAX_HEAD_DIM:
        return Obstacle(f"head dimension {head_dim} is above {MAX_HEAD_DIM}", lasting=True)
    return None


def mha_obstacle(mha: Any) -> Obstacle | None:
    """Why an `nn.MultiheadAttention` is not attention of packed queries, keys and values."""
    if not mha.batch_first or mha.in_proj_weight is None:
        return Obstacle("has another layout than batch first with packed weights", lasting=True)
    if mha.bias_k is not None or mha.bias_v is not None or mha.add_zero_attn:
        return Obstacle("adds keys of its own", lasting=True)
    return head_obstacle(mha.embed_dim // mha.num_heads)


def conv_obstacle(conv: Any) -> Obstacle | None:
    """Why a convolution is no patch embedding for our kernel."""
    padded = conv.padding != "valid" and any(conv.padding)
    tiles = conv.stride == conv.kernel_size and not padded
    if not tiles or max(conv.dilation) > 1 or conv.groups != 1:
        return Obstacle(f"{conv} does not cut patches side by side", lasting=True)
    weight = type(conv.weight)
    if weight not in PLAIN and not torch.compiler.is_exporting():
        return Obstacle(f"has a weight of class {weight.__name__}", lasting=True)
    return None
