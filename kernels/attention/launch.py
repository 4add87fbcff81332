"""The launcher of attention, and of its gradients.

The tuning table chooses a backend with the tile: "" is the portable kernel; ``hopper`` is one of
Hopper's (`hopper_plan`), with the tile for the portable kernel where none can run; and each of
those has a name of its own.

One launcher for the three ops. Its tensors are (q, k, v, mask, cos, sin, cu_seqlens): q
[B, H, N, d] with k and v [B, H, M, d]; or, without k and v, all three as q [B, N, 3*H*d], of packed
images [T, 3*H*d]. The mask broadcasts to [B, H, N, M], cos and sin to [B, H, N', d] or
[B, H, N', d/2].

Legend: B batch, H heads, N queries, M keys, d head dimension, T tokens of all packed images.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.kernels._backend import Grads, Meta, describe, matmul_precision, packed
from fastvit.kernels._device import architecture, cached, check_fp8_device
from fastvit.kernels._hopper import or_portable, refuse
from fastvit.kernels._launch import Prepared, accumulator, maker, product_precision, wide_dtype
from fastvit.kernels._launch import run as run_kernel
from fastvit.kernels._tuning import TileConfig, cdiv, lookup
from fastvit.kernels.attention import hopper_plan as hopper
from fastvit.kernels.attention.reference import rope_pairs, unpack

MIN_PART = 16  # the narrowest matrix product a tensor core takes
EXACT_PART = 32
QUERIES, KEYS, BIAS = 1, 2, 3  # "PHASE" of a tuning table

Strides = tuple[int, int, int, int, int]  # first element; along B, H, tokens and d
Sides = tuple[Strides, Strides, Strides]


class Options(NamedTuple):
    """Optional inputs of an attention."""

    num_heads: int  # of q without k and v, else not read
    longest: int  # tokens of the longest packed image, for the choice of tiles; 0 for the mean
    scale: Any  # a float, or None for 1/sqrt(d)
    half: bool  # as `rotate_half` of `fastvit.ops.attention`
    out_scale: float | None = None  # the output is e4m3, over it


class Problem(NamedTuple):
    """One attention, without addresses. Packed images are one batch of N = M tokens."""

    sizes: tuple[int, int, int, int, int]  # B, H, N, M, d
    dtype: torch.dtype
    device: torch.device
    sides: Sides  # of q, k and v
    mask: Strides | None
    rope: tuple[int, ...] | None  # strides along B, H, tokens and pairs, and the prefix
    images: int | None  # packed ones
    options: Options
    precision: str
    copies: bool  # the tables or cu_seqlens are to be copied first
    inverse: float | None  # of `out_scale`

    def by_head(self, x: Meta) -> Strides:
        """Of [B, N, H, d] or [..., N, H*d], or the first third of [..., N, 3*H*d]."""
        if x.dim() == 4:
            b, n, h, c = x.strides
            return 0, b, h, n, c
        return _third(x, 0, *self.sizes[1::3])

    def tile(self, op: str = "attention", **phase: int) -> TileConfig:
        """From a tuning table."""
        _, _, n, m, d = self.sizes
        if self.images is not None:
            n = m = self.options.longest
        rope = int(self.rope is not None)  # takes registers
        arch = architecture(self.device)
        return lookup(op, arch, self.dtype, N=n, M=m, D=d, ROPE=rope, **phase)

    def programs(self, tokens: int, block: int) -> int:
        """How many do `block` of every head's `tokens` each; as `find_block` counts them."""
        batch, heads = self.sizes[:2]
        if self.images is None:
            return cdiv(tokens, block) * batch * heads
        return (tokens // block + self.images) * heads

    def tail(self, tokens: int, block: int) -> int:
        """Of the kernels' masked last step: packed images each have one of their own."""
        return tail_of(tokens, block) if self.images is None else block

    def form(self, *others: Strides | None) -> Any:
        """What kernels are compiled for; `others` are strides of outputs and gradients."""
        from fastvit.kernels.attention.kernel import Form

        d = self.sizes[4]
        sides = (side for side in (*self.sides, *others) if side is not None)
        align = math.gcd(16, *(stride for side in sides for stride in side[:4]))
        precision = product_precision(self.dtype, self.precision)
        exact = self.dtype == torch.float32 and precision == "ieee"
        widest = EXACT_PART if exact else d * 2
        pairs = () if self.rope is None else _ranges(d // 2, widest)
        return Form(
            self.options.scale, self.options.half, precision, accumulator(self.dtype), align, d,
            _ranges(d, widest), pairs,
        )  # fmt: skip

    def launch(
        self, kernel: Any, programs: int, tile: TileConfig, others: tuple[Strides | None, ...],
        *constants: Any,
    ) -> Prepared:  # fmt: skip
        """Of a kernel that takes the tensors of the module's docstring, H, N, M, the images and
        B*H*N, more tensors (`others`: how each lies in memory, None for a plain pointer), and
        `constants`."""
        from fastvit.kernels.attention.kernel import Heads, Rope

        heads, rope = map(maker, (Heads, Rope))
        q_strides, k_strides, v_strides = self.sides
        mask_strides, rope_strides = self.mask or (), self.rope or ()
        batch, h, n, m, _ = self.sizes
        sizes = (h, n, m, self.images or 0, batch * h * n)

        def arguments(
            q: Any, k: Any, v: Any, mask: Any, cos: Any, sin: Any, cu_seqlens: Any, *rest: Any
        ) -> tuple[Any, ...]:
            more = [
                x if strides is None or x is None else heads((x, *strides))
                for x, strides in zip(rest, others, strict=True)
            ]
            return (
                heads((q, *q_strides)),
                heads((q if k is None else k, *k_strides)),
                heads((q if v is None else v, *v_strides)),
                None if mask is None else heads((mask, *mask_strides)),
                None if cos is None else rope((cos, sin, *rope_strides)),
                cu_seqlens, *sizes, *more, *constants,
            )  # fmt: skip

        return Prepared(kernel, programs, tile, arguments)


def sizes_of(q: Any, k: Any, num_heads: int) -> tuple[int, int, int, int, int]:
    """(B, H, N, M, d) of tensors or their metadata."""
    if k is not None:
        batch, h, n, d = q.shape
        return batch, h, n, k.shape[2], d
    batch, n, width = (1, *q.shape)[-3:]
    return batch, num_heads, n, n, width // (3 * num_heads)


def problem_of(tensors: tuple[Any, ...], options: Options, precision: str) -> Problem:
    """Of a `Meta` or None for each tensor of the module's docstring, that fit one another."""
    q, k, v, mask, cos, sin, cu_seqlens = tensors
    sizes = sizes_of(q, k, options.num_heads)
    _, _, n, _, d = sizes
    if options.scale is None:
        options = options._replace(scale=1 / math.sqrt(d))
    rope, copies = None, False
    if cos is not None:
        if copies := cos.strides != sin.strides:
            cos = packed(cos.dtype, cos.shape, cos.device)
        *outer, step = _broadcast(cos)
        both = cos.shape[-1] != d // 2  # one entry a channel
        rope = (*outer, step * (2 if both and not options.half else 1), n - cos.shape[-2])
    images = None
    if cu_seqlens is not None:
        images = cu_seqlens.shape[0] - 1
        options = options._replace(longest=options.longest or cdiv(n, max(1, images)))
        copies |= cu_seqlens.dtype != torch.int32 or cu_seqlens.strides != (1,)
    return Problem(
        sizes, q.dtype, q.device, sides_of(q, k, v, options),
        None if mask is None else (0, *_broadcast(mask)), rope, images, options, precision, copies,
        options.out_scale and 1.0 / options.out_scale,
    )  # fmt: skip


def sides_of(q: Meta, k: Meta | None, v: Meta | None, options: Options) -> Sides:
    """How q, k and v, or their gradients, lie in memory."""
    if k is None or v is None:
        h = options.num_heads
        d = q.shape[-1] // (3 * h)
        return _third(q, 0, h, d), _third(q, 1, h, d), _third(q, 2, h, d)
    q_side, k_side, v_side = ((0, *x.strides) for x in (q, k, v))
    return q_side, k_side, v_side  # type: ignore[return-value]


def _third(x: Meta, which: int, h: int, d: int) -> Strides:
    """The heads of q, k or v in [..., N, 3*H*d]."""
    b, n, c = (0, *x.strides)[-3:]
    return which * h * d * c, b, d * c, n, c


def _broadcast(x: Meta) -> tuple[int, int, int, int]:
    """Strides of four dimensions: 0 along what x has one of, or has not."""
    strides = [0 if size == 1 else step for size, step in zip(x.shape, x.strides, strict=True)]
    a, b, c, d = (0,) * (4 - len(strides)) + tuple(strides)
    return a, b, c, d


class Attention(NamedTuple):
    """A prepared attention."""

    launch: Prepared | None  # None for an empty result
    shape: tuple[int, ...]  # of the output: [B, N, H, d], [B, N, H*d] or [T, H*d]
    dtype: torch.dtype
    statistics: tuple[int, ...] | None  # shape of what the backward reads, if that is wanted
    wide: torch.dtype  # its dtype
    copies: bool
    turn: Callable[..., tuple[Any, ...]] | None = None  # to what `launch` takes, if not the same


@cached
def prepare(*args: Any, keep: bool = False) -> Attention:
    """Of a `Meta` or None for each tensor of the module's docstring, what `Options` holds, and the
    precision as `matmul_precision` gives it. With `keep` what the backward reads is wanted too."""
    q, k, v, mask = args[:4]
    problem = problem_of(args[:7], Options(*args[7:-1]), args[-1])
    if problem.inverse is not None:
        check_fp8_device("fp8_attention", q.device)
    batch, h, n, m, d = problem.sizes
    shape = (batch, n, h, d) if k is not None else (*q.shape[:-1], h * d)
    statistics = (2, batch, h, n) if keep else None
    dtype = q.dtype if problem.inverse is None else torch.float8_e4m3fn
    prepared = Attention(None, shape, dtype, statistics, wide_dtype(q.dtype), problem.copies)
    if 0 in shape:
        return prepared
    choice = problem.tile()
    strides = problem.by_head(packed(q.dtype, shape, q.device))

    def portable(problem: Problem) -> Prepared:
        from fastvit.kernels.attention.kernel import attention_kernel

        tile = hopper.portable_tile(choice)
        return problem.launch(
            attention_kernel, problem.programs(n, tile.BLOCK_M), tile, (strides, None),
            problem.inverse, problem.form(strides), tile.BLOCK_M, tile.BLOCK_N,
            problem.tail(m, tile.BLOCK_N),
        )  # fmt: skip

    variant = hopper.hopper_variant(problem, q, k, v, mask, choice)
    if isinstance(variant, str):
        return prepared._replace(launch=portable(problem))
    turn = None
    if (left := hopper.turned(problem, q, v)) is not None:
        turn = hopper.prepare_turn(problem)
        problem, _, k, _ = left
    launch = hopper.prepare_hopper(variant, problem, k, mask, keep=keep)
    launch.spare = lambda error: refuse(error) or portable(problem)
    return prepared._replace(launch=launch, turn=turn)


def run(prepared: Attention, q: Tensor, *others: Tensor | None) -> Any:
    """The output, and with `keep` also what the backward reads: each query's maximum (in base 2)
    and 1 / sum, [2, B, H, N]."""
    launch, shape, dtype, statistics, wide, copies, turn = prepared
    out = torch.empty(shape, dtype=dtype, device=q.device)
    kept = None if statistics is None else torch.empty(statistics, dtype=wide, device=q.device)
    if launch is not None:
        if copies:
            others = (*others[:3], *in_order(*others[3:]))
        tensors = (q, *others) if turn is None else turn(q, *others)
        run_kernel(launch, *tensors, out, kept)
    return out if kept is None else (out, kept)


def in_order(
    cos: Tensor | None, sin: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Tables of the same strides, and bounds as kernels read them."""
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    return cos, sin, cu_seqlens


def split_head_dim(d: int, widest: int = 512) -> list[int]:
    """Powers of two, from 16 to `widest`, that cover head dimension `d` with the least padding, in
    at most three parts before those wider than `widest` are divided: 64 is [64], 72 [64, 16],
    104 [64, 32, 16]."""
    parts: list[int] = []
    rest = -(-d // MIN_PART) * MIN_PART
    while rest:
        # the largest that fits; in the last place one that covers what is left
        part = 1 << (rest.bit_length() - 1)
        if len(parts) == 2 and part < rest:
            part *= 2
        parts.append(part)
        rest -= min(part, rest)
    padded = max(MIN_PART, 1 << (d - 1).bit_length())
    if sum(parts) >= padded:
        parts = [padded]
    return [min(part, widest) for part in parts for _ in range(max(1, part // widest))]


def _ranges(d: int, widest: int) -> tuple[tuple[int, int], ...]:
    """First channel and width of each part."""
    widths = split_head_dim(d, widest)
    return tuple(zip(itertools.accumulate(widths, initial=0), widths, strict=False))


def tail_of(tokens: int, block: int) -> int:
    """Width of the masked last step: 0 if `block` divides `tokens`, else a power of two from 16."""
    rest = tokens % block
    return min(block, max(MIN_PART, 1 << (rest - 1).bit_length())) if rest else 0


@or_portable
def attention_backward(
    grad: Tensor, kept: Sequence[Tensor], args: Sequence[Any], wanted: Sequence[bool]
) -> Grads:
    """As `_register.Gradient` has it; what is kept is the output and its statistics."""
    tensors, options, (out, statistics) = tuple(args[:7]), Options(*args[7:]), kept
    q, k, v, mask, cos, sin, cu_seqlens = tensors
    if out.numel() == 0:
        return tuple(None if x is None else x.new_zeros(x.shape) for x in tensors)
    wants_rope = wanted[4] or wanted[5]  # takes the gradients of q and k
    wants_q, wants_k, wants_v = [wanted[0]] * 3 if k is None else wanted[:3]
    needed = (wants_q or wants_rope, wants_k or wants_rope, wants_v)
    dq = q.new_empty(q.shape)
    dk, dv = (dq if x is None else x.new_empty(x.shape) for x in (k, v))

    metas, around = describe(*tensors), describe(grad, out)
    whole, queries, keys, copies = _prepare_gradients(
        metas, *around, options, matmul_precision(), needed
    )
    if whole is not None:
        run_kernel(whole, *tensors, grad, out, statistics, dq, dk, dv)
        return dq, dk, dv, None, None, None
    if copies:
        tensors = (q, k, v, mask, *in_order(cos, sin, cu_seqlens))
    delta = torch.empty_like(statistics[0])
    run_kernel(queries, *tensors, grad, out, statistics, delta, dq if needed[0] else None)
    for launch, has_dk, has_dv in keys:
        pair = dk if has_dk else None, dv if has_dv else None
        run_kernel(launch, *tensors, grad, statistics, delta, *pair)

    bias = dcos = dsin = None
    if mask is not None and wanted[3]:
        bias = _bias_gradient(tensors, options, grad, statistics, delta)
    if wants_rope and cos is not None and sin is not None:
        pairs = [(q, dq), (k, dk)]
        if k is None:
            (q, k, _), (dq_part, dk_part, _) = (unpack(x, options.num_heads) for x in (q, dq))
            pairs = [(q, dq_part), (k, dk_part)]
        dcos, dsin = _rope_gradient(cos, sin, options.half, *pairs)
    return dq, dk, dv, bias, dcos, dsin


def _bias_gradient(
    tensors: tuple[Any, ...], options: Options, grad: Tensor, statistics: Tensor, delta: Tensor
) -> Tensor:
    """Summed over what the mask was broadcast along."""
    mask = tensors[3]
    metas = describe(*tensors), *describe(grad)
    launch, shape, dtype = _prepare_bias(*metas, options, matmul_precision())
    total = grad.new_empty(shape, dtype=dtype)
    run_kernel(launch, *tensors, grad, statistics, delta, total)
    return total.sum_to_size(_four(mask.shape)).to(mask.dtype).view(mask.shape)


def _rope_gradient(
    cos: Tensor, sin: Tensor, half: bool, *pairs: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """From q and k and their gradients, [B, H, N, d].

    A pair of channels is a complex number z, its table entry e; what the kernels multiply is z e.
    With G its gradient, that of z is G conj(e), and that of e is G conj(z).
    """
    dtype, d = wide_dtype(pairs[0][0].dtype), pairs[0][0].shape[-1]
    e = torch.complex(*(rope_pairs(table, d, half).to(dtype) for table in (cos, sin)))

    def paired(x: Tensor) -> Tensor:
        x = x[..., -e.shape[-2] :, :].to(dtype)
        a, b = x.chunk(2, -1) if half else (x[..., ::2], x[..., 1::2])
        return torch.complex(a, b)

    terms = [paired(dz) / e.conj() * paired(z).conj() for z, dz in pairs]
    total = torch.stack([term.sum_to_size(e.shape) for term in terms]).sum(0)
    dcos, dsin = cos.new_zeros(cos.shape), sin.new_zeros(sin.shape)
    rope_pairs(dcos, d, half).copy_(total.real)
    rope_pairs(dsin, d, half).copy_(total.imag)
    return dcos, dsin


@cached
def _prepare_gradients(
    tensors: tuple[Any, ...], grad: Meta, out: Meta, options: Options, precision: str,
    needed: tuple[bool, bool, bool],
) -> tuple[Prepared | None, Any, list[tuple[Prepared, bool, bool]], bool]:  # fmt: skip
    """Launches that write the `needed` gradients of q, k and v: of all three, else None; of delta
    and dQ; of dK, dV or both, each with which; and whether the tables or cu_seqlens are to be
    copied first."""
    from fastvit.kernels.attention import kernel_backward

    problem = problem_of(tensors, options, precision)
    _, _, n, m, d = problem.sizes
    g_side, out_side = problem.by_head(grad), problem.by_head(out)
    q, k, v = (x and packed(x.dtype, x.shape, x.device) for x in tensors[:3])
    dq, dk, dv = sides_of(q, k, v, options)
    tile = problem.tile("attention_backward", PHASE=QUERIES)
    variant = hopper.backward_variant(problem, tensors, grad, out, needed, tile)
    if not isinstance(variant, str):
        return hopper.prepare_whole(variant, problem, k, grad), None, [], False
    tile, form = hopper.portable_tile(tile), problem.form(g_side, out_side, dq, dk, dv)
    queries = problem.launch(
        kernel_backward.attention_backward_q_kernel, problem.programs(n, tile.BLOCK_M), tile,
        (g_side, out_side, None, None, dq),
        form, tile.BLOCK_M, tile.BLOCK_N, problem.tail(m, tile.BLOCK_N),
    )  # fmt: skip
    tile = problem.tile("attention_backward", PHASE=KEYS)
    _, has_dk, has_dv = needed
    # the sums of both do not fit the registers for wide heads
    pairs = ((has_dk, has_dv),) if d <= 128 else ((has_dk, False), (False, has_dv))
    keys = []
    for pair in pairs:
        launch = problem.launch(
            kernel_backward.attention_backward_kv_kernel, problem.programs(m, tile.BLOCK_N), tile,
            (g_side, None, None, dk, dv),
            form, tile.BLOCK_M, tile.BLOCK_N, problem.tail(n, tile.BLOCK_M),
        )  # fmt: skip
        if any(pair):
            keys.append((launch, *pair))
    return None, queries, keys, problem.copies


@cached
def _prepare_bias(
    tensors: tuple[Any, ...], grad: Meta, options: Options, precision: str
) -> tuple[Prepared, tuple[int, ...], torch.dtype]:
    """The launch, and shape and dtype of what it writes: batch and heads are summed in the kernel,
    queries and keys (seldom broadcast) after it."""
    from fastvit.kernels.attention.kernel_backward import Shared, attention_backward_bias_kernel

    problem, mask = problem_of(tensors, options, precision), tensors[3]
    batch, h, n, m, _ = problem.sizes
    side = problem.by_head(grad)
    biases, bias_heads, *last = _four(mask.shape)
    shared = Shared(bias_heads, batch // biases, h // bias_heads)
    tile = problem.tile("attention_backward", PHASE=BIAS)
    programs = biases * bias_heads * cdiv(n, tile.BLOCK_M) * cdiv(m, tile.BLOCK_N)
    launch = problem.launch(
        attention_backward_bias_kernel, programs, tile, (side, None, None, None),
        shared, problem.form(side), tile.BLOCK_M, tile.BLOCK_N,
    )  # fmt: skip
    dtype = mask.dtype if last == [n, m] else wide_dtype(problem.dtype)
    return launch, (biases, bias_heads, n, m), dtype


def _four(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with ones in front."""
    return (1,) * (4 - len(shape)) + tuple(shape)
