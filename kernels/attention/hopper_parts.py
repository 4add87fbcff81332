"""What Hopper's two attention kernels share.

Layouts: a product of 64 queries and PART keys lies in the registers of 4 warps, 16 rows each; a
thread has two neighbouring columns of every eight, in two rows. So columns with the same remainder
by 8 (or 16) of a row are in one thread, and a row is in four.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastvit.kernels._hopper_e4m3 import to_e4m3_pairs

# of all threads of a role; triton 3.6 has the other name
barrier = getattr(gl, "barrier" if hasattr(gl, "barrier") else "thread_barrier")


@gluon.jit
def fast_exp2(x):
    """In one instruction; results below 2^-126 are 0."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def matrix_of(buf):
    """The [rows, D] matrix in a box [1, rows, 1, D]."""
    return buf.reshape([buf.shape[1], buf.shape[3]])


@gluon.jit
def head_of(head, H, WHICH: gl.constexpr, PACKED: gl.constexpr):
    """Where q, k or v (WHICH 0, 1, 2) of a head lies along a tensor's heads: PACKED has 3 H."""
    if PACKED:
        return WHICH * H + head
    else:
        return head


@gluon.jit
def narrow_max(s, LAYOUT: gl.constexpr, WIDTH: gl.constexpr):
    """[rows, WIDTH]: of the columns with the same remainder by WIDTH, in one thread."""
    if s.shape[1] > WIDTH:
        s = gl.max(s.reshape([s.shape[0], s.shape[1] // WIDTH, WIDTH]), axis=1)
    return gl.convert_layout(s, LAYOUT, assert_trivial=True)


@gluon.jit
def narrow_sum(s, LAYOUT: gl.constexpr, WIDTH: gl.constexpr):
    """As `narrow_max`."""
    if s.shape[1] > WIDTH:
        s = gl.sum(s.reshape([s.shape[0], s.shape[1] // WIDTH, WIDTH]), axis=1)
    return gl.convert_layout(s, LAYOUT, assert_trivial=True)


@gluon.jit
def hide(s, left):
    """-inf in the columns from `left` on."""
    cols = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    return gl.where((cols < left)[None, :], s, float("-inf"))


@gluon.jit
def like_rows(row, x):
    """A value per row, for the rows of x."""
    ROW: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    return gl.convert_layout(row, ROW, assert_trivial=True)[:, None]


@gluon.jit
def as_operand(w, D: gl.constexpr, DTYPE: gl.constexpr):
    """Weights as the left operand of a product with values [PART, D], where they are: in
    registers."""
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 16])
    return gl.convert_layout(w.to(DTYPE), gl.DotOperandLayout(0, OUT, 2), assert_trivial=True)


@gluon.jit
def put_rows(out, first, stride, value, N, left, DTYPE: gl.constexpr):
    """From registers to rows from `first` to N, the first `left` columns, as `DTYPE` or, where
    `out` is e4m3, as that in pairs: the four lanes that share a row swap until each has eight
    neighbours (16 bytes)."""
    if out.dtype.element_ty == gl.float8e4nv:
        out = out.to(gl.pointer_type(gl.int16))
        value = to_e4m3_pairs(value)
        stride = stride // 2
        LEFT: gl.constexpr = left // 2
    else:
        value = value.to(DTYPE)
        LEFT: gl.constexpr = left
    WIDTH: gl.constexpr = value.shape[1]
    if WIDTH == 8:
        WIDE: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2]], [[0, 4], [8, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
            [64, 8],
        )  # fmt: skip
    elif WIDTH == 16:
        WIDE: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4]], [[0, 8], [8, 0], [1, 0], [2, 0], [4, 0]],
            [[16, 0], [32, 0]], [], [64, 16],
        )  # fmt: skip
    elif WIDTH == 32:
        WIDE: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
            [[16, 0], [32, 0]], [], [64, 32],
        )  # fmt: skip
    elif WIDTH == 64:
        WIDE: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32]],
            [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 64],
        )  # fmt: skip
    else:
        gl.static_assert(WIDTH == 128)
        WIDE: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]],
            [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 128],
        )  # fmt: skip
    value = gl.convert_layout(value, WIDE)
    rows = first + gl.arange(0, value.shape[0], layout=gl.SliceLayout(1, WIDE))
    cols = gl.arange(0, value.shape[1], layout=gl.SliceLayout(0, WIDE))
    ptrs = out + rows[:, None] * stride + cols[None, :]
    if LEFT >= WIDTH:
        gl.store(ptrs, value, mask=(rows < N)[:, None])
    else:
        gl.store(ptrs, value, mask=(rows < N)[:, None] & (cols < LEFT)[None, :])
