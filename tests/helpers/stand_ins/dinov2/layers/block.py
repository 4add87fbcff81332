from typing import Any

from torch import Tensor, nn

from .attention import Attention, MemEffAttention
from .layer_scale import DropPath, LayerScale
from .mlp import Mlp


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        drop: float = 0.0,
        drop_path: float = 0.0,
        scaled: bool = True,
        attn_class: type[Attention] = Attention,
        ffn_layer: Any = Mlp,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn_class(dim, num_heads, proj_drop=drop)
        self.ls1 = LayerScale(dim) if scaled else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ffn_layer(dim, 2 * dim, drop)
        self.ls2 = LayerScale(dim) if scaled else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()
        self.sample_drop_ratio = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        # both halves drop by the first module, as there
        return x + self.drop_path1(self.ls2(self.mlp(self.norm2(x))))


class NestedTensorBlock(Block):
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, attn_class=MemEffAttention, **options)

    def forward(self, x_or_x_list: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(x_or_x_list, Tensor):
            return super().forward(x_or_x_list)
        return [super(NestedTensorBlock, self).forward(x) for x in x_or_x_list]
