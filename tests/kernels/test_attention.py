"""Attention beyond the contract of `test_contract.py`: gradients of a bias, of rows that may look
nowhere, in every layout; the rotary embedding against the libraries that it comes from.

Kernels run in the interpreter, in float64 where the arithmetic (not its rounding) is tested.
"""

import functools
import sys

import numpy as np
import pytest
import torch

from fastvit import ops
from fastvit.check.launches import recorded, stubbed
from fastvit.kernels._register import OPS
from fastvit.kernels.attention.reference import attention_qkv_reference, attention_reference

# a few thousand roundings of 1e-16
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
B, H, N, D = 2, 2, 19, 16


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(n=N, m=None, d=D):
    sizes = (n, m or n, m or n)
    return tuple(drawn(B, H, size, d, seed=i).requires_grad_() for i, size in enumerate(sizes))


def gradients(function, inputs, **kwargs):
    """Of a fixed weighted sum of the output, for every input that requires one."""
    out = function(*inputs, **kwargs)
    given = [t for t in (*inputs, *kwargs.values()) if isinstance(t, torch.Tensor)]
    wanted = [t for t in given if t.requires_grad]
    return torch.autograd.grad(out, wanted, drawn(*out.shape, seed=9).to(out))


def check(inputs, **kwargs):
    ours = gradients(ops.attention, inputs, **kwargs)
    expected = gradients(attention_reference, inputs, **kwargs)
    assert_close(ours, expected)
    return ours


@pytest.mark.parametrize(
    "shape",
    [(B, H, N, N), (1, H, N, N), (B, 1, N, N), (N, N), (H, 1, N), (B, H, N, 1), (1,)],
    ids=str,
)
def test_gradient_of_a_bias_is_summed_over_what_it_was_broadcast_along(triton_path, shape):
    check(qkv(), attn_mask=drawn(*shape, seed=5).requires_grad_())


MASKS = [(), (1,), (N,), (N, 1), (1, N), (H, N, N), (B, 1, 1, N)]


@pytest.mark.parametrize("path", ["triton", "torch"])
@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_a_mask_broadcasts(triton_path, shape, boolean, path):
    mask = drawn(*shape, seed=5)
    with ops.backend(path):
        check(qkv(), attn_mask=mask > -1 if boolean else mask)


@pytest.mark.parametrize("along", [0, 1])
def test_a_mask_of_more_elements_than_32_bits_count(triton_path, along):
    """Its rows, or its columns, lie 2^25 elements apart; unwritten memory costs nothing."""
    n, apart = 66, 2**25
    memory = torch.from_numpy(np.zeros((n - 1) * apart + n, dtype=bool))
    mask = memory.as_strided((n, n), (apart, 1) if along == 0 else (1, apart))
    mask.copy_(drawn(n, n, seed=5) > 0)
    inputs = [drawn(1, 1, n, D, seed=i).requires_grad_() for i in range(3)]
    ours = gradients(ops.attention, inputs, attn_mask=mask)
    assert_close(ours, gradients(attention_reference, inputs, attn_mask=mask.contiguous()))


def test_gradient_of_a_bias_keeps_its_dtype(triton_path):
    q, k, v = (t.detach().float() for t in qkv())
    bias = drawn(H, N, N, dtype=torch.float16).requires_grad_()
    (ours,) = gradients(ops.attention, (q, k, v), attn_mask=bias)
    (expected,) = gradients(attention_reference, (q, k, v), attn_mask=bias)
    assert ours.dtype == torch.float16
    # one rounding to float16 of sums of order 1 that differ by 1e-6
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("boolean", [True, False])
def test_rows_that_may_look_nowhere_have_no_gradient(triton_path, boolean):
    allowed = torch.ones(N, N, dtype=torch.bool).tril(-1)  # the first query sees no key
    allowed[:, -1] = False  # and no query the last key
    mask = allowed
    if not boolean:
        mask = drawn(H, N, N).masked_fill(~allowed, float("-inf")).requires_grad_()
    dq, dk, dv, *bias = check(qkv(), attn_mask=mask)
    assert not dq[:, :, 0].any()
    assert not dk[:, :, -1].any()
    assert not dv[:, :, -1].any()
    for gradient in bias:
        assert not gradient[:, ~allowed].any()


@pytest.mark.filterwarnings("ignore:overflow")  # in columns past the last key, which are dropped
def test_rows_whose_keys_all_have_the_lowest_float_are_a_plain_average(triton_path):
    """transformers' masks; times log2(e) that float would be -inf."""
    lowest = torch.full((N, N), torch.finfo(torch.float32).min)
    mask = lowest.triu()  # the first query sees no key
    q, k, v = qkv()
    check((q, k, v), attn_mask=mask)
    assert_close(ops.attention(q, k, v, mask)[:, :, 0], v.mean(dim=2))


