"""Checkpoints of transformers, torchvision, open_clip, DINO and Google under timm's names.

A format is known by a key that only it has. What belongs to another task than the encoder's and
its classifier's is left out: poolers, mask tokens, decoders, text towers, projection heads of
self-supervised training. Whatever else a model has no place for keeps a name, so that loading it
names it as unexpected.

Shape legend: N patches, D width, H heads, d head dimension, p patch side, C channels.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvit.vit import VisionTransformer

State = dict[str, Tensor]


class Format(NamedTuple):
    """How a library names its weights."""

    name: str
    marker: re.Pattern[str]  # a key with this in it; what stands before it is every key's prefix
    rules: tuple[tuple[re.Pattern[str], str | None], ...]  # all that match apply; None: left out


def _format(name: str, marker: str, rules: dict[str, str | None]) -> Format:
    compiled = tuple((re.compile(pattern), to) for pattern, to in rules.items())
    return Format(name, re.compile(marker), compiled)


# vit.layers.0 of transformers 5 is vit.encoder.layer.0 in its files and in older versions
_TRANSFORMERS = _format(
    "transformers",
    r"embeddings\.(patch_embeddings\.projection|patch_embedding)\.weight$",
    {
        r"^(text_model|text_projection|logit_scale|logit_bias|decoder)\b": None,
        r"^pooler\.dense\.|mask_token$|position_ids$|relative_position_index$": None,
        r"^head\.": "attn_pool.",
        r"^(classifier|cls_classifier|visual_projection)\.": "head.",
        r"^embeddings\.(cls_token|class_embedding)$": "cls_token",
        r"^embeddings\.register_tokens$": "reg_token",
        r"^embeddings\.(patch_embeddings\.projection|patch_embedding)\.": "patch_embed.proj.",
        r"^embeddings\.(position_embeddings|position_embedding\.weight)$": "pos_embed",
        r"^(layernorm|post_layernorm)\.": "norm.",
        r"^pooler\.layernorm\.": "fc_norm.",
        r"^pre_layrnorm\.": "norm_pre.",
        r"^(encoder\.)?layers?\.(\d+)\.": r"blocks.\2.",
        r"\.(layernorm_before|layer_norm1)\.": ".norm1.",
        r"\.(layernorm_after|layer_norm2)\.": ".norm2.",
        r"\.attention\.attention\.(query|key|value)\.": r".attn.\1.",
        r"\.(attention|self_attn)\.([qkv])_proj\.": r".attn.\2.",
        r"\.attn\.(q|k|v)(uery|ey|alue)\.": r".attn.\1.",
        r"\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.": ".attn.proj.",
        r"\.intermediate\.dense\.": ".mlp.fc1.",
        r"\.output\.dense\.": ".mlp.fc2.",
        r"\.layer_scale(\d)\.lambda1$|\.lambda_(\d)$": r".ls\1\2.gamma",
        r"(\.attention\.attention)?\.relative_position_bias\.": ".attn.rel_pos.",
        r"^attn_pool\.probe$": "attn_pool.latent",
        r"^attn_pool\.attention\.in_proj_": "attn_pool.in_proj_",
        r"^attn_pool\.attention\.out_proj\.": "attn_pool.proj.",
        r"^attn_pool\.layernorm\.": "attn_pool.norm.",
    },
)
_TORCHVISION = _format(
    "torchvision",
    r"conv_proj\.weight$",
    {
        r"^conv_proj\.": "patch_embed.proj.",
        r"^class_token$": "cls_token",
        r"^encoder\.pos_embedding$": "pos_embed",
        r"^encoder\.ln\.": "norm.",
        r"^heads\.head\.": "head.",
        r"^heads\.pre_logits\.": "pre_logits.fc.",
        r"^encoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
        r"\.ln_([12])\.": r".norm\1.",
        r"\.self_attention\.in_proj_": ".attn.qkv.",
        r"\.self_attention\.out_proj\.": ".attn.proj.",
        r"\.mlp\.(0|linear_1)\.": ".mlp.fc1.",
        r"\.mlp\.(3|linear_2)\.": ".mlp.fc2.",
    },
)
_OPEN_CLIP = _format(
    "open_clip",
    r"class_embedding$",
    {
        r"^conv1\.": "patch_embed.proj.",
        r"^class_embedding$": "cls_token",
        r"^positional_embedding$": "pos_embed",
        r"^ln_pre\.": "norm_pre.",
        r"^ln_post\.": "norm.",
        r"^proj$": "head.weight",
        r"^transformer\.resblocks\.(\d+)\.": r"blocks.\1.",
        r"\.ln_([12])\.": r".norm\1.",
        r"\.ls_([12])\.": r".ls\1.",
        r"\.attn\.in_proj_": ".attn.qkv.",
        r"\.attn\.out_proj\.": ".attn.proj.",
        r"\.mlp\.c_fc\.": ".mlp.fc1.",
        r"\.mlp\.c_proj\.": ".mlp.fc2.",
    },
)
_DINO = _format(  # and DINOv2, whose blocks may be in chunks: blocks.<chunk>.<number>
    "DINO",
    r"(register_tokens|mask_token|blocks\.\d+\.\d+\.norm1\.weight)$",
    {
        r"^mask_token$|^(head\.(mlp|last_layer)|dino_head|ibot_head)\.": None,
        r"^register_tokens$": "reg_token",
        r"^blocks\.\d+\.(\d+)\.": r"blocks.\1.",
    },
)
_GOOGLE = _format(  # after `_unstack`; big_vision numbers what stands in a block otherwise
    "Google's .npz",
    r"embedding/kernel$",
    {
        r"^cls$": "cls_token",
        r"^embedding/": "patch_embed/proj/",
        r"^(Transformer/posembed_input/)?pos_embedding$": "pos_embed",
        r"^Transformer/encoder_norm/": "norm/",
        r"^pre_logits/": "pre_logits/fc/",
        r"^MAPHead_0/probe$": "attn_pool/latent",
        r"^MAPHead_0/": "attn_pool/",
        r"^attn_pool/LayerNorm_0/": "attn_pool/norm/",
        r"^Transformer/encoderblock_(\d+)/": r"blocks/\1/",
        r"/LayerNorm_0/": "/norm1/",
        r"/LayerNorm_[12]/": "/norm2/",
        r"/MlpBlock_\d/Dense_0/": "/mlp/fc1/",
        r"/MlpBlock_\d/Dense_1/": "/mlp/fc2/",
        r"/MultiHeadDotProductAttention_\d/": "/attn/",
        r"^attn_pool/attn/": "attn_pool/",
        r"/(attn|attn_pool)/out/": r"/\1/proj/",
        r"^attn_pool/out/": "attn_pool/proj/",
        r"/(q|k|v)(uery|ey|alue)/": r"/\1/",
        r"/(kernel|scale)$": "/weight",
    },
)
_FORMATS = (_TRANSFORMERS, _TORCHVISION, _OPEN_CLIP, _GOOGLE, _DINO)


def to_timm(state: Mapping[str, Tensor], model: VisionTransformer) -> tuple[State, str | None]:
    """A state_dict of any known library under timm's names.

    Args:
        state: a state_dict, or the arrays of a .npz file.
        model: is to take it: it decides where the position of a CLS token goes and whether a
            classifier without bias gets one of zeros.

    Returns:
        The weights, and the library whose names they had; None for timm's own names, which stay.
    """
    if "Transformer/encoderblock/" in " ".join(map(str, state)):
        state = _unstack(state)
    for library in _FORMATS:
        found = next(filter(None, (library.marker.search(str(key)) for key in state)), None)
        if found is None:
            continue
        prefix = found.string[: found.start()]
        if library is _DINO:
            prefix = "backbone." if found.string.startswith("backbone.") else ""
        renamed = _rename(state, library, prefix)
        if library is _GOOGLE:
            renamed = {key.replace("/", "."): _from_jax(key, v) for key, v in renamed.items()}
        return _as_timm_shapes(renamed, library, model), library.name
    plain = {str(key).removeprefix("backbone."): value for key, value in state.items()}
    heads = _DINO.rules[0][0]  # DINO's first version has timm's names but for these
    is_dino = any(str(key).startswith("backbone.") for key in state)
    return {k: v for k, v in plain.items() if not (is_dino and heads.search(k))}, None


def _rename(state: Mapping[str, Tensor], library: Format, prefix: str) -> State:
    renamed: State = {}
    for key, value in state.items():
        if library is _OPEN_CLIP and not str(key).startswith(prefix):
            continue  # a text tower has blocks of the same names
        name: str | None = str(key).removeprefix(prefix)
        for pattern, to in library.rules:
            if name is None or not pattern.search(name):
                continue
            name = None if to is None else pattern.sub(_filled(to), name)
        if name is not None:
            renamed[name] = value
    return renamed


def _filled(template: str) -> Callable[[re.Match[str]], str]:
    """`template` with its groups, empty where one took no part."""
    return lambda match: re.sub(r"\\(\d)", lambda m: match[int(m[1])] or "", template)


def _as_timm_shapes(state: State, library: Format, model: VisionTransformer) -> State:
    state = _pack_qkv(state)
    if library is _OPEN_CLIP and "head.weight" in state:
        state["head.weight"] = state["head.weight"].T.contiguous()
    without_bias = library in (_OPEN_CLIP, _TRANSFORMERS) and "head.weight" in state
    if without_bias and "head.bias" not in state and isinstance(model.head, nn.Linear):
        state["head.bias"] = state["head.weight"].new_zeros(len(state["head.weight"]))
    for key in ("cls_token", "reg_token", "pos_embed"):
        if key in state:
            state[key] = state[key].reshape(1, -1, state[key].shape[-1])
    return _place_cls_position(state, model)


def _pack_qkv(state: State) -> State:
    """Separate q, k and v as one ``qkv``, and an attention pool's packed ones as its q and kv. Of
    three biases those that are missing are zeros."""
    packed = dict(state)
    for key in [key for key in state if key.endswith(".attn.q.weight")]:
        stem = key.removesuffix("q.weight")
        if any(f"{stem}{name}.weight" not in state for name in "kv"):
            continue
        weights = [packed.pop(f"{stem}{name}.weight") for name in "qkv"]
        biases = [packed.pop(f"{stem}{name}.bias", None) for name in "qkv"]
        packed[f"{stem}qkv.weight"] = torch.cat(weights)
        if any(bias is not None for bias in biases):
            pairs = zip(weights, biases, strict=True)
            biases = [w.new_zeros(len(w)) if b is None else b for w, b in pairs]
            packed[f"{stem}qkv.bias"] = torch.cat(biases)
    for kind in ("weight", "bias"):
        whole = packed.pop(f"attn_pool.in_proj_{kind}", None)
        if whole is not None:
            third = len(whole) // 3
            packed[f"attn_pool.q.{kind}"] = whole[:third].clone()
            packed[f"attn_pool.kv.{kind}"] = whole[third:].clone()
        pair = [f"attn_pool.{name}.{kind}" for name in "kv"]
        if all(name in packed for name in pair):
            packed[f"attn_pool.kv.{kind}"] = torch.cat([packed.pop(name) for name in pair])
    return packed


def _place_cls_position(state: State, model: VisionTransformer) -> State:
    """DINOv2 gives its registers no position. Models with positions for patches only, as timm's
    with registers are, get the CLS token's added to the token; others zeros for the registers."""
    table, cls, registers = (state.get(key) for key in ("pos_embed", "cls_token", "reg_token"))
    if table is None or cls is None or registers is None:
        return state
    if model.no_embed_class:
        return state | {"cls_token": cls + table[:, :1], "pos_embed": table[:, 1:].clone()}
    zeros = table.new_zeros(1, registers.shape[1], table.shape[2])
    return state | {"pos_embed": torch.cat([table[:, :1], zeros, table[:, 1:]], dim=1)}


