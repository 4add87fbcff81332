"""The encoder's pieces as nn.Modules: parameters under timm's names, arithmetic through `ops`.

Shape legend: B batch, N tokens, D width, H heads, d head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastvit import ops


def is_active(module: nn.Module) -> bool:
    """Whether a dropout or stochastic-depth module changes its input now."""
    rate = getattr(module, "p", None)
    if rate is None:
        rate = getattr(module, "drop_prob", 0.0)
    return module.training and bool(rate)


def apply_norm(norm: Any, x: Tensor) -> Tensor:
    """A LayerNorm's or RMSNorm's arithmetic on our kernel; any other norm as it is.

    timm and torch each have an RMSNorm of their own, so that one goes by name.
    """
    if isinstance(norm, nn.LayerNorm):
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
    if type(norm).__name__ in ("RMSNorm", "RmsNorm"):
        eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
        return ops.rms_norm(x, norm.weight, eps)
    return norm(x)


def fused_attention(attn: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Everything of a timm-named `attn` module before its output projection.

    Args:
        attn: has ``qkv, q_norm, k_norm, norm, attn_drop, num_heads, head_dim``.
        x: [B, N, D], normalised.
        attn_mask: as in `ops.attention`, broadcasts to [B, H, N, N].

    Returns:
        [B, N, H*d].
    """
    return attend(attn, ops.linear(x, attn.qkv.weight, attn.qkv.bias), attn_mask)


