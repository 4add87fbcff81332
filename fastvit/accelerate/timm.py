# pyright: reportPrivateImportUsage=false
"""timm's Vision Transformers: which of their modules run on our kernels, and how; their patch
embedding, and the models themselves.

Shape legend: B batch, C channels, N patch tokens, P prefix tokens, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, ClassVar

from fastvit._compat import import_timm

import_timm()  # before all else of timm; unpickling an accelerated model comes here first

# ruff: noqa: E402
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, PatchEmbed, RmsNorm
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer, checkpoint, checkpoint_seq
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from fastvit import ops
from fastvit.accelerate import graphs, single, timm_blocks
from fastvit.accelerate.block import (
    applies,
    block_part,
    fast,
    fast_class,
    library_class,
    make_row,
    model_parts,
    original_of,
)
from fastvit.accelerate.plan import Part
from fastvit.accelerate.precision import at_precision
from fastvit.accelerate.timm_blocks import FastBlock
from fastvit.obstacles import (
    Obstacle,
    conv_obstacle,
    global_hook,
    is_traced,
    module_obstacle,
    patched,
    wanted_of,
)
from fastvit.parts import weights_of
from fastvit.pos_embed import resample_pos_embed

__all__ = ["FAST", "FastBlock", "find"]

# --------------------------------------------------------------------------- patch embedding

METHODS = ("_pos_embed", "forward_features")  # what a model's fast class does not call


def _single_obstacle(module: nn.Module, *expected: type) -> Obstacle | None:
    """Why an op may not stand in for calling `module`, which should be of a class `expected`."""
    return module_obstacle(module, wanted_of(expected, type(module)))


def patch_obstacle(embed: Any) -> Obstacle | None:
    """Why `embed`, of timm's exact class `PatchEmbed`, runs timm's forward now; None if it need
    not. Its norm may be any."""
    found = _single_obstacle(embed.proj, nn.Conv2d)
    if found is not None:
        return found.within("proj")
    if (found := conv_obstacle(embed.proj)) is not None:
        return found
    if not embed.flatten and embed.output_fmt != "NHWC":
        return Obstacle(f"output format is {embed.output_fmt.value}", lasting=True)
    return global_hook()


def embeds_positions(vit: Any) -> bool:
    """Whether one kernel can do all of a model's embedding now, exactly."""
    embed = getattr(vit, "patch_embed", None)
    if isinstance(vit, VisionTransformer) and vit.pos_embed is None:
        return False  # timm's versions differ in what prefix tokens there are then
    return (
        isinstance(embed, PatchEmbed)
        and not is_traced()
        and _single_obstacle(embed, PatchEmbed, FastPatchEmbed) is None
        and patched(PatchEmbed) is None
        and _single_obstacle(embed.norm, nn.Identity) is None
        and patched(library_class(vit), *METHODS) is None
        and not any(name in vit.__dict__ for name in METHODS)
        and embed.flatten != getattr(vit, "dynamic_img_size", False)  # else timm's path objects
        and patch_obstacle(embed) is None
    )


