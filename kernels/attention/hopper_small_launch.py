"""Attention of few heads on Hopper whose launch may start before the launch ahead of it has ended.
For inference, without registration, as `linear/hopper_small_launch.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.kernels._backend import Meta, describe
from fastvit.kernels._device import cached
from fastvit.kernels._launch import Prepared, run
from fastvit.kernels.attention.hopper_plan import hopper_variant, prepare_hopper
from fastvit.kernels.attention.launch import Options, problem_of


@cached
def prepare(qkv: Meta, heads: int, scale: float | None) -> Prepared | None:
    """`run` is given the tensors of `launch.py`, the output and None; None where the tuning table
    and the rule take another kernel than the one for few heads."""
    options = Options(heads, 0, scale, half=False)
    problem = problem_of((qkv, None, None, None, None, None, None), options, "highest")
    variant = hopper_variant(problem, qkv, None, None, None)
    if isinstance(variant, str) or variant.name != "head":
        return None
    return prepare_hopper(variant, problem, None, None, keep=False, early=True)


def early_attention_qkv(qkv: Tensor, heads: int, scale: float | None = None) -> Tensor | None:
    """`fastvit.ops.attention_qkv` of [B, N, 3*H*d], [B, N, H*d]; None as of `prepare`."""
    launch = prepare(*describe(qkv), heads, scale)
    if launch is None:
        return None
    out = torch.empty((*qkv.shape[:-1], qkv.shape[-1] // 3), dtype=qkv.dtype, device=qkv.device)
    run(launch, qkv, None, None, None, None, None, None, out, None)
    return out
