"""Which path an op takes, and what happens where Triton cannot run."""

import pytest
import torch

from fastvit import ops
from fastvit.kernels import _backend
from fastvit.kernels._backend import backend, current_path, uses_triton
from fastvit.kernels._register import OPS


def test_cpu_tensors_take_plain_pytorch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with backend("auto"):
        assert current_path() == "auto"
        assert not uses_triton(torch.ones(1))


def test_interpreter_takes_triton():
    with backend("auto"):
        assert current_path() == "interpret"
        assert uses_triton(torch.ones(1))


def test_forced_triton_without_a_gpu_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with backend("triton"), pytest.raises(RuntimeError, match=r"torch\.float32 tensors on cpu"):
        ops.linear(torch.ones(2, 4), torch.ones(3, 4))


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'cuda'"):
        ops.set_backend("cuda")


def test_backend_comes_back_after_an_error():
    before = current_path()
    with pytest.raises(KeyError), backend("triton"):
        raise KeyError
    assert current_path() == before


def test_compile_failure_warns_once_and_falls_back(monkeypatch):
    """A launcher that fails as Triton's compiler does; on a GPU the op then runs plain PyTorch."""
    from triton.errors import TritonError

    calls = []

    def broken(*args):
        calls.append(args)
        raise TritonError("ptxas: out of registers")

    monkeypatch.setattr(_backend, "_path", "auto")
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: torch.no_grad())
    monkeypatch.setattr(_backend, "uncompiled", set())
    _backend.warn_once.cache_clear()
    args = (torch.randn(2, 4), torch.randn(3, 4), None, None, None, None, "none")
    eager = OPS["linear"].eager
    with pytest.warns(RuntimeWarning, match="out of registers") as caught:
        results = [_backend.run_triton("linear", broken, eager, args) for _ in range(2)]
    assert len(caught) == 1
    assert len(calls) == 2
    assert all(torch.equal(result, eager(*args)) for result in results)


def test_other_errors_are_not_swallowed(monkeypatch):
    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(_backend, "_path", "auto")
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: torch.no_grad())
    args = (torch.randn(2, 4), torch.randn(3, 4), None, None, None, None, "none")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        _backend.run_triton("linear", broken, OPS["linear"].eager, args)


def test_old_gpu_falls_back_with_one_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "Tesla T4")
    _backend.gpu_problem.cache_clear()
    _backend.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="Tesla T4 is older than sm_80") as caught:
        answers = [_backend._gpu_ok() for _ in range(2)]
    assert len(caught) == 1
    assert answers == [False, False]
    _backend.gpu_problem.cache_clear()


def test_float32_products_follow_pytorchs_setting():
    from fastvit.kernels._backend import matmul_precision
    from fastvit.kernels._launch import product_precision

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert product_precision(torch.float32, matmul_precision()) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert product_precision(torch.float32, matmul_precision()) == "tf32"
        assert product_precision(torch.float64, matmul_precision()) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


ONES = torch.ones(1, 1, 4, 8)
WIDE = torch.ones(1, 1, 2, 264)
BAD = {
    "linear: activation 'tanh'": lambda: ops.linear(
        torch.ones(2, 4), torch.ones(3, 4), activation="tanh"
    ),
    r"linear: weight has shape \[3, 5\], expected \[N, 4\]": lambda: ops.linear(
        torch.ones(2, 4), torch.ones(3, 5)
    ),
    r"linear: bias has shape \[4\], expected \[3\]": lambda: ops.linear(
        torch.ones(2, 4), torch.ones(3, 4), torch.ones(4)
    ),
    r"layer_norm: weight has shape \[3\]": lambda: ops.layer_norm(
        torch.ones(2, 4), torch.ones(3), None
    ),
    r"attention: attn_mask \[7\]": lambda: ops.attention(ONES, ONES, ONES, attn_mask=torch.ones(7)),
    r"no keys": lambda: ops.attention(
        torch.ones(1, 1, 4, 8), torch.ones(1, 1, 0, 8), torch.ones(1, 1, 0, 8)
    ),
    r"head dimension 264": lambda: ops.attention(WIDE, WIDE, WIDE),
    r"num_heads=5": lambda: ops.attention_qkv(torch.ones(1, 2, 12), 5),
    r"mlp: w2 has shape \[4, 9\], expected \[N, 8\]": lambda: ops.mlp(
        torch.ones(2, 4), torch.ones(8, 4), None, torch.ones(4, 9), None
    ),
    "16x16 do not tile an image of 40x32": lambda: ops.patch_embed(
        torch.ones(1, 3, 40, 32), torch.ones(8, 3, 16, 16)
    ),
    r"std \[1.0, 0.0, 1.0\] contains 0": lambda: ops.patch_embed(
        torch.ones(1, 3, 32, 32), torch.ones(8, 3, 16, 16), std=(1.0, 0.0, 1.0)
    ),
    r"pos_embed \[3, 8\]": lambda: ops.patch_embed(
        torch.ones(1, 3, 32, 32), torch.ones(8, 3, 16, 16), pos_embed=torch.ones(3, 8)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_shapes_are_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
