"""Weights from files and from timm's hub: all of them, or an error and the model as it was."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import _builder
from timm_models import randomise, reseed
from torch import Tensor
from vit_models import TINY, assert_close, same_weights, tiny

import fastvit
from fastvit.checkpoint import load_checkpoint, read_checkpoint


def hub_weights(monkeypatch: pytest.MonkeyPatch, full_name: str) -> dict[str, Tensor]:
    """Random weights for one of timm's names with a tag; timm's hub loader then gives them."""
    reseed()
    source = timm.create_model(full_name)
    randomise(source)
    weights = source.state_dict()

    def load(model_id: str, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        assert model_id == f"timm/{full_name}"
        return dict(weights)

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", load)
    return weights


@pytest.mark.parametrize("tag", ["augreg_in21k", "augreg_in21k_ft_in1k"])
def test_pretrained_comes_through_timms_hub(tag, monkeypatch):
    architecture = "vit_tiny_patch16_224"
    weights = hub_weights(monkeypatch, f"{architecture}.{tag}")
    # the second is the one that a name without a tag stands for
    name = architecture if tag == "augreg_in21k_ft_in1k" else f"{architecture}.{tag}"
    model = fastvit.create_model(name, pretrained=True)
    assert model.default_cfg["tag"] == tag
    assert same_weights(model, weights)


# the second has as many patches as the source, on another grid
@pytest.mark.parametrize("img_size", [(160, 192), (112, 448)])
def test_pretrained_weights_are_adapted_as_timm_does(img_size, monkeypatch):
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    hub_weights(monkeypatch, name)
    options: dict[str, Any] = {"num_classes": 6, "img_size": img_size, "in_chans": 1}
    ours: Any = fastvit.create_model(name, pretrained=True, **options).eval()
    theirs: Any = timm.create_model(name, pretrained=True, **options).eval()
    assert float(ours.head.weight.detach().std()) > 0
    ours.head.load_state_dict(theirs.head.state_dict())
    x = torch.randn(1, 1, *img_size)
    with torch.inference_mode():
        assert_close(ours(x), theirs(x))


def test_pretrained_weights_that_do_not_fit(monkeypatch):
    hub_weights(monkeypatch, "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    with pytest.raises(ValueError, match=r"2 missing keys: fc_norm[^$]*2 unexpected keys: norm"):
        fastvit.create_model("vit_tiny_patch16_224", pretrained=True, global_pool="avg")
    with pytest.raises(ValueError, match="1 unexpected keys: pos_embed"):
        fastvit.create_model("vit_tiny_patch16_224", pretrained=True, pos_embed="none")
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        fastvit.create_model("vit_giant_patch14_224", pretrained=True, depth=1)
    with pytest.raises(ValueError, match="exclude one another"):
        fastvit.create_model("vit_tiny_patch16_224", pretrained=True, checkpoint="x.pt")


def test_a_tag_decides_classes_size_and_statistics():
    name = "vit_base_patch16_clip_224.openai"
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), fastvit.create_model(name)
    assert ours.num_classes == theirs.num_classes == 512
    assert ours.default_cfg == theirs.default_cfg
    with pytest.raises(ValueError, match=r"'nothing'.*openai"):
        fastvit.create_model("vit_base_patch16_clip_224.nothing")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_files(suffix, tmp_path):
    source, path = tiny(), tmp_path / f"model.{suffix}"
    state = source.state_dict()
    if suffix == "safetensors":
        save_file(state, path)
    else:  # as a training script saves it
        wrapped = {f"module._orig_mod.{key}": value for key, value in state.items()}
        torch.save({"model": wrapped, "epoch": 3}, path)
    model = fastvit.create_model("vit_tiny_patch16_224", checkpoint=path, **TINY)
    assert same_weights(model, source)


@pytest.mark.parametrize("pos_embed", ["learned", "2d", "relative"])
@pytest.mark.parametrize(
    "size", [{"img_size": (48, 24)}, {"img_size": (16, 64)}, {"img_size": 48, "patch_size": 6}]
)
def test_another_size_is_resampled_as_set_input_size_does(pos_embed, size):
    source = tiny(pos_embed=pos_embed)
    target = tiny(**size, pos_embed=pos_embed)
    grid = source.patch_embed.grid_size
    load_checkpoint(target, source.state_dict(), source_grid=grid)
    source.set_input_size(**size)
    assert same_weights(target, source)


@pytest.mark.parametrize("pos_embed", ["learned", "relative"])
def test_the_grid_of_a_checkpoint_is_the_models_or_a_square(pos_embed):
    source, wide = tiny(pos_embed=pos_embed), tiny(img_size=(16, 64), pos_embed=pos_embed)
    other = tiny(img_size=(16, 64), pos_embed=pos_embed)
    load_checkpoint(other, wide.state_dict())
    assert same_weights(other, wide)
    other = tiny(img_size=(24, 48), pos_embed=pos_embed)
    load_checkpoint(other, source.state_dict())
    source.set_input_size((24, 48))
    assert same_weights(other, source)
    with pytest.raises(ValueError, match=r"wrong shapes: .*pos"):
        load_checkpoint(other, tiny(img_size=(16, 40), pos_embed=pos_embed).state_dict())


class Harmful:
    """Unpickling it would create a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harmful_code_ran"),)


