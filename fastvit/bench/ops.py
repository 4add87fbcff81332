"""Ops at the shapes of real models: ours beside eager PyTorch, Inductor, cuBLAS, SDPA's backends,
and FlashAttention, xFormers and Liger where they are installed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastvit import numerics, ops
from fastvit.bench.report import Result, checked_numerics
from fastvit.bench.timing import OURS, Race, race, reason, rotating
from fastvit.kernels._backend import gpu_problem
from fastvit.kernels._spec import Case, OpSpec
from fastvit.kernels.specs import all_specs

CPU_FLOPS, CPU_BYTES = 2e9, 1e8  # a case beyond either takes a CPU too long
ROTATION_BYTES, MAX_COPIES = 2**28, 16  # inputs rotate through more memory than a cache holds
CUBLAS, CUBLASLT = "cuBLAS addmm alone", "cuBLASLt addmm with tanh GELU"
SCALED = "torch._scaled_mm alone"


def backend_for(device: torch.device) -> str:
    """The backend that our ops are timed on: Triton where this GPU runs it, else plain PyTorch."""
    return "triton" if device.type == "cuda" and gpu_problem() is None else "torch"


def plan(device: torch.device, *, quick: bool) -> tuple[list[tuple[OpSpec, Case]], str | None]:
    """The cases to time, and a note of what a CPU leaves out.

    `quick` keeps the smallest case of every op.
    """
    jobs: list[tuple[OpSpec, Case]] = []
    left_out = 0
    for spec in all_specs().values():
        fits = [case for case in spec.bench_cases if device.type == "cuda" or _fits_cpu(spec, case)]
        left_out += len(spec.bench_cases) - len(fits)
        fits.sort(key=lambda case: spec.bytes(case.sizes, 4))
        jobs += [(spec, case) for case in (fits[:1] if quick else fits)]
    note = f"Left out, too large for a CPU: {left_out} op cases above {CPU_FLOPS / 1e9:g} GFLOP"
    return jobs, f"{note} or {CPU_BYTES / 1e6:g} MB." if left_out else None


def _fits_cpu(spec: OpSpec, case: Case) -> bool:
    return spec.flops(case.sizes) <= CPU_FLOPS and spec.bytes(case.sizes, 4) <= CPU_BYTES


@numerics.exact_convolutions
def bench_op(
    spec: OpSpec,
    case: Case,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    budget_s: float,
) -> Result:
    """Time one case, unless its numerics fail on the path that would be timed."""
    backend = backend_for(device)
    itemsize = torch.finfo(dtype).bits // 8
    size = spec.bytes(case.sizes, itemsize)
    copies = max(2, min(MAX_COPIES, ROTATION_BYTES // max(size, 1)))
    inputs = [spec.inputs(case, dtype, str(device), seed + i) for i in range(copies)]
    ours = on_backend(backend, spec.op)
    checked = checked_numerics(lambda: numerics.compare(ours, spec.reference, inputs[0]))
    result = Race()
    if checked["passed"]:
        torch.compiler.reset()  # earlier cases count towards its limit of recompilations
        with torch.no_grad():
            jobs, missing = _contenders(spec, ours, inputs[0], device)
            result = race(
                rotating(jobs, inputs), budget_s=budget_s, min_rounds=5, device=device, cold=True,
                bounds=_bounds(inputs[0]),
            )  # fmt: skip
        result.failed |= missing
    return Result(
        kind="op",
        name=spec.name,
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        race=result,
        numerics=checked,
        flops=spec.flops(case.sizes),
        bytes=size,
        sizes=case.sizes,
    )


def on_backend(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with `ops` on `backend` during each call."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with ops.backend(backend):
            return function(*args, **kwargs)

    return call


def _contenders(
    spec: OpSpec, ours: Callable[..., Tensor], inputs: Mapping[str, Any], device: torch.device
) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """What is timed, and why some of it is not. Each takes the spec's keyword arguments."""
    jobs = {
        OURS: ours,
        # the plain path, not the reference, which spells attention out: a peer is at its best
        "eager": on_backend("torch", spec.op),
        "torch.compile": on_backend("torch", torch.compile(spec.op, dynamic=False)),
    }
    missing: dict[str, str] = {}
    if spec.name == "linear":
        jobs[CUBLAS] = _addmm
    if spec.name == "attention_packed":
        jobs["padding"] = on_backend("torch", padded(ops.attention_qkv))
        jobs["padding, our attention"] = on_backend(backend_for(device), padded(ops.attention_qkv))
    if device.type == "cuda":
        if spec.name == "linear" and inputs["activation"] == "gelu":
            jobs[CUBLASLT] = _addmm_gelu
        if spec.name == "fp8_linear":
            jobs[SCALED] = _scaled_mm
        if spec.name.startswith("attention"):
            jobs.update(_sdpa_backends(spec))
        for name, build in _optional(spec.name):
            try:
                jobs[name] = build()
            except ImportError as error:
                missing[name] = reason(error)
    return jobs, missing


