# pyright: reportPrivateImportUsage=false
"""timm's models on our kernels: pixels to tokens in one of them, `precision` and `cuda_graphs`.

Shape legend: B batch, C channels, N patch tokens, P prefix tokens, D width.
"""

from __future__ import annotations

import functools
from typing import Any

from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer, checkpoint, checkpoint_seq
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from fastvit.accelerate import graphs
from fastvit.accelerate.block import fast
from fastvit.accelerate.precision import at_precision
from fastvit.accelerate.timm.embed import embed_tokens


class _FastModel(graphs.Graphed):
    """Base of the models: `precision` and `cuda_graphs`."""

    def _features(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        timm: Any = super()
        return timm.forward_features(x, *args, **kwargs)

    def _run(self, block: nn.Module, x: Tensor, **options: Any) -> Tensor:
        """`block`, and again in the backward pass where checkpointing is on."""
        checkpointed = self.grad_checkpointing
        return checkpoint(block, x, **options) if checkpointed else block(x, **options)

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As timm's: [B, C, H, W] to [B, P+N, D]."""
        return at_precision(self, self._features, x, *args, **kwargs)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As timm's."""
        timm: Any = super()
        return at_precision(self, timm.forward_intermediates, x, *args, **kwargs)

    def _forward(self, x: Any, **options: Any) -> Tensor:
        """timm's forward with those options that are given: its older versions know fewer."""
        timm: Any = super()
        forward = functools.partial(at_precision, self, timm.forward)
        given = {k: v for k, v in options.items() if v is not None and v is not False}
        return graphs.run(self, forward, x, **given)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to logits [B, classes]."""
        return self._forward(x)


class _MaskedModel(_FastModel):
    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, C, H, W] to logits [B, classes]."""
        return self._forward(x, attn_mask=attn_mask, is_causal=is_causal)


@fast(VisionTransformer)
class FastVisionTransformer(_MaskedModel, VisionTransformer):
    """timm's `VisionTransformer`, from pixels to finished tokens in one kernel."""

    def _prefix_tokens(self) -> tuple[Tensor | None, ...]:
        return self.cls_token, self.reg_token

    def _features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        tokens = None if is_causal is not False else embed_tokens(self, x, *self._prefix_tokens())
        if tokens is None:
            return super()._features(x, **_mask_options(attn_mask, is_causal))
        x = self.norm_pre(self.patch_drop(self.pos_drop(tokens)))
        if attn_mask is not None:
            for block in self.blocks.children():
                x = block(x, attn_mask=attn_mask)
        elif self.grad_checkpointing:
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)


@fast(VisionTransformerDistilled)
class FastVisionTransformerDistilled(FastVisionTransformer, VisionTransformerDistilled):
    """timm's `VisionTransformerDistilled`, as `FastVisionTransformer`."""

    def _prefix_tokens(self) -> tuple[Tensor | None, ...]:
        return self.cls_token, self.dist_token


@fast(Eva)
class FastEva(_MaskedModel, Eva):
    """timm's `Eva`, from pixels to finished tokens in one kernel."""

    def _features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        options = _mask_options(attn_mask, is_causal)
        tokens = None
        if self.patch_drop is None:  # it drops positions too
            tokens = embed_tokens(self, x, self.cls_token, self.reg_token)
        if tokens is None:
            return super()._features(x, **options)
        ropes = self._rope(x)
        if ropes is None or not getattr(self, "rope_mixed", False):  # else each block has its own
            ropes = [ropes] * len(self.blocks)
        x = self.norm_pre(self.pos_drop(tokens))
        for block, rope in zip(self.blocks, ropes, strict=False):
            x = self._run(block, x, rope=rope, **options)
        return self.norm(x)

    def _rope(self, images: Tensor) -> Any:
        """Rotary positions as timm's `_pos_embed` gets them, or None."""
        rope: Any = self.rope
        if rope is None:
            return None
        if self.dynamic_img_size:
            height, width = images.shape[2:]
            return rope.get_embed(shape=self.patch_embed.dynamic_feat_size((height, width)))
        if hasattr(rope, "feat_shape"):
            return rope.get_embed()
        return rope.get_embed(shape=self.patch_embed.grid_size)


@fast(Beit)
class FastBeit(_FastModel, Beit):
    """timm's `Beit`, from pixels to finished tokens in one kernel."""

    def _features(self, x: Tensor) -> Tensor:
        tokens = embed_tokens(self, x, self.cls_token)
        if tokens is None:
            return super()._features(x)
        x = self.pos_drop(tokens)
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias()
        for block in self.blocks:
            x = self._run(block, x, shared_rel_pos_bias=shared)
        return self.norm(x)


@fast(VisionTransformerRelPos)
class FastVisionTransformerRelPos(_FastModel, VisionTransformerRelPos):
    """timm's `VisionTransformerRelPos`, from pixels to finished tokens in one kernel."""

    def _features(self, x: Tensor) -> Tensor:
        tokens = embed_tokens(self, x, self.cls_token)
        if tokens is None:
            return super()._features(x)
        x = tokens
        shared = None if self.shared_rel_pos is None else self.shared_rel_pos.get_bias()
        for block in self.blocks:
            x = self._run(block, x, shared_rel_pos=shared)
        return self.norm(x)


@fast(NaFlexVit)
class FastNaFlexVit(_FastModel, NaFlexVit):
    """timm's `NaFlexVit`."""

    def forward(
        self,
        x: Tensor | dict[str, Tensor],
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Images, patches or a dict of patches, as timm's, to logits [B, classes]."""
        return self._forward(
            x, patch_coord=patch_coord, patch_valid=patch_valid, attn_mask=attn_mask
        )

    def forward_features(self, patches: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As timm's."""
        return super().forward_features(patches, *args, **kwargs)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    VisionTransformer: FastVisionTransformer,
    VisionTransformerDistilled: FastVisionTransformerDistilled,
    Eva: FastEva,
    Beit: FastBeit,
    VisionTransformerRelPos: FastVisionTransformerRelPos,
    NaFlexVit: FastNaFlexVit,
}


def _mask_options(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """As keywords, and only what is given: timm before 1.0.26 knows no `is_causal`."""
    options: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
    return options | ({} if is_causal is False else {"is_causal": is_causal})