def attend(attn: Any, qkv: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """What `fused_attention` does after its first linear: [B, N, 3*H*d] to [B, N, H*d]."""
    dropout_p = attn.attn_drop.p if attn.training else 0.0
    if isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity):
        out = ops.attention_qkv(qkv, attn.num_heads, attn_mask, dropout_p)
    else:
        b, n, _ = qkv.shape
        q, k, v = qkv.view(b, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = apply_norm(attn.q_norm, q), apply_norm(attn.k_norm, k)
        out = ops.attention(q, k, v, attn_mask, dropout_p).transpose(1, 2).flatten(2)
    return apply_norm(attn.norm, out)


def fused_block(block: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """A pre-norm encoder block (ViT paper, equations 2 and 3) on our kernels.

    LayerScale, stochastic depth and the residual sum ride in the last linear of each half, and the
    backward computes norms and activations again; where dropout is active before the sum, that half
    runs its tail unfused, in timm's order.

    Args:
        block: a module tree with timm's names: ``norm1, attn, ls1, drop_path1, norm2, mlp, ls2,
            drop_path2``. Used for our own `Block` and for timm's.
        x: [B, N, D].
        attn_mask: as in `ops.attention`.

    Returns:
        [B, N, D].
    """
    attn, mlp = block.attn, block.mlp
    out = attend(attn, norm_linear(block.norm1, x, attn.qkv), attn_mask)
    if is_active(attn.proj_drop):
        out = attn.proj_drop(ops.linear(out, attn.proj.weight, attn.proj.bias))
        x = x + block.drop_path1(block.ls1(out))
    else:
        x = ops.linear(
            out, attn.proj.weight, attn.proj.bias, scale=getattr(block.ls1, "gamma", None),
            residual=x, row_scale=drop_path_scale(block.drop_path1, x),
        )  # fmt: skip

    activation = activation_name(mlp.act)
    if is_active(mlp.drop1) or not isinstance(mlp.norm, nn.Identity):
        h = ops.linear(
            apply_norm(block.norm2, x), mlp.fc1.weight, mlp.fc1.bias, activation=activation
        )
        h = apply_norm(mlp.norm, mlp.drop1(h))
        h = mlp.drop2(ops.linear(h, mlp.fc2.weight, mlp.fc2.bias))
        return x + block.drop_path2(block.ls2(h))
    h, norm = norm_in_front(block.norm2, x)
    fused = functools.partial(
        ops.mlp, h, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
        activation=activation, **norm,
    )  # fmt: skip
    if is_active(mlp.drop2):
        return x + block.drop_path2(block.ls2(mlp.drop2(fused())))
    return fused(
        scale=getattr(block.ls2, "gamma", None), residual=x,
        row_scale=drop_path_scale(block.drop_path2, x),
    )  # fmt: skip


def norm_linear(norm: nn.Module, x: Tensor, linear: nn.Linear) -> Tensor:
    """A linear behind a norm; behind a LayerNorm in one op, which keeps x only."""
    if isinstance(norm, nn.LayerNorm):
        return ops.norm_linear(x, norm.weight, norm.bias, linear.weight, linear.bias, eps=norm.eps)
    return ops.linear(apply_norm(norm, x), linear.weight, linear.bias)


def norm_in_front(norm: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What `ops.mlp` takes in the place of a norm: its input and options."""
    if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
        return x, {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
    return apply_norm(norm, x), {}


def drop_path_scale(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """Stochastic depth as a factor for each token of x [B, N, D], [B, N]: one for each sample,
    drawn by the module itself. None where it is inactive."""
    if not is_active(drop_path):
        return None
    return drop_path(x.new_ones(x.shape[0], 1)).expand(x.shape[:-1])


def activation_name(act: nn.Module) -> str | None:
    """The name in `ops.ACTIVATIONS` of what an activation module computes, or None.

    Goes by class name, since timm, transformers and torch each have classes of their own.
    """
    kind = type(act).__name__
    if kind == "GELU":
        return "gelu" if getattr(act, "approximate", "none") == "none" else "gelu_tanh"
    names = {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu", "ReLU": "relu"}
    return names.get(kind)


def is_plain(*modules: nn.Module | None) -> bool:
    """Whether modules and all below them are as this file builds them: no hooks, no replaced
    layers, no quantised or sharded weights.

    Only then may an op read a layer's weights without calling the layer.
    """
    return not _has_any_global_hook() and all(map(_is_plain, modules))


def _is_plain(module: nn.Module | None) -> bool:
    if module is None:
        return True
    state = module.__dict__  # this runs for every layer in every forward
    if (
        type(module) not in _KNOWN
        or state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    ):
        return False
    weight = state["_parameters"].get("weight")
    if type(weight) not in _PLAIN_WEIGHTS and not torch.compiler.is_exporting():
        return False  # exporting puts fake tensors in their place
    for name, child in state["_modules"].items():
        # a relative position bias is always called as a module
        if name != "rel_pos" and not _is_plain(child):
            return False
    return True


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last dimension on our kernel; eps 1e-6 as in ViT."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), OpenAI CLIP's GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.ACTIVATIONS["quick_gelu"](x)


ACT_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}


class LayerScale(nn.Module):
    """x * gamma, one factor a channel. Source: arXiv:2103.17239, equation 4."""

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's whole branch is 0 with probability `drop_prob`,
    else scaled to keep the mean. Source: arXiv:1603.09382."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not is_active(self):
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask.div_(keep) if keep > 0 else mask)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class Mlp(nn.Module):
    """Linear, activation, linear: [..., D] to [..., D]."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        act_layer: str = "gelu",
        bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.act = ACT_LAYERS[act_layer]()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.drop1(self.act(self.fc1(x))))
        return self.drop2(self.fc2(x))


class Attention(nn.Module):
    """Multi-head self-attention. Source: ViT paper (arXiv:2010.11929), appendix A.

    Args:
        dim: D.
        num_heads: H, divides D.
        qkv_bias, proj_bias: whether these linears have a bias.
        qk_norm: LayerNorm of every head's queries and keys (arXiv:2302.05442).
        attn_drop, proj_drop: dropout rates of the weights and of the result.
        norm_eps: of the norms of `qk_norm`.
        rel_pos: gives a bias [1, H, N, N] that is added to the scores, or None.

    Raises:
        ValueError: D is not divisible by H.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_eps: float = 1e-6,
        rel_pos: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = LayerNorm(self.head_dim, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = LayerNorm(self.head_dim, norm_eps) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rel_pos = rel_pos

    def add_rel_pos(self, attn_mask: Tensor | None) -> Tensor | None:
        """`attn_mask` (as in `ops.attention`) with the relative position bias added."""
        if self.rel_pos is None:
            return attn_mask
        bias = self.rel_pos()  # (1, H, N, N)
        if attn_mask is None:
            return bias
        if attn_mask.dtype == torch.bool:
            return bias.masked_fill(~attn_mask, float("-inf"))
        return bias + attn_mask

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """[B, N, D] to [B, N, D], calling every layer; `Block` takes the fused way."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))  # (B, N, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, d)
        dropout_p = self.attn_drop.p if self.training else 0.0
        attn_mask = self.add_rel_pos(attn_mask)
        out = ops.attention(self.q_norm(q), self.k_norm(k), v, attn_mask, dropout_p)
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))


