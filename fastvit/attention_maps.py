"""What a ViT attends to: attention maps of any block, and attention rollout.

Fused attention never forms softmax(Q K^T). While a model is watched, every attention call of its
forward is computed a second time the eager way, to read the weights; the outputs stay as they are.
An accelerated model runs its library's own forward meanwhile, a compiled one runs uncompiled.

Shape legend: B batch, H heads, N tokens, d head dimension, Nq and Nk queries and keys (both N in
self-attention), P prefix tokens (CLS, registers), gh x gw the grid of patches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastvit import ops
from fastvit.layers import take_indices

Blocks = int | Sequence[int] | None
MAX_PREFIX = 16  # more tokens than patches by this is a model whose layout we do not know
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class AttentionMap(NamedTuple):
    """The attention weights of one module.

    Attributes:
        module: its name in the model.
        weights: [B, H, Nq, Nk], rows sum to 1; in the dtype that the model computes in.
    """

    module: str
    weights: Tensor


class TokenLayout(NamedTuple):
    """Where patches stand among a model's tokens.

    Attributes:
        prefix: P, tokens in front of the patches.
        grid: (gh, gw).
        class_token: whether token 0 is one that gathers the image.
    """

    prefix: int
    grid: tuple[int, int]
    class_token: bool


# --------------------------------------------------------------------------- maps


@contextlib.contextmanager
def watch_attention(model: nn.Module, blocks: Blocks = None) -> Iterator[list[AttentionMap]]:
    """Collect the attention maps of every forward of `model` inside a with-block.

    Seen are `F.scaled_dot_product_attention`, `nn.MultiheadAttention`, our own attention and eager
    code with a softmax over the last of four dimensions: timm's, transformers' (``sdpa``,
    ``eager``), torchvision's, open_clip's and fastvit's ViTs, accelerated, compiled or as they are.
    Weights are those before dropout. Two attentions in one module (differential attention) stand
    side by side along H.

    Args:
        model: a ViT, or a module with one inside.
        blocks: which attending modules to keep, numbered as they run (an attention pool comes
            last): a number for the last so many, a list in which negatives count from the end, or
            None for all. What is not wanted is freed during the forward.

    Yields:
        A list that holds the maps once the with-block has ended, in the order of `blocks`.

    Raises:
        ValueError: no attention was seen, or `blocks` name none of those that were.
    """
    watcher = _Watcher(blocks)
    maps: list[AttentionMap] = []
    hooks = [
        hook
        for name, module in model.named_modules()
        for hook in (
            module.register_forward_pre_hook(watcher.enter(name)),
            module.register_forward_hook(watcher.leave, always_call=True),
        )
    ]
    try:
        # hooks make accelerated blocks run their library's forward and keep CUDA graphs away
        with torch.compiler.set_stance("force_eager"), ops.backend("torch"), watcher:
            yield maps
    finally:
        for hook in hooks:
            hook.remove()
    if not watcher.seen:
        raise ValueError(
            f"no attention was seen in this {type(model).__name__}: nothing in it calls "
            "scaled_dot_product_attention, nn.MultiheadAttention or a softmax of four dimensions"
        )
    for i in take_indices(len(watcher.seen), blocks):
        found = watcher.seen[i]
        assert found is not None
        maps.append(found)


def attention_maps(
    model: nn.Module, *inputs: Any, blocks: Blocks = None, **options: Any
) -> list[AttentionMap]:
    """The attention maps of ``model(*inputs, **options)``.

    Args:
        model, blocks: as in `watch_attention`.
        inputs, options: what the model takes, images [B, C, H, W] as a rule.

    Returns:
        One `AttentionMap` a block, weights [B, H, Nq, Nk] in the compute dtype. They carry
        gradients unless called under `torch.no_grad`.

    Raises:
        ValueError: as `watch_attention`.
    """
    with watch_attention(model, blocks) as maps:
        model(*inputs, **options)
    return maps


def attention_rollout(model: nn.Module, *inputs: Any, **options: Any) -> Tensor:
    """How much of every input token reaches every output token through all blocks.

    The product of (A + I) / 2 over the blocks, A being the mean over heads. Attention pooling
    after the blocks is left out.

    Args:
        model, inputs, options: as in `attention_maps`.

    Returns:
        [B, N, N], rows sum to 1.

    Raises:
        ValueError: no self-attention was seen; blocks differ in N (windows, merged tokens); a
            module's maps are not one a head (differential attention).

    Source: Abnar and Zuidema, Quantifying attention flow in transformers (arXiv:2005.00928).
    """
    modules = dict(model.named_modules())
    rollout: Tensor | None = None
    for name, weights in attention_maps(model, *inputs, **options):
        heads = getattr(modules[name], "num_heads", weights.shape[1])
        if weights.shape[1] != heads:
            raise ValueError(f"{name} has {weights.shape[1]} maps for {heads} heads: no rollout")
        if weights.shape[-1] != weights.shape[-2]:
            continue
        mean = weights.mean(1)  # (B, N, N)
        step = (mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)) / 2
        if rollout is not None and rollout.shape != step.shape:
            raise ValueError(
                f"rollout needs the same tokens in every block; {name} attends over "
                f"{list(mean.shape)}, blocks before it over {list(rollout.shape)}"
            )
        rollout = step if rollout is None else step @ rollout
    if rollout is None:
        raise ValueError(f"no self-attention was seen in this {type(model).__name__}")
    return rollout


class _Watcher(TorchFunctionMode):
    """Sees torch's functions by name, and in which module they are called."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.seen: list[AttentionMap | None] = []  # None: not wanted
        self._path: list[tuple[str, object]] = []  # modules being run; every visit is another
        self._visit: object = None  # the one that the last map is of
        wanted = range(-blocks, 0) if isinstance(blocks, int) else blocks
        self._wanted = None if wanted is None else set(wanted)

    def enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._path.append((name, object()))

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._path.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._path:
            return result
        if func is F.scaled_dot_product_attention:
            self._record(attention_weights(*args, **kwargs))
        elif func is F.multi_head_attention_forward:
            asked = {**kwargs, "need_weights": True, "average_attn_weights": False}
            self._record(func(*args, **asked)[1])
        elif func in _SOFTMAX and _is_attention(result, *args[1:], **kwargs):
            self._record(result)
        return result

    def _record(self, weights: Tensor) -> None:
        name, visit = self._path[-1]
        weights = weights.unsqueeze(1) if weights.dim() == 3 else weights
        if visit is self._visit:
            before = self.seen.pop()
            weights = weights if before is None else torch.cat([before.weights, weights], dim=1)
        self._visit = visit
        self.seen.append(AttentionMap(name, weights))
        if self._wanted is not None:
            old = len(self.seen) + min(self._wanted, default=0) - 1  # the end may move past it
            if 0 <= old < len(self.seen) - 1 and old not in self._wanted:
                self.seen[old] = None


