"""Cases, FLOPs and bytes of `attention` and `attention_qkv`."""

import itertools
from typing import Any, Literal

import torch

from fastvit.kernels._hopper_cases import ATTENTION, QKV
from fastvit.kernels._spec import Case, Draw, OpSpec
from fastvit.kernels.attention import reference
from fastvit.kernels.attention.op import attention, attention_packed, attention_qkv

Rope = Literal["none", "interleaved", "half"]


def _rope(draw: Draw, kind: Rope, tokens: int, d: int, *heads: int) -> dict[str, Any]:
    """Angles of several turns, drawn."""
    if kind == "none":
        return {}
    angle = draw(*heads, tokens, d // 2, std=5.0)
    return {"rope": (angle.cos(), angle.sin()), "rotate_half": kind == "half"}


def _case(
    name: str, b: int, h: int, n: int, d: int, *, m: int | None = None,
    mask: Literal["none", "bool", "bias"] = "none", sharp: float = 1.0, rope: Rope = "none",
    prefix: int = 1,
) -> Case:  # fmt: skip
    keys = n if m is None else m

    def make(draw: Draw) -> dict[str, Any]:
        inputs: dict[str, Any] = {"q": draw(b, h, n, d, std=sharp)}
        inputs |= {name: draw(b, h, keys, d) for name in ("k", "v")}
        if mask == "bias":  # relative position: one bias per head, the same for each image
            inputs["attn_mask"] = draw(1, h, n, keys)
        elif mask == "bool":  # keys past an image's length; the last image sees none at all
            lengths = torch.arange(b, 0, -1, device=inputs["q"].device) * keys // b
            lengths[-1] = 0
            columns = torch.arange(keys, device=lengths.device)
            inputs["attn_mask"] = (columns < lengths[:, None])[:, None, None, :]
        return inputs | _rope(draw, rope, n - prefix, d, h)

    return Case(name, {"B": b, "H": h, "N": n, "M": keys, "d": d}, make)


def _qkv_case(name: str, b: int, h: int, n: int, d: int, rope: Rope = "none") -> Case:
    def make(draw: Draw) -> dict[str, Any]:
        inputs = {"qkv": draw(b, n, 3 * h * d), "num_heads": h}
        return inputs | _rope(draw, rope, n - 5, d)  # a class token and four registers stay

    return Case(name, {"B": b, "H": h, "N": n, "M": n, "d": d}, make)


def _packed_case(name: str, lengths: list[int], h: int, d: int, rope: Rope = "none") -> Case:
    tokens, pairs = sum(lengths), sum(length**2 for length in lengths)

    def make(draw: Draw) -> dict[str, Any]:
        qkv = draw(tokens, 3 * h * d)
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        inputs = {"qkv": qkv, "num_heads": h, "cu_seqlens": bounds.to(qkv.device)}
        return inputs | {"max_seqlen": max(lengths)} | _rope(draw, rope, tokens, d)

    return Case(name, {"T": tokens, "pairs": pairs, "H": h, "d": d}, make)


def _mixed_lengths(count: int) -> list[int]:
    """Tokens of images of many sizes, patch 16: sides from 96 to 384 pixels, in a fixed order."""
    sides = [6 + (7 * i) % 19 for i in range(2 * count)]
    return [height * width + 1 for height, width in zip(sides[::2], sides[1::2], strict=True)]


def _flops(sizes: dict[str, int]) -> int:
    return 4 * sizes["B"] * sizes["H"] * sizes["N"] * sizes["M"] * sizes["d"]


def _bytes(sizes: dict[str, int], itemsize: int) -> int:
    return 2 * itemsize * sizes["B"] * sizes["H"] * (sizes["N"] + sizes["M"]) * sizes["d"]


_CASES = (
    _case("one token", 1, 1, 1, 16),
    _case("one query, 197 keys", 2, 3, 1, 64, m=197),
    _case("ViT 224, N=197", 1, 2, 197, 64),
    _case("257 keys, d=88", 1, 1, 257, 88),
    _case("d=72", 1, 2, 65, 72),
    _case("d=80", 1, 2, 50, 80),
    _case("d=104", 1, 2, 50, 104),
    _case("d=32", 2, 2, 64, 32),
    _case("d=256", 1, 1, 33, 256),
    _case("d=20", 1, 2, 17, 20),
    _case("key lengths", 3, 2, 70, 64, mask="bool"),
    _case("bias per head", 2, 2, 81, 64, mask="bias"),
    _case("bias per head, d=128", 2, 1, 20, 128, mask="bias"),
    _case("bias per head, d=256", 1, 2, 18, 256, mask="bias"),
    _case("sharp scores", 1, 2, 130, 64, sharp=30.0),
    _case("rope of each head, d=40", 2, 2, 70, 40, rope="interleaved"),
    _case("rope of halves, bias", 2, 1, 38, 32, mask="bias", rope="half", prefix=5),
)
_BENCH = tuple(
    _case(f"{name}, batch {batch}", batch, h, n, d)
    for batch in (1, 32, 256)
    for name, h, n, d in (("ViT-B 224", 12, 197, 64), ("ViT-B 384", 12, 577, 64))
)
_QKV_CASES = (
    _qkv_case("one token", 2, 1, 1, 32),
    _qkv_case("ViT-Ti 224", 1, 3, 197, 64),
    _qkv_case("N=50, d=80", 2, 2, 50, 80),
    _qkv_case("rope", 2, 1, 21, 32, rope="interleaved"),
    _qkv_case("rope of halves", 1, 2, 69, 96, rope="half"),
)
_QKV_BENCH = (
    _qkv_case("ViT-B 224, batch 1", 1, 12, 197, 64),
    _qkv_case("ViT-B 224, batch 256", 256, 12, 197, 64),
    _qkv_case("DINOv3-B 224, batch 1", 1, 12, 201, 64, rope="half"),
    _qkv_case("DINOv3-B 224, batch 256", 256, 12, 201, 64, rope="half"),
)
_PACKED_CASES = (
    _packed_case("one token", [1], 1, 16),
    _packed_case("three images, one without tokens", [17, 0, 9], 1, 16),
    _packed_case("ViT 224 and smaller", [197, 65, 17], 1, 64),
    _packed_case("d=80", [50, 70], 1, 80),
    _packed_case("rope", [33, 20], 2, 32, rope="half"),
)
_PACKED_BENCH = tuple(
    _packed_case(f"ViT-B, {count} images of mixed sizes", _mixed_lengths(count), 12, 64)
    for count in (8, 256)
)
SPECS = (
    OpSpec(
        "attention", attention, reference.attention_reference, _CASES, _BENCH, _flops, _bytes,
        gpu_cases=tuple(_case(*sizes, **options) for *sizes, options in ATTENTION),
    ),
    OpSpec(
        "attention_qkv", attention_qkv, reference.attention_qkv_reference, _QKV_CASES, _QKV_BENCH,
        _flops, _bytes, gpu_cases=tuple(itertools.starmap(_qkv_case, QKV)),
    ),
    OpSpec(
        "attention_packed", attention_packed, reference.attention_packed_reference, _PACKED_CASES,
        _PACKED_BENCH, lambda sizes: 4 * sizes["pairs"] * sizes["H"] * sizes["d"],
        lambda sizes, itemsize: 4 * itemsize * sizes["T"] * sizes["H"] * sizes["d"],
    ),
)  # fmt: skip
