"""What the files of transformers, torchvision, open_clip and DINO share.

Shape legend: B batch, N tokens, D width, H heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import layers, ops
from fastvit.accelerate.plan import PRECISION, Part, PlanRow


class Obstacle(NamedTuple):
    """Why a module runs its library's forward."""

    reason: str
    lasting: bool  # False for a hook, which can be taken away again


MAX_HEAD_DIM = 256
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
GLOBAL_HOOK = Obstacle("a hook on every module is registered", lasting=False)
_PLAIN = frozenset({nn.Parameter, Tensor, type(None)})  # not quantised, not sharded


def _no_hook_is_inert(hook: object) -> bool:
    return False


def layer_obstacle(
    module: nn.Module,
    knows: Callable[[str, type], bool],
    is_inert: Callable[[Any], bool] = _no_hook_is_inert,
    prefix: str = "",
) -> Obstacle | None:
    """Why ops may not stand in for calling the layers below `module`.

    Args:
        module: a block; its own hooks run around it either way and do not count.
        knows: whether a layer of this name and exact class is one whose arithmetic the ops have.
        is_inert: forward hooks that may be there.
        prefix: of the names given in reasons.
    """
    for name, child in module._modules.items():
        if child is None:
            continue
        if not knows(name, type(child)):
            kind = type(child).__name__
            return Obstacle(f"{prefix}{name} is {kind}, which has no fused form there", True)
        state = child.__dict__  # this runs for every layer in every forward
        hooks = state["_forward_hooks"]
        if (
            state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
            or (hooks and not all(map(is_inert, hooks.values())))
        ):
            return Obstacle(f"{prefix}{name} has a hook or a forward of its own", lasting=False)
        for key, parameter in state["_parameters"].items():
            # torch.export puts fake tensors in the place of parameters
            if type(parameter) not in _PLAIN and not torch.compiler.is_exporting():
                kind = type(parameter).__name__
                return Obstacle(f"{prefix}{name} has a {key} of class {kind}", lasting=True)
        if child._modules:
            found = layer_obstacle(child, knows, is_inert, f"{prefix}{name}.")
            if found is not None:
                return found
    return None


