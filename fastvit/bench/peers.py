"""Other libraries' Vision Transformers of the same shape and with the same weights as timm's."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastvit._compat import import_timm
from fastvit.numerics import exact_convolutions

# Regular expressions for whole parameter names and timm's names for them. ``#n`` is the nth third
# of a fused weight, since transformers keeps query, key and value apart.
TRANSFORMERS = {
    r"vit\.embeddings\.cls_token": "cls_token",
    r"vit\.embeddings\.position_embeddings": "pos_embed",
    r"vit\.embeddings\.patch_embeddings\.projection\.(\w+)": r"patch_embed.proj.\1",
    r"vit\.layers\.(\d+)\.attention\.q_proj\.(\w+)": r"blocks.\1.attn.qkv.\2#0",
    r"vit\.layers\.(\d+)\.attention\.k_proj\.(\w+)": r"blocks.\1.attn.qkv.\2#1",
    r"vit\.layers\.(\d+)\.attention\.v_proj\.(\w+)": r"blocks.\1.attn.qkv.\2#2",
    r"vit\.layers\.(\d+)\.attention\.o_proj\.(\w+)": r"blocks.\1.attn.proj.\2",
    r"vit\.layers\.(\d+)\.layernorm_before\.(\w+)": r"blocks.\1.norm1.\2",
    r"vit\.layers\.(\d+)\.layernorm_after\.(\w+)": r"blocks.\1.norm2.\2",
    r"vit\.layers\.(\d+)\.mlp\.(fc.\.\w+)": r"blocks.\1.mlp.\2",
    r"vit\.layernorm\.(\w+)": r"norm.\1",
    r"classifier\.(\w+)": r"head.\1",
}
_LAYER = r"encoder\.layers\.encoder_layer_(\d+)"
TORCHVISION = {
    r"class_token": "cls_token",
    r"encoder\.pos_embedding": "pos_embed",
    r"conv_proj\.(\w+)": r"patch_embed.proj.\1",
    _LAYER + r"\.self_attention\.in_proj_(\w+)": r"blocks.\1.attn.qkv.\2",
    _LAYER + r"\.self_attention\.out_proj\.(\w+)": r"blocks.\1.attn.proj.\2",
    _LAYER + r"\.ln_([12])\.(\w+)": r"blocks.\1.norm\2.\3",
    _LAYER + r"\.mlp\.0\.(\w+)": r"blocks.\1.mlp.fc1.\2",
    _LAYER + r"\.mlp\.3\.(\w+)": r"blocks.\1.mlp.fc2.\2",
    r"encoder\.ln\.(\w+)": r"norm.\1",
    r"heads\.head\.(\w+)": r"head.\1",
}
SAME = 1e-3  # relative; in float32 two orders of operations differ by 1e-6, two functions by 1e-2


class _Logits(nn.Module):
    """transformers' classifier as a function of images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def transformers_vit(model: nn.Module) -> nn.Module:
    """transformers' ``ViTForImageClassification`` on SDPA with the weights of timm's `model`.

    Returns:
        A module of images to logits, in `model`'s dtype, mode and place.

    Raises:
        ImportError: transformers is not installed.
        ValueError: `model` is not a plain ViT, so that transformers' computes something else.
    """
    import_timm()  # transformers imports torchvision too
    from transformers import ViTConfig, ViTForImageClassification

    shape = _shape(model)
    options: dict[str, Any] = {
        "hidden_size": shape["dim"],
        "num_hidden_layers": shape["depth"],
        "num_attention_heads": shape["heads"],
        "intermediate_size": shape["hidden"],
        "image_size": shape["img_size"],
        "patch_size": shape["patch_size"],
        "num_labels": shape["classes"],
        "layer_norm_eps": shape["eps"],
        "hidden_act": "gelu",
        "attn_implementation": "sdpa",
    }
    peer = ViTForImageClassification(ViTConfig(**options))
    return _checked(_fill(peer, model, TRANSFORMERS), _Logits(peer), model)


def torchvision_vit(model: nn.Module) -> nn.Module:
    """torchvision's ``VisionTransformer`` with the weights of timm's `model`.

    Returns:
        A module of images to logits, in `model`'s dtype, mode and place.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: `model` is not a plain ViT, so that torchvision's computes something else.
    """
    import_timm()
    from torchvision.models.vision_transformer import VisionTransformer

    shape = _shape(model)
    peer = VisionTransformer(
        image_size=shape["img_size"],
        patch_size=shape["patch_size"],
        num_layers=shape["depth"],
        num_heads=shape["heads"],
        hidden_dim=shape["dim"],
        mlp_dim=shape["hidden"],
        num_classes=shape["classes"],
    )
    return _checked(_fill(peer, model, TORCHVISION), peer, model)


def torchao_fp8(model: nn.Module) -> nn.Module:
    """A copy of timm's `model` whose linears but the classifier multiply e4m3, with a scale for
    each row that is found as it runs; made for `torch.compile`.

    Raises:
        ImportError: torchao is not installed.
    """
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    # without its settings of Inductor, which the other contenders would get too
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), set_inductor_config=False
    )
    peer = copy.deepcopy(model)
    quantize_(peer, config, lambda module, name: isinstance(module, nn.Linear) and name != "head")
    return peer


def _shape(model: Any) -> dict[str, Any]:
    """What both libraries' configurations ask for, read off timm's model."""
    block, patch = model.blocks[0], model.patch_embed
    height, width = patch.img_size
    if height != width or patch.patch_size[0] != patch.patch_size[1]:
        raise ValueError("not a plain ViT: images or patches are not square")
    return {
        "dim": model.embed_dim,
        "depth": len(model.blocks),
        "heads": block.attn.num_heads,
        "hidden": block.mlp.fc1.out_features,
        "img_size": height,
        "patch_size": patch.patch_size[0],
        "classes": model.num_classes,
        "eps": block.norm1.eps,
    }


def _fill(peer: nn.Module, model: nn.Module, names: Mapping[str, str]) -> nn.Module:
    """Copy every weight of `model` into `peer`, or refuse."""
    state = model.state_dict()
    filled, used = {}, set()
    for name, target in peer.state_dict().items():
        for pattern, replacement in names.items():
            match = re.fullmatch(pattern, name)
            if match:
                source, _, third = match.expand(replacement).partition("#")
                break
        else:
            raise ValueError(f"not a plain ViT: timm has nothing for {name}")
        value = state.get(source)
        if value is not None and third:
            value = value.chunk(3)[int(third)]
        if value is None or value.shape != target.shape:
            raise ValueError(f"not a plain ViT: {name} and timm's {source} differ")
        filled[name] = value
        used.add(source)
    left = sorted(state.keys() - used)
    if left:
        raise ValueError(f"not a plain ViT: it also has {left[0]}")
    peer.load_state_dict(filled)
    return peer


@exact_convolutions
def _checked(peer: nn.Module, wrapped: nn.Module, model: Any) -> nn.Module:
    """`wrapped` beside timm's own, if both compute the same in float32: equal names of weights do
    not rule out another activation or pooling."""
    weight = next(model.parameters())
    size = model.patch_embed.img_size
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, model.patch_embed.proj.in_channels, *size, generator=generator)
    image = image.to(weight.device)
    with torch.inference_mode():
        truth = copy.deepcopy(model).float().eval()(image)
        other = wrapped.to(weight.device).float().eval()(image)
    difference = float((other - truth).norm() / truth.norm())
    if not difference < SAME:
        raise ValueError(f"not a plain ViT: {type(peer).__name__} differs by {difference:.1e}")
    return wrapped.to(weight.dtype).train(model.training)
