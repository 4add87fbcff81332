"""The Vision Transformer (arXiv:2010.11929), with timm's parameter names and methods.

Shape legend: B batch, N patches, P prefix tokens (CLS, registers), D width, H heads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvit import _seen, ops
from fastvit.layers import (
    ACT_LAYERS,
    Attention,
    AttentionPoolLatent,
    DropPath,
    LayerNorm,
    LayerScale,
    Mlp,
    PatchEmbed,
    causal_mask,
    fused_block,
    has_plain_layers,
    is_plain,
    take_indices,
)
from fastvit.pos_embed import (
    RelPosBias,
    join_axes,
    resample_pos_embed,
)
from fastvit.timm_methods import TimmMethods
from fastvit.variants import ViTConfig, check_choice

_POOL: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.mean(dim=1),
    "max": lambda x: x.amax(dim=1),
    "avgmax": lambda x: 0.5 * (x.amax(dim=1) + x.mean(dim=1)),
}


class Block(nn.Module):
    """Pre-norm encoder block. Source: ViT paper, equations 2 and 3.

    Args:
        cfg: of the whole model.
        drop_path: this block's own rate of stochastic depth.
        rel_pos: its relative position bias.
    """

    def __init__(self, cfg: ViTConfig, drop_path: float, rel_pos: RelPosBias | None) -> None:
        super().__init__()
        dim, init_values, drop = cfg.embed_dim, cfg.init_values, cfg.proj_drop_rate
        self.norm1 = LayerNorm(dim, cfg.norm_eps)
        self.attn = Attention(
            dim, cfg.num_heads, cfg.qkv_bias, cfg.qk_norm, cfg.proj_bias, cfg.attn_drop_rate, drop,
            cfg.norm_eps, rel_pos,
        )  # fmt: skip
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim, cfg.norm_eps)
        self.mlp = Mlp(dim, int(dim * cfg.mlp_ratio), cfg.act_layer, cfg.proj_bias, drop)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """[B, P + N, D] to the same; `attn_mask` as in `ops.attention`.

        Where a layer has a hook or was replaced, every layer is called on its own.
        """
        if _seen.keep(self, has_plain_layers):
            return fused_block(self, x, self.attn.add_rel_pos(attn_mask))
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(TimmMethods):
    """Images to class scores or features.

    Args:
        options: fields of `ViTConfig`, which says what each does.

    Raises:
        ValueError: an unknown choice, or sizes that do not fit one another.
        TypeError: an unknown option.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        cfg = ViTConfig(**options)
        check_choice("act_layer", cfg.act_layer, ACT_LAYERS)
        dim, relative = cfg.embed_dim, cfg.pos_embed == "relative"
        self.default_cfg = self.pretrained_cfg = dict[str, Any]()
        self.num_classes, self.in_chans = cfg.num_classes, cfg.in_chans
        self.embed_dim = self.num_features = self.head_hidden_size = dim
        self.global_pool, self.pool_include_prefix = cfg.global_pool, cfg.pool_include_prefix
        self.has_class_token, self.num_reg_tokens = cfg.class_token, cfg.reg_tokens
        self.num_prefix_tokens = int(cfg.class_token) + cfg.reg_tokens
        self.num_embedded_prefix = 0 if cfg.no_embed_class else self.num_prefix_tokens
        self.no_embed_class, self.dynamic_img_size = cfg.no_embed_class, cfg.dynamic_img_size
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            cfg.img_size, cfg.patch_size, cfg.in_chans, dim,
            bias=not cfg.pre_norm, strict_img_size=not cfg.dynamic_img_size,
        )  # fmt: skip
        grid = self.patch_embed.grid_size

        def table(wanted: bool, rows: int, width: int = dim) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(1, rows, width)) if wanted else None

        def norm(wanted: bool) -> nn.Module:
            return LayerNorm(dim, cfg.norm_eps) if wanted else nn.Identity()

        self.cls_token = table(cfg.class_token, 1)
        self.reg_token = table(cfg.reg_tokens > 0, cfg.reg_tokens)
        rows = self.patch_embed.num_patches + self.num_embedded_prefix
        self.pos_embed = table(cfg.pos_embed == "learned", rows)
        self.pos_embed_x = table(cfg.pos_embed == "2d", grid[1], dim // 2)
        self.pos_embed_y = table(cfg.pos_embed == "2d", grid[0], dim // 2)
        self.pos_drop = nn.Dropout(cfg.pos_drop_rate)
        self.norm_pre = norm(cfg.pre_norm)
        blocks = []
        for i in range(cfg.depth):
            drop_path = cfg.drop_path_rate * i / max(cfg.depth - 1, 1)
            bias = RelPosBias(grid, cfg.num_heads, self.num_prefix_tokens) if relative else None
            blocks.append(Block(cfg, drop_path, bias))
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm(cfg.final_norm and not cfg.norm_after_pool)
        self.attn_pool = None
        if cfg.global_pool == "map":
            self.attn_pool = AttentionPoolLatent(
                dim, cfg.num_heads, cfg.mlp_ratio, cfg.act_layer, cfg.norm_eps
            )
        self.fc_norm = norm(cfg.final_norm and cfg.norm_after_pool)
        self.pre_logits = nn.Identity()
        if cfg.head == "mlp":
            self.pre_logits = nn.Sequential(OrderedDict(fc=nn.Linear(dim, dim), act=nn.Tanh()))
        self.head_drop = nn.Dropout(cfg.drop_rate)
        self.head = nn.Linear(dim, cfg.num_classes) if cfg.num_classes > 0 else nn.Identity()
        if cfg.weight_init != "skip":
            self.init_weights()

    def init_weights(self) -> None:
        """Start as timm does: truncated normals of 0.02, zero biases, 1e-6 for prefix tokens; the
        patch projection keeps PyTorch's default."""
        for embedding in (self.pos_embed, self.pos_embed_x, self.pos_embed_y):
            if embedding is not None:
                nn.init.trunc_normal_(embedding, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.attn_pool is not None:
            std = self.embed_dim**-0.5
            nn.init.trunc_normal_(self.attn_pool.latent, std=std, a=-2 * std, b=2 * std)

    def _position(self, grid: tuple[int, int]) -> Tensor | None:
        """[N, D] or [P + N, D] for a grid of patches."""
        if self.pos_embed_x is not None and self.pos_embed_y is not None:
            table, prefix = join_axes(self.pos_embed_x, self.pos_embed_y), 0
        elif self.pos_embed is not None:
            table, prefix = self.pos_embed, self.num_embedded_prefix
        else:
            return None
        return resample_pos_embed(table, grid, self.patch_embed.grid_size, prefix)[0]

    def _prefix(self) -> Tensor | None:  # (P, D): CLS and register tokens
        tokens = [token[0] for token in (self.cls_token, self.reg_token) if token is not None]
        return torch.cat(tokens) if tokens else None

    def _embed(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to what the first block takes, [B, P + N, D]."""
        patch_embed = self.patch_embed
        patch_embed.check_images(images)
        grid = patch_embed.dynamic_feat_size(images.shape[2:])
        if not is_plain(patch_embed):
            return self._add_positions(patch_embed(images), grid)
        mean = std = None
        if images.dtype == torch.uint8:
            mean, std = self.default_cfg.get("mean"), self.default_cfg.get("std")
            if mean is None or std is None:
                raise ValueError("uint8 images need 'mean' and 'std' in model.default_cfg")
        x = ops.patch_embed(
            images, patch_embed.proj.weight, patch_embed.proj.bias, mean=mean, std=std,
            pos_embed=self._position(grid), prefix=self._prefix(),
        )  # fmt: skip
        return self.norm_pre(self.pos_drop(x))

    def _add_positions(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Projected patches [B, N, D] to what the first block takes, [B, P + N, D]."""
        position, prefix = self._position(grid), self._prefix()
        if position is not None and position.shape[0] == x.shape[1]:
            x, position = x + position, None
        x = x if prefix is None else torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
        x = x if position is None else x + position
        return self.norm_pre(self.pos_drop(x))

    def _run_block(self, block: nn.Module, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, attn_mask, use_reentrant=False)  # pyright: ignore
        return block(x, attn_mask)

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens after the blocks and, unless `fc_norm`, the final norm.

        Args:
            x: [B, C, H, W] of the weights' dtype, normalised; or uint8, which `default_cfg`'s mean
                and std then normalise.
            attn_mask: broadcasts to [B, H, P + N, P + N]; bool (True takes part) or added values.
            is_causal: a token sees itself and earlier ones only.

        Returns:
            [B, P + N, D].

        Raises:
            ValueError: an image size that the model does not take, `attn_mask` with `is_causal`.
            TypeError: images of another dtype.
        """
        x = self._embed(x)
        attn_mask = causal_mask(x, attn_mask) if is_causal else attn_mask
        if attn_mask is None and not self.grad_checkpointing:
            return self.norm(self.blocks(x))
        for block in self.blocks:
            x = self._run_block(block, x, attn_mask)
        return self.norm(x)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """[B, P + N, D] to [B, D], or unchanged for ``""``."""
        pool_type = self.global_pool if pool_type is None else pool_type
        if self.attn_pool is None and pool_type in ("", "token"):
            return x[:, 0] if pool_type else x
        x = x if self.pool_include_prefix else x[:, self.num_prefix_tokens :]
        return _POOL[pool_type](x) if self.attn_pool is None else self.attn_pool(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, P + N, D] to [B, num_classes]; what the last linear takes with `pre_logits`."""
        x = self.head_drop(self.pre_logits(self.fc_norm(self.pool(x))))
        return x if pre_logits else self.head(x)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, C, H, W] to [B, num_classes]; arguments as in `forward_features`."""
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Features after some blocks, as timm's method of this name gives them.

        Args:
            x, attn_mask, is_causal: as in `forward_features`.
            indices: blocks to take; a number for the last so many, None for all.
            return_prefix_tokens: give prefix tokens [B, P, D] beside the patches.
            norm: apply the final norm to each.
            stop_early: do not run blocks after the last one taken.
            output_fmt: ``NCHW`` for [B, D, gh, gw], ``NLC`` for [B, N, D].
            intermediates_only: leave out the final features.
            output_dict: a dict with ``image_intermediates``, and ``image_intermediates_prefix``
                and ``image_features`` where asked for.

        Returns:
            (final features [B, P + N, D], list of features), the list alone, or the dict; with
            prefix tokens the list has pairs.

        Raises:
            ValueError: an index out of range or an unknown format.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take = take_indices(len(self.blocks), indices)
        img_size, x = x.shape[2:], self._embed(x)
        attn_mask = causal_mask(x, attn_mask) if is_causal else attn_mask
        taken = []
        for i, block in enumerate(self.blocks):
            if stop_early and i > max(take):
                break
            x = self._run_block(block, x, attn_mask)
            if i in take:
                taken.append(self.norm(x) if norm else x)
        p = self.num_prefix_tokens
        prefixes, features = [y[:, :p] for y in taken], [y[:, p:] for y in taken]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size(img_size)
            features = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in features]
        with_prefix = return_prefix_tokens and p > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": features}
            if with_prefix:
                result["image_intermediates_prefix"] = prefixes
            return result if intermediates_only else {**result, "image_features": self.norm(x)}
        found = list(zip(features, prefixes, strict=True)) if with_prefix else features
        return found if intermediates_only else (self.norm(x), found)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list[Any]:
        """`forward_intermediates` under DINO's name and arguments."""
        output_fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, False, output_fmt, True, attn_mask=attn_mask
        )
