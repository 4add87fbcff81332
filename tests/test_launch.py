"""Cheap launches: a compiled kernel gets just what Triton's own launch gives it, and only where
nothing that the compiler looks at has changed. A real kernel is compiled for sm_90; the driver,
which would need a GPU, is a stand-in that keeps what it is given."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STAND_IN = '''
import gc, json, sys, threading
from types import SimpleNamespace
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor
from fastvit.kernels import _launch
from fastvit.kernels._tuning import TileConfig

DEVICE, STREAM = -1, 7  # -1 is what a CPU tensor's get_device() says
log = []

class Launcher:
    def __init__(self, src, metadata):
        pass

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        log.append([(x, y, z, stream, function, packed), arguments])
        for hook in (enter, leave):
            if hook is not None:
                hook(metadata)

loaded = iter(range(1, 1000))
driver = SimpleNamespace(
    get_current_device=lambda: DEVICE, get_current_stream=lambda device: STREAM,
    get_current_target=lambda: GPUTarget("cuda", 90, 32), launcher_cls=Launcher,
    utils=SimpleNamespace(
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
def add(x_ptr, bias_ptr, y_ptr, N, stride, SCALE: tl.constexpr, ACC: tl.constexpr,
        BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i * stride, mask=i < N).to(ACC) * SCALE
    if bias_ptr is not None:
        x += tl.load(bias_ptr + i, mask=i < N)
    tl.store(y_ptr + i, x, mask=i < N)

@triton.jit
def copy(x_desc, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i[:, None] * BLOCK + i[None, :], x_desc.load([0, 0]))

TILE = TileConfig(16, 16)
x, y = torch.zeros(65), torch.zeros(65)
BASE = dict(x_ptr=x, bias_ptr=None, y_ptr=y, N=48, stride=1, SCALE=2.0, ACC=tl.float32, BLOCK=64)

def go(kernel=add, programs=3, tile=TILE, **changed):
    """Whether it was launched cheaply, and what the driver got."""
    before = len(ordinary)
    _launch.launch(kernel, programs, tile, **({**BASE, **changed} if kernel is add else changed))
    return len(ordinary) == before, log[-1]
'''


def in_stand_in(code: str, folder: Path, **extra: str) -> Any:
    """What `code` prints as JSON, run after `STAND_IN`."""
    path = folder / "launches.py"  # Triton reads the source of a kernel from its file
    path.write_text(STAND_IN + code)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", "import runpy, sys; runpy.run_path(sys.argv[1])", path],
        env=env | extra, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


CHANGES = '''
found = {}

def again(name, **changed):
    """First launch after a change, then one more."""
    ours = [go(**changed) for _ in range(2)]
    found[name] = [cheap for cheap, _ in ours]
    (_, (first, first_args)), (_, (second, second_args)) = ours
    assert first == second, (name, first, second)  # same function, grid, stream, options
    assert len(first_args) == len(second_args)
    assert all(a is b for a, b in zip(first_args, second_args)), name

again("first")
again("other tensors", x_ptr=torch.zeros(65), y_ptr=torch.zeros(65))
again("more programs", programs=5)
again("misaligned", x_ptr=x[1:])
again("dtype", x_ptr=x.half())
again("bias", bias_ptr=y)
again("size", N=50)
again("stride", stride=16)
again("constant", SCALE=1.0)
again("its type", SCALE=1)
again("accumulator", ACC=tl.float64)
again("warps", tile=TileConfig(16, 16, num_warps=8))
again("stages", tile=TileConfig(16, 16, num_stages=3))
matrix = torch.zeros(64, 64)
again("descriptor", kernel=copy, x_desc=TensorDescriptor.from_tensor(matrix, [64, 64]), y_ptr=y,
      BLOCK=64)
again("another of it", kernel=copy, x_desc=TensorDescriptor.from_tensor(matrix[:32], [64, 64]),
      y_ptr=y, BLOCK=64)
again("box", kernel=copy, x_desc=TensorDescriptor.from_tensor(matrix, [32, 32]), y_ptr=y, BLOCK=32)
_, (_, arguments) = go(N=49, y_ptr=x)
assert arguments[2] is x and arguments[3] == 49
reordered = dict(reversed(BASE.items()))
_launch.launch(add, 3, TILE, **reordered)
_launch.launch(add, 3, TILE, **reordered)
assert all(a is b for a, b in zip(log[-1][1], (BASE[name] for name in add.arg_names)))
print(json.dumps(found))
'''


def check_changes(found: dict[str, list[bool]]) -> None:
    """Cheap from the second launch on; from the first where nothing changed for the compiler."""
    same = {"other tensors", "more programs", "another of it"}
    assert found == {name: [name in same, True] for name in found}
    assert len(found) == 16


def test_the_driver_gets_what_it_got_before(tmp_path):
    check_changes(in_stand_in(CHANGES, tmp_path))


FALLS_BACK = """
runtime, found = triton.knobs.runtime, {}
assert [go()[0], go()[0]] == [False, True]

told = []
runtime.launch_enter_hook.add(told.append)
found["hook"] = go()[0]
runtime.launch_enter_hook.remove(told.append)
found["told"] = len(told)
hook, runtime.launch_exit_hook = runtime.launch_exit_hook, told.append
found["plain hook"] = go()[0]
runtime.launch_exit_hook = None
found["no hook"] = go()[0]
runtime.launch_exit_hook = hook
add.add_pre_run_hook(lambda *args, **kwargs: None)
found["pre-run hook"] = go()[0]
add.pre_run_hooks.clear()
DEVICE = 1
found["device"] = go()[0]
found["tensors elsewhere"] = go(N=51)[0] or go(N=51)[0]  # not to be kept
DEVICE = -1
torch.version.hip = "6.0"
found["AMD"] = go(N=52)[0] or go(N=52)[0]
torch.version.hip = None
found["after all"] = go()[0]

_launch._MOST = 4
for n in range(53, 70):
    go(N=n)
found["kept"] = len(_launch._ready) <= 4

pairs = {n: torch.zeros(65) for n in range(1, 9)}  # with so many sizes some are thrown out
def many():
    for _ in range(100):
        for n, mine in pairs.items():
            _launch.launch(add, n, TILE, **{**BASE, "N": n, "y_ptr": mine})
log.clear()
threads = [threading.Thread(target=many) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
found["threads"] = len(log) == 3200 and all(
    programs == n and y is pairs[n] for (programs, *_), (_, _, y, n, *_) in log
)
print(json.dumps(found))
"""


def test_what_goes_the_ordinary_way(tmp_path):
    assert in_stand_in(FALLS_BACK, tmp_path) == {
        "hook": False, "told": 1, "plain hook": False, "no hook": True, "pre-run hook": False,
        "device": False, "tensors elsewhere": False, "AMD": False, "after all": True, "kept": True,
        "threads": True,
    }  # fmt: skip


@pytest.mark.slow
def test_with_triton_3_6(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    env = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    subprocess.run([*install, tmp_path / "triton", "triton==3.6.0"], check=True, env=env)
    paths = {"PYTHONPATH": str(tmp_path / "triton"), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    check_changes(in_stand_in(CHANGES, tmp_path, **paths))
