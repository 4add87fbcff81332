"""`linear`: launcher, registration, public function."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.kernels._checks import check_same_dtype, check_shape, check_tensors
from fastvit.kernels._device import architecture, multiprocessors
from fastvit.kernels._library import Gradient, define_op, launch, uses_triton
from fastvit.kernels._tuning import TileConfig, cdiv, lookup
from fastvit.kernels.linear.reference import ACTIVATIONS, finish_reference, linear_reference

GROUP_M = 8
TMA = ("tma", "device_tma")  # backends whose operands need packed rows of 16 bytes
REDUCE_M = 16  # rows of a program that adds up the parts of a split sum
REDUCE = TileConfig(REDUCE_M, 64)
PORTABLE = TileConfig(64, 64, BLOCK_K=32)  # for operands that a table's ``tma`` cannot read
PLAIN_LARGE = TileConfig(128, 128, 64, 8, 3)  # where a table's backend has no such epilogue


class Extra(NamedTuple):
    """What inference adds to the epilogue; `kernels/linear/inference.py` says what each is."""

    factor: Tensor | None = None
    statistics: Tensor | None = None
    colsum: Tensor | None = None
    eps: float = 0.0
    wants_statistics: bool = False
    out_scale: float | None = None
    dtype: torch.dtype | None = None  # of the result; None for promotion's
    # what training adds: a factor for each row [M]; what goes into the activation, or for
    # gradients (`kernels/linear/backward.py`) went into it
    row_scale: Tensor | None = None
    wants_pre: bool = False
    pre: Tensor | None = None

    @property
    def has_plain_form(self) -> bool:
        """Whether PyTorch's own product with separate passes can stand in."""
        inference = self.factor, self.statistics, self.out_scale, self.wants_statistics or None
        return self.pre is None and inference == (None,) * 4


def result_dtype(x: Tensor, *others: Tensor | None) -> torch.dtype:
    """What PyTorch's promotion gives for x and those of `others` that are there."""
    return functools.reduce(
        torch.promote_types, [other.dtype for other in others if other is not None], x.dtype
    )


def statistics_band(x: Tensor, weight: Tensor) -> int:
    """Columns of each part of the statistics that `launch_with` gives: the table alone decides, so
    that they are known without a launch."""
    n, k = weight.shape
    m = math.prod(x.shape[:-1])
    tile = lookup("linear", architecture(x.device), x.dtype, M=m, N=n, K=k)
    tile = PLAIN_LARGE if tile.backend == "cublas" else tile
    return tile.BLOCK_N // tile.subtiles


