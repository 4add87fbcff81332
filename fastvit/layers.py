"""The encoder's pieces as nn.Modules: parameters under timm's names, arithmetic through `ops`.

Shape legend: B batch, N tokens, D width, H heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.obstacles import Obstacle, global_hook, layer_obstacle, module_obstacle
from fastvit.parts import (
    Parts,
    activation_name,
    drop_or_none,
    is_active,
    layer_or_none,
    run,
    scale_of,
)


def fused_block(block: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """A block of timm's names, `has_plain_layers`, by `parts.run`.

    Args:
        block: has ``norm1, attn, ls1, drop_path1, norm2, mlp, ls2, drop_path2``.
        x: [B, N, D].
        attn_mask: as in `ops.attention`.

    Returns:
        [B, N, D].
    """
    return run(parts_of(block), x, attn_mask)


def parts_of(block: Any) -> Parts:
    """The parts of a block of timm's names."""
    layers = block._modules  # which costs no Python call, as an attribute does
    attn, mlp = layers["attn"], layers["mlp"]
    in_attn, in_mlp = attn._modules, mlp._modules
    return Parts(
        layers["norm1"], attn, (in_attn["qkv"],), attn.num_heads, in_attn["proj"],
        layers["norm2"], in_mlp["fc1"], activation_name(in_mlp["act"]), in_mlp["fc2"],
        q_norm=layer_or_none(in_attn["q_norm"]), k_norm=layer_or_none(in_attn["k_norm"]),
        dropout=in_attn["attn_drop"].p, out_norm=layer_or_none(in_attn["norm"]),
        drop1=drop_or_none(in_attn["proj_drop"]), scale1=scale_of(layers["ls1"]),
        drop_path1=drop_or_none(layers["drop_path1"]),
        hidden_drop=drop_or_none(in_mlp["drop1"]), hidden_norm=layer_or_none(in_mlp["norm"]),
        drop2=drop_or_none(in_mlp["drop2"]), scale2=scale_of(layers["ls2"]),
        drop_path2=drop_or_none(layers["drop_path2"]),
    )  # fmt: skip


def has_plain_layers(module: nn.Module) -> bool:
    """`is_plain` of all that `module` consists of."""
    return is_plain(*module._modules.values())


def is_plain(*modules: nn.Module | None) -> bool:
    """Whether modules and all below them are as this file builds them: no hooks, no replaced
    layers, no quantised or sharded weights.

    Only then may an op read a layer's weights without calling the layer.
    """
    return obstacle_in(*modules) is None


def obstacle_in(*modules: nn.Module | None) -> Obstacle | None:
    """Why some of `modules` are not `is_plain`."""
    for module in modules:
        if module is None:
            continue
        found = module_obstacle(module, wanted(module, "", type(module)))
        if (found := found or layer_obstacle(module, wanted)) is not None:
            return found
    return global_hook()


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


_KNOWN = frozenset({
    nn.Conv2d, nn.Linear, nn.Identity, nn.Dropout, nn.GELU, nn.SiLU, nn.ReLU,
    QuickGELU, LayerNorm, LayerScale, DropPath, Mlp, Attention, PatchEmbed,
})  # fmt: skip


def wanted(parent: nn.Module, name: str, kind: type[nn.Module]) -> str | None:
    """As `obstacles.layer_obstacle` asks."""
    return None if kind in _KNOWN else "one of fastvit's layers"