def damaged(how: str, folder: Path) -> Any:
    """A checkpoint that does not load."""
    state: dict[str, Any] = tiny().state_dict()
    path = folder / "model.pt"
    match how:
        case "missing key":
            del state["blocks.0.attn.qkv.weight"]
        case "unexpected key":
            state["blocks.7.attn.qkv.weight"] = torch.zeros(1)
        case "wrong shape":
            state["head.weight"] = torch.zeros(9, 32)
        case "integers":
            state["head.bias"] = torch.zeros(5, dtype=torch.int64)
        case "no tensor":
            state["head.bias"] = "five"
        case "no state_dict":
            return [1, 2]
        case "truncated safetensors":
            path = folder / "model.safetensors"
            save_file(state, path)
            path.write_bytes(path.read_bytes()[:-100])
            return path
        case "truncated torch file":
            torch.save(state, path)
            path.write_bytes(path.read_bytes()[:-3000])
            return path
        case "text":
            path.write_text("no weights here")
            return path
        case "code":
            torch.save({**state, "extra": Harmful()}, path)
            return path
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing key", r"1 missing keys: blocks\.0\.attn\.qkv\.weight"),
        ("unexpected key", r"1 unexpected keys: blocks\.7\.attn\.qkv\.weight"),
        ("wrong shape", r"head\.weight is \[9, 32\], the model's \[5, 32\]"),
        ("integers", r"1 not floating tensors: head\.bias is torch\.int64"),
        ("no tensor", r"1 not floating tensors: head\.bias is str"),
        ("no state_dict", "is a list"),
        ("truncated safetensors", r"model\.safetensors is damaged"),
        ("truncated torch file", r"model\.pt is damaged"),
        ("text", r"model\.pt is damaged"),
        ("code", r"model\.pt .* might run code"),
    ],
)
def test_a_bad_checkpoint_is_named_and_leaves_the_model(how, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad, model = damaged(how, tmp_path), tiny()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, bad)
    assert not Path("harmful_code_ran").exists()
    assert same_weights(model, before)


def test_all_that_does_not_fit_is_counted():
    count = len(tiny().state_dict())
    with pytest.raises(
        ValueError, match=rf"{count} missing keys: .*, \.\.\.\n  1 unexpected keys: x"
    ):
        load_checkpoint(tiny(), {"x": torch.zeros(1)})


@pytest.mark.parametrize("name", ["none.safetensors", "none.pt"])
def test_a_missing_file_is_not_called_damaged(name, tmp_path):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / name)
