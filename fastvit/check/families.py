"""A small model of every family of transformers that `accelerate` knows: what `fastvit coverage`
compares, and tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvit._compat import import_transformers

_SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
}
_VIDEO: dict[str, Any] = _SIZE | {"num_frames": 4}
_DINO = {key: value for key, value in _SIZE.items() if key != "intermediate_size"} | {
    "layerscale_value": 0.5,
    "mlp_ratio": 2,
}
_DPT: dict[str, Any] = {"backbone_out_indices": [0, 1], "reassemble_factors": [2, 1]}
_BARE = {key: value for key, value in _SIZE.items() if key != "intermediate_size"}

# name -> config class, model class, what differs from the library's defaults
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT": ("ViTConfig", "ViTForImageClassification", _SIZE),
    "DeiT": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", _SIZE),
    "BEiT": (
        "BeitConfig",
        "BeitForImageClassification",
        _SIZE | {"use_relative_position_bias": True, "out_indices": [1]},
    ),
    "BEiT shared bias": (
        "BeitConfig",
        "BeitModel",
        _SIZE | {"use_shared_relative_position_bias": True, "layer_scale_init_value": 0.0},
    ),
    "Dinov2": ("Dinov2Config", "Dinov2ForImageClassification", _DINO),
    "Dinov2 SwiGLU": ("Dinov2Config", "Dinov2Model", _DINO | {"use_swiglu_ffn": True}),
    "Dinov2WithRegisters": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        _DINO | {"num_register_tokens": 3},
    ),
    "DINOv3ViT": ("DINOv3ViTConfig", "DINOv3ViTModel", _SIZE | {"num_register_tokens": 2}),
    "DINOv3ViT gated": (
        "DINOv3ViTConfig",
        "DINOv3ViTModel",
        _SIZE | {"use_gated_mlp": True, "key_bias": True, "hidden_act": "silu"},
    ),
    "CLIPVision": ("CLIPVisionConfig", "CLIPVisionModel", _SIZE),
    "SiglipVision": ("SiglipVisionConfig", "SiglipVisionModel", _SIZE),
    "Siglip2Vision": ("Siglip2VisionConfig", "Siglip2VisionModel", _SIZE | {"num_patches": 16}),
    "MetaClip2Vision": ("MetaClip2VisionConfig", "MetaClip2VisionModel", _SIZE),
    "ViTMAE": (
        "ViTMAEConfig",
        "ViTMAEForPreTraining",
        _SIZE
        | {
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 64,
        },
    ),
    "ViTMSN": ("ViTMSNConfig", "ViTMSNModel", _SIZE),
    "IJepa": ("IJepaConfig", "IJepaModel", _SIZE),
    "VideoMAE": ("VideoMAEConfig", "VideoMAEModel", _VIDEO | {"tubelet_size": 2}),
    "ViViT": ("VivitConfig", "VivitModel", _VIDEO | {"tubelet_size": [2, 8, 8]}),
    "YOLOS": (
        "YolosConfig",
        "YolosForObjectDetection",
        _SIZE | {"image_size": [32, 32], "num_detection_tokens": 3},
    ),
    "DPT": (
        "DPTConfig",
        "DPTForSemanticSegmentation",
        _SIZE | _DPT | {"neck_hidden_sizes": [8, 8], "fusion_hidden_size": 8, "num_labels": 3},
    ),
    "Aimv2": ("Aimv2VisionConfig", "Aimv2VisionModel", _SIZE),
    "InternVL": (
        "InternVLVisionConfig",
        "InternVLVisionModel",
        _SIZE | {"image_size": [32, 32], "patch_size": [8, 8], "layer_scale_init_value": 0.5},
    ),
    "InternVL qk-norm": (
        "InternVLVisionConfig",
        "InternVLVisionModel",
        _SIZE
        | {"image_size": [32, 32], "patch_size": [8, 8], "use_qk_norm": True}
        | {"norm_type": "rms_norm", "attention_bias": True},
    ),
    "ViTPose": (
        "VitPoseBackboneConfig",
        "VitPoseBackbone",
        {key: value for key, value in _SIZE.items() if key != "intermediate_size"}
        | {"image_size": [32, 32], "patch_size": [8, 8], "mlp_ratio": 2},
    ),
    "SamVision": (
        "SamVisionConfig",
        "SamVisionModel",
        _BARE
        | {"output_channels": 8, "mlp_dim": 64}
        | {"global_attn_indexes": [1], "window_size": 3},
    ),
    "VitDet": (
        "VitDetConfig",
        "VitDetModel",
        _BARE
        | {"mlp_ratio": 2, "use_relative_position_embeddings": True, "window_size": 3}
        | {"window_block_indices": [0], "residual_block_indices": [1]},
    ),
    "Hiera": (
        "HieraConfig",
        "HieraModel",
        {"embed_dim": 16, "image_size": [32, 32], "depths": [1, 1], "num_heads": [1, 2]}
        | {"query_stride": [2, 2], "num_query_pool": 1, "masked_unit_size": [4, 4]}
        | {"initial_hidden_size": 16},
    ),
    "Data2VecVision": (
        "Data2VecVisionConfig",
        "Data2VecVisionModel",
        _SIZE | {"use_relative_position_bias": True},
    ),
}


def tiny_model(name: str, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A two-layer model of a family with the library's own initialisation, in eval mode, and inputs
    for a batch of two.

    Args:
        name: one of `FAMILIES`; a variant of a family has its own.
        options: of the config, beside those here.

    Raises:
        ImportError: transformers is not installed.
        AttributeError: it has no such family yet.
        KeyError: an unknown name.
    """
    transformers = import_transformers()
    config_name, model_name, size = FAMILIES[name]
    # with the library's two classes an error is often relative to next to nothing
    config = getattr(transformers, config_name)(**{"num_labels": 10, **size, **options})
    model = getattr(transformers, model_name)(config)
    return model.eval(), _INPUTS.get(name, _images)(config)


def tensors(output: Any) -> list[Tensor]:
    """The floating tensors of a model's output, those within tuples too, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [t for value in values for t in tensors(value)] if isinstance(values, tuple) else []


def _images(config: Any) -> dict[str, Tensor]:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.randn(2, 3, height, width)}


def _video(config: Any) -> dict[str, Tensor]:
    size = (2, config.num_frames, 3, config.image_size, config.image_size)
    return {"pixel_values": torch.randn(size)}


def _packed(config: Any) -> dict[str, Tensor]:
    """Two images of 16 and 9 patches, the second padded."""
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 9:] = 0
    return {
        "pixel_values": torch.randn(2, 16, 3 * config.patch_size**2),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[4, 4], [3, 3]]),
    }


def _masked(config: Any) -> dict[str, Tensor]:
    """With the noise by which ViTMAE drops patches."""
    count = (config.image_size // config.patch_size) ** 2
    return _images(config) | {"noise": torch.rand(2, count)}


_INPUTS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "Siglip2Vision": _packed,
    "ViTMAE": _masked,
    "VideoMAE": _video,
    "ViViT": _video,
}
