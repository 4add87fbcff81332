from typing import Any

import torch
from torch import Tensor, nn

from ..layers.block import Block, NestedTensorBlock
from ..layers.swiglu_ffn import SwiGLUFFN


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class DinoVisionTransformer(nn.Module):
    def __init__(
        self,
        size: int = 28,
        patch: int = 7,
        dim: int = 32,
        depth: int = 2,
        num_heads: int = 2,
        registers: int = 0,
        nested: bool = True,
        swiglu: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        if swiglu:
            options["ffn_layer"] = SwiGLUFFN
        block = NestedTensorBlock if nested else Block
        self.blocks = nn.ModuleList([block(dim, num_heads, **options) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]