@pytest.mark.parametrize("d", [1, 20, 72, 112, 144])  # above 128, dK and dV are summed apart
def test_gradients_in_a_head_dimension_in_parts(triton_path, d):
    check(qkv(n=5, m=7, d=d))


def test_gradients_over_several_blocks(triton_path):
    check(qkv(n=70, m=101))


def test_only_what_is_needed_is_computed(triton_path):
    everything = gradients(ops.attention, qkv())
    for i in range(3):
        inputs = [t.detach() for t in qkv()]
        inputs[i].requires_grad_()
        assert torch.equal(gradients(ops.attention, inputs)[0], everything[i])
    bias = drawn(H, N, N).requires_grad_()
    inputs = [t.detach() for t in qkv()]
    ours = gradients(ops.attention, inputs, attn_mask=bias)
    expected = gradients(attention_reference, inputs, attn_mask=bias)
    assert_close(ours, expected)


def test_gradient_with_any_strides(triton_path):
    """Also of one that is expanded, as a sum's is, and of one that is transposed."""
    q, k, v = qkv()
    expected = torch.autograd.grad(attention_reference(q, k, v).sum(), (q, k, v))
    ours = torch.autograd.grad(ops.attention(q, k, v).sum(), (q, k, v))
    assert_close(ours, expected)

    packed = drawn(B, N, 2 * 3 * H * D)[..., ::2].requires_grad_()
    upstream = drawn(B, H * D, N, seed=9).mT
    out = attention_qkv_reference(packed.contiguous(), H)
    expected = torch.autograd.grad(out, packed, upstream)
    ours = torch.autograd.grad(ops.attention_qkv(packed, H), packed, upstream)
    assert_close(ours, expected)


