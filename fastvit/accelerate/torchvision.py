"""torchvision's ``vit_*``: their encoder blocks, patch projection and last norm on our kernels.

Each fast class is a subclass of torchvision's; where a layer of a block carries a hook or has been
replaced, that block runs torchvision's forward.

Shape legend: B batch, N tokens, D width.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from fastvit import layers, ops
from fastvit._compat import import_torchvision
from fastvit.accelerate import common, graphs
from fastvit.accelerate.common import GLOBAL_HOOK, Obstacle
from fastvit.accelerate.plan import Part

import_torchvision()  # before all else of torchvision

from torchvision.models.vision_transformer import (  # noqa: E402
    EncoderBlock,
    MLPBlock,
    VisionTransformer,
)

_NORM = frozenset({nn.LayerNorm})
_LINEAR = frozenset({nn.Linear})
_DROPOUT = frozenset({nn.Dropout, nn.Identity})
_KINDS: dict[str, frozenset[type]] = {  # "0" to "4" are the MLP's
    "ln_1": _NORM, "self_attention": frozenset({nn.MultiheadAttention}),
    "out_proj": frozenset({NonDynamicallyQuantizableLinear}), "dropout": _DROPOUT, "ln_2": _NORM,
    "mlp": frozenset({MLPBlock}), "0": _LINEAR, "1": frozenset({nn.GELU, nn.ReLU, nn.SiLU}),
    "2": _DROPOUT, "3": _LINEAR, "4": _DROPOUT,
}  # fmt: skip


def _knows(name: str, kind: type) -> bool:
    return kind in _KINDS.get(name, ())


def block_obstacle(block: Any) -> Obstacle | None:
    """Why `block`, an `EncoderBlock`, runs torchvision's forward now."""
    if _has_any_global_hook():
        return GLOBAL_HOOK
    return common.layer_obstacle(block, _knows) or common.mha_obstacle(
        block.self_attention, "self_attention"
    )


class FastEncoderBlock(EncoderBlock):
    """torchvision's `EncoderBlock` on our kernels."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        if not isinstance(input, Tensor) or input.dim() != 3 or block_obstacle(self) is not None:
            return super().forward(input)
        attn, mlp = self.self_attention, self.mlp
        out = common.attend_mha(attn, layers.apply_norm(self.ln_1, input))
        x = common.add_branch(input, out, attn.out_proj, dropout=self.dropout)
        return common.add_mlp(
            x, layers.apply_norm(self.ln_2, x), mlp[0], layers.activation_name(mlp[1]), mlp[3],
            hidden_dropout=mlp[2], dropout=mlp[4],
        )  # fmt: skip


class FastVisionTransformer(graphs.Graphed, VisionTransformer):
    """torchvision's `VisionTransformer`: from pixels to tokens with their positions in one kernel,
    `precision` and `cuda_graphs`."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to logits [B, classes]."""
        return graphs.run(self, functools.partial(common.at_precision, self, self._forward), x)

    def _forward(self, x: Tensor) -> Tensor:
        encoder: Any = self.encoder
        conv: Any = self.conv_proj
        if not isinstance(x, Tensor) or not embeds_positions(self, x):
            return super().forward(x)
        tokens = ops.patch_embed(
            x, conv.weight, conv.bias,
            pos_embed=encoder.pos_embedding[0], prefix=self.class_token[0],
        )  # fmt: skip
        return self.heads(encoder.ln(encoder.layers(encoder.dropout(tokens)))[:, 0])


def embeds_positions(vit: Any, x: Tensor) -> bool:
    """Whether one kernel can do all of a `VisionTransformer` up to the first block, exactly."""
    conv, encoder = vit.conv_proj, vit.encoder
    plain = type(conv) in common.ORIGINAL and common.conv_obstacle(conv) is None
    hooked = any(
        state[kind]
        for state in (conv.__dict__, encoder.__dict__)
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    )
    fits = x.dim() == 4 and x.shape[2:] == (vit.image_size, vit.image_size)
    return plain and not hooked and fits and x.is_floating_point() and not _has_any_global_hook()


FAST: dict[type[nn.Module], type[nn.Module]] = {
    EncoderBlock: FastEncoderBlock,
    VisionTransformer: FastVisionTransformer,
}
ORIGINAL = common.ORIGINAL | {fast: original for original, fast in FAST.items()}


def find(model: nn.Module) -> list[Part]:
    """The blocks, patch projections and last norms of torchvision's ViTs inside `model`."""
    parts: list[Part] = []
    single: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, VisionTransformer):
            single |= {module.conv_proj, module.encoder.ln}
            kind = ORIGINAL.get(type(module), type(module))
            if kind is VisionTransformer:
                fast = FAST[kind]
                parts.append(Part(module, fast, row=None, graphed=fast))
        if module in single:
            part = common.find_single(name, module, "torchvision")
            parts += [] if part is None else [part]
        kind = ORIGINAL.get(type(module), type(module))
        if issubclass(kind, EncoderBlock):
            parts.append(_block_part(name, module, kind))
    return parts


def _block_part(name: str, block: nn.Module, kind: type) -> Part:
    obstacle = Obstacle(f"{kind.__name__} is not torchvision's own block", lasting=True)
    if kind in FAST:
        obstacle = block_obstacle(block)
    runs = "layer_norm, linear, attention_qkv, mlp"
    row = common.make_row(name, kind, runs, "torchvision", obstacle, block=True)
    stays = obstacle is not None and obstacle.lasting
    return Part(block, None if stays else FAST[kind], row)