# --------------------------------------------------------------------------- arithmetic


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H*d] to [B, H, N, d], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, H, N, d] to [B, N, H*d]."""
    return x.transpose(1, 2).flatten(2)


def attend_mha(mha: Any, x: Tensor) -> Tensor:
    """An `nn.MultiheadAttention` of `x` [B, N, D] with itself, up to its output projection."""
    qkv = ops.linear(x, mha.in_proj_weight, mha.in_proj_bias)
    return ops.attention_qkv(qkv, mha.num_heads, None, mha.dropout if mha.training else 0.0)


def mha_obstacle(mha: Any, name: str) -> Obstacle | None:
    """Why `attend_mha` is not that module's attention."""
    if not mha.batch_first or mha.in_proj_weight is None:
        return Obstacle(f"{name} has another layout than batch first with packed weights", True)
    if mha.bias_k is not None or mha.bias_v is not None or mha.add_zero_attn:
        return Obstacle(f"{name} adds keys of its own", lasting=True)
    return head_obstacle(mha.embed_dim // mha.num_heads)


def head_obstacle(head_dim: int) -> Obstacle | None:
    """For heads wider than the attention kernel takes."""
    if head_dim > MAX_HEAD_DIM:
        return Obstacle(f"head dimension {head_dim} is above {MAX_HEAD_DIM}", lasting=True)
    return None


def add_branch(
    x: Tensor,
    h: Tensor,
    linear: Any,
    *,
    dropout: nn.Module | None = None,
    scale: Tensor | None = None,
    drop_path: nn.Module | None = None,
) -> Tensor:
    """x + drop_path(scale * dropout(linear(h))), in one op where nothing is dropped.

    Args:
        x: [B, N, D].
        h: [B, N, K].
        linear: an nn.Linear from K to D.
        scale: [D], LayerScale's.
    """
    dropout, drop_path = _active(dropout), _active(drop_path)
    if dropout is None and drop_path is None:
        return ops.linear(h, linear.weight, linear.bias, scale=scale, residual=x)
    out = ops.linear(h, linear.weight, linear.bias)
    return x + _tail(out, dropout, scale, drop_path)


def add_mlp(
    x: Tensor,
    h: Tensor,
    fc1: Any,
    activation: str | None,
    fc2: Any,
    *,
    gate: Any = None,
    hidden_dropout: nn.Module | None = None,
    dropout: nn.Module | None = None,
    scale: Tensor | None = None,
    drop_path: nn.Module | None = None,
) -> Tensor:
    """x + drop_path(scale * dropout(fc2(hidden_dropout(act(fc1(h)))))), in one op where nothing is
    dropped; with `gate`, act(gate(h)) * fc1(h) is the hidden layer (SwiGLU, arXiv:2002.05202).

    Arguments as in `add_branch`; `activation` is a name in `ops.ACTIVATIONS`.
    """
    rest: dict[str, Any] = {"dropout": dropout, "scale": scale, "drop_path": drop_path}
    if gate is not None:
        hidden = ops.linear(h, gate.weight, gate.bias, activation=activation)
        hidden = hidden * ops.linear(h, fc1.weight, fc1.bias)
        return add_branch(x, hidden, fc2, **rest)
    hidden_dropout = _active(hidden_dropout)
    if hidden_dropout is None and _active(dropout) is None and _active(drop_path) is None:
        return ops.mlp(
            h, fc1.weight, fc1.bias, fc2.weight, fc2.bias,
            activation=activation, scale=scale, residual=x,
        )  # fmt: skip
    hidden = ops.linear(h, fc1.weight, fc1.bias, activation=activation)
    if hidden_dropout is not None:
        hidden = hidden_dropout(hidden)
    return add_branch(x, hidden, fc2, **rest)


def _active(module: nn.Module | None) -> nn.Module | None:
    return module if module is not None and layers.is_active(module) else None


def _tail(
    out: Tensor, dropout: nn.Module | None, scale: Tensor | None, drop_path: nn.Module | None
) -> Tensor:
    out = out if dropout is None else dropout(out)
    out = out if scale is None else out * scale
    return out if drop_path is None else drop_path(out)


def attention_maps(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`ops.attention` spelled out, for who wants to see its weights.

    Returns:
        [B, H, N, d] and the weights [B, H, N, M] (after dropout, as transformers gives them).
    """
    scores = q @ k.transpose(-2, -1) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, dropout_p)
    return weights @ v, weights


def at_precision(
    vit: nn.Module, forward: Callable[..., Any], x: Any, *args: Any, **kwargs: Any
) -> Any:
    """`forward(x)`, under autocast if `accelerate` was given a precision; results in x's dtype."""
    precision = vit.__dict__.get(PRECISION)
    pixels = x["patches"] if isinstance(x, dict) else x  # timm's NaFlex takes a dict
    if precision is None or not isinstance(pixels, Tensor):
        return forward(x, *args, **kwargs)
    with torch.autocast(pixels.device.type, AUTOCAST[precision]):
        return _cast(forward(x, *args, **kwargs), pixels.dtype)


def _cast(result: Any, dtype: torch.dtype) -> Any:
    """The floating tensors of a result, of one dtype."""
    if isinstance(result, Tensor):
        return result.to(dtype) if result.is_floating_point() else result
    if isinstance(result, dict):
        return {name: _cast(value, dtype) for name, value in result.items()}
    if isinstance(result, (list, tuple)):
        return type(result)(_cast(value, dtype) for value in result)
    return result


# --------------------------------------------------------------------------- layers by themselves


class FastLayerNorm(nn.LayerNorm):
    """torch's `LayerNorm` on our kernel."""

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):  # torch.fx traces with proxies
            return super().forward(input)
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


class FastPatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel on the patch embedding's kernel.

    The result [B, D, H/p, W/p] is a view of tokens [B, N, D], which is what libraries make of it
    next.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _divides(self, input) or conv_obstacle(self) is not None:
            return super().forward(input)
        tokens = ops.patch_embed(input, self.weight, self.bias)
        grid = (-1, input.shape[-1] // self.kernel_size[1])
        return tokens.transpose(1, 2).unflatten(2, grid)


class FastPatchConv3d(nn.Conv3d):
    """As `FastPatchConv2d` for tubelets of a video: their frames become channels of an image."""

    def forward(self, input: Tensor) -> Tensor:
        if not _divides(self, input) or conv_obstacle(self) is not None:
            return super().forward(input)
        b, frames = input.shape[0], self.kernel_size[0]
        images = input.unflatten(2, (-1, frames)).transpose(1, 2)  # (B, T/t, C, t, H, W)
        images = images.flatten(2, 3).flatten(0, 1)  # (B * T/t, C*t, H, W)
        tokens = ops.patch_embed(images, self.weight.flatten(1, 2), self.bias)
        grid = (-1, input.shape[3] // self.kernel_size[1], input.shape[4] // self.kernel_size[2])
        return tokens.unflatten(0, (b, -1)).flatten(1, 2).transpose(1, 2).unflatten(2, grid)


def conv_obstacle(conv: Any) -> Obstacle | None:
    """Why a convolution is no patch embedding for our kernel."""
    padded = conv.padding != "valid" and any(conv.padding)
    tiles = conv.stride == conv.kernel_size and not padded
    if not tiles or max(conv.dilation) > 1 or conv.groups != 1:
        return Obstacle(f"{conv} does not cut patches side by side", lasting=True)
    weight = type(conv.weight)
    if weight not in _PLAIN and not torch.compiler.is_exporting():
        return Obstacle(f"has a weight of class {weight.__name__}", lasting=True)
    return None


def _divides(conv: Any, x: Any) -> bool:
    """Whether `x` is a batch of floats that the patches divide; all else is left to PyTorch."""
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.dim() == conv.weight.dim()
        and not any(size % p for size, p in zip(x.shape[2:], conv.kernel_size, strict=True))
    )


FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: FastLayerNorm,
    nn.Conv2d: FastPatchConv2d,
    nn.Conv3d: FastPatchConv3d,
}
ORIGINAL = {fast: original for original, fast in FAST.items()}
_RUNS = {nn.LayerNorm: "layer_norm", nn.Conv2d: "patch_embed", nn.Conv3d: "patch_embed"}


def find_single(name: str, module: Any, library: str) -> Part | None:
    """The part of a norm or a patch projection that a library's file points at; None where it is of
    no such class."""
    kind = ORIGINAL.get(type(module), type(module))
    if kind not in FAST:
        return None
    obstacle = None if kind is nn.LayerNorm else conv_obstacle(module)
    row = make_row(name, kind, _RUNS[kind], library, obstacle)
    return Part(module, FAST[kind] if obstacle is None else None, row)


def make_row(
    name: str,
    kind: type,
    runs: str,
    library: str,
    obstacle: Obstacle | None,
    block: bool = False,
) -> PlanRow:
    """The row of a module that runs `runs`, or the library's forward where there is an obstacle."""
    return PlanRow(
        module=name,
        type=kind.__name__,
        fused=obstacle is None,
        runs=runs if obstacle is None else library,
        reason=None if obstacle is None else obstacle.reason,
        block=block,
    )
