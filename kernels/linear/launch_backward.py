"""Gradients of y = act(x W^T + b) * scale * row_scale + residual.

With pre = x W^T + b and the gradient g of y:

    G = g * row_scale * scale * act'(pre)    dx = G W    dW = G^T x    db = colsum(G)
    dscale = colsum(g * row_scale * act(pre))

Without an activation the scale stays out of G, and pre need not be kept: with P = G^T x,

    dx = G (scale W)    dW = scale * P    db = scale * colsum(G)
    dscale = rowsum(P * W) + b * colsum(G)

Nothing is added up by atomics: the sums over all rows, P among them, are split into parts, which a
second step adds in order.

Shape legend: M rows (batch x tokens), N output features, K input features.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.kernels import _launch
from fastvit.kernels._backend import Grads, Meta, describe, matmul_precision, prepare_and_run
from fastvit.kernels._device import architecture, cached, multiprocessors
from fastvit.kernels._hopper import or_portable
from fastvit.kernels._launch import Prepared, accumulator, product_precision, wide_dtype
from fastvit.kernels._tuning import TileConfig, cdiv, lookup
from fastvit.kernels.linear import hopper_backward_plan as hopper
from fastvit.kernels.linear import launch as forward
from fastvit.kernels.linear.hopper_plan import portable_tile

PASS_TILE = TileConfig(16, 128)  # of `pre_gradient_kernel`
PASS_ROWS = 256  # rows of one program of it
SUM_TILE = TileConfig(4, 256)  # rows and columns at a time of `weight_gradient_kernel`
# What a part of the sum over rows costs, in rows of products: writing and reading it in float32
# takes an H200 as long as multiplying that many rows does (8 bytes at 4.3 TB/s, 2 FLOP at
# 790 TFLOP/s).
SPLIT_COST = 735
MAX_SPLIT = 32


class PreGradient(NamedTuple):
    """G as in the module's docstring, [M, N], and sums over its rows where they were asked for."""

    grad: Tensor
    sums: Tensor | None  # [N], float64
    scale_sums: Tensor | None  # [N], float64: dscale of a linear with an activation


