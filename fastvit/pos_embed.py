"""Position embeddings, and resampling them (and the patch projection) to other sizes.

Shape legend: N patches on a grid of gh rows and gw columns, P prefix tokens, D width, H heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize_grid(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """[1, D, h, w] to [1, D, *size], bicubic with antialiasing, in float32 at least."""
    wide = grid.to(torch.promote_types(grid.dtype, torch.float32))
    if wide.requires_grad and torch.compiler.is_compiling():
        # PyTorch cannot trace its gradient for sizes that vary; along each axis it is a product
        rows, columns = (_axis_weights(wide, axis, n) for axis, n in zip((2, 3), size, strict=True))
        return (rows @ wide @ columns.T).to(grid.dtype)
    return F.interpolate(wide, size=size, mode="bicubic", antialias=True).to(grid.dtype)


def _axis_weights(grid: Tensor, axis: int, size: int) -> Tensor:
    """[size, length of `axis`]: what each new entry along an axis takes of each old one."""
    unit = torch.eye(grid.shape[axis], dtype=grid.dtype, device=grid.device)[None, :, :, None]
    # two columns, because PyTorch 2.13 repeats the first row of an image that is one pixel wide
    wide = F.interpolate(unit.repeat(1, 1, 1, 2), size=(size, 2), mode="bicubic", antialias=True)
    return wide[0, :, :, 0].T


def resample_pos_embed(
    pos_embed: Tensor,
    new_grid: tuple[int, int],
    old_grid: tuple[int, int],
    num_prefix_tokens: int = 0,
) -> Tensor:
    """Position embedding for another grid of patches, prefix rows kept.

    Args:
        pos_embed: [1, P + old N, D].
        new_grid, old_grid: (gh, gw).
        num_prefix_tokens: P, rows at the front that belong to no patch.

    Returns:
        [1, P + new N, D]; `pos_embed` itself where the grids agree.

    Source: ViT paper (arXiv:2010.11929), section 3.2; bicubic with antialiasing as timm does it.
    """
    # comparing sizes that torch.export keeps dynamic would fix them to the example's
    if not any(isinstance(n, torch.SymInt) for n in new_grid) and new_grid == old_grid:
        return pos_embed
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    grid = patches.unflatten(1, old_grid).permute(0, 3, 1, 2)  # (1, D, gh, gw)
    patches = resize_grid(grid, new_grid).flatten(2).transpose(1, 2)
    return torch.cat([prefix, patches], dim=1)


def join_axes(x: Tensor, y: Tensor) -> Tensor:
    """The 2-D embedding: every patch gets its column's embedding and then its row's.

    Args:
        x: [1, gw, D/2], one entry a column.
        y: [1, gh, D/2], one entry a row.

    Returns:
        [1, gh * gw, D].

    Source: ViT paper (arXiv:2010.11929), appendix D.4.
    """
    gh, gw = y.shape[1], x.shape[1]
    columns = x[:, None].expand(-1, gh, -1, -1)
    rows = y[:, :, None].expand(-1, -1, gw, -1)
    return torch.cat([columns, rows], dim=-1).flatten(1, 2)


def resample_axis(axis: Tensor, size: int) -> Tensor:
    """One half of a 2-D embedding, [1, g, D/2], to [1, size, D/2]."""
    grid = axis.transpose(1, 2)[:, :, None]  # (1, D/2, 1, g)
    return resize_grid(grid, (1, size))[:, :, 0].transpose(1, 2)


def relative_position_index(grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Row of the bias table for every pair of tokens.

    Rows go by the offset between two patches, (2 gh - 1) (2 gw - 1) of them; then one for each
    prefix token looking at patches, one for patches looking at each prefix token, and one for each
    pair of prefix tokens. With one prefix token this is BEiT's and timm's order.

    Returns:
        int64 [P + N, P + N].
    """
    gh, gw = grid
    row, column = torch.arange(gh * gw) // gw, torch.arange(gh * gw) % gw
    d_row = row[:, None] - row + gh - 1
    d_column = column[:, None] - column + gw - 1
    p, first = num_prefix_tokens, (2 * gh - 1) * (2 * gw - 1)
    index = F.pad(d_row * (2 * gw - 1) + d_column, (p, 0, p, 0))
    number = torch.arange(p)
    index[:p] = first + number[:, None]
    index[:, :p] = first + p + number
    index[:p, :p] = first + 2 * p + number[:, None] * p + number
    return index


def relative_prefix_rows(num_prefix_tokens: int) -> int:
    """Rows of the bias table that are about prefix tokens."""
    return num_prefix_tokens * (2 + num_prefix_tokens)


