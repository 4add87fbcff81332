"""The other libraries that models are timed beside: which, when, and that they do the same job."""

import sys
import types
from typing import Any

import pytest
import torch

from fastvit import numerics
from fastvit._compat import import_timm
from fastvit.bench import models, peers
from fastvit.kernels import _device


def test_levels_of_peers(monkeypatch: pytest.MonkeyPatch):
    model = models._timm_model("test_vit", seed=0)
    gpu = torch.device("cuda")

    def names_on(arch: str) -> dict[Any, list[str]]:
        levels: list[Any] = ["few", "timm", "all"]
        monkeypatch.setattr(_device, "_architecture", lambda index: arch)
        return {
            level: list(dict(models._peers(model, gpu, 1, train=False, level=level)))
            for level in levels
        }

    names = names_on("sm90")
    assert names["few"] == ["timm", "timm + torch.compile", "timm + reduce-overhead"]
    assert names["timm"] == [*names["few"], "timm + max-autotune", models.TORCHAO]
    assert names_on("sm80")["timm"] == names["timm"][:-1]  # no e4m3
    others = ["transformers", "transformers + torch.compile", "torchvision"]
    assert names["all"] == [*names["timm"], *others]


def test_torchao_gets_every_linear_but_the_classifier(monkeypatch: pytest.MonkeyPatch):
    model = models._timm_model("test_vit", seed=0)
    with pytest.raises(ImportError, match="torchao"):
        peers.torchao_fp8(model)
    given: list[str] = []

    def quantize_(peer: Any, config: Any, chosen: Any) -> None:
        assert peer is not model
        assert config == {"granularity": "a row", "set_inductor_config": False}
        given.extend(name for name, module in peer.named_modules() if chosen(module, name))

    torchao = types.ModuleType("torchao.quantization")
    vars(torchao).update(
        Float8DynamicActivationFloat8WeightConfig=dict, PerRow=lambda: "a row", quantize_=quantize_
    )
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", torchao)
    peers.torchao_fp8(model)
    assert len(given) == 4 * len(model.blocks)
    assert "head" not in given


@pytest.mark.parametrize("build", [peers.transformers_vit, peers.torchvision_vit])
def test_other_libraries_compute_what_timm_does(build):
    model = models._timm_model("test_vit", seed=0).eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        # two orders of the same float32 operations: some hundred roundings of 6e-8
        torch.testing.assert_close(build(model)(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [peers.transformers_vit, peers.torchvision_vit])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"init_values": 0.1}, "it also has blocks.0.ls1.gamma"),
        ({"qkv_bias": False}, "differ"),
        ({"global_pool": "avg", "fc_norm": False}, "differs by"),  # the same weights
        ({"act_layer": "relu"}, "differs by"),
    ],
)
def test_other_libraries_are_no_peers_of_what_they_do_not_compute(build, options, reason):
    model = import_timm().create_model("test_vit", depth=1, **options)
    numerics.randomise(model, 0)
    with pytest.raises(ValueError, match=f"not a plain ViT.*{reason}"):
        build(model.eval())