def linear_backward(
    grad: Tensor, kept: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> Grads:
    """As `_register.Gradient` has it; what is kept is pre, or an empty tensor."""
    x, weight, bias, scale, _, row_scale, activation = args
    if activation == "none":
        g, sums, dscale = pre_gradient(grad, x.dtype, row_scale=row_scale)
        inner = scale
    else:
        g, sums, dscale = pre_gradient(
            grad, x.dtype, row_scale=row_scale, scale=scale, pre=kept[0], activation=activation,
            wants_scale=needs[3],
        )  # fmt: skip
        inner = None  # is in G
    dx = input_gradient(g, weight, inner).view(x.shape) if needs[0] else None
    wanted = (needs[1], needs[2], needs[3] and dscale is None)
    dw, db, inner_dscale = parameter_gradients(g, x, weight, bias, inner, sums, wanted)
    return dx, dw, db, inner_dscale if dscale is None else dscale.to(scale.dtype)


def pre_gradient(
    grad: Tensor, dtype: torch.dtype, *, row_scale: Tensor | None = None,
    scale: Tensor | None = None, pre: Tensor | None = None, hidden: Tensor | None = None,
    activation: str = "none", wants_scale: bool = False, only_sums: bool = False,
) -> PreGradient:  # fmt: skip
    """G in `dtype`, in one pass; without one where grad [..., N] is G already.

    Args:
        scale: for an activation only.
        pre: [..., N], contiguous, for an activation.
        hidden: [..., N], contiguous: gets act(pre).
        wants_scale: sum the gradient of scale too.
        only_sums: G is not wanted.
    """
    n = grad.shape[-1]
    g = grad.reshape(-1, n)
    is_plain = g.dtype == dtype and g.stride(1) == 1 and row_scale is None
    if is_plain and pre is None and not only_sums:
        return PreGradient(g, None, None)
    m = g.shape[0]
    out = None if only_sums else g.new_empty(m, n, dtype=dtype)
    sums = g.new_empty(cdiv(m, PASS_ROWS), n, dtype=torch.float64)
    scale_sums = torch.empty_like(sums) if wants_scale else None
    if g.numel():
        scale = None if scale is None else scale.contiguous()
        row_scale = None if row_scale is None else row_scale.reshape(-1)
        tensors = (g, pre, scale, row_scale, out, hidden, sums, scale_sums)
        _launch.run(_prepare_pass(*describe(*tensors), activation, dtype), *tensors)
    return PreGradient(
        g if out is None else out, sums.sum(0), None if scale_sums is None else scale_sums.sum(0)
    )


@cached
def _prepare_pass(g: Meta, *others: Any) -> Prepared:
    *_, activation, dtype = others
    from fastvit.kernels._tiles import Matrix
    from fastvit.kernels.linear.kernel_backward import pre_gradient_kernel

    (m, n), strides = g.shape, g.strides
    constants = (
        m, n, PASS_ROWS, forward.exact_activation(activation, dtype), accumulator(dtype),
        PASS_TILE.BLOCK_M, PASS_TILE.BLOCK_N,
    )  # fmt: skip
    return Prepared(
        pre_gradient_kernel, cdiv(m, PASS_ROWS) * cdiv(n, PASS_TILE.BLOCK_N), PASS_TILE,
        lambda g, *rest: (Matrix(g, *strides), *rest, *constants),
    )  # fmt: skip


@or_portable
def input_gradient(g: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """G (scale W): [M, N] to [M, K]."""
    scaled, factor = _scaled(weight, scale)
    found = hopper.input_gradient(g, scaled, factor)
    return _multiply(g, *_turned(scaled, factor)) if found is None else found.grad


def _multiply(g: Tensor, turned: Tensor, factor: Tensor | None) -> Tensor:
    tensors = (g, turned, None, factor, None, None)
    return prepare_and_run(forward.prepare, forward.run, tensors, "none", dtype=g.dtype)


@or_portable
def hidden_gradient(
    g: Tensor, weight: Tensor, scale: Tensor | None, pre: Tensor, activation: str, *,
    wants_hidden: bool,
) -> hopper.InputGradient:  # fmt: skip
    """(G (scale W)) * act'(pre), and act(pre) if wanted or if it comes along; pre is [..., K]."""
    scaled, factor = _scaled(weight, scale)
    pre = pre.view(g.shape[0], weight.shape[1])
    activation = forward.exact_activation(activation, g.dtype)
    found = hopper.input_gradient(g, scaled, factor, pre, activation, hidden=wants_hidden)
    if found is not None:
        return found
    turned, factor = _turned(scaled, factor)
    tensors = (g, turned, pre, factor)
    launch = _prepare_hidden(*describe(*tensors), activation, matmul_precision())
    hidden = torch.empty_like(pre)
    if launch is None:
        dh = _multiply(g, turned, factor)
        passed = pre_gradient(dh, g.dtype, pre=pre, hidden=hidden, activation=activation)
        return hopper.InputGradient(passed.grad, hidden, passed.sums)
    out = torch.empty_like(pre, dtype=g.dtype)
    if out.numel():
        _launch.run(launch, *tensors, out, hidden)
    return hopper.InputGradient(out, hidden, None)


@cached
def _prepare_hidden(
    g: Meta, turned: Meta, pre: Meta, factor: Meta | None, activation: str, precision: str
) -> Prepared | None:
    """None where the table has PyTorch's product, and a pass after it, for this."""
    from fastvit.kernels._tiles import Matrix
    from fastvit.kernels.linear.kernel import Hidden, through_activation

    tile = portable_tile(forward.looked_up(g, turned), g, turned)
    if tile.backend == "cublas":
        return None
    # one matrix more to read and one more to write: half the columns at a time
    tile = replace(tile, subtiles=min(4, 2 * tile.subtiles))
    k = pre.shape[1]

    def operands(pre: Tensor, factor: Tensor | None, out: Tensor, hidden: Tensor) -> Any:
        pre_at, hidden_at, out_at = (Matrix(matrix, k, 1) for matrix in (pre, hidden, out))
        return Hidden(pre_at, hidden_at, out_at, factor)

    return forward.prepare_product(
        g, turned, tile, operands, through_activation, activation, precision
    )


def _scaled(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """scale W [N, K] up to a factor [1] that keeps a small LayerScale out of float16, in which
    1e-5 * W would lose its digits; the other dtypes need none."""
    if scale is None:
        return weight, None
    wide, factor = wide_dtype(weight.dtype), None
    scale = scale.to(wide)
    if weight.dtype == torch.float16:
        factor = scale.abs().amax(0, keepdim=True).clamp_min(torch.finfo(wide).tiny)
        scale = scale / factor
    return (weight * scale[:, None]).to(weight.dtype), factor


def _turned(scaled: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As a linear's weight [K, N] and its scale [K]."""
    turned = scaled.t().contiguous()
    return turned, None if factor is None else factor.expand(len(turned)).contiguous()


def parameter_gradients(
    g: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    sums: Any, needs: Sequence[bool],
) -> Grads:  # fmt: skip
    """Gradients of weight, bias and scale, those that `needs` names, from G [M, N] without `scale`,
    its column sums [N] if there are any yet, and x [..., K], if more than the bias needs one."""
    wants_weight, wants_bias, wants_scale = needs
    dw = dscale = None
    if wants_weight or wants_scale:
        assert x is not None
        missing = sums is None and (wants_bias or (wants_scale and bias is not None))
        rows, final = x.reshape(-1, x.shape[-1]), weight.dtype if scale is None else None
        partial, found = _weight_product(g, rows, missing, final)
        sums = found if missing else sums
        if partial.dim() == 2:
            dw = partial
        else:
            dw, dscale = _weight_gradient(
                partial, weight, bias, scale, sums, wants_weight=wants_weight,
                wants_scale=wants_scale,
            )  # fmt: skip
    if not wants_bias or bias is None:
        return dw, None, dscale
    if sums is None:
        sums = pre_gradient(g, g.dtype, only_sums=True).sums
    db = sums if scale is None else sums * scale
    return dw, db.to(bias.dtype), dscale


@or_portable
def _weight_product(
    g: Tensor, x: Tensor, wants_sums: bool, final: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """G^T x in parts [S, N, K] of which it is the sum, and G's column sums [N] if wanted; where the
    kernel can give it, G^T x itself [N, K] in dtype `final`."""
    launch, split, rows = _prepare_weight_product(*describe(g, x), matmul_precision(), wants_sums)
    if isinstance(launch, hopper.WeightProduct):
        return hopper.run_weight_product(launch, g, x, wants_sums, final)
    if launch is None:
        g, x = (g[:0], x[:0]) if _launch.idle() else (g, x)
        sums = pre_gradient(g, g.dtype, only_sums=True).sums if wants_sums else None
        return _plain_product(g, x)[None], sums
    n = g.shape[1]
    partial = g.new_empty(split, n, x.shape[1], dtype=wide_dtype(g.dtype))
    sums = g.new_empty(rows, n, dtype=torch.float64) if wants_sums else None
    _launch.run(launch, g, x, partial, sums)
    return partial, None if sums is None else sums.sum(0)


@cached
def _prepare_weight_product(
    g: Meta, x: Meta, precision: str, wants_sums: bool
) -> tuple[hopper.WeightProduct | Prepared | None, int, int]:
    """The launch (None: PyTorch's product), into how many parts it splits the sum over M, and into
    how many rows the column sums."""
    from fastvit.kernels._tiles import Matrix
    from fastvit.kernels.linear.kernel_backward import weight_product_kernel

    (m, n), k = g.shape, x.shape[1]
    # the rows, columns and depth of this product
    tile = lookup("linear_backward", architecture(g.device), g.dtype, M=n, N=k, K=m)
    choice = hopper.weight_variant(g, x, tile)
    if isinstance(choice, hopper.Pieces):
        return hopper.prepare_weight_product(choice, g, x), 1, 0
    tile = portable_tile(tile, g, x)
    if tile.backend == "cublas":
        return None, 1, 0
    rows, cols, depth = tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K
    tiles_k = cdiv(k, cols)
    tiles = cdiv(n, rows) * tiles_k
    split = choose_split(tiles, cdiv(m, depth), depth, multiprocessors(g.device))
    tma = tile.backend == "tma"
    constants = (
        split, m, n, k, "columns" if tma else "", product_precision(g.dtype, precision),
        accumulator(g.dtype), m % depth == 0, forward.GROUP_M, depth, rows, cols,
    )  # fmt: skip
    (gm, gn), (xm, xk) = g.strides, x.strides
    launch = Prepared(
        weight_product_kernel, tiles * split, tile,
        lambda g, x, *rest: (Matrix(g, gn, gm), Matrix(x, xk, xm), *rest, *constants),
    )  # fmt: skip
    if tma:
        launch.arguments = lambda *tensors: (*tensors, *constants)
        boxes = ((m, n), (gm, gn), (depth, rows)), ((m, k), (xm, xk), (depth, cols))
        launch.boxes = [forward.matrix_box(*box) for box in boxes]
    return launch, split, split * tiles_k


def _plain_product(g: Tensor, x: Tensor) -> Tensor:
    """G^T x in float32 or wider by PyTorch: unscaled, it may exceed float16's range."""
    if g.dtype == wide_dtype(g.dtype):
        return g.t() @ x
    if g.is_cuda:
        return torch.mm(g.t(), x, out_dtype=torch.float32)
    return g.t().float() @ x.float()


def _weight_gradient(
    partial: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    sums: Tensor | None, *, wants_weight: bool, wants_scale: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dW and dscale from the parts of P."""
    _, n, k = partial.shape
    dw = partial.new_empty(n, k, dtype=weight.dtype) if wants_weight else None
    dscale = None
    if wants_scale and scale is not None:
        dscale = partial.new_empty(n, dtype=scale.dtype)
    if dscale is None or bias is None:
        bias = sums = None
    bias, scale = (None if t is None else t.to(partial.dtype).contiguous() for t in (bias, scale))
    tensors = (partial, weight, bias, scale, sums, dw, dscale)
    _launch.run(_prepare_weight_gradient(*describe(*tensors)), *tensors)
    return dw, dscale


@cached
def _prepare_weight_gradient(partial: Meta, weight: Meta, *others: Meta | None) -> Prepared:
    from fastvit.kernels._tiles import Matrix
    from fastvit.kernels.linear.kernel_backward import weight_gradient_kernel

    (split, n, k), strides = partial.shape, weight.strides
    constants = (split, n, k, accumulator(partial.dtype), SUM_TILE.BLOCK_M, SUM_TILE.BLOCK_N)
    return Prepared(
        weight_gradient_kernel, cdiv(n, SUM_TILE.BLOCK_M), SUM_TILE,
        lambda partial, weight, *rest: (partial, Matrix(weight, *strides), *rest, *constants),
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def choose_split(tiles: int, steps: int, step: int, processors: int) -> int:
    """In how many parts to split a sum of `steps` steps of `step` rows for each of `tiles` tiles:
    enough to fill the GPU's last round of programs (two a multiprocessor), few enough not to pay
    more for the parts than that saves."""
    slots = 2 * processors

    def cost(split: int) -> float:
        rounds = math.ceil(tiles * split / slots)
        return rounds * math.ceil(steps / split) * step * slots / tiles + split * SPLIT_COST

    return min(range(1, min(MAX_SPLIT, max(steps, 1)) + 1), key=cost)