def embed_tokens(vit: Any, x: Tensor, prefix: Iterable[str]) -> Tensor | None:
    """A model's patch embedding, positions and prefix tokens: [B, C, H, W] to [B, P+N, D]; None
    where timm's own way is to run.

    Args:
        vit: with timm's names, ``patch_embed`` and where it has them ``pos_embed, no_embed_class``.
        x: images.
        prefix: names of tokens [1, 1 or more, D], in their order; a model may lack some.
    """
    pixels = pixels_of(vit.patch_embed, x) if embeds_positions(vit) else None
    if pixels is None:
        return None
    proj = vit.patch_embed.proj
    grid = (pixels.shape[2] // proj.kernel_size[0], pixels.shape[3] // proj.kernel_size[1])
    pos_embed = getattr(vit, "pos_embed", None)
    if pos_embed is not None:
        own_positions = 0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens
        if getattr(vit, "dynamic_img_size", False):
            pos_embed = resample_pos_embed(
                pos_embed, grid, vit.patch_embed.grid_size, own_positions
            )
        if pos_embed.shape[1] != grid[0] * grid[1] + own_positions:
            return None  # timm says what is wrong
    tokens = [getattr(vit, name, None) for name in prefix]
    tokens = [token for token in tokens if token is not None]
    return ops.patch_embed(
        pixels,
        proj.weight,
        proj.bias,
        pos_embed=None if pos_embed is None else pos_embed[0],
        prefix=torch.cat(tokens, dim=1)[0] if tokens else None,
    )


def pixels_of(embed: Any, images: Tensor) -> Tensor | None:
    """Images to cut into patches, or None where timm's own forward has to pad, crop or object."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() != 4:
        return None
    height, width = images.shape[2:]
    if embed.img_size is not None and embed.strict_img_size and (height, width) != embed.img_size:
        return None
    patch_h, patch_w = embed.patch_size
    if embed.dynamic_img_pad:
        return F.pad(images, (0, -width % patch_w, 0, -height % patch_h))
    return None if height % patch_h or width % patch_w else images


@fast(PatchEmbed)
class FastPatchEmbed(PatchEmbed):
    """timm's `PatchEmbed` on our kernel: projection and bias; the models' classes add more."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) to (B, N, D) or (B, H/p, W/p, D)
        fused = applies(self, x) and patch_obstacle(self) is None
        pixels = pixels_of(self, x) if fused else None
        if pixels is None:
            return super().forward(x)
        tokens = ops.patch_embed(pixels, self.proj.weight, self.proj.bias)
        if not self.flatten:
            tokens = tokens.unflatten(1, (-1, pixels.shape[3] // self.proj.kernel_size[1]))
        return self.norm(tokens)


@fast(nn.Linear)
class FastLinear(nn.Linear):
    """torch's `Linear`, where it embeds patches."""

    def forward(self, input: Tensor) -> Tensor:
        if not applies(self, input) or _single_obstacle(self, FastLinear):
            return super().forward(input)
        return ops.linear(input, *weights_of(self))


# --------------------------------------------------------------------------- models


class _FastModel(graphs.Graphed):
    """Base of the models: one kernel from pixels to finished tokens, `precision`, `cuda_graphs`."""

    prefix: ClassVar = ("cls_token", "reg_token")
    norm: Any

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As timm's: [B, C, H, W] to [B, P+N, D]."""
        return at_precision(self, self._features, x, *args, **kwargs)

    def _features(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        timm: Any = super()
        tokens = self._tokens(x, **kwargs)
        if tokens is None:
            return timm.forward_features(x, *args, **kwargs)
        return self.norm(self._encode(tokens, x, **kwargs))

    def _tokens(self, x: Tensor, **options: Any) -> Tensor | None:
        """[B, C, H, W] to [B, P+N, D], or None where timm's own way is to run."""
        return embed_tokens(self, x, self.prefix)

    def _encode(self, tokens: Tensor, images: Tensor) -> Tensor:
        """All that timm does from embedded tokens [B, P+N, D] to the last norm."""
        raise NotImplementedError

    def _run(self, blocks: Iterable[nn.Module], x: Tensor, **options: Any) -> Tensor:
        """`blocks`, and again in the backward pass where checkpointing is on."""
        for block in blocks:
            checkpointed = self.grad_checkpointing
            x = checkpoint(block, x, **options) if checkpointed else block(x, **options)
        return x

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As timm's."""
        timm: Any = super()
        return at_precision(self, timm.forward_intermediates, x, *args, **kwargs)

    def _forward(self, x: Any, **options: Any) -> Tensor:
        """timm's forward with those options that are given: its older versions know fewer."""
        timm: Any = super()
        forward = functools.partial(at_precision, self, timm.forward)
        return graphs.run(self, forward, x, **_given(options))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to logits [B, classes]."""
        return self._forward(x)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None and v is not False}


class _MaskedModel(_FastModel):
    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, C, H, W] to logits [B, classes]."""
        return self._forward(x, attn_mask=attn_mask, is_causal=is_causal)

    def _features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return super()._features(x, **_given({"attn_mask": attn_mask, "is_causal": is_causal}))


@fast(VisionTransformer)
class FastVisionTransformer(_MaskedModel, VisionTransformer):
    """timm's `VisionTransformer`."""

    def _tokens(self, x: Tensor, **options: Any) -> Tensor | None:
        return None if "is_causal" in options else super()._tokens(x)

    def _encode(self, tokens: Tensor, images: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = self.norm_pre(self.patch_drop(self.pos_drop(tokens)))
        if attn_mask is None:
            return checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        for block in self.blocks.children():
            x = block(x, attn_mask=attn_mask)
        return x


@fast(VisionTransformerDistilled)
class FastVisionTransformerDistilled(FastVisionTransformer, VisionTransformerDistilled):
    """timm's `VisionTransformerDistilled`."""

    prefix = "cls_token", "dist_token"


@fast(Eva)
class FastEva(_MaskedModel, Eva):
    """timm's `Eva`."""

    def _tokens(self, x: Tensor, **options: Any) -> Tensor | None:
        return super()._tokens(x) if self.patch_drop is None else None  # it drops positions too

    def _encode(self, tokens: Tensor, images: Tensor, **options: Any) -> Tensor:
        x, ropes = self.norm_pre(self.pos_drop(tokens)), self._rope(images)
        if ropes is None or not getattr(self, "rope_mixed", False):  # else each block has its own
            return self._run(self.blocks, x, rope=ropes, **options)
        for block, rope in zip(self.blocks, ropes, strict=False):
            x = self._run([block], x, rope=rope, **options)
        return x

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
    """timm's `Beit`."""

    def _encode(self, tokens: Tensor, images: Tensor) -> Tensor:
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias()
        return self._run(self.blocks, self.pos_drop(tokens), shared_rel_pos_bias=shared)


@fast(VisionTransformerRelPos)
class FastVisionTransformerRelPos(_FastModel, VisionTransformerRelPos):
    """timm's `VisionTransformerRelPos`."""

    def _encode(self, tokens: Tensor, images: Tensor) -> Tensor:
        shared = None if self.shared_rel_pos is None else self.shared_rel_pos.get_bias()
        return self._run(self.blocks, tokens, shared_rel_pos=shared)


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


_MODELS: dict[type[nn.Module], type[nn.Module]] = {
    VisionTransformer: FastVisionTransformer,
    VisionTransformerDistilled: FastVisionTransformerDistilled,
    Eva: FastEva,
    Beit: FastBeit,
    VisionTransformerRelPos: FastVisionTransformerRelPos,
    NaFlexVit: FastNaFlexVit,
}
FAST: dict[type[nn.Module], type[nn.Module]] = (
    single.FAST
    | _MODELS
    | timm_blocks.FAST
    | {kind: fast_class(kind, single.FastNorm, globals()) for kind in (LayerNorm, RmsNorm)}
    | {PatchEmbed: FastPatchEmbed, nn.Linear: FastLinear}
)

# --------------------------------------------------------------------------- the plan


def find(model: nn.Module) -> list[Part]:
    """The modules inside `model` that this file knows, fused or not, in the model's order."""
    parts: list[Part] = []
    roles: dict[nn.Module, str] = {}  # of the children of timm's models
    for name, module in model.named_modules():
        kind = original_of(type(module))
        if kind in _MODELS:
            found = patched(kind, "forward", *METHODS)
            parts += model_parts(name, module, FAST[kind], "timm", found)
            roles |= _roles(module)
        elif (part := _part(name, module, kind, roles.get(module, ""))) is not None:
            parts.append(part)
    return parts


def _roles(vit: Any) -> dict[nn.Module, str]:
    roles = {child: role for role, child in vit.named_children()}
    if embeds_positions(vit):
        roles[vit.patch_embed] = "patch_embed with positions"
    if hasattr(vit, "embeds"):  # NaFlex
        roles[vit.embeds.proj] = "embeds.proj"
    return roles


def _is_block(module: nn.Module, kind: type[nn.Module]) -> bool:
    of_timm = kind.__module__.startswith("timm.") and kind.__name__.endswith("Block")
    return of_timm or isinstance(module, tuple(timm_blocks.BLOCKS))


def _part(name: str, module: Any, kind: type[nn.Module], role: str) -> Part | None:  # noqa: PLR0911
    """None for a module of no interest."""

    def single_part(runs: str, obstacle: Obstacle | None) -> Part:
        return single.layer_part(name, module, FAST.get(kind), runs, "timm", obstacle)

    if kind in timm_blocks.FAST:
        is_block = kind in timm_blocks.BLOCKS
        return block_part(name, module, FAST[kind], _ops_of(module), "timm", is_block)
    if kind is PatchEmbed:
        positions = ", positions and prefix tokens" if role.endswith("positions") else ""
        return single_part(f"patch_embed{positions}", patch_obstacle(module))
    if role == "embeds.proj" and kind is nn.Conv2d:
        return single_part("patch_embed", conv_obstacle(module))
    if role == "embeds.proj" and kind is nn.Linear:
        return single_part("linear", _single_obstacle(module, kind, FAST[kind]))
    if role in ("norm_pre", "norm", "fc_norm") and kind is not nn.Identity:
        return single_part(_norm_op(kind), _norm_obstacle(module, kind))
    if _is_block(module, kind) or role in ("patch_embed", "embeds.proj", "attn_pool"):
        obstacle = Obstacle(f"{kind.__name__} has no fused form yet", lasting=True)
        row = make_row(name, kind, "", "timm", obstacle, block=_is_block(module, kind))
        return Part(module, None, row)
    return None


def _norm_op(kind: type[nn.Module]) -> str:
    return "rms_norm" if kind in timm_blocks.RMS_NORM else "layer_norm"


def _norm_obstacle(norm: Any, kind: type[nn.Module]) -> Obstacle | None:
    if kind not in FAST:
        return Obstacle(f"{kind.__name__} is not fused; LayerNorm and RmsNorm are", lasting=True)
    if getattr(norm, "_fast_norm", False):
        return Obstacle("timm's fast norm keeps to autocast's dtype", lasting=True)
    return None


def _ops_of(block: nn.Module) -> str:
    """Names of our ops that a block or an attention pooling runs, by its layers' classes."""
    found = {type(module) for module in block.modules()}
    layers = dict(block.named_modules())
    norms = sorted({_norm_op(kind) for kind in found & timm_blocks.NORM})
    normed = any(
        name.endswith("q_norm") and type(layer) is not nn.Identity for name, layer in layers.items()
    )
    one_linear = any(name.endswith(("qkv", "in_proj")) for name in layers)
    differential = found & (timm_blocks.DIFF_ATTENTION | timm_blocks.DIFF_PARALLEL)
    packed = one_linear and not normed and not differential
    attention = "attention_qkv" if packed else "attention"
    mlp = ["mlp"] if timm_blocks.Mlp in found else []
    return ", ".join([*norms, "linear", attention, *mlp])
