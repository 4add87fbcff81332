"""Position embeddings and resampling against timm's, and against their definitions."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import resample_patch_embed as timm_resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import RelPosBias as TimmRelPosBias

from fastvit.pos_embed import (
    RelPosBias,
    join_axes,
    relative_position_index,
    resample_axis,
    resample_patch_embed,
    resample_pos_embed,
    resample_rel_pos_table,
)

# float32 interpolation, the same PyTorch function called on the same numbers
TOLERANCE = 1e-6


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (24, 24)), ((16, 16), (7, 9)), ((5, 8), (8, 5)), ((1, 1), (3, 2))]
)
def test_resampling_is_timms(prefix, old, new):
    table = torch.randn(1, prefix + old[0] * old[1], 12)
    ours = resample_pos_embed(table, new, old, prefix)
    theirs = resample_abs_pos_embed(table, new, old, num_prefix_tokens=prefix)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    assert torch.equal(ours[:, :prefix], table[:, :prefix])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_resampling_keeps_the_dtype_and_rounds_once(dtype):
    table = torch.randn(1, 16, 8, dtype=dtype)
    ours = resample_pos_embed(table, (6, 6), (4, 4))
    exact = resample_pos_embed(table.double(), (6, 6), (4, 4))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_the_same_grid_is_the_same_tensor():
    table = torch.randn(1, 13, 8)
    assert resample_pos_embed(table, (3, 4), (3, 4), 1) is table


@pytest.mark.parametrize(
    ("old", "new"), [((16, 16), (14, 14)), ((8, 8), (16, 12)), ((4, 4), (4, 4))]
)
def test_patch_projections_are_resampled_as_timm_does(old, new):
    weight = torch.randn(6, 3, *old)
    ours, theirs = resample_patch_embed(weight, new), timm_resample_patch_embed(weight, [*new])
    # a pseudo-inverse in float32: its condition number costs a digit or two
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_larger_patch_of_a_larger_image_gives_the_same_token():
    weight = torch.randn(6, 3, 8, 8)
    patch = torch.randn(2, 3, 8, 8)
    larger = F.interpolate(patch, size=(16, 16), mode="bicubic", antialias=True)
    token = torch.einsum("bchw,dchw->bd", patch, weight)
    resampled = torch.einsum("bchw,dchw->bd", larger, resample_patch_embed(weight, (16, 16)))
    torch.testing.assert_close(resampled, token, rtol=1e-4, atol=1e-4)


def test_axes_are_joined_column_first():
    x, y = torch.randn(1, 3, 4), torch.randn(1, 2, 4)
    joined = join_axes(x, y)
    assert joined.shape == (1, 6, 8)
    for row in range(2):
        for column in range(3):
            wanted = torch.cat([x[0, column], y[0, row]])
            assert torch.equal(joined[0, row * 3 + column], wanted)


def test_an_axis_is_resampled_as_its_grid_would_be():
    x, y = torch.randn(1, 4, 6), torch.randn(1, 5, 6)
    ours = join_axes(resample_axis(x, 7), resample_axis(y, 3))
    grid = resample_pos_embed(join_axes(x, y), (3, 7), (5, 4))
    torch.testing.assert_close(ours, grid, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 2)])
def test_the_relative_bias_is_timms(grid, prefix):
    ours, theirs = RelPosBias(grid, 3, prefix), TimmRelPosBias(grid, 3, prefix)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(), theirs.get_bias())


def test_every_pair_with_a_prefix_token_has_its_entry():
    p, patches = 3, 6
    index = relative_position_index((2, 3), p)
    assert index.shape == (p + patches, p + patches)
    first = 3 * 5
    assert sorted(index.unique().tolist()) == list(range(first + p * (2 + p)))
    assert int(index[p:, p:].max()) < first <= int(index[:p].min())
    assert index[:p, p:].unique(dim=1).shape == (p, 1)  # one for each prefix token as the query
    assert index[p:, :p].unique(dim=0).shape == (1, p)  # one for each as the key
    assert index[:p, :p].unique().numel() == p * p


def test_the_relative_index_goes_by_the_offset():
    gw = 4
    index = relative_position_index((3, gw), 0)
    seen: dict[tuple[int, int], int] = {}
    for i in range(12):
        for j in range(12):
            offset = (i // gw - j // gw, i % gw - j % gw)
            assert seen.setdefault(offset, int(index[i, j])) == int(index[i, j])
    assert len(set(seen.values())) == len(seen) == 5 * 7


def test_a_relative_table_is_resampled_about_its_centre():
    # rows of prefix tokens and the bias at offset 0 stay; a symmetric table stays symmetric
    old, new, prefix = (3, 3), (5, 4), 1
    table = torch.randn(5 * 5 + 3, 2)
    grid = table[:25].view(5, 5, 2)
    table[:25] = (grid + grid.flip(0, 1)).reshape(25, 2)
    resampled = resample_rel_pos_table(table, new, old, prefix)
    assert resampled.shape == (9 * 7 + 3, 2)
    assert torch.equal(resampled[-3:], table[-3:])
    grid = resampled[:-3].view(9, 7, 2)
    # weights and order of sums differ between mirror images
    torch.testing.assert_close(grid, grid.flip(0, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(grid[4, 3], table[12], rtol=0, atol=1e-5)
    assert resample_rel_pos_table(table, old, old, prefix) is table


def test_set_window_size_replaces_table_and_index():
    bias = RelPosBias((3, 3), 2, 1)
    bias.relative_position_bias_table.requires_grad_(False)
    bias.set_window_size((2, 4))
    assert bias().shape == (1, 2, 9, 9)
    assert not bias.relative_position_bias_table.requires_grad
    assert torch.equal(bias.relative_position_index, relative_position_index((2, 4), 1))