# --------------------------------------------------------------------------- Google's .npz


def read_npz(path: str | os.PathLike[str]) -> State:
    """The arrays of a .npz file; a pickled object in it is an error, never loaded."""
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        return {key: _to_tensor(arrays[key]) for key in arrays.files}


def _to_tensor(array: Any) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # JAX's bfloat16
        return torch.from_numpy(array.view("uint16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array)


def _unstack(state: Mapping[str, Tensor]) -> State:
    """big_vision's blocks of one scan, stacked along the first axis, as separate ones."""
    separate: State = {}
    for key, value in state.items():
        if "/encoderblock/" not in key:
            separate[key] = value
            continue
        for i, one in enumerate(value):
            separate[key.replace("/encoderblock/", f"/encoderblock_{i}/")] = one
    return separate


def _from_jax(key: str, value: Tensor) -> Tensor:
    """One weight in PyTorch's layout: JAX multiplies from the right and keeps heads apart."""
    if key == "patch_embed/proj/weight" and value.dim() == 4:  # (p, p, C, D)
        return value.permute(3, 2, 0, 1).contiguous()
    if not re.search(r"/(q|k|v|proj|fc|fc1|fc2)/|^head/", key):
        return value
    if key.endswith("/bias"):
        return value.flatten()  # (H, d) of q, k and v
    if value.dim() == 3:  # (H, d, D) of the output projection, else (D, H, d)
        value = value.flatten(0, 1) if "/proj/" in key else value.flatten(1)
    return value.T.contiguous()
