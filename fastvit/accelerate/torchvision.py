"""torchvision's ``vit_*``: their encoder blocks, patch projection and last norm on our kernels.

Shape legend: B batch, N tokens, D width.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastvit import ops
from fastvit._compat import import_torchvision
from fastvit.accelerate import graphs
from fastvit.accelerate.block import FastBlock, block_part, fast, model_parts, original_of
from fastvit.accelerate.plan import Part
from fastvit.accelerate.precision import at_precision
from fastvit.accelerate.single import FastPatchConv2d, find_single
from fastvit.obstacles import (
    Obstacle,
    conv_obstacle,
    global_hook,
    is_traced,
    layer_obstacle,
    mha_obstacle,
    module_obstacle,
    patched,
    wanted_by,
    wanted_of,
)
from fastvit.parts import Parts, activation_name, drop_or_none, packed_weights_of

import_torchvision()  # before all else of torchvision

from torchvision.models.vision_transformer import (  # noqa: E402
    Encoder,
    EncoderBlock,
    MLPBlock,
    VisionTransformer,
)

_CONV = frozenset({nn.Conv2d, FastPatchConv2d})
_LINEAR, _DROPOUT = frozenset({nn.Linear}), frozenset({nn.Dropout, nn.Identity})
_WANTED = wanted_by({
    "ATTENTION": frozenset({nn.MultiheadAttention}),
    "out_proj": frozenset({NonDynamicallyQuantizableLinear}), "MLP": frozenset({MLPBlock}),
    "0": _LINEAR, "1": frozenset({nn.GELU, nn.ReLU, nn.SiLU}), "2": _DROPOUT, "3": _LINEAR,
    "4": _DROPOUT,
})  # fmt: skip


@fast(EncoderBlock)
class FastEncoderBlock(FastBlock, EncoderBlock):
    """torchvision's `EncoderBlock` on our kernels."""

    @staticmethod
    def take_apart(block: Any) -> Parts | Obstacle:
        """Of an `EncoderBlock`."""
        attn, mlp = block.self_attention, block.mlp
        found = layer_obstacle(block, _WANTED) or mha_obstacle(attn)
        return found or Parts(
            block.ln_1, attn, (attn,), attn.num_heads, attn.out_proj,
            block.ln_2, mlp[0], activation_name(mlp[1]), mlp[3],
            qkv_weights=packed_weights_of, dropout=attn.dropout,
            drop1=drop_or_none(block.dropout),
            hidden_drop=drop_or_none(mlp[2]), drop2=drop_or_none(mlp[4]),
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        parts = self.examine(input)
        if parts is None or input.dim() != 3:
            return super().forward(input)
        return self.run(parts, input)


@fast(VisionTransformer)
class FastVisionTransformer(graphs.Graphed, VisionTransformer):
    """torchvision's `VisionTransformer`: from pixels to tokens with their positions in one kernel,
    `precision` and `cuda_graphs`."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to logits [B, classes]."""
        return graphs.run(self, functools.partial(at_precision, self, self._forward), x)

    def _forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not embeds_positions(self, x):
            return super().forward(x)
        encoder: Any = self.encoder
        conv: Any = self.conv_proj
        tokens = ops.patch_embed(
            x, conv.weight, conv.bias,
            pos_embed=encoder.pos_embedding[0], prefix=self.class_token[0],
        )  # fmt: skip
        return self.heads(encoder.ln(encoder.layers(encoder.dropout(tokens)))[:, 0])


def embeds_positions(vit: Any, x: Tensor) -> bool:
    """Whether one kernel can do all of a `VisionTransformer` up to the first block, exactly."""
    size = vit.image_size
    fits = x.is_floating_point() and x.dim() == 4 and x.shape[2:] == (size, size)
    return fits and not is_traced() and model_obstacle(vit) is None


def model_obstacle(vit: Any) -> Obstacle | None:
    """Why a `VisionTransformer` embeds pixels as torchvision does."""
    for name, expected in (("conv_proj", _CONV), ("encoder", {Encoder})):
        module = vit._modules[name]
        found = module_obstacle(module, wanted_of(expected, type(module)))
        if found is not None:
            return found.within(name)
    if "_process_input" in vit.__dict__:
        return Obstacle("has a _process_input of its own", lasting=False)
    found = patched(VisionTransformer, "forward", "_process_input") or patched(nn.Conv2d)
    return found or conv_obstacle(vit.conv_proj) or global_hook()


FAST: dict[type[nn.Module], type[nn.Module]] = {
    EncoderBlock: FastEncoderBlock,
    VisionTransformer: FastVisionTransformer,
}


def find(model: nn.Module) -> list[Part]:
    """The blocks, patch projections and last norms of torchvision's ViTs inside `model`."""
    parts: list[Part] = []
    single: set[Any] = set()
    module: Any
    for name, module in model.named_modules():
        kind = original_of(type(module))
        if isinstance(module, VisionTransformer):
            inner = module._modules
            single |= {inner["conv_proj"], getattr(inner["encoder"], "ln", None)}
            if kind is VisionTransformer:
                obstacle = model_obstacle(module)
                parts += model_parts(name, module, FAST[kind], "torchvision", obstacle)
        if module in single:
            part = find_single(name, module, "torchvision")
            parts += [] if part is None else [part]
        if issubclass(kind, EncoderBlock):
            fast = FAST.get(kind) or Obstacle(
                f"{kind.__name__} is not torchvision's own block", lasting=True
            )
            parts.append(block_part(name, module, fast, None, "torchvision"))
    return parts
