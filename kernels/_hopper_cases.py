"""Shapes that half dtypes give to Hopper's kernels, for the certificate on a GPU, the proofs of the
ledger and the audit. The interpreter would take hours for them."""

from __future__ import annotations

from typing import Any

import torch

from fastvit.kernels._spec import Case, OpSpec

# name, M, K, N and options of a linear
LINEAR: tuple[tuple[Any, ...], ...] = tuple(
    (f"M={m:,}, {name}", m, k, n, options)
    for m in (1000, 50_432)
    for name, k, n, options in (
        ("gelu", 768, 1000, {"activation": "gelu"}),
        ("residual", 768, 768, {"scale": True, "residual": True}),
        ("residual, long sums", 3072, 768, {"residual": True}),
    )
)
# name, M, K, F and options of an MLP behind a norm
MLP: tuple[tuple[Any, ...], ...] = (
    ("M=1,000, silu, no bias", 1000, 1000, 768, {"activation": "silu", "full": False}),
    ("M=25,216, gelu", 25_216, 768, 3072, {"full": True}),
)
# name, B, H, N, d and options of an attention of q, k and v
ATTENTION: tuple[tuple[Any, ...], ...] = (
    ("N=197, separate", 16, 12, 197, 64, {}),
    ("130 queries, 70 keys, d=48", 41, 5, 130, 48, {"m": 70}),
    ("N=257, d=80, key lengths", 16, 4, 257, 80, {"mask": "bool"}),
    ("N=577, d=72, bias per head", 8, 4, 577, 72, {"mask": "bias"}),
    ("1,370 queries, 577 keys", 4, 6, 1370, 64, {"m": 577}),
)
# name, B, H, N, d and rotary positions of one of packed qkv: every kind of kernel, every way to
# split keys and channels
QKV: tuple[tuple[Any, ...], ...] = (
    *(
        (f"N={n}, d={d}, batch {b}", b, h, n, d)
        for b, h, n, d in (
            (1, 12, 197, 64), (64, 12, 197, 64), (64, 12, 257, 64), (64, 16, 256, 72),
            (47, 5, 50, 64), (29, 7, 208, 64),
            (16, 12, 577, 64), (4, 4, 577, 128), (4, 12, 1370, 64), (4, 4, 1370, 88),
        )
    ),
    ("N=201, rope of halves", 64, 12, 201, 64, "half"),
    ("N=1,025, rope", 4, 12, 1025, 64, "interleaved"),
)  # fmt: skip


def certified(spec: OpSpec, dtype: torch.dtype, device: str) -> tuple[Case, ...]:
    """What the certificate checks of an op on `device`."""
    return spec.cases + spec.gpu_cases * (device == "cuda" and dtype.itemsize == 2)