class AttentionPoolLatent(nn.Module):
    """Multi-head attention pooling (MAP): one learned query looks at all tokens, then an MLP.

    Source: arXiv:2106.04560, the head of ViT-G; also SigLIP's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        act_layer: str = "gelu",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, D]."""
        b, _, dim = x.shape
        shape = (self.num_heads, dim // self.num_heads)
        q = self.q(self.latent).unflatten(2, shape).transpose(1, 2)  # (1, H, 1, d)
        k, v = self.kv(x).unflatten(2, (2, *shape)).permute(2, 0, 3, 1, 4).unbind(0)
        out = ops.attention(q.expand(b, -1, -1, -1), k, v).transpose(1, 2).flatten(2)  # (B, 1, D)
        out = self.proj(out)
        return (out + self.mlp(self.norm(out)))[:, 0]


def causal_mask(x: Tensor, attn_mask: Tensor | None) -> Tensor:
    """The mask [N, N] in which a token sees itself and earlier ones."""
    if attn_mask is not None:
        raise ValueError("attn_mask and is_causal exclude one another")
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()


def take_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Block numbers meant by timm's `indices`."""
    if indices is None or isinstance(indices, int):
        take = list(range(count - (count if indices is None else indices), count))
    else:
        take = [i + count if i < 0 else i for i in indices]
    if not take or min(take) < 0 or max(take) >= count:
        raise ValueError(f"indices {indices!r} do not name some of {count} blocks")
    return take


def to_2tuple(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from one number for both, or from two.

    Raises:
        ValueError: not one or two positive numbers.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{size!r} is not a size: one positive integer, or two")
    return pair


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel: images [B, C, H, W] to patches [B, N, D].

    Args:
        img_size, patch_size: in pixels, one number or (height, width).
        in_chans: C.
        embed_dim: D.
        bias: whether the projection has one.
        strict_img_size: take images of `img_size` only.

    Raises:
        ValueError: the patch does not divide the image.

    Source: ViT paper (arXiv:2010.11929), equation 1.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        strict_img_size: bool = True,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.strict_img_size = strict_img_size
        self.set_sizes(to_2tuple(img_size), to_2tuple(patch_size))
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias)

    def set_sizes(self, img_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
        """Record the sizes; the weights stay.

        Raises:
            ValueError: the patch does not divide the image.
        """
        if img_size[0] % patch_size[0] or img_size[1] % patch_size[1]:
            raise ValueError(
                f"patch size {patch_size[0]}x{patch_size[1]} does not divide "
                f"image size {img_size[0]}x{img_size[1]}"
            )
        self.img_size = img_size
        self.patch_size = patch_size
        self.grid_size = self.dynamic_feat_size(img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of patches in an image of this height and width."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def check_images(self, images: Tensor) -> None:
        """Raises:
        ValueError: images that are not [B, C, H, W], or of a size that the model does not take.
        """
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images {list(images.shape)} are not [B, {self.in_chans}, H, W]")
        h, w = images.shape[2:]
        if self.strict_img_size and (h, w) != self.img_size:
            raise ValueError(
                f"image size {h}x{w} is not the model's {self.img_size[0]}x{self.img_size[1]}: "
                "build it with dynamic_img_size=True, or call set_input_size"
            )
        if h % self.patch_size[0] or w % self.patch_size[1]:
            raise ValueError(
                f"image size {h}x{w} is not a multiple of the patch size "
                f"{self.patch_size[0]}x{self.patch_size[1]}"
            )

    def forward(self, images: Tensor) -> Tensor:
        """The plain way; `VisionTransformer` finishes the tokens in one op."""
        self.check_images(images)
        return self.proj(images).flatten(2).transpose(1, 2)


_KNOWN = {
    nn.Conv2d, nn.Linear, nn.Identity, nn.Dropout, nn.GELU, nn.SiLU, nn.ReLU,
    QuickGELU, LayerNorm, LayerScale, DropPath, Mlp, Attention, PatchEmbed,
}  # fmt: skip
_PLAIN_WEIGHTS = {nn.Parameter, Tensor, type(None)}
