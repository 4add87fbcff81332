"""`linear` for inference: statistics out, a norm folded in, e4m3 operands; the parts that the
contract tests do not see."""

import random

import pytest
import torch
import torch.nn.functional as F

from fastvit import ops
from fastvit.kernels import _device
from fastvit.kernels._tuning import TileConfig
from fastvit.kernels.layer_norm.inference import (
    E4M3,
    fp8_layer_norm,
    fp8_quantize,
    merge_statistics,
    row_statistics,
)
from fastvit.kernels.linear.inference import fold, folded_linear, fp8_linear, linear_statistics
from fastvit.kernels.linear.op import part_width

TILES = {
    "pointers": TileConfig(32, 64, 32),
    "bands": TileConfig(32, 64, 32, subtiles=4),
    "tma": TileConfig(32, 32, 32, backend="tma", subtiles=2),
    "persistent": TileConfig(32, 32, 32, backend="tma", persistent=1),
    "made in the kernel": TileConfig(32, 64, 32, backend="device_tma", persistent=1),
    "split sum": TileConfig(32, 32, 32, split_k=2),
    "without such an epilogue": TileConfig(32, 32, 32, backend="cublas"),
}
each_tile = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)


@pytest.fixture(autouse=True)
def seed():
    value = random.SystemRandom().randrange(2**31)
    print(f"torch.manual_seed({value})")
    torch.manual_seed(value)


@pytest.fixture
def use(monkeypatch):
    """Choose the tile of every linear."""

    def choose(tile):
        monkeypatch.setattr("fastvit.kernels.linear.op.lookup", lambda *args, **sizes: tile)

    return choose


# --------------------------------------------------------------------------- statistics


@each_tile
@pytest.mark.parametrize("k", [64, 75], ids=["packed rows", "odd rows"])
def test_statistics_are_those_of_the_stored_rows(triton_path, use, tile, k):
    x, weight = torch.randn(2, 35, k).bfloat16(), torch.randn(91, k).bfloat16()
    residual = 10 + torch.randn(2, 35, 91).bfloat16()
    use(tile)
    y, statistics = linear_statistics(x, weight, residual=residual)
    if tile.backend != "cublas":
        assert torch.equal(y, ops.linear(x, weight, residual=residual))
    assert statistics.shape[:2] == (2, 35)
    for ours, truth in zip(merge_statistics(statistics, 91), _moments(y.double()), strict=True):
        # float32 sums of 91 values
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


def _moments(y):
    return y.mean(dim=-1), y.var(dim=-1, unbiased=False)


def test_the_count_of_parts_tells_their_width():
    for width in range(1, 700):
        for part in (16, 32, 64, 128, 256):
            parts = -(-width // part)
            assert part_width(width, parts) == (part if parts > 1 else width)


def test_statistics_survive_a_large_mean(triton_path):
    """Centred sums: where mean^2 is 1e8 times the variance, E[x^2] - mean^2 would have no digit."""
    x = 1e4 + torch.randn(5, 192)
    mean, variance = merge_statistics(row_statistics(x), 192)
    torch.testing.assert_close(variance.double(), _moments(x.double())[1], rtol=1e-3, atol=0)
    parts = torch.cat([row_statistics(values) for values in x.split(64, dim=1)], dim=1)
    merged = merge_statistics(parts, 192)
    torch.testing.assert_close(merged[0], mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(merged[1], variance, rtol=1e-3, atol=0)


# --------------------------------------------------------------------------- folded in


@each_tile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folded_is_as_exact_as_norm_then_linear(triton_path, use, tile, dtype):
    """From float32 masters, through the statistics of the linear before, beside eager PyTorch."""
    masters = [torch.randn(96, 64) / 8, torch.randn(96), 1 + torch.randn(64) / 4, torch.randn(64)]
    x = torch.randn(35, 48, dtype=dtype) + 1
    before = torch.randn(64, 48).to(dtype)
    use(tile)
    y, statistics = linear_statistics(x, before)
    weight, colsum, bias = fold(*masters, dtype=dtype)
    ours = folded_linear(y, statistics, weight, colsum, bias, activation="relu")

    def plain(kind):
        w, b, norm_w, norm_b = (p.to(kind) for p in masters)
        return F.linear(F.layer_norm(y.to(kind), (64,), norm_w, norm_b, 1e-6), w, b).relu()

    truth = plain(torch.float64)
    ulp = torch.finfo(dtype).eps * truth.abs().max()
    allowed = 2 * (plain(dtype).double() - truth).abs().max() + ulp
    assert (ours.double() - truth).abs().max() <= allowed


def test_colsum_has_to_be_of_the_rounded_weight(triton_path):
    """The negative control of `fold`: sums of the weight as it was leave the mean behind."""
    weight = torch.randn(32, 256)
    x = (20 + torch.randn(16, 256)).bfloat16()
    truth = F.linear(F.layer_norm(x.double(), (256,)), weight.double())
    folded, colsum, _ = fold(weight, None, None, None, torch.bfloat16)
    errors = [
        (folded_linear(x, row_statistics(x), folded, sums).double() - truth).abs().mean()
        for sums in (colsum, weight.sum(dim=1))
    ]
    assert errors[1] > 5 * errors[0]


def test_fold_without_parameters():
    weight = torch.randn(8, 16, dtype=torch.float64)
    folded, colsum, bias = fold(weight, None, None, None)
    assert torch.equal(folded, weight)
    assert torch.equal(colsum, weight.sum(dim=1))
    assert bias is None
    shifted = fold(weight, None, None, torch.ones(16, dtype=torch.float64))[2]
    torch.testing.assert_close(shifted, weight.sum(dim=1))


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"statistics": torch.zeros(4, 1, 2).half()}, TypeError, "statistics is torch.float16"),
        ({"statistics": torch.zeros(3, 1, 2)}, ValueError, "statistics"),
        ({"colsum": torch.zeros(7)}, ValueError, "colsum"),
        ({"weight": torch.zeros(8, 5)}, ValueError, "do not fit"),
        ({"activation": "gleu"}, ValueError, "gleu"),
    ],
)
def test_folded_names_bad_input(wrong, kind, message):
    given = {
        "x": torch.zeros(4, 6), "statistics": torch.zeros(4, 1, 2), "weight": torch.zeros(8, 6),
        "colsum": torch.zeros(8),
    }  # fmt: skip
    with pytest.raises(kind, match=message):
        folded_linear(**{**given, **wrong})


