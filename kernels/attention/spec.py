"""Cases, FLOPs and bytes of `attention` and `attention_qkv`."""

from __future__ import annotations

from typing import Any, Literal

import torch

from fastvit.kernels._spec import Case, Draw, OpSpec
from fastvit.kernels.attention.op import attention, attention_qkv
from fastvit.kernels.attention.reference import attention_qkv_reference, attention_reference


def _case(
    name: str,
    b: int,
    h: int,
    n: int,
    d: int,
    *,
    m: int | None = None,
    mask: Literal["none", "bool", "bias"] = "none",
    sharp: float = 1.0,
) -> Case:
    keys = n if m is None else m

    def make(draw: Draw) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "q": draw(b, h, n, d, std=sharp),
            "k": draw(b, h, keys, d),
            "v": draw(b, h, keys, d),
        }
        if mask == "bias":  # relative position: one bias per head, the same for each image
            inputs["attn_mask"] = draw(1, h, n, keys)
        elif mask == "bool":  # keys past an image's length; the last image sees none at all
            lengths = torch.arange(b, 0, -1, device=inputs["q"].device) * keys // b
            lengths[-1] = 0
            columns = torch.arange(keys, device=lengths.device)
            inputs["attn_mask"] = (columns < lengths[:, None])[:, None, None, :]
        return inputs

    return Case(name, {"B": b, "H": h, "N": n, "M": keys, "d": d}, make)


def _packed_case(name: str, b: int, h: int, n: int, d: int) -> Case:
    def make(draw: Draw) -> dict[str, Any]:
        return {"qkv": draw(b, n, 3 * h * d), "num_heads": h}

    return Case(name, {"B": b, "H": h, "N": n, "M": n, "d": d}, make)


def _flops(sizes: dict[str, int]) -> int:
    return 4 * sizes["B"] * sizes["H"] * sizes["N"] * sizes["M"] * sizes["d"]


def _bytes(sizes: dict[str, int], itemsize: int) -> int:
    return 2 * itemsize * sizes["B"] * sizes["H"] * (sizes["N"] + sizes["M"]) * sizes["d"]


SPECS = (
    OpSpec(
        name="attention",
        op=attention,
        reference=attention_reference,
        cases=(
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
            _case("sharp scores", 1, 2, 130, 64, sharp=30.0),
        ),
        bench_cases=tuple(
            _case(f"{name}, batch {batch}", batch, h, n, d)
            for batch in (1, 32, 256)
            for name, h, n, d in (("ViT-B 224", 12, 197, 64), ("ViT-B 384", 12, 577, 64))
        ),
        flops=_flops,
        bytes=_bytes,
    ),
    OpSpec(
        name="attention_qkv",
        op=attention_qkv,
        reference=attention_qkv_reference,
        cases=(
            _packed_case("one token", 2, 1, 1, 32),
            _packed_case("ViT-Ti 224", 1, 3, 197, 64),
            _packed_case("N=50, d=80", 2, 2, 50, 80),
        ),
        bench_cases=tuple(
            _packed_case(f"ViT-B 224, batch {batch}", batch, 12, 197, 64) for batch in (1, 256)
        ),
        flops=_flops,
        bytes=_bytes,
    ),
)