def _bounds(inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Contenders that leave a part of this case out, or approximate it."""
    tail = any(inputs.get(part) is not None for part in ("activation", "scale", "residual"))
    return (CUBLAS, CUBLASLT, SCALED) if tail else ()


def _addmm(x: Tensor, weight: Tensor, bias: Tensor | None = None, **tail: object) -> Tensor:
    """The product and bias; no activation, scale or residual."""
    return F.linear(x, weight, bias)


def _scaled_mm(
    x: Tensor, weight: Tensor, factor: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype,
    **tail: object,
) -> Tensor:  # fmt: skip
    """cuBLASLt's product of e4m3 with a scale for each row of both, and bias."""
    ones = factor.new_ones(x.shape[0], 1)
    return torch._scaled_mm(  # pyright: ignore
        x, weight.t(), ones, factor[None], bias=bias, out_dtype=dtype, use_fast_accum=True
    )


def _addmm_gelu(x: Tensor, weight: Tensor, bias: Tensor, **tail: object) -> Tensor:
    """cuBLASLt's own epilogue; on a GPU its GELU is the tanh form."""
    return torch.ops.aten._addmm_activation(bias, x, weight.t(), use_gelu=True)


def _sdpa_backends(spec: OpSpec) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        choose = sdpa_kernel(getattr(SDPBackend, backend))
        yield f"SDPA {backend.split('_')[0].lower()}", on_backend("torch", choose(spec.op))


def padded(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`attend` on the images of `attention_packed` padded to the longest, their keys masked; gives
    [B, max_seqlen, H*d]. What is padded once is not padded again, so the time is that of attention.
    """
    ready: dict[int, tuple[Tensor, Tensor]] = {}

    def call(qkv: Tensor, num_heads: int, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        if qkv.data_ptr() not in ready:
            lengths = cu_seqlens.diff()
            images = qkv.split(lengths.tolist())
            tokens = torch.arange(max_seqlen, device=qkv.device)
            mask = (tokens < lengths[:, None])[:, None, None]  # (B, 1, 1, N)
            ready[qkv.data_ptr()] = pad_sequence(list(images), batch_first=True), mask
        batch, mask = ready[qkv.data_ptr()]
        return attend(batch, num_heads, mask)

    return call


def _optional(op: str) -> Iterator[tuple[str, Callable[[], Callable[..., Tensor]]]]:
    """Name and builder of libraries' kernels; a builder raises ImportError without its library."""
    if op == "attention":
        yield "flash-attn", functools.partial(_token_major, "flash_attn", "flash_attn_func")
        yield (
            "xFormers",
            functools.partial(_token_major, "xformers.ops", "memory_efficient_attention"),
        )
    elif op == "attention_qkv":
        yield "flash-attn", _flash_qkv
    elif op == "attention_packed":
        yield "flash-attn", _flash_packed
    elif op in ("layer_norm", "rms_norm"):
        yield "Liger", functools.partial(_liger, op)


def _token_major(module: str, name: str) -> Callable[..., Tensor]:
    """Attention of q, k, v [B, N, H, d] as one of [B, H, N, d]."""
    attend = getattr(importlib.import_module(module), name)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return attend(q, k, v).transpose(1, 2)

    return call


def _flash_qkv() -> Callable[..., Tensor]:
    attend = importlib.import_module("flash_attn").flash_attn_qkvpacked_func
    return lambda qkv, num_heads: attend(qkv.unflatten(-1, (3, num_heads, -1))).flatten(-2)


def _flash_packed() -> Callable[..., Tensor]:
    attend = importlib.import_module("flash_attn").flash_attn_varlen_qkvpacked_func

    def call(qkv: Tensor, num_heads: int, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return attend(qkv.unflatten(-1, (3, num_heads, -1)), cu_seqlens, max_seqlen).flatten(-2)

    return call


def _liger(op: str) -> Callable[..., Tensor]:
    module = importlib.import_module(f"liger_kernel.ops.{op}")
    name = {"layer_norm": "LigerLayerNormFunction", "rms_norm": "LigerRMSNormFunction"}[op]
    apply = getattr(module, name).apply  # takes positional arguments only, in the spec's order
    return lambda **inputs: apply(*inputs.values())