# --------------------------------------------------------------------------- e4m3


def test_values_beyond_e4m3_saturate_and_nan_stays(triton_path):
    x = torch.tensor([[448.0, 470.0, 1e30, -1e30, float("inf"), -float("inf"), 0.0, float("nan")]])
    wanted = [448.0, 448.0, 448.0, -448.0, 448.0, -448.0, 0.0]
    found = fp8_quantize(x, out_scale=1.0).float()[0]
    assert found[:-1].tolist() == wanted
    assert found[-1].isnan()
    with ops.backend("torch"):
        assert torch.equal(fp8_quantize(x, out_scale=1.0).float()[0, :-1], found[:-1])


@each_tile
def test_fp8_backends_agree_with_the_emulation(triton_path, use, tile):
    use(tile)
    x, weight = (torch.randn(35, 64) * 30).to(E4M3), (torch.randn(91, 64) * 30).to(E4M3)
    factor = torch.rand(91) / 1000
    options = {"activation": "gelu", "residual": torch.randn(35, 91), "dtype": torch.float32}
    ours = fp8_linear(x, weight, factor, **options)
    with ops.backend("torch"):
        torch.testing.assert_close(ours, fp8_linear(x, weight, factor, **options))


@pytest.mark.parametrize(("arch", "message"), [("sm80", "sm_89"), ("gfx942", "fnuz")])
def test_fp8_is_refused_where_there_is_none(triton_path, arch, message):
    x = torch.zeros(4, 16)
    q, factor = x.to(E4M3), torch.ones(4)
    with _device.emulate(arch):
        for run in (
            lambda: fp8_quantize(x, out_scale=1.0),
            lambda: fp8_layer_norm(x, None, None, out_scale=1.0),
            lambda: fp8_linear(q, q, factor),
        ):
            with pytest.raises(RuntimeError, match=message):
                run()


@pytest.mark.parametrize("out_scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_is_positive(out_scale):
    with pytest.raises(ValueError, match="out_scale"):
        fp8_quantize(torch.zeros(2, 2), out_scale=out_scale)


def test_fp8_linear_names_bad_operands():
    q, factor = torch.zeros(4, 16).to(E4M3), torch.ones(4)
    with pytest.raises(TypeError, match=r"weight is torch\.float32"):
        fp8_linear(q, q.float(), factor)
    with pytest.raises(TypeError, match=r"factor is torch\.float16"):
        fp8_linear(q, q, factor.half())
    with pytest.raises(ValueError, match="factor has shape"):
        fp8_linear(q, q, torch.ones(3))
