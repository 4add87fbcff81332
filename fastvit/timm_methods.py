"""The methods by which timm's scripts, and ours, handle a model for training or as a backbone.

Shape legend: D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastvit.layers import take_indices, to_2tuple
from fastvit.pos_embed import parameter_like, resample_patch_embed, resize_positions
from fastvit.variants import POOLS, check_choice


class TimmMethods(nn.Module):
    """Of `fastvit.vit.VisionTransformer`, under timm's names."""

    patch_embed: Any
    embed_dim: int

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone (beside 1-D ones)."""
        embeddings = {"pos_embed", "pos_embed_x", "pos_embed_y", "cls_token", "reg_token"}
        tables = {n for n, _ in self.named_parameters() if n.endswith("position_bias_table")}
        return embeddings | tables

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names, by which timm's optimizers tell the layers apart (for
        layer-wise learning rates); a block is one layer, `coarse` or not."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Leave out what `forward_intermediates` of some blocks does not need.

        Args:
            indices: blocks to take; a number for the last so many.
            prune_norm: the final norm goes.
            prune_head: pooling and head go.

        Returns:
            The numbers of the blocks that are taken.

        Raises:
            ValueError: an index out of range.
        """
        take = take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max(take) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only block inputs for the backward pass, and run each block again there."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, *, zero_init: bool = False
    ) -> None:
        """A new linear head, in place of an MLP head too.

        Args:
            num_classes: 0 for no head.
            global_pool: also change the pooling; norms stay where they are.
            zero_init: start from zeros, as the paper fine-tunes (section 3.2), rather than from
                PyTorch's default as timm does.

        Raises:
            ValueError: a pooling that the model has no parameters for.
        """
        if global_pool is not None:
            check_choice("global_pool", global_pool, POOLS)
            if global_pool == "token" and not self.has_class_token:
                raise ValueError("global_pool='token' needs a class token")
            if global_pool == "map" and self.attn_pool is None:
                raise ValueError("global_pool='map' cannot be added later: build the model with it")
            self.attn_pool = self.attn_pool if global_pool == "map" else None
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.pre_logits, self.head = nn.Identity(), nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.embed_dim, num_classes).to(next(self.parameters()))
            if zero_init:
                nn.init.zeros_(self.head.weight)
                nn.init.zeros_(self.head.bias)
        self.head.train(self.training)

    def set_input_size(
        self,
        img_size: int | Sequence[int] | None = None,
        patch_size: int | Sequence[int] | None = None,
    ) -> None:
        """Take images of another size from now on, or cut them into patches of another size.

        Position embeddings and the patch projection are resampled.

        Raises:
            ValueError: the patch does not divide the image; the model is then as it was.
        """
        pe, old_grid = self.patch_embed, self.patch_embed.grid_size
        new_img_size = pe.img_size if img_size is None else to_2tuple(img_size)
        new_patch_size = pe.patch_size if patch_size is None else to_2tuple(patch_size)
        pe.set_sizes(new_img_size, new_patch_size)
        proj = pe.proj
        if new_patch_size != proj.kernel_size:
            weight = resample_patch_embed(proj.weight, new_patch_size)
            proj.weight = parameter_like(proj.weight, weight)
            proj.kernel_size = proj.stride = new_patch_size
        resize_positions(self, old_grid)
