"""`attention_packed` beyond the contract of `test_contract.py`: how much work it does, that sizes
are data, and what it makes of odd ones.

Kernels run in the interpreter, in float64 where the arithmetic (not its rounding) is tested.
"""

import functools
import json

import fresh
import pytest
import torch

from fastvit import ops
from fastvit.kernels import _tuning
from fastvit.kernels.attention.reference import attention_packed_reference

# a few thousand roundings of 1e-16
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
H, D = 1, 16


def drawn(tokens, h=H, d=D, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, 3 * h * d, generator=generator, dtype=dtype)


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def check(lengths):
    """Output and gradient."""
    qkv, cu_seqlens = drawn(sum(lengths)).requires_grad_(), bounds(lengths)
    results = []
    for function in (ops.attention_packed, attention_packed_reference):
        out = function(qkv, H, cu_seqlens)
        upstream = drawn(len(qkv))[:, : out.shape[1]]
        results.append((out, *torch.autograd.grad(out, qkv, upstream)))
    assert_close(*results)


@pytest.mark.parametrize("path", ["triton", "torch"])
@pytest.mark.parametrize(
    "lengths", [[64], [0], [0, 0, 5], [1, 1, 1], [63, 64, 65], [16, 0, 0, 31]], ids=str
)
def test_odd_lengths(triton_path, lengths, path):
    with ops.backend(path):
        check(lengths)


def test_more_images_than_are_looked_at_at_once(triton_path, monkeypatch):
    import triton.language as tl

    from fastvit.kernels.attention import kernel

    monkeypatch.setattr(kernel, "IMAGES_AT_ONCE", tl.constexpr(2))
    check([1, 0, 20, 3, 64])


def test_what_an_image_gets_does_not_depend_on_its_neighbours(triton_path):
    qkv = drawn(90, dtype=torch.float16)
    together = ops.attention_packed(qkv, H, bounds([20, 70]), max_seqlen=70)
    alone = ops.attention_packed(qkv[20:], H, bounds([70]), max_seqlen=70)
    assert torch.equal(together[20:], alone)


@pytest.mark.parametrize("lengths", [[197, 64, 65, 1], [64, 128], [30] * 5], ids=str)
def test_work_is_exact_up_to_one_tile_an_image(triton_path, monkeypatch, lengths):
    """Counted where every product of two tiles passes. Padding to the longest image would do
    4 * 16 tiles where the first case needs 16 + 1 + 4 + 1."""
    from triton.runtime.interpreter import InterpreterBuilder

    products = []
    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda *args: products.append(1) or dot(*args)
    )
    # of one size for queries and keys, so that a tile has one meaning
    monkeypatch.setattr(_tuning, "_lookup", lambda query: _tuning.TileConfig(64, 64))
    qkv = drawn(sum(lengths), h=2, dtype=torch.float16).requires_grad_()
    out = ops.attention_packed(qkv, 2, bounds(lengths))
    forward = len(products)
    out.sum().backward()
    backward = len(products) - forward
    tiles = 2 * sum(_tuning.cdiv(length, 64) ** 2 for length in lengths)  # of two heads
    spare = 2 * len(lengths)
    # two products a tile forward; three for dQ and four for dK and dV backward
    assert 2 * tiles <= forward <= 2 * (tiles + spare)
    assert 7 * tiles <= backward <= 7 * (tiles + spare)


RECORD = """
import json, torch
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import create_function_from_signature
from fastvit.check.launches import recorded
from fastvit.kernels._register import OPS
op = OPS["attention_packed"]

def key(prepared, arguments):  # what Triton compiles a kernel anew for
    kernel = prepared.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, BaseBackend)
    return str((kernel.fn.__name__, binder(*arguments)[1], prepared.tile))

keys = []
for lengths in ([197, 65, 17], [64], [576] * 16, [5, 9]):
    qkv = torch.empty(sum(lengths), 3 * 12 * 64, dtype=torch.half, device="meta")
    bounds = torch.empty(len(lengths) + 1, dtype=torch.int32, device="meta")
    args = (qkv, *[None] * 5, bounds, 12, max(lengths), 0.125, False)
    with recorded() as launches:
        op.launch(*args)
        out, statistics = op.launch(*args, keep=True)
        op.gradient.backward(out, [out, statistics], args, [True] + [False] * 10)
    keys.append(sorted({key(*launch) for launch in launches}))
print(json.dumps(keys))
"""