def _is_attention(weights: Tensor, dim: int | None = None, *_: Any, **options: Any) -> bool:
    return weights.dim() == 4 and (options.get("dim", dim) in (-1, 3))


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights that `F.scaled_dot_product_attention` applies to `value`, before dropout.

    Returns:
        softmax(Q K^T * scale + mask), [..., Nq, Nk] in the dtype of `query`; rows whose keys are
        all masked are 0.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is None:
        return logits.softmax(-1)
    if attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, float("-inf"))
    else:
        logits = logits + attn_mask
    return logits.softmax(-1).masked_fill(logits.isneginf().all(-1, keepdim=True), 0)


# --------------------------------------------------------------------------- patches


def token_layout(model: Any, img_size: Sequence[int], tokens: int) -> TokenLayout:
    """Which of a model's tokens are patches, and on which grid.

    Args:
        model: timm's and fastvit's say it themselves; elsewhere the first convolution that cuts
            patches gives the grid, and what is left over is the prefix, a class token first.
        img_size: (height, width) in pixels.
        tokens: N.

    Raises:
        ValueError: the grid and the number of tokens do not go together.
    """
    height, width = img_size
    if hasattr(model, "num_prefix_tokens") and hasattr(model.patch_embed, "dynamic_feat_size"):
        gh, gw = model.patch_embed.dynamic_feat_size((height, width))
        prefix = model.num_prefix_tokens
        class_token = model.cls_token is not None
    else:
        patch_h, patch_w = _patch_size(model)
        gh, gw = height // patch_h, width // patch_w
        prefix = tokens - gh * gw
        class_token = prefix > 0
    if prefix + gh * gw != tokens or prefix > MAX_PREFIX:
        raise ValueError(
            f"{tokens} tokens are not a grid of {gh}x{gw} patches after {prefix} prefix tokens"
        )
    return TokenLayout(prefix, (gh, gw), class_token)


def _patch_size(model: nn.Module) -> tuple[int, int]:
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.stride == module.kernel_size != (1, 1):
            return module.kernel_size[0], module.kernel_size[1]
    raise ValueError(f"no convolution in this {type(model).__name__} cuts patches")


def patch_attention(weights: Tensor, layout: TokenLayout) -> Tensor:
    """Attention on the grid of patches.

    Args:
        weights: [..., Nq, Nk], of `attention_maps` or `attention_rollout`.
        layout: of the Nk keys.

    Returns:
        [..., gh, gw]: what the class token (or the one query of an attention pool) gives each
        patch; in a model without a class token, the mean over all patches' queries. What goes to
        prefix tokens is left out, so that a map sums to less than 1.
    """
    queries = weights[..., layout.prefix :]  # (..., Nq, gh*gw)
    if layout.class_token or weights.shape[-2] == 1:
        row = queries[..., 0, :]
    else:
        row = queries[..., layout.prefix :, :].mean(-2)
    return row.unflatten(-1, layout.grid)