def part_width(width: int, parts: int) -> int:
    """Columns that each of the `parts` of a row's statistics is of: a power of two, so that only
    one fits, or the whole width for a single part."""
    return 1 << ((width - 1) // parts).bit_length() if parts > 1 else width


def float32_precision(dtype: torch.dtype) -> str:
    """``ieee`` or ``tf32`` for a kernel's float32 products, as PyTorch is set."""
    highest = torch.get_float32_matmul_precision() == "highest"
    return "ieee" if highest or dtype != torch.float32 else "tf32"


def launch_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    scale: Tensor | None,
    residual: Tensor | None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """The Triton path; arguments as in `linear`, [..., K] to a contiguous [..., N].

    The tuning table chooses a backend with the tile: ``cublas`` is PyTorch's own product with its
    epilogue in separate passes; ours are the portable ``""``, ``tma`` (descriptors made by the
    host) and ``device_tma`` (made in the kernel; the one that `warp_specialize` is for). With
    `split_k` a second kernel adds up parts of the sum.
    """
    extra = Extra(row_scale=row_scale)
    return launch_with(extra, x, weight, bias, activation, scale, residual)[0]


def launch_training(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    scale: Tensor | None,
    residual: Tensor | None,
    row_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`launch_linear`, and what goes into an activation, which the backward needs; without an
    activation an empty tensor."""
    extra = Extra(row_scale=row_scale, wants_pre=activation != "none")
    y, pre = launch_with(extra, x, weight, bias, activation, scale, residual)
    return y, x.new_empty(0) if pre is None or not extra.wants_pre else pre


def launch_with(
    extra: Extra,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    scale: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`launch_linear` with more in its epilogue; beside the result what that leaves behind, if it
    does: statistics, what goes into the activation, or act(pre) of the `pre` given."""
    from fastvit.kernels.linear.kernel import linear_kernel

    n, k = weight.shape
    m = math.prod(x.shape[:-1])
    tile = lookup("linear", architecture(x.device), x.dtype, M=m, N=n, K=k)
    if tile.backend == "cublas":
        if extra.has_plain_form:
            pre = linear_reference(x, weight, bias)
            y = finish_reference(pre, activation, scale, residual, extra.row_scale)
            return y.to(extra.dtype or y.dtype).contiguous(), pre
        tile = PLAIN_LARGE
    if extra.pre is not None:
        # one matrix more to read and one more to write: half the columns at a time
        tile = replace(tile, subtiles=min(4, 2 * tile.subtiles))
    y = x.new_empty(*x.shape[:-1], n, dtype=extra.dtype or result_dtype(x, scale, residual))
    x2 = x.reshape(m, k)
    band = tile.BLOCK_N // tile.subtiles
    if tile.backend in TMA and not (_fits_tma(x2) and _fits_tma(weight)):
        tile = replace(PORTABLE, BLOCK_N=band) if extra.wants_statistics else PORTABLE
    asides = _asides(extra, x, n, band)
    aside = next((tensor for tensor in asides.values() if tensor is not None), None)
    if y.numel() == 0:
        return y, aside
    parts = 0 if extra.statistics is None else extra.statistics.shape[-2]
    if activation == "gelu" and y.dtype in (torch.bfloat16, torch.float8_e4m3fn):
        activation = "gelu_polynomial"
    residual2 = None if residual is None else residual.reshape(-1, n)
    programs = cdiv(m, tile.BLOCK_M) * cdiv(n, tile.BLOCK_N)
    common: dict[str, Any] = {
        "bias_ptr": None if bias is None else bias.contiguous(),
        "scale_ptr": None if scale is None else scale.contiguous(),
        "residual_ptr": residual2,
        "y_ptr": y,
        "factor_ptr": extra.factor,
        "colsum_ptr": extra.colsum,
        "statistics_ptr": extra.statistics,
        "inv_out_scale": None if extra.out_scale is None else 1.0 / extra.out_scale,
        "row_scale_ptr": None if extra.row_scale is None else extra.row_scale.reshape(-1),
        **asides,
        "M": m,
        "N": n,
        "K": k,
        "stride_rm": 0 if residual2 is None else residual2.stride(0),
        "stride_rn": 0 if residual2 is None else residual2.stride(1),
        "stride_ym": n,
        "PARTS": parts,
        "PART": part_width(k, parts) if parts else 0,
        "EPS": extra.eps,
        "ACTIVATION": activation,
        "GROUP_M": GROUP_M,
        "SUBTILES": tile.subtiles,
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_K": tile.BLOCK_K,
    }
    if tile.split_k > 1:
        _launch_split(tile, programs, x2, weight, common)
    elif tile.backend in TMA:
        _launch_tma(tile, programs, x2, weight, common)
    else:
        operands = _pointers(x2, weight, tile)
        launch(linear_kernel, programs, tile, x_ptr=x2, weight_ptr=weight, **operands, **common)
    return y, aside


def _asides(extra: Extra, x: Tensor, n: int, band: int) -> dict[str, Tensor | None]:
    """What the epilogue writes beside the result, and `extra.pre`, by the kernels' names; first
    what `launch_with` gives."""
    statistics = pre = hidden = None
    if extra.wants_statistics:
        dtype = torch.promote_types(x.dtype, torch.float32)
        statistics = x.new_empty(*x.shape[:-1], cdiv(n, band), 2, dtype=dtype)
    if extra.wants_pre:
        pre = x.new_empty(*x.shape[:-1], n)
    if extra.pre is not None:
        pre, hidden = extra.pre, torch.empty_like(extra.pre)
    return {"out_statistics_ptr": statistics, "hidden_ptr": hidden, "pre_ptr": pre}


def _pointers(x: Tensor, weight: Tensor, tile: TileConfig) -> dict[str, Any]:
    """What a kernel that reads both operands by pointers needs to know of them."""
    import triton.language as tl

    return {
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_wn": weight.stride(0),
        "stride_wk": weight.stride(1),
        "PRECISION": float32_precision(x.dtype),
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "EVEN_K": x.shape[1] % tile.BLOCK_K == 0,
    }


def _launch_tma(
    tile: TileConfig, tiles: int, x: Tensor, weight: Tensor, common: dict[str, Any]
) -> None:
    """All of `tiles` through the tensor memory accelerator."""
    from fastvit.kernels.linear.kernel import linear_device_tma_kernel, linear_tma_kernel

    persistent = tile.persistent * multiprocessors(x.device)
    programs = min(tiles, persistent) if persistent else tiles
    if tile.backend == "tma":
        launch(
            linear_tma_kernel,
            programs,
            tile,
            **_descriptors(x, weight, tile),
            PERSISTENT=tile.persistent > 0,
            **common,
        )
        return
    _provide_scratch()
    launch(
        linear_device_tma_kernel,
        programs,
        tile,
        x_ptr=x,
        weight_ptr=weight,
        stride_xm=x.stride(0),
        stride_wn=weight.stride(0),
        WARP_SPECIALIZE=tile.warp_specialize,
        **common,
    )


def _launch_split(
    tile: TileConfig, tiles: int, x: Tensor, weight: Tensor, common: dict[str, Any]
) -> None:
    """`tile.split_k` sums over a part of K for each of `tiles` tiles, then their sum."""
    from fastvit.kernels.linear.kernel_split import linear_reduce_kernel, linear_split_kernel

    m, n = common["M"], common["N"]
    partial = x.new_empty(
        tile.split_k, m, n, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
    )
    tma = tile.backend != ""
    operands = _descriptors(x, weight, tile) if tma else {"x_desc": x, "weight_desc": weight}
    pointers = _pointers(x, weight, tile)
    launch(
        linear_split_kernel,
        tiles * tile.split_k,
        tile,
        x=operands["x_desc"],
        weight=operands["weight_desc"],
        partial_ptr=partial,
        SPLIT_K=tile.split_k,
        TMA=tma,
        **{name: common[name] for name in ("M", "N", "K", "GROUP_M")},
        **{name: common[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
        **pointers,
    )
    rest = {name: common[name] for name in common if name not in ("GROUP_M", "BLOCK_M", "BLOCK_K")}
    launch(
        linear_reduce_kernel,
        cdiv(m, REDUCE_M) * cdiv(n, tile.BLOCK_N),
        REDUCE,
        partial_ptr=partial,
        SPLIT_K=tile.split_k,
        ACC=pointers["ACC"],
        BLOCK_M=REDUCE_M,
        **rest,
    )


def _descriptors(x: Tensor, weight: Tensor, tile: TileConfig) -> dict[str, Any]:
    """The host's descriptors of both operands."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return {
        "x_desc": TensorDescriptor.from_tensor(x, [tile.BLOCK_M, tile.BLOCK_K]),
        "weight_desc": TensorDescriptor.from_tensor(weight, [tile.BLOCK_N, tile.BLOCK_K]),
    }


def _provide_scratch() -> None:
    """Memory for descriptors made in a kernel, unless the user has set an allocator."""
    import triton
    from triton.runtime import _allocation

    if isinstance(_allocation._allocator.get(), _allocation.NullAllocator):
        triton.set_allocator(_scratch)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    # PyTorch's own blocks are aligned to more, and freed in the order of the stream
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _fits_tma(matrix: Tensor) -> bool:
    """Whether the tensor memory accelerator can read it: 16-byte rows, last dimension packed."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    return (
        matrix.numel() > 0
        and matrix.stride(1) == 1
        and row_bytes % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    scale: Tensor | None,
    residual: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape, dtype=result_dtype(x, scale, residual))


def _fake_kept(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *_: object) -> Any:
    kept = (0,) if activation == "none" else (*x.shape[:-1], weight.shape[0])
    return (x.new_empty(kept),)


def _backward(*args: Any) -> list[Tensor]:
    from fastvit.kernels.linear.backward import linear_backward

    return linear_backward(*args)


_linear = define_op(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? scale, Tensor? residual, "
    "Tensor? row_scale)",
    launch=launch_linear,
    eager=linear_reference,
    fake=_fake,
    flops=lambda x, weight, *rest: 2 * math.prod(x[:-1]) * weight[0] * weight[1],
    autocast=("x", "weight", "bias"),
    gradient=Gradient(
        _backward, launch_training, kept=1, fake_kept=_fake_kept, unsaved=("residual",)
    ),
)


def check_activation(op: str, activation: str | None) -> str:
    """`activation`, ``none`` for None.

    Raises:
        ValueError: for a name that is not in `ACTIVATIONS`.
    """
    if activation is None:
        return "none"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return activation


def check_row_scale(op: str, row_scale: Tensor | None, x: Tensor) -> None:
    """None, or one constant for each row of x.

    Raises:
        TypeError, ValueError: naming what does not fit.
    """
    check_tensors(op, x, row_scale=row_scale)
    check_shape(op, "row_scale", row_scale, *x.shape[:-1])
    if row_scale is not None and row_scale.requires_grad:
        raise ValueError(f"{op}: row_scale has no gradient, but requires one")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """act(x W^T + b) * scale * row_scale + residual, in one kernel.

    The sum, the activation and the epilogue are in float32 (float64 for float64 input); one
    rounding at the store.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N].
        activation: ``gelu`` (exact erf; where the result is bfloat16, a polynomial within 4e-5 of
            it, see `kernels/_epilogue.py`), ``gelu_tanh``, ``quick_gelu``, ``silu``, ``relu`` or
            None.
        scale: [N], LayerScale's gamma (arXiv:2103.17239, equation 4).
        residual: [..., N].
        row_scale: [...], stochastic depth's factor of each row (arXiv:1603.09382); no gradient.

    Returns:
        [..., N], of x's dtype promoted with scale's and residual's.

    Raises:
        TypeError: a dtype that is not floating, or weight or bias of another dtype than x.
        ValueError: shapes or devices that do not fit, an unknown activation, a row_scale that
            requires a gradient.

    Source: ViT paper (arXiv:2010.11929), equations 1 to 3.
    """
    activation = check_activation("linear", activation)
    check_tensors("linear", x, weight=weight, bias=bias, scale=scale, residual=residual)
    check_same_dtype("linear", x, weight=weight, bias=bias)
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: x {list(x.shape)} and weight {list(weight.shape)} do not fit [..., K], [N, K]"
        )
    n = weight.shape[0]
    check_shape("linear", "bias", bias, n)
    check_shape("linear", "scale", scale, n)
    check_shape("linear", "residual", residual, *x.shape[:-1], n)
    check_row_scale("linear", row_scale, x)
    op = _linear if uses_triton(x) else linear_reference
    return op(x, weight, bias, activation, scale, residual, row_scale)
