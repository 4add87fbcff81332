"""CUDA graphs in `accelerate` on a GPU; `test_graphs.py` tests the rest without one."""

import os
import threading
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from test_graphs import assign, move, new_head, plain, pooling, replace, taller_positions
from timm_models import TOLERANCE, error, images, small
from torch import Tensor, nn

from fastvit.accelerate import accelerate
from fastvit.accelerate.graphs import GRAPHS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def on_gpu(**options: Any) -> Any:
    return accelerate(small(**options).cuda(), cuda_graphs=True, strict=True)


KERNELS = """
import torch
import fastvit
from test_graphs_gpu import GRAPHS, accelerate, error, images, plain, replace, small

torch.set_grad_enabled(False)
fastvit.ops.set_backend("triton")
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    model = accelerate(small().cuda().to(dtype), cuda_graphs=True, strict=True)
    for batch in (1, 3, 1, 3):
        x = images(model, batch).cuda().to(dtype)
        print(error(model(x).float(), plain(model, x).float()))
        replace(model)
    assert all(getattr(model, GRAPHS)._replays.values())
"""


def test_gpu_kernels_in_graphs():
    """In a process of its own, because this one interprets kernels. The same kernels run with and
    without a graph, so that even bfloat16 gives the same numbers."""
    code = "from fastvit._compat import import_timm; import_timm()\n" + KERNELS
    here = Path(__file__).parent
    paths = [here, here.parent / "helpers", os.environ.get("PYTHONPATH", "")]
    printed = fresh.python("-c", code, PYTHONPATH=os.pathsep.join(map(str, paths)))
    errors = [float(line) for line in printed.splitlines() if not line.startswith("torch.")]
    assert len(errors) == 12
    assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("precision", ["keep", "bf16", "fp16"])
def test_gpu_replays_equal_plain_forwards(precision: str):
    model = accelerate(small().cuda(), cuda_graphs=True, precision=precision)
    for batch in (1, 3, 1, 3):
        x = images(model, batch).cuda()
        assert error(model(x), plain(model, x)) <= TOLERANCE
    assert len(getattr(model, GRAPHS)._replays) == 2


@pytest.mark.parametrize("change", [move, replace, assign, new_head, pooling, taller_positions])
def test_gpu_changes_are_noticed(change: Any):
    model = on_gpu()
    x = images(model).cuda()
    before = model(x)
    model.blocks[0].mlp.fc2.weight.mul_(1.5)
    assert error(model(x), plain(model, x)) <= TOLERANCE
    assert error(model(x), before) > TOLERANCE
    change(model)
    torch.cuda.empty_cache()
    assert error(model(x), plain(model, x)) <= TOLERANCE


def test_gpu_streams_and_threads_do_not_mix():
    model = on_gpu()
    inputs = [images(model).cuda() for _ in range(4)]
    expected = [plain(model, x) for x in inputs]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[] for _ in inputs]

    def work(i: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            results[i] = [model(inputs[i]) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for outputs, wanted in zip(results, expected, strict=True):
        assert len(outputs) == 50
        assert max(error(y, wanted) for y in outputs) <= TOLERANCE


def test_gpu_a_forward_that_waits_runs_without_a_graph():
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.abs().max().item()

    model = on_gpu()
    model.fc_norm = Waits()
    x = images(model).cuda()
    with pytest.warns(RuntimeWarning, match="no CUDA graph for an input of"):
        ours = model(x)
    assert error(ours, plain(model, x)) <= TOLERANCE
    model.fc_norm = nn.Identity()
    assert error(model(x), plain(model, x)) <= TOLERANCE
    assert all(getattr(model, GRAPHS)._replays.values())