def test_backward_twice_gives_the_same_bits(triton_path):
    q, k, v = (t.detach().half().requires_grad_() for t in qkv(n=70))
    bias = drawn(1, H, 70, 70, dtype=torch.float16).requires_grad_()
    first, second = (gradients(ops.attention, (q, k, v), attn_mask=bias) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_saved(triton_path):
    """qkv, the output and two float32 numbers a query: no matrix of weights."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = drawn(B, 70, 3 * H * D, dtype=torch.float16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.attention_qkv(x, H)
    assert sum(saved.values()) == x.nbytes + x.nbytes // 3 + 2 * 4 * B * H * 70


@pytest.mark.parametrize("form", ["attention", "attention_qkv", "rope", "mask"])
def test_a_second_call_costs_few_python_calls(form):
    """All of the host's work but the launch itself, for which three stand-ins of C functions are
    called here."""
    q, x = torch.randn(1, 3, 20, 16), torch.randn(1, 20, 3 * 3 * 16)
    call = {
        "attention": lambda: ops.attention(q, q, q),
        "attention_qkv": lambda: ops.attention_qkv(x, 3),
        "rope": lambda: ops.attention_qkv(x, 3, rope=(torch.ones(20, 8), torch.ones(20, 8))),
        "mask": lambda: ops.attention(q, q, q, torch.ones(20, 20, dtype=torch.bool)),
    }[form]
    calls = []
    with stubbed() as stub, torch.no_grad():
        call()
        sys.setprofile(lambda frame, event, _: event == "call" and calls.append(frame.f_code))
        call()
        sys.setprofile(None)
    assert stub.launches == 2
    # the lambda, and list comprehensions, which are calls before Python 3.12
    assert len([code for code in calls if not code.co_name.startswith("<list")]) <= 1 + 12


@pytest.mark.parametrize(("dtype", "chain"), [(torch.float32, 32), (torch.bfloat16, 256)])
def test_exact_float32_products_are_summed_in_two_levels(dtype, chain):
    """One chain of multiply-adds over 256 channels, or over all keys, is 3 times less exact than
    cuBLAS."""
    q = torch.empty(1, 1, 300, 256, dtype=dtype, device="meta")
    with recorded() as launches:
        OPS["attention"].launch(q, q, q, *[None] * 4, 0, 0, 1.0, False)
    ((prepared, arguments),) = launches
    form = next(argument for argument in arguments if hasattr(argument, "parts"))
    assert max(width for _, width in form.parts) == chain
    assert sum(width for _, width in form.parts) == 256
    if dtype == torch.float32:
        assert prepared.tile.BLOCK_N <= 32


# --------------------------------------------------------------------------- rotary


def tables(*leading, n=N, d=D // 2, prefix=3):
    angle = drawn(*leading, n - prefix, d, seed=7) * 5
    return angle.cos(), angle.sin()


def widened(table, half):
    """[..., d/2] as the libraries have it: [..., d]."""
    return torch.cat((table, table), -1) if half else table.repeat_interleave(2, -1)


@pytest.mark.parametrize("half", [False, True], ids=["interleaved", "half"])
@pytest.mark.parametrize("leading", [(), (H,), (B, 1), (B, H)], ids=str)
def test_rope_has_timms_meaning(triton_path, half, leading):
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    cos, sin = tables(*leading)
    wide = tuple(widened(table, half) for table in (cos, sin))
    rope = torch.cat((wide[1], wide[0]), -1)
    q, k, v = qkv()

    def turned(x):
        return torch.cat((x[:, :, :3], apply_rot_embed_cat(x[:, :, 3:], rope, half=half)), 2)

    expected = gradients(lambda q, k, v: attention_reference(turned(q), turned(k), v), (q, k, v))
    for given in ((cos, sin), wide):
        ours = gradients(ops.attention, (q, k, v), rope=given, rotate_half=half)
        assert_close(ours, expected)


def test_rope_has_the_meaning_of_transformers_dinov3(triton_path):
    from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

    cos, sin = (widened(table, half=True) for table in tables(prefix=5))
    q, k, v = qkv()
    expected = attention_reference(*apply_rotary_pos_emb(q, k, cos, sin), v)
    ours = ops.attention(q, k, v, rope=(cos, sin), rotate_half=True)
    assert_close(ours, expected)


@pytest.mark.parametrize("path", ["triton", "torch"])
@pytest.mark.parametrize("half", [False, True], ids=["interleaved", "half"])
@pytest.mark.parametrize("leading", [(), (H,)], ids=str)
def test_gradient_of_the_tables(triton_path, leading, half, path):
    """timm's mixed rotary embedding learns its frequencies. Here no cos^2 + sin^2 is 1."""
    rope = (1.3 * table for table in tables(*leading))
    inputs = (*qkv(), *(table.requires_grad_() for table in rope))

    def run(function):
        def call(q, k, v, *rope):
            return function(q, k, v, rope=rope, rotate_half=half)

        return gradients(call, inputs)

    with ops.backend(path):
        assert_close(run(ops.attention), run(attention_reference))


def test_gradient_of_one_table_alone(triton_path):
    cos, sin = tables()
    inputs = (*(t.detach() for t in qkv()), cos, sin.requires_grad_())

    def run(function):
        return gradients(lambda q, k, v, cos, sin: function(q, k, v, rope=(cos, sin)), inputs)

    assert_close(run(ops.attention), run(attention_reference))


@pytest.mark.parametrize("half", [False, True], ids=["interleaved", "half"])
def test_rope_of_packed_qkv_over_several_blocks(triton_path, half):
    x = drawn(1, 70, 3 * H * 48).requires_grad_()
    options = {"rope": tables(n=70, d=24), "rotate_half": half}
    ours = gradients(lambda x: ops.attention_qkv(x, H, **options), [x])
    expected = gradients(lambda x: attention_qkv_reference(x, H, **options), [x])
    assert_close(ours, expected)


def test_rope_with_dropout_is_turned_first(triton_path):
    q, k, v = qkv()
    ours = ops.attention(q, k, v, dropout_p=1e-12, rope=tables())
    assert_close(ours, attention_reference(q, k, v, rope=tables()))


BAD = {
    r"cos \[20, 8\]": lambda: tables(n=20, prefix=0),
    r"cos \[16, 6\]": lambda: tables(d=6),
    r"cos \[3, 16, 8\]": lambda: tables(3),
    r"sin \[15, 8\]": lambda: (tables()[0], tables()[1][1:]),
    "on meta": lambda: tuple(table.to("meta") for table in tables()),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_bad_tables_are_named(triton_path, message, path):
    q, k, v = qkv()
    with ops.backend(path), pytest.raises(ValueError, match=message):
        ops.attention(q, k, v, rope=BAD[message]())
    with ops.backend(path), pytest.raises(ValueError, match=message):
        ops.attention_qkv(drawn(B, N, 3 * H * D), H, rope=BAD[message]())


def test_other_bad_uses_of_rope_are_named():
    q, k, v = qkv()
    cos, sin = tables()
    with pytest.raises(TypeError, match=r"torch\.int64"):
        ops.attention(q, k, v, rope=(cos.long(), sin.long()))
    with pytest.raises(ValueError, match="19 queries and 7 keys"):
        ops.attention(q, k[:, :, :7], v[:, :, :7], rope=tables())
    with pytest.raises(ValueError, match="does not fit"):
        ops.attention(q[..., :15], k[..., :15], v[..., :15], rope=tables(d=7))