def resample_rel_pos_table(
    table: Tensor, new_grid: tuple[int, int], old_grid: tuple[int, int], num_prefix_tokens: int
) -> Tensor:
    """[rows for old_grid, H] to [rows for new_grid, H]; rows of prefix tokens are kept."""
    if new_grid == old_grid:
        return table
    count = len(table) - relative_prefix_rows(num_prefix_tokens)
    offsets, rest = table[:count], table[count:]
    old, new = ((2 * gh - 1, 2 * gw - 1) for gh, gw in (old_grid, new_grid))
    offsets = resize_grid(offsets.T.unflatten(1, old)[None], new)[0].flatten(1).T
    return torch.cat([offsets, rest])


class RelPosBias(nn.Module):
    """A learned bias of the attention scores by head and by the 2-D offset of key from query.

    The paper's appendix D.4 makes a relative embedding an extra key; the plain bias is the form
    that Swin, BEiT and timm use. Names are timm's.

    Args:
        window_size: grid (gh, gw) of patches.
        num_heads: H.
        prefix_tokens: P.
    """

    relative_position_index: Tensor

    def __init__(self, window_size: tuple[int, int], num_heads: int, prefix_tokens: int = 0):
        super().__init__()
        self.window_size = window_size
        self.prefix_tokens = prefix_tokens
        gh, gw = window_size
        rows = (2 * gh - 1) * (2 * gw - 1) + relative_prefix_rows(prefix_tokens)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
        index = relative_position_index(window_size, prefix_tokens)
        self.register_buffer("relative_position_index", index, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Resample the table to another grid."""
        table = self.relative_position_bias_table
        resampled = resample_rel_pos_table(table, window_size, self.window_size, self.prefix_tokens)
        index = relative_position_index(window_size, self.prefix_tokens)
        self.window_size = window_size
        self.relative_position_bias_table = parameter_like(table, resampled)
        self.relative_position_index = index.to(table.device)

    def forward(self) -> Tensor:
        """[1, H, P + N, P + N]."""
        bias = self.relative_position_bias_table[self.relative_position_index]  # (N, N, H)
        return bias.permute(2, 0, 1)[None].contiguous()


def parameter_like(old: Tensor, value: Tensor) -> nn.Parameter:
    """`value` as a parameter that trains if `old` does."""
    return nn.Parameter(value.detach(), requires_grad=old.requires_grad)


def resize_positions(vit: Any, old_grid: tuple[int, int]) -> None:
    """Resample every position embedding of a `VisionTransformer` to its patch_embed's new grid."""
    grid = vit.patch_embed.grid_size
    if grid == old_grid:
        return
    if vit.pos_embed is not None:
        table = resample_pos_embed(vit.pos_embed, grid, old_grid, vit.num_embedded_prefix)
        vit.pos_embed = parameter_like(vit.pos_embed, table)
    if vit.pos_embed_x is not None:
        vit.pos_embed_x = parameter_like(vit.pos_embed_x, resample_axis(vit.pos_embed_x, grid[1]))
        vit.pos_embed_y = parameter_like(vit.pos_embed_y, resample_axis(vit.pos_embed_y, grid[0]))
    for module in vit.modules():
        if isinstance(module, RelPosBias):
            module.set_window_size(grid)


def resample_patch_embed(weight: Tensor, new_size: tuple[int, int]) -> Tensor:
    """Patch projection for another patch size, by the pseudo-inverse of the resize.

    A patch resized to the new size then gives what the patch gave before, as far as it can.

    Args:
        weight: [D, C, ph, pw].
        new_size: (new ph, new pw).

    Returns:
        [D, C, *new_size], of weight's dtype.

    Source: FlexiViT (arXiv:2212.08013), section 3.4; bicubic with antialiasing as timm does it.
    """
    old_size = tuple(weight.shape[2:])
    if new_size == old_size:
        return weight
    count = math.prod(old_size)
    basis = torch.eye(count, device=weight.device).reshape(1, count, *old_size)
    resize = resize_grid(basis, new_size)[0].flatten(1).T  # (new pixels, old pixels)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(2)
    new = wide @ torch.linalg.pinv(resize).to(wide.dtype)  # (D, C, new pixels)
    return new.unflatten(2, new_size).to(weight.dtype)


def sincos_2d(grid: tuple[int, int], dim: int, temperature: float = 10_000.0) -> Tensor:
    """The fixed 2-D embedding: sines and cosines of a patch's column, then of its row.

    Args:
        grid: (gh, gw).
        dim: D, a multiple of 4.

    Returns:
        float32 [1, gh * gw, D].

    Raises:
        ValueError: `dim` is not a multiple of 4.

    Source: MoCo v3 (arXiv:2104.02057), section 5, after arXiv:1706.03762, section 3.5.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine embedding needs a multiple of 4, got dim={dim}")
    frequency = temperature ** -(torch.arange(dim // 4) / (dim // 4))

    def axis(size: int) -> Tensor:
        angle = torch.arange(size)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)[None]  # (1, size, D/2)

    return join_axes(axis(grid[1]), axis(grid[0]))
