"""The architectures: what can be chosen, and one table of shapes and names.

Names are timm's, ``{family}_{size}_patch{p}_{style}_{pixels}``, and stand for timm's shapes.
Sources: ViT (arXiv:2010.11929), scaling (arXiv:2106.04560, 2106.10270), DeiT (arXiv:2012.12877,
2204.07118), CLIP (arXiv:2103.00020), SigLIP (arXiv:2303.15343), DINOv2 (arXiv:2304.07193).
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

POOLS = ("", "token", "avg", "max", "avgmax", "map")
POS_EMBEDS = ("none", "learned", "2d", "relative")
HEADS = ("linear", "mlp")
WEIGHT_INITS = ("", "skip")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises:
    ValueError: naming the choices, where `value` is none of them.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True)
class ViTConfig:
    """Everything that can be chosen about a `VisionTransformer`; names are timm's.

    Args:
        img_size, patch_size: in pixels, one number or (height, width).
        in_chans: image channels C.
        num_classes: of the head; 0 for no head.
        global_pool: ``token`` (CLS), ``avg``, ``max``, ``avgmax``, ``map`` (attention pooling,
            arXiv:2106.04560) or ``""`` for all tokens.
        embed_dim, depth, num_heads, mlp_ratio: width D, blocks, heads H, hidden width over D.
        qkv_bias, proj_bias: biases of the qkv linears; of the projections and the MLPs.
        qk_norm: LayerNorm of queries and keys (arXiv:2302.05442).
        init_values: where LayerScale starts (arXiv:2103.17239); None for no LayerScale.
        class_token: whether there is a CLS token.
        reg_tokens: number of register tokens (arXiv:2309.16588).
        pos_embed: ``none``, ``learned`` (1-D, the ViT paper's), ``2d`` (a column's and a row's
            embedding side by side, the paper's appendix D.4) or ``relative`` (a bias by offset
            and head in every block).
        no_embed_class: a learned embedding has rows for patches only.
        pre_norm: LayerNorm before the blocks, no bias in the patch projection (CLIP).
        final_norm: LayerNorm after the blocks.
        fc_norm: whether that norm comes after pooling; None: for ``avg``, ``max``, ``avgmax``.
        pool_include_prefix: pooling other than ``token`` sees prefix tokens too.
        dynamic_img_size: take every image whose sides are multiples of the patch size.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, after
            the embedding, after linears, of attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 in the first.
        norm_eps: of every LayerNorm.
        act_layer: of the MLPs, a name in `layers.ACT_LAYERS`: ``gelu`` is the exact one.
        head: ``linear``, or ``mlp``: the paper's pre-training head with one tanh layer of width D.
        weight_init: ``""`` for truncated normals of 0.02 as in timm; ``skip`` leaves PyTorch's.

    Raises:
        ValueError: an unknown choice, or choices that exclude one another.
    """

    img_size: int | Sequence[int] = 224
    patch_size: int | Sequence[int] = 16
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "token"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    init_values: float | None = None
    class_token: bool = True
    reg_tokens: int = 0
    pos_embed: str = "learned"
    no_embed_class: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool | None = None
    pool_include_prefix: bool = False
    dynamic_img_size: bool = False
    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    norm_eps: float = 1e-6
    act_layer: str = "gelu"
    head: str = "linear"
    weight_init: str = ""

    def __post_init__(self) -> None:
        check_choice("global_pool", self.global_pool, POOLS)
        check_choice("pos_embed", self.pos_embed, POS_EMBEDS)
        check_choice("head", self.head, HEADS)
        check_choice("weight_init", self.weight_init, WEIGHT_INITS)
        for name in ("in_chans", "embed_dim", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive")
        if self.depth < 0:
            raise ValueError(f"depth={self.depth} is negative")
        if int(self.embed_dim * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves the MLPs no hidden width")
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool='token' needs class_token=True")
        if self.pos_embed == "2d" and self.embed_dim % 2:
            raise ValueError(f"pos_embed='2d' halves embed_dim, which is {self.embed_dim}")
        if self.pos_embed == "relative" and self.dynamic_img_size:
            raise ValueError("pos_embed='relative' has one grid: use set_input_size instead")

    @property
    def norm_after_pool(self) -> bool:
        """`fc_norm`, decided."""
        return (
            self.global_pool in ("avg", "max", "avgmax") if self.fc_norm is None else self.fc_norm
        )


# --------------------------------------------------------------------------- the table

SIZES = {  # embed_dim, depth, num_heads, mlp_ratio
    "tiny": (192, 12, 3, 4),
    "wee": (256, 14, 4, 5),
    "xsmall": (256, 10, 4, 4),
    "little": (320, 14, 5, 5.6),
    "small": (384, 12, 6, 4),
    "medium": (512, 12, 8, 4),
    "mediumd": (512, 20, 8, 4),
    "betwixt": (640, 12, 10, 4),
    "base": (768, 12, 12, 4),
    "large": (1024, 24, 16, 4),
    "so400m": (1152, 27, 16, 4304 / 1152),
    "huge": (1280, 32, 16, 4),
    "giant": (1408, 40, 16, 48 / 11),
    "giantopt": (1536, 40, 16, 4),
    "gigantic": (1664, 48, 16, 64 / 13),
}

Stats = tuple[tuple[float, float, float], tuple[float, float, float]]
HALF: Stats = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: Stats = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
UNIT: Stats = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

_gap = {"class_token": False, "global_pool": "avg"}
_reg_gap = {**_gap, "no_embed_class": True, "init_values": 1e-5}
_clip = {"pre_norm": True, "norm_eps": 1e-5, "stats": CLIP}
_siglip = {"class_token": False, "global_pool": "map", "num_classes": 0}
_dinov2 = {"init_values": 1e-5, "img_size": 518, "num_classes": 0, "stats": IMAGENET}
_tips = {"init_values": 1.0, "img_size": 448, "num_classes": 0, "stats": UNIT}

STYLES: dict[str, dict[str, Any]] = {  # "stats": mean and std of the pixels
    "": {},
    "gap": {**_gap, "fc_norm": False},
    "reg1_gap": {**_reg_gap, "reg_tokens": 1},
    "reg4_gap": {**_reg_gap, "reg_tokens": 4},
    "36x1": {"depth": 36, "init_values": 1e-5},
    "plus": {"embed_dim": 896, "num_heads": 14, "init_values": 1e-5},
    "plus_clip": {"embed_dim": 896, "num_heads": 14, **_clip},
    "clip": _clip,
    "clip_quickgelu": {**_clip, "act_layer": "quick_gelu"},
    "siglip": _siglip,
    "siglip_gap": {**_siglip, "global_pool": "avg", "fc_norm": False},
    "dinov2": _dinov2,
    "reg4_dinov2": {**_dinov2, "reg_tokens": 4, "no_embed_class": True},
    "reg1_tipsv2": {**_tips, "reg_tokens": 1, "no_embed_class": True},
}

FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {},
    "deit": {"stats": IMAGENET},
    "deit3": {"stats": IMAGENET, "no_embed_class": True, "init_values": 1e-6},
}

NAMES = {  # stem: endings, ":n" for n classes
    "deit_tiny_patch16": "224",
    "deit_small_patch16": "224",
    "deit_base_patch16": "224 384",
    "deit3_small_patch16": "224 384",
    "deit3_medium_patch16": "224",
    "deit3_base_patch16": "224 384",
    "deit3_large_patch16": "224 384",
    "deit3_huge_patch14": "224",
    "vit_tiny_patch16": "224 384",
    "vit_wee_patch16": "reg1_gap_256",
    "vit_xsmall_patch16": "clip_224:512",
    "vit_little_patch16": "reg1_gap_256 reg4_gap_256",
    "vit_small_patch8": "224:0",
    "vit_small_patch14": "dinov2 reg4_dinov2",
    "vit_small_patch16": "224 384 36x1_224",
    "vit_small_patch32": "224 384",
    "vit_medium_patch16": "gap_240:11821 gap_256 gap_384 reg1_gap_256 reg4_gap_256 clip_224:512",
    "vit_medium_patch32": "clip_224:512",
    "vit_mediumd_patch16": "reg4_gap_256 reg4_gap_384",
    "vit_betwixt_patch16": "gap_256 reg1_gap_256 reg4_gap_256 reg4_gap_384",
    "vit_betwixt_patch32": "clip_224:512",
    "vit_base_patch8": "224",
    "vit_base_patch14": "dinov2 reg4_dinov2 reg1_tipsv2",
    "vit_base_patch16": "224 384 gap_224 reg4_gap_256 plus_240 plus_clip_240:640 clip_224 clip_384 "
    "clip_quickgelu_224:512 siglip_224 siglip_256 siglip_384 siglip_512 siglip_gap_224 "
    "siglip_gap_256 siglip_gap_384 siglip_gap_512",
    "vit_base_patch32": "224 384 plus_256 clip_224 clip_256:512 clip_384 clip_448 "
    "clip_quickgelu_224:512 siglip_256 siglip_gap_256",
    "vit_large_patch14": "224 clip_224 clip_336 clip_quickgelu_224:768 clip_quickgelu_336:768 "
    "dinov2 reg4_dinov2 reg1_tipsv2",
    "vit_large_patch16": "224 384 siglip_256 siglip_384 siglip_512 siglip_gap_256 siglip_gap_384 "
    "siglip_gap_512",
    "vit_large_patch32": "224:0 384",
    "vit_so400m_patch14": "siglip_224 siglip_378 siglip_gap_224 siglip_gap_378 siglip_gap_448 "
    "siglip_gap_896 reg1_tipsv2",
    "vit_so400m_patch16": "siglip_256 siglip_384 siglip_512 siglip_gap_256 siglip_gap_384 "
    "siglip_gap_512",
    "vit_huge_patch14": "224:0 gap_224:0 clip_224 clip_336 clip_378:1024 clip_quickgelu_224:1024 "
    "clip_quickgelu_378:1024",
    "vit_huge_patch16": "gap_448:0",
    "vit_giant_patch14": "224 clip_224:1024",
    "vit_giant_patch16": "gap_224:0",
    "vit_giantopt_patch16": "siglip_256 siglip_384 siglip_gap_256 siglip_gap_384",
    "vit_gigantic_patch14": "224 clip_224:1280 clip_378:1280 clip_quickgelu_224:1280",
}

EXCEPTIONS: dict[str, dict[str, Any]] = {  # pattern: what differs from the rules above
    "vit_small_patch8_224": {"stats": IMAGENET},
    "vit_medium_patch16_gap_*": {"qkv_bias": False, "init_values": 1e-6},
    "vit_betwixt_patch16_gap_*": {"qkv_bias": False, "init_values": 1e-6},
    "vit_base_patch16_gap_224": {"num_heads": 16},
    "vit_base_patch16_reg4_gap_256": {"init_values": None},
    "vit_base_patch32_siglip_*": {"act_layer": "gelu_tanh"},
    "vit_large_patch14_clip_[23]*": {"stats": HALF},
    "vit_large_patch16_siglip_*512": {"act_layer": "gelu_tanh"},
    "vit_so400m_patch16_siglip_*": {"act_layer": "gelu_tanh"},
    "vit_huge_patch1[46]_gap_*": {"stats": IMAGENET},
    "vit_giant_patch16_gap_224": {"stats": IMAGENET},
    "vit_giantopt_*": {"act_layer": "gelu_tanh"},
}


CROPS = {  # patterns, of which the first that fits counts: share of the side that timm keeps
    "vit_so400m_patch14_siglip_gap_[48]*": 1.0,
    "*_siglip_* vit_base_patch32_clip_quickgelu_*": 0.9,
    "vit_medium_patch16_gap_384": 0.95,
    "*_384 *_448 *_dinov2 *_tipsv2 *_clip_quickgelu_* *_plus_clip_* *_patch14_clip_*": 1.0,
    "vit_base_patch32_clip_256": 1.0,
    "vit_base_patch16_clip_224 *_plus_* vit_medium_patch16_gap_* vit_medium_patch16_reg*": 0.95,
    "vit_betwixt_patch16_* vit_little_* vit_mediumd_* vit_wee_*": 0.95,
    "*": 0.9,
}
SQUASHED = "vit_base_patch16_clip_384 *_clip_336 vit_gigantic_*_clip_378 vit_medium_patch16_gap_384"


def _fits(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split())


def _parse() -> dict[str, tuple[str, str, int | None, int | None]]:
    """name: stem, style, pixels, classes; None where the style or the default decides."""
    table = {}
    for stem, endings in NAMES.items():
        for item in endings.split():
            ending, _, classes = item.partition(":")
            style, _, pixels = ending.rpartition("_")
            if not pixels.isdigit():
                style, pixels = ending, ""
            name = f"{stem}_{ending}"
            table[name] = (stem, style, int(pixels or 0) or None, int(classes) if classes else None)
    return table


_TABLE = _parse()


def list_models(pattern: str = "*") -> list[str]:
    """Architecture names that match a shell-style pattern, sorted."""
    return sorted(fnmatch.filter(_TABLE, pattern))


def unknown_model(name: str, known: Iterable[str]) -> ValueError:
    """An error that names the three of `known` nearest to `name`."""
    nearest = difflib.get_close_matches(name, list(known), n=3, cutoff=0)
    return ValueError(f"unknown model {name!r}; nearest: {', '.join(nearest)}")


def find_variant(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a name stands for.

    Args:
        name: one of `list_models`.

    Returns:
        Options for `ViTConfig`; and the input they are for, in timm's notation, as its
        ``resolve_model_data_config`` reads it.

    Raises:
        ValueError: an unknown name, with the three nearest.
    """
    if name not in _TABLE:
        raise unknown_model(name, _TABLE)
    stem, style, pixels, classes = _TABLE[name]
    family, size, patch = stem.split("_")
    shape = dict(zip(("embed_dim", "depth", "num_heads", "mlp_ratio"), SIZES[size], strict=True))
    options: dict[str, Any] = {
        "patch_size": int(patch.removeprefix("patch")),
        "num_classes": 1000,
        "stats": HALF,
        **shape,
        **FAMILIES[family],
        **STYLES[style],
    }
    for pattern, differences in EXCEPTIONS.items():
        if fnmatch.fnmatchcase(name, pattern):
            options.update(differences)
    if pixels is not None:
        options["img_size"] = pixels
    if classes is not None:
        options["num_classes"] = classes
    mean, std = options.pop("stats")
    cfg = {
        "architecture": name,
        "num_classes": options["num_classes"],
        "input_size": (3, options["img_size"], options["img_size"]),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": next(crop for patterns, crop in CROPS.items() if _fits(name, patterns)),
        "crop_mode": "squash" if _fits(name, SQUASHED) else "center",
        "mean": mean,
        "std": std,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return options, cfg
