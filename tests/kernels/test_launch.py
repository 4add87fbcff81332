"""Cheap launches: a compiled kernel gets just what Triton's own launch gives it, and only while
nobody watches launches and the device is the same. A real kernel is compiled for sm_90; the driver,
which would need a GPU, is a stand-in that keeps what it is given."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fresh
import pytest

STAND_IN = '''
import json, threading
from types import SimpleNamespace
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.tools.tensor_descriptor import TensorDescriptor
from fastvit.kernels import _launch
from fastvit.kernels._launch import Box, Prepared
from fastvit.kernels._tiles import Matrix
from fastvit.kernels._tuning import TileConfig

DEVICE, STREAM = -1, 7  # -1 is what a CPU tensor's get_device() says
log = []  # what arrives where the driver's C begins, but for what it does not read

def in_c(*arguments):
    for hook in filter(callable, arguments):
        hook(None)
    read = int, float, str, list, tuple, torch.Tensor
    log.append([a for a in arguments if isinstance(a, read)])

nvidia.PyKernelArg = lambda nested_tuple, type: (nested_tuple, type)  # 3.7's are types of the C
nvidia.ARG_TUPLE, nvidia.ARG_KERNEL, nvidia.ARG_CONSTEXPR = "tuple", "kernel", "constexpr"
nvidia.library_dirs = list  # 3.6 compiles the C for each kernel
nvidia.compile_module_from_src = lambda **source: SimpleNamespace(launch=in_c)

described = []
def describe(tensor, settings):
    described.append(tensor.base.data_ptr())
    return [("map of", tensor.base.data_ptr()), *tensor.shape, *tensor.strides]
nvidia.make_tensordesc_arg = describe

loaded = iter(range(1, 1000))
driver = SimpleNamespace(
    get_current_device=lambda: DEVICE, get_current_stream=lambda device: STREAM,
    get_current_target=lambda: GPUTarget("cuda", 90, 32), launcher_cls=nvidia.CudaLauncher,
    utils=SimpleNamespace(
        launch=in_c, build_signature_metadata=lambda signature: str(signature),
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *args: ("module", next(loaded), 32, 0, 1024),
    ),
)
triton.runtime.driver.set_active(driver)
_launch._device, _launch._stream = (lambda: DEVICE), (lambda device: STREAM)
ordinary = []  # the kernels that Triton launched itself
run = triton.runtime.jit.JITFunction.run
def counted(self, *args, **kwargs):
    ordinary.append(self.fn.__name__)
    return run(self, *args, **kwargs)
triton.runtime.jit.JITFunction.run = counted

@triton.jit
def add(x, bias_ptr, y_ptr, N, SCALE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x.ptr + i * x.stride_n, mask=i < N).to(ACC) * SCALE
    if bias_ptr is not None:
        value += tl.load(bias_ptr + i, mask=i < N)
    tl.store(y_ptr + i, value, mask=i < N)

@triton.jit
def copy(x_desc, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i[:, None] * BLOCK + i[None, :], x_desc.load([0, 0]))

TILE = TileConfig(16, 16)
x, y = torch.zeros(65), torch.zeros(65)

def prepare_add(bias=False, scale=2.0):
    def arguments(x, bias_ptr, y):
        return Matrix(x, 65, 1), bias_ptr, y, 48, scale, tl.float32, 64
    return Prepared(add, 3, TILE, arguments)

def prepare_copy(size):
    box = Box(lambda t: TensorDescriptor(t, [64, 64], [64, 1], [size, size]))
    return Prepared(copy, 1, TILE, lambda x, y: (x, y, size), [box])

def go(prepared, *tensors):
    """Whether it was launched cheaply, and what the driver got."""
    before = len(ordinary)
    _launch.run(prepared, *tensors)
    return len(ordinary) == before, log[-1]
'''


def in_stand_in(code: str, folder: Path, **extra: str) -> Any:
    """What `code` prints as JSON, run after `STAND_IN`."""
    path = folder / "launches.py"  # Triton reads the source of a kernel from its file
    path.write_text(STAND_IN + code)
    run = "import runpy, sys; runpy.run_path(sys.argv[1])"
    return json.loads(fresh.python("-c", run, path, **extra))


SAME = '''
def flat(given):
    for value in given:
        if isinstance(value, (list, tuple)):
            yield from flat(value)
        else:
            yield id(value) if isinstance(value, torch.Tensor) else value

def both(prepared, *tensors):
    """How it was launched twice; the driver got the same both times."""
    (first, ordinarily), (second, cheaply) = go(prepared, *tensors), go(prepared, *tensors)
    assert [*flat(ordinarily)] == [*flat(cheaply)], (ordinarily, cheaply)
    return [first, second]

found = {
    "pointers": both(prepare_add(), x, None, y),
    "a bias": both(prepare_add(), x, y, y),
    "descriptor": both(prepare_copy(64), torch.zeros(64, 64), y),
    "a smaller box": both(prepare_copy(32), torch.zeros(64, 64), y),
}
# other tensors and another stream are no reason to ask Triton again
plain, boxed = prepare_add(), prepare_copy(64)
other = torch.zeros(65)
found["other tensors"] = [go(plain, x, None, y)[0], go(plain, other, None, x)[0]]
assert [*flat(log[-1])].count(id(other)) == 1
STREAM = 9
go(plain, x, None, y)
assert log[-1][3] == 9
# one description of an address, however often it is read
matrices = [torch.zeros(64, 64) for _ in range(2)]
go(boxed, matrices[0], y)
described.clear()
for _ in range(3):
    for matrix in matrices:
        go(boxed, matrix, y)
found["descriptions"] = sorted(described) == sorted(m.data_ptr() for m in matrices)
_launch._MOST_MAPS = 4
many = [torch.zeros(64, 64) for _ in range(9)]
for matrix in many:
    go(boxed, matrix, y)
    assert matrix.data_ptr() in [*flat(log[-1])]
found["kept"] = len(boxed.boxes[0].maps) <= 4
print(json.dumps(found))
'''


def check_same(found: dict[str, Any]) -> None:
    assert found == {
        "pointers": [False, True], "a bias": [False, True], "descriptor": [False, True],
        "a smaller box": [False, True], "other tensors": [False, True], "descriptions": True,
        "kept": True,
    }  # fmt: skip


def test_the_driver_gets_what_it_got_before(tmp_path):
    check_same(in_stand_in(SAME, tmp_path))


FALLS_BACK = """
runtime, found = triton.knobs.runtime, {}
prepared = prepare_add()
def cheap():
    return go(prepared, x, None, y)[0]
