"""Offline compile of every forward kernel for sm_80 and sm_90: matrix instructions are there,
nothing spills in a loop, shared memory fits. The reader of machine code is tested with planted
listings, and the whole check with a planted kernel, so that a pass means something."""

import json
import os
import subprocess
import sys

import pytest

from fastvit.audit import Compiled, count_in_sass

# A fresh process, because kernels of this one are interpreted.
COMPILE = """
import json, sys
import torch
from fastvit import audit
from fastvit.kernels._spec import all_specs
name, arch = sys.argv[1:]
spec = all_specs()[name]
tensor_cores = spec.flops(spec.cases[0].sizes) > 0
seen, rows = set(), []
for case in spec.cases + spec.bench_cases:
    # float16 differs from bfloat16 in the opcodes' suffix only: the shapes of real models suffice
    half = (torch.bfloat16, torch.float16) if case in spec.bench_cases else (torch.bfloat16,)
    for dtype in (*half, torch.float32):
        for launch in audit.record_launches(spec, case, dtype, arch):
            if launch.key() in seen:
                continue
            seen.add(launch.key())
            compiled = audit.compile_launch(launch, arch)
            wants = tensor_cores and dtype != torch.float32
            rows.append([case.name, str(dtype), compiled.matrix_ops,
                         compiled.problems(tensor_cores=wants)])
print(json.dumps(rows))
"""


def in_fresh_process(code: str, *args: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize(
    "name",
    [
        "patch_embed",
        "layer_norm",
        "rms_norm",
        "linear",
        "attention",
        "attention_qkv",
    ],  # mlp has none
)
def test_every_forward_kernel_compiles_well(name, arch):
    rows = json.loads(in_fresh_process(COMPILE, name, arch))
    assert rows
    assert not [row for row in rows if row[3]]


PLANT = """
import torch, triton, triton.language as tl
from fastvit import audit

@triton.jit
def spilling(x_ptr, y_ptr, n, SIZE: tl.constexpr):
    # three matrices of 64 x 64 kept by one warp: 384 registers a thread, 255 are there
    i = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    keep = tl.load(x_ptr + i).to(tl.float32)
    for k in range(n):
        acc += tl.exp2(keep * k) * keep
        keep = keep + acc
    tl.store(y_ptr + i, acc + keep)

import sys, types
tensor = torch.empty(1, device="meta")
launch = audit.Launch(spilling, {"x_ptr": tensor, "y_ptr": tensor, "n": 64, "SIZE": 64},
                      {"num_warps": 1, "num_stages": 1})
print(audit.compile_launch(launch, "sm90").problems(tensor_cores=True))
"""


def test_planted_bad_kernel_is_caught(tmp_path):
    path = tmp_path / "planted.py"  # Triton reads the source of a kernel from its file
    path.write_text(PLANT)
    code = "import runpy, sys; runpy.run_path(sys.argv[1])"
    printed = in_fresh_process(code, str(path))
    assert "no HGMMA instruction" in printed
    assert "spills in a loop" in printed


LOOP = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R2 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ ;
        /*0030*/                   {spill}
        /*0040*/              @!P0 BRA 0x20 ;
        /*0050*/                   LDL R3, [R1] ;
        /*0060*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("instruction", "spills"), [("LDL R4, [R1+0x4] ;", 1), ("FADD R4, R4, R5 ;", 0)]
)
def test_only_spills_inside_a_loop_count(instruction, spills):
    assert count_in_sass(LOOP.format(spill=instruction), "HGMMA") == (1, spills)


def test_problems_name_what_is_wrong():
    good = Compiled("k", "sm90", 128, 0, 200_000, matrix_ops=4, loop_spills=0)
    assert good.problems(tensor_cores=True) == []
    bad = Compiled("k", "sm80", 255, 64, 200_000, matrix_ops=0, loop_spills=3)
    assert bad.problems(tensor_cores=True) == [
        "no HMMA instruction", "3 spills in a loop", "200000 bytes of shared memory",
    ]  # fmt: skip
