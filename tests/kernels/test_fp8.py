"""Ops on e4m3: the parts that the contract tests do not see."""

import pytest
import torch
from timm_models import reseed

from fastvit import ops
from fastvit.kernels import _device, _tuning
from fastvit.kernels._tuning import TileConfig
from fastvit.kernels.linear_fp8.op import (
    E4M3,
    fp8_layer_norm,
    fp8_linear,
    fp8_quantize,
)

TILES = {
    "pointers": TileConfig(32, 64, 32),
    "bands": TileConfig(32, 64, 32, subtiles=4),
    "tma": TileConfig(32, 32, 32, backend="tma", subtiles=2),
    "without such an epilogue": TileConfig(32, 32, 32, backend="cublas"),
}
each_tile = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)


@pytest.fixture(autouse=True)
def seed():
    reseed()


def test_values_beyond_e4m3_saturate_and_nan_stays(triton_path):
    x = torch.tensor([[448.0, 470.0, 1e30, -1e30, float("inf"), -float("inf"), 0.0, float("nan")]])
    wanted = [448.0, 448.0, 448.0, -448.0, 448.0, -448.0, 0.0]
    found = fp8_quantize(x, out_scale=1.0).float()[0]
    assert found[:-1].tolist() == wanted
    assert found[-1].isnan()
    with ops.backend("torch"):
        assert torch.equal(fp8_quantize(x, out_scale=1.0).float()[0, :-1], found[:-1])


@each_tile
def test_fp8_backends_agree_with_the_emulation(triton_path, tile):
    x, weight = (torch.randn(35, 64) * 30).to(E4M3), (torch.randn(91, 64) * 30).to(E4M3)
    factor = torch.rand(91) / 1000
    options = {"activation": "gelu", "residual": torch.randn(35, 91), "dtype": torch.float16}
    with _tuning.forced("linear", tile):
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