def test_other_sizes_are_the_same_kernels():
    """None of these calls would compile what another has not compiled."""
    first, *others = json.loads(fresh.python("-c", RECORD))
    assert len(first) == 4  # forward, the same for training, two phases backward
    assert all(keys == first for keys in others)


@pytest.mark.parametrize("path", ["triton", "torch"])
def test_other_sizes_are_the_same_graph(triton_path, path):
    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(
        ops.attention_packed, fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph
    )
    with ops.backend(path):
        for lengths in ([5, 7], [9, 30, 2], [64], [3, 3, 3, 3]):
            qkv, cu_seqlens = drawn(sum(lengths)), bounds(lengths)
            ours = compiled(qkv, H, cu_seqlens, max(lengths))
            assert_close(ours, attention_packed_reference(qkv, H, cu_seqlens))
    assert len(graphs) == 2  # of the first sizes, and of any


@pytest.mark.parametrize("path", ["triton", "torch"])
def test_gradient_of_the_tables(triton_path, path):
    lengths = [7, 12]
    angle = torch.randn(2, 19, D // 2, generator=torch.Generator().manual_seed(1)).double()
    qkv, cu_seqlens = drawn(19, h=2).requires_grad_(), bounds(lengths)
    rope = tuple(table.requires_grad_() for table in (angle.cos(), angle.sin()))

    def gradients(function):
        out = function(qkv, 2, cu_seqlens, rope=rope)
        return torch.autograd.grad(out.square().sum(), (qkv, *rope))

    with ops.backend(path):
        ours = gradients(ops.attention_packed)
    assert_close(ours, gradients(attention_packed_reference))


BAD = {
    r"\[0, 5, 3, 7\] does not rise from 0 to 7": lambda: torch.tensor([0, 5, 3, 7]),
    r"\[0, 6\] does not rise from 0 to 7": lambda: torch.tensor([0, 6]),
    r"\[1, 7\] does not rise from 0 to 7": lambda: torch.tensor([1, 7]),
    r"cu_seqlens \[1, 2\] is not": lambda: torch.tensor([[0, 7]]),
    r"cu_seqlens \[0\] is not": lambda: torch.tensor([], dtype=torch.int32),
    "cu_seqlens is on meta": lambda: torch.tensor([0, 7], device="meta"),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_bad_lengths_are_named(triton_path, message, path):
    with ops.backend(path), pytest.raises(ValueError, match=message):
        ops.attention_packed(drawn(7), H, BAD[message]())


def test_other_bad_input_is_named():
    with pytest.raises(TypeError, match=r"torch\.float32"):
        ops.attention_packed(drawn(7), H, torch.tensor([0.0, 7.0]))
    with pytest.raises(ValueError, match="num_heads=5"):
        ops.attention_packed(drawn(7), 5, bounds([7]))
    table = torch.ones(6, D)
    with pytest.raises(ValueError, match="rope of 6 tokens for 7"):
        ops.attention_packed(drawn(7), H, bounds([7]), rope=(table, table))


def test_padding_that_it_is_timed_against_gives_the_same():
    from fastvit.bench.ops import padded

    lengths = [5, 9, 2]
    qkv, cu_seqlens = drawn(16), bounds(lengths)
    images = padded(ops.attention_qkv)(qkv, H, cu_seqlens, 9)
    rows = torch.cat([image[:length] for image, length in zip(images, lengths, strict=True)])
    assert_close(rows, ops.attention_packed(qkv, H, cu_seqlens))
