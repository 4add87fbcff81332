"""Launchers of the backward kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.kernels._library import launch
from fastvit.kernels._tuning import cdiv
from fastvit.kernels.attention.forward import Problem, Rope, accumulator, strides

QUERIES, KEYS, BIAS = 1, 2, 3  # "PHASE" of a tuning table


def backward(
    problem: Problem,
    grad: Tensor,
    out: Tensor,
    statistics: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
) -> Tensor:
    """Write the gradients of q, k and v into tensors of their shapes, where given.

    Args:
        grad: of the output, [B, N, H, d], any strides.
        out, statistics: what `forward` gave.

    Returns:
        rowsum(grad * out), [B, H, N].
    """
    from fastvit.kernels.attention.backward_kernel import attention_backward_q_kernel

    _, _, n, m, d = problem.sizes
    delta = torch.empty_like(statistics[0])
    grad, out = grad.transpose(1, 2), out.transpose(1, 2)
    tile = problem.tile("attention_backward", PHASE=QUERIES)
    launch(
        attention_backward_q_kernel,
        problem.programs(n, tile.BLOCK_M),
        tile,
        **problem.arguments(tile, grad, out, *([] if dq is None else [dq])),
        TAIL=problem.tail(m, tile.BLOCK_N),
        g_ptr=grad,
        stat_ptr=statistics,
        **strides("g", "bhnd", grad),
        stride_stat=statistics.stride(0),
        o_ptr=out,
        **strides("o", "bhn", out),
        delta_ptr=delta,
        dq_ptr=dq,
        **strides("dq", "bhn", dq),
    )
    # the sums of both do not fit the registers for wide heads
    for pair in ((dk, dv),) if d <= 128 else ((dk, None), (None, dv)):
        if pair != (None, None):
            _keys_and_values(problem, grad, statistics, delta, *pair)
    return delta


def _keys_and_values(
    problem: Problem,
    grad: Tensor,
    statistics: Tensor,
    delta: Tensor,
    dk: Tensor | None,
    dv: Tensor | None,
) -> None:
    from fastvit.kernels.attention.backward_kernel import attention_backward_kv_kernel

    _, _, n, m, _ = problem.sizes
    tile = problem.tile("attention_backward", PHASE=KEYS)
    launch(
        attention_backward_kv_kernel,
        problem.programs(m, tile.BLOCK_N),
        tile,
        **problem.arguments(tile, grad, *(x for x in (dk, dv) if x is not None)),
        TAIL=problem.tail(n, tile.BLOCK_M),
        g_ptr=grad,
        stat_ptr=statistics,
        **strides("g", "bhnd", grad),
        stride_stat=statistics.stride(0),
        delta_ptr=delta,
        dk_ptr=dk,
        dv_ptr=dv,
        **strides("dk", "bhm", dk),
        **strides("dv", "bhm", dv),
    )


def bias_gradient(
    problem: Problem, grad: Tensor, statistics: Tensor, delta: Tensor, attn_mask: Tensor
) -> Tensor:
    """Gradient of a float `attn_mask`, summed over what it was broadcast along.

    Args:
        grad: of the output, [B, N, H, d], any strides.
        statistics: what `forward` gave.
        delta: what `backward` gave.
    """
    from fastvit.kernels.attention.backward_kernel import attention_backward_bias_kernel

    batch, heads, n, m, _ = problem.sizes
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    # batch and heads are summed in the kernel, queries and keys (seldom broadcast) after it
    dtype = attn_mask.dtype if shape[2:] == (n, m) else accumulator(problem.q.dtype)
    total = grad.new_empty(*shape[:2], n, m, dtype=dtype)
    grad = grad.transpose(1, 2)
    tile = problem.tile("attention_backward", PHASE=BIAS)
    launch(
        attention_backward_bias_kernel,
        shape[0] * shape[1] * cdiv(n, tile.BLOCK_M) * cdiv(m, tile.BLOCK_N),
        tile,
        **problem.arguments(tile, grad),
        g_ptr=grad,
        stat_ptr=statistics,
        **strides("g", "bhnd", grad),
        stride_stat=statistics.stride(0),
        delta_ptr=delta,
        db_ptr=total,
        bias_heads=shape[1],
        batches=batch // shape[0],
        heads=heads // shape[1],
    )
    return total.sum_to_size(shape).to(attn_mask.dtype).view(attn_mask.shape)


def rope_gradient(rope: Rope, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Gradients of cos and sin, from q and k and their gradients.

    A pair of channels is a complex number z, its table entry e; what the kernels multiply is z e.
    With G its gradient, that of z is G conj(e), and that of e is G conj(z).
    """
    dtype = accumulator(pairs[0][0].dtype)
    e = torch.complex(rope.cos.to(dtype), rope.sin.to(dtype))

    def paired(x: Tensor) -> Tensor:
        x = x[..., -e.shape[-2] :, :].to(dtype)
        a, b = x.chunk(2, -1) if rope.half else (x[..., ::2], x[..., 1::2])
        return torch.complex(a, b)

    terms = [paired(dz) / e.conj() * paired(z).conj() for z, dz in pairs]
    total = torch.stack([term.sum_to_size(e.shape) for term in terms]).sum(0)
    return [total.real.to(rope.cos.dtype), total.imag.to(rope.sin.dtype)]
