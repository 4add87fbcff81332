"""Checkpoints of every library, written by a model of that library and read by `create_model`: the
same outputs. Google's .npz is written under JAX's names here and read by timm's loader as well."""

import copy
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from timm.models.vision_transformer import _load_weights
from timm_models import TOLERANCE, error, reseed
from torch import Tensor
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT
from vit_models import same_weights

import fastvit
from fastvit.checkpoint import load_checkpoint
from fastvit.numerics import randomise

# ours and transformers' names for one small size; 4 x 4 patches
OURS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}
OURS |= {"num_heads": 2, "mlp_ratio": 2.0}
SIZE: dict[str, Any] = {"image_size": 32, "patch_size": 8, "hidden_size": 32}
SIZE |= {"num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = torch.randn(2, 3, 32, 32)


def draw(model: Any) -> Any:
    reseed()
    randomise(model, int(torch.randint(2**31, ()).item()))
    return model.eval()


def read(name: str, checkpoint: Any, **options: Any) -> Any:
    return fastvit.create_model(name, checkpoint=checkpoint, **{**OURS, **options}).eval()


# --------------------------------------------------------------------------- transformers


def hf(kind: str, config: str, **options: Any) -> Any:
    settings = getattr(transformers, config)(**{**SIZE, **options})
    return draw(getattr(transformers, kind)(settings))


def first_token(output: Any) -> Tensor:
    return output.last_hidden_state[:, 0]


TRANSFORMERS: dict[str, Any] = {
    "ViT": (
        lambda: hf("ViTForImageClassification", "ViTConfig", intermediate_size=64, num_labels=5),
        lambda output: output.logits,
        ("vit_tiny_patch16_224", {"num_classes": 5, "norm_eps": 1e-12}),
    ),
    "ViT without head": (
        lambda: hf("ViTModel", "ViTConfig", intermediate_size=64),
        first_token,
        ("vit_tiny_patch16_224", {"num_classes": 0, "norm_eps": 1e-12}),
    ),
    "ViTMAE": (
        lambda: hf("ViTMAEForPreTraining", "ViTMAEConfig", intermediate_size=64, mask_ratio=0.0),
        None,
        ("vit_tiny_patch16_224", {"num_classes": 0, "norm_eps": 1e-12}),
    ),
    "IJepa": (
        lambda: hf("IJepaModel", "IJepaConfig", intermediate_size=64),
        lambda output: output.last_hidden_state,
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "", "num_classes": 0,
                                  "norm_eps": 1e-12}),
    ),
    "Dinov2": (
        lambda: hf("Dinov2Model", "Dinov2Config", mlp_ratio=2),
        first_token,
        ("vit_small_patch14_dinov2", {}),
    ),
    "Dinov2WithRegisters": (
        lambda: hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=2),
        first_token,
        ("vit_small_patch14_reg4_dinov2", {}),
    ),
    "Dinov2WithRegisters, positions for all": (
        lambda: hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=2),
        first_token,
        ("vit_small_patch14_reg4_dinov2", {"no_embed_class": False}),
    ),
    "CLIPVision": (
        lambda: hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", intermediate_size=64,
                   projection_dim=24),
        lambda output: output.image_embeds,
        ("vit_base_patch16_clip_224", {"num_classes": 24, "act_layer": "quick_gelu",
                                       "norm_eps": 1e-5}),
    ),
    "SiglipVision": (
        lambda: hf("SiglipVisionModel", "SiglipVisionConfig", intermediate_size=64),
        lambda output: output.pooler_output,
        ("vit_base_patch16_siglip_224", {"num_classes": 0, "act_layer": "gelu_tanh"}),
    ),
    "BEiT": (
        lambda: hf("BeitForImageClassification", "BeitConfig", intermediate_size=64, num_labels=5,
                   use_relative_position_bias=True, use_absolute_position_embeddings=False),
        lambda output: output.logits,
        ("vit_tiny_patch16_224", {"num_classes": 5, "pos_embed": "relative", "init_values": 0.1,
                                  "global_pool": "avg", "norm_eps": 1e-12}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", ["state_dict", "save_pretrained"])
@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers(case, way, tmp_path):
    """In memory its names are those of this version, in its files those of the hub."""
    make, output, (name, options) = TRANSFORMERS[case]
    model = make()
    path: Path = tmp_path / "model.safetensors"
    if way == "state_dict":
        save_file(model.state_dict(), path)
    else:
        model.save_pretrained(tmp_path)
    ours = read(name, path, **options)
    with torch.no_grad():
        if output is None:  # MAE shuffles its patches
            noise = torch.arange(16.0).expand(2, -1)
            theirs = model.vit(IMAGES, noise=noise).last_hidden_state[:, 0]
        else:
            theirs = output(model(IMAGES))
        assert error(ours(IMAGES), theirs) <= TOLERANCE


def test_a_whole_clip_of_transformers():
    size = SIZE | {"intermediate_size": 64}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    config = transformers.CLIPConfig(vision_config=size, text_config=text, projection_dim=24)
    model: Any = draw(transformers.CLIPModel(config))
    options = {"num_classes": 24, "act_layer": "quick_gelu", "norm_eps": 1e-5}
    ours = read("vit_base_patch16_clip_224", model.state_dict(), **options)
    with torch.no_grad():
        theirs = model.get_image_features(IMAGES).pooler_output
        assert error(ours(IMAGES), theirs) <= TOLERANCE


def test_what_our_model_cannot_hold_is_named():
    model = hf("DeiTModel", "DeiTConfig", intermediate_size=64)
    with pytest.raises(ValueError, match=r"(?s)of transformers .*unexpected.*distillation_token"):
        read("vit_tiny_patch16_224", model.state_dict(), num_classes=0)
    swiglu = hf("Dinov2Model", "Dinov2Config", mlp_ratio=2, use_swiglu_ffn=True)
    with pytest.raises(ValueError, match=r"missing keys: blocks\.0\.mlp\.fc1[^$]*gate_proj"):
        read("vit_small_patch14_dinov2", swiglu.state_dict())


# --------------------------------------------------------------------------- torchvision, open_clip


@pytest.mark.parametrize("representation_size", [None, 32])
@pytest.mark.parametrize("legacy", [False, True])
def test_torchvision(legacy, representation_size, tmp_path):
    model = draw(TorchvisionViT(32, 8, 2, 2, 32, 64, num_classes=5,
                                representation_size=representation_size))  # fmt: skip
    state = model.state_dict()
    if legacy:  # as files from before torchvision 0.13 have it
        for old, new in ((".mlp.0.", ".mlp.linear_1."), (".mlp.3.", ".mlp.linear_2.")):
            state = {key.replace(old, new): value for key, value in state.items()}
    torch.save(state, tmp_path / "model.pth")
    options = {"head": "mlp"} if representation_size else {}
    ours = read("vit_tiny_patch16_224", tmp_path / "model.pth", num_classes=5, **options)
    with torch.no_grad():
        assert error(ours(IMAGES), model(IMAGES)) <= TOLERANCE


@pytest.mark.parametrize("whole", [False, True])
def test_open_clip(whole, tmp_path):
    vision: Any = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    vision |= {"mlp_ratio": 2.0, "ls_init_value": 0.1}
    text: Any = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    model: Any = draw(open_clip.CLIP(24, vision, text, quick_gelu=True))
    assert isinstance(model.visual.transformer.resblocks[0].mlp.gelu, QuickGELU)
    torch.save((model if whole else model.visual).state_dict(), tmp_path / "open_clip.pt")
    options = {"num_classes": 24, "act_layer": "quick_gelu", "norm_eps": 1e-5, "init_values": 0.1}
    ours = read("vit_base_patch16_clip_224", tmp_path / "open_clip.pt", **options)
    with torch.no_grad():
        assert error(ours(IMAGES), model.encode_image(IMAGES)) <= TOLERANCE


# --------------------------------------------------------------------------- DINO


@pytest.fixture
def repositories(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins written for these tests, see test_dino.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "helpers" / "stand_ins"))


@pytest.mark.parametrize("way", ["model", "training"])
@pytest.mark.usefixtures("repositories")
def test_dino(way, tmp_path):
    model = draw(importlib.import_module("vision_transformer").VisionTransformer())
    state = model.state_dict()
    if way == "training":  # student and teacher with their projection heads
        head = {
            "module.head.mlp.0.weight": torch.ones(3),
            "module.head.last_layer.weight_g": torch.ones(3),
        }
        teacher = {f"module.backbone.{key}": value for key, value in state.items()} | head
        state = {"teacher": teacher, "student": {}, "epoch": 3}
    torch.save(state, tmp_path / "dino.pth")
    ours = read("vit_tiny_patch16_224", tmp_path / "dino.pth", num_classes=0)
    with torch.no_grad():
        assert error(ours(IMAGES), model(IMAGES)) <= TOLERANCE


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.usefixtures("repositories")
def test_dinov2(registers, chunked, tmp_path):
    module = importlib.import_module("dinov2.models.vision_transformer")
    model = draw(module.DinoVisionTransformer(size=32, patch=8, registers=registers))
    state = model.state_dict()
    if chunked:  # for FSDP; a block keeps its number within the whole
        for old, new in (("blocks.0.", "blocks.0.0."), ("blocks.1.", "blocks.1.1.")):
            state = {key.replace(old, new): value for key, value in state.items()}
    torch.save(state, tmp_path / "dinov2.pth")
    name = f"vit_small_patch14{'_reg4' if registers else ''}_dinov2"
    ours = read(name, tmp_path / "dinov2.pth")
    with torch.no_grad():
        assert error(ours(IMAGES), model(IMAGES)) <= TOLERANCE


# --------------------------------------------------------------------------- Google


def jax_names(vit: Any, *, big_vision: bool = False) -> dict[str, Any]:
    """A timm ViT's weights as JAX's Vision Transformer keeps them."""
    state = {key: value.numpy() for key, value in vit.state_dict().items()}
    heads = vit.blocks[0].attn.num_heads
    width = state["norm.weight"].shape[0]
    names: dict[str, np.ndarray] = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    table = "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"
    names[table] = state["pos_embed"]
    if "cls_token" in state:
        names["cls"] = state["cls_token"]
    if "head.weight" in state:
        names |= {"head/kernel": state["head.weight"].T, "head/bias": state["head.bias"]}

    def linear(to: str, source: str) -> None:
        names[f"{to}/kernel"] = state[f"{source}.weight"].T
        names[f"{to}/bias"] = state[f"{source}.bias"]

    def norm(to: str, source: str) -> None:
        names[f"{to}/scale"] = state[f"{source}.weight"]
        names[f"{to}/bias"] = state[f"{source}.bias"]

    def attention(to: str, qkv: dict[str, tuple[np.ndarray, np.ndarray]], proj: str) -> None:
        for part, (weight, bias) in qkv.items():
            names[f"{to}/{part}/kernel"] = weight.T.reshape(width, heads, -1)
            names[f"{to}/{part}/bias"] = bias.reshape(heads, -1)
        names[f"{to}/out/kernel"] = state[f"{proj}.weight"].T.reshape(heads, -1, width)
        names[f"{to}/out/bias"] = state[f"{proj}.bias"]

    def split(*parts: tuple[str, np.ndarray, np.ndarray]) -> Any:
        return {name: (weight, bias) for name, weight, bias in parts}

    for i in range(len(vit.blocks)):
        block, to = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        weights = np.split(state[f"{block}.attn.qkv.weight"], 3)
        biases = np.split(state[f"{block}.attn.qkv.bias"], 3)
        parts = split(*zip(("query", "key", "value"), weights, biases, strict=True))
        numbers = ("0", "1", "0") if big_vision else ("1", "2", "3")
        attention(f"{to}/MultiHeadDotProductAttention_{numbers[0]}", parts, f"{block}.attn.proj")
        norm(f"{to}/LayerNorm_0", f"{block}.norm1")
        norm(f"{to}/LayerNorm_{numbers[1]}", f"{block}.norm2")
        for j in (0, 1):
            linear(f"{to}/MlpBlock_{numbers[2]}/Dense_{j}", f"{block}.mlp.fc{j + 1}")
    if "attn_pool.latent" in state:
        to, pool = "MAPHead_0", "attn_pool"
        names[f"{to}/probe"] = state[f"{pool}.latent"]
        weights = [state[f"{pool}.q.weight"], *np.split(state[f"{pool}.kv.weight"], 2)]
        biases = [state[f"{pool}.q.bias"], *np.split(state[f"{pool}.kv.bias"], 2)]
        parts = split(*zip(("query", "key", "value"), weights, biases, strict=True))
        attention(f"{to}/MultiHeadDotProductAttention_0", parts, f"{pool}.proj")
        norm(f"{to}/LayerNorm_0", f"{pool}.norm")
        for j in (0, 1):
            linear(f"{to}/MlpBlock_0/Dense_{j}", f"{pool}.mlp.fc{j + 1}")
    prefix = "params/" if big_vision else ""
    return {prefix + name: np.ascontiguousarray(value) for name, value in names.items()}


def timms(name: str, **options: Any) -> Any:
    return timm.create_model(name, **{**OURS, "num_classes": 5, **options})


@pytest.mark.parametrize("big_vision", [False, True])
@pytest.mark.parametrize("pool", ["token", "map"])
def test_google_npz(pool, big_vision, tmp_path):
    if pool == "map" and not big_vision:
        pytest.skip("only big_vision has it")
    name = "vit_tiny_patch16_224" if pool == "token" else "vit_base_patch16_siglip_224"
    options = {"num_classes": 0} if pool == "map" else {}
    source, other = draw(timms(name, **options)), timms(name, **options).eval()
    np.savez(tmp_path / "vit.npz", **jax_names(source, big_vision=big_vision))
    with torch.no_grad():
        _load_weights(other, str(tmp_path / "vit.npz"))
        assert error(other(IMAGES), source(IMAGES)) <= TOLERANCE  # the names written are right
        ours = read(name, tmp_path / "vit.npz", **{"num_classes": 5, **options})
        assert error(ours(IMAGES), source(IMAGES)) <= TOLERANCE
    assert same_weights(ours, source)


def test_google_npz_of_one_scan_in_bfloat16(tmp_path):
    """big_vision stacks the blocks that one scan runs; JAX's bfloat16 comes as 2 bytes of nothing
    that numpy knows."""
    source = draw(timms("vit_tiny_patch16_224")).bfloat16()
    names = jax_names(copy.deepcopy(source).float(), big_vision=True)
    stacked = {}
    for name, first in names.items():
        if "encoderblock_1" in name:
            continue
        both = np.stack([first, names[name.replace("encoderblock_0", "encoderblock_1")]])
        value = np.ascontiguousarray(both if "encoderblock_0" in name else first)
        high = (value.view(np.uint32) >> 16).astype(np.uint16)  # exact: it was bfloat16
        stacked[name.replace("encoderblock_0", "encoderblock")] = high.view("V2")
    np.savez(tmp_path / "vit.npz", **stacked)
    ours = read("vit_tiny_patch16_224", tmp_path / "vit.npz", num_classes=5)
    assert same_weights(ours, source.float())


def test_npz_for_another_size(tmp_path):
    source = draw(timms("vit_tiny_patch16_224"))
    np.savez(tmp_path / "vit.npz", **jax_names(source))
    ours = read("vit_tiny_patch16_224", tmp_path / "vit.npz", num_classes=5, img_size=48)
    source.set_input_size(48)
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert error(ours(x), source(x)) <= TOLERANCE


@pytest.mark.parametrize("how", ["pickle", "truncated", "missing", "extra", "shape"])
def test_a_bad_npz_is_named_and_leaves_the_model(how, tmp_path):
    source = draw(timms("vit_tiny_patch16_224"))
    names: dict[str, Any] = jax_names(source)
    path = tmp_path / "vit.npz"
    message = {
        "pickle": "vit.npz is damaged", "truncated": "vit.npz is damaged",
        "missing": r"1 missing keys: blocks\.1\.attn\.qkv\.bias",
        "extra": r"1 unexpected keys: blocks\.2\.norm1\.weight",
        "shape": r"head\.weight is \[5, 3\], the model's \[5, 32\]",
    }[how]  # fmt: skip
    attention = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1"
    if how == "pickle":
        names["head/bias"] = np.array([{"code": 1}], dtype=object)
    elif how == "missing":
        names = {k: v for k, v in names.items() if not (k.startswith(attention) and "bias" in k)}
        names[f"{attention}/out/bias"] = source.blocks[1].attn.proj.bias.detach().numpy()
    elif how == "extra":
        names["Transformer/encoderblock_2/LayerNorm_0/scale"] = np.ones(32, np.float32)
    elif how == "shape":
        names["head/kernel"] = np.ones((3, 5), np.float32)
    np.savez(path, **names)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    model = fastvit.create_model("vit_tiny_patch16_224", num_classes=5, **OURS)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, path)
    assert same_weights(model, before)