assert [cheap(), cheap()] == [False, True]

told = []
runtime.launch_enter_hook.add(told.append)
found["hook"] = cheap()
runtime.launch_enter_hook.remove(told.append)
found["told"] = len(told)
found["hook gone"] = cheap()
hook, runtime.launch_exit_hook = runtime.launch_exit_hook, told.append
found["plain hook"] = cheap()
found["told again"] = len(told)
runtime.launch_exit_hook = hook
found["hook back"] = cheap()
add.add_pre_run_hook(lambda *args, **kwargs: None)
found["pre-run hook"] = cheap()
add.pre_run_hooks.clear()
DEVICE = 1
found["device"] = cheap()
DEVICE = -1
found["device back"] = cheap()
torch.version.hip = "6.0"
amd = prepare_add(scale=3.0)
found["AMD"] = go(amd, x, None, y)[0] or go(amd, x, None, y)[0]
torch.version.hip = None

pairs = {n: (prepare_add(scale=float(n)), torch.zeros(65)) for n in range(1, 9)}
def many():
    for _ in range(100):
        for mine, out in pairs.values():
            _launch.run(mine, x, None, out)
log.clear()
threads = [threading.Thread(target=many) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
found["threads"] = len(log) == 3200
print(json.dumps(found))
"""


def test_what_goes_the_ordinary_way(tmp_path):
    assert in_stand_in(FALLS_BACK, tmp_path) == {
        "hook": False, "told": 1, "hook gone": True, "plain hook": False, "told again": 2,
        "hook back": True, "pre-run hook": False, "device": False, "device back": True,
        "AMD": False, "threads": True,
    }  # fmt: skip


@pytest.mark.slow
def test_with_triton_3_6(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    env = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    subprocess.run([*install, tmp_path / "triton", "triton==3.6.0"], check=True, env=env)
    paths = {"PYTHONPATH": str(tmp_path / "triton"), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    check_same(in_stand_in(SAME, tmp_path, **paths))
