"""Offline compile of every kernel, forward and backward: matrix instructions are there,
nothing spills in a loop, shared memory fits. The reader of machine code is tested with planted
listings, and the whole check with a planted kernel, so that a pass means something."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fresh
import pytest

from fastvit.check import few_tokens
from fastvit.check.audit import (
    Compiled,
    buffer_depths,
    count_in_sass,
    specs_with_kernels,
    tma_boxes,
)

# A fresh process, because kernels of this one are interpreted.
AUDIT = """
import json, sys
from fastvit.check import audit
op, arch, sizes = sys.argv[1:]
spec = audit.specs_with_kernels()[op]
real = [case.name for case in spec.bench_cases]
rows = [[row.case, row.dtype, row.problems,
         row.compiled.narrow_loads if row.case in real else None]
        for row in audit.audit_op(spec, arch, real=sizes == "real")]
print(json.dumps(rows))
"""


SLOW = [
    pytest.param(arch, "all", marks=pytest.mark.slow)
    for arch in ("sm80", "sm90", "sm100", "gfx942")
]


# the sizes of real models; `make test-slow` and `fastvit audit` compile all
@pytest.mark.parametrize(("arch", "sizes"), [("sm90", "real"), *SLOW])
@pytest.mark.parametrize("name", specs_with_kernels())
def test_every_kernel_compiles_well(name, arch, sizes):
    rows = json.loads(fresh.python("-c", AUDIT, name, arch, sizes))
    without_e4m3 = specs_with_kernels()[name].fp8 and arch in ("sm80", "gfx942")
    assert bool(rows) != (without_e4m3 or (name in few_tokens.SPECS and arch != "sm90"))
    assert not [row for row in rows if row[2]]
    # at the sizes of real models no tile is loaded by less than 4 bytes (patch 14's), most by 16; a
    # vector with a value for each thread (a bias) is one narrow load, a tile would be many
    assert not [row for row in rows if (row[3] or 0) > 1]


ROWS = """
import json
from fastvit.check import audit
from fastvit.kernels import _tuning

queries = set()
for spec in audit.specs_with_kernels().values():
    for arch in audit.ARCHITECTURES:
        with _tuning.observed() as asked:
            for launch in audit.distinct_launches(spec, arch):
                pass
        queries.update(asked)
unreached = []
for op in sorted({query.op for query in queries}):
    for path in sorted(_tuning.table_folder(op).glob("*.json")):
        rows = _tuning.load_table(op, path.stem)
        mine = [query for query in queries if (query.op, query.arch) == (op, path.stem)]
        reached = [_tuning.first_match(query, rows) for query in mine]
        unreached += [f"{op} {path.stem} {row}" for row in rows if row not in reached]
print(json.dumps([len(queries), unreached]))
"""


def test_the_audit_reaches_every_row_of_every_table():
    count, unreached = json.loads(fresh.python("-c", ROWS))
    assert count > 100
    assert not unreached


PLANT = """
import torch, triton, triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from fastvit.check import audit

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

@triton.jit
def shared_tile(x_ptr, w_ptr, y_ptr, K, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    # x feeds a product and a sum in one pipelined loop
    i = tl.arange(0, SIZE)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    total = tl.zeros((SIZE,), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + i[:, None] * K + start + k[None, :])
        w = tl.load(w_ptr + i[None, :] * K + start + k[:, None])
        total += tl.sum(x.to(tl.float32), axis=1)
        acc = tl.dot(x, w, acc)
    tl.store(y_ptr + i[:, None] * SIZE + i[None, :], acc + total[:, None])

@triton.jit
def nothing(x_desc, w_desc, y_ptr, K, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    # its product is not used
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(x_desc.load([0, k]), w_desc.load([0, k]).T, acc)

f32 = torch.empty(1)
b16 = torch.empty(1, dtype=torch.bfloat16)
matrix = torch.empty(128, 768, dtype=torch.bfloat16)
box = TensorDescriptor.from_tensor(matrix, [128, 64])

for kernel, arguments, (num_warps, num_stages), arch in (
    (spilling, (f32, f32, 64, 64), (1, 1), "sm90"),
    (shared_tile, (b16, b16, f32, 768, 128, 64), (8, 3), "sm90"),
    (nothing, (box, box, f32, 768, 128, 64), (4, 3), "sm100"),
):
    options = {"num_warps": num_warps, "num_stages": num_stages}
    launch = audit.Launch(kernel, arguments, options, arch)
    print(audit.compile_launch(launch).problems(tensor_cores=True))
"""


def planted_problems(path: Path, **env: str) -> list[str]:
    path.write_text(PLANT)  # Triton reads the source of a kernel from its file
    return fresh.python(
        "-c", "import runpy, sys; runpy.run_path(sys.argv[1])", str(path), **env
    ).splitlines()


def check_planted(problems: list[str]) -> None:
    spilling, shared_tile, nothing = problems
    assert "no HGMMA instruction" in spilling
    assert "spills in a loop" in spilling
    assert shared_tile == "['operands with unequal buffers [(2, 3)]']"
    assert nothing == "['no UTCHMMA instruction', 'nothing is stored']"


def test_planted_bad_kernels_are_caught(tmp_path):
    check_planted(planted_problems(tmp_path / "planted.py"))


def test_boxes_are_compared_with_the_memory_they_go_to():
    """As triton 3.6 gave 64 rows to each of two groups of warps, from boxes of 128."""
    copy = """
        ttng.async_tma_copy_global_to_local %xd[%fr, %k] %49, %48, %true {{async_task_id = 0}} :
 !tt.tensordesc<tensor<{rows}x64xbf16, #shared>>, !ttg.memdesc<1xi64, #shared1, #smem, mutable>
 -> !ttg.memdesc<64x64xbf16, #shared, #smem, mutable> loc(#loc)
    """.replace("\n ", " ")
    assert tma_boxes(copy.format(rows=128)) == ((8192, 4096),)
    assert tma_boxes(copy.format(rows=64)) == ((4096, 4096),)


def test_buffers_are_those_of_a_products_operands():
    """A ring that no product reads (bytes to be converted) may have any depth."""
    listing = """
        %bytes = ttg.local_alloc : () -> !ttg.memdesc<2x128x64xi8, #shared, #smem, mutable>
        %x = ttg.local_alloc : () -> !ttg.memdesc<{x}x128x64xbf16, #shared, #smem, mutable>
        %w = ttg.local_alloc : () -> !ttg.memdesc<3x64x128xbf16, #shared, #smem, mutable>
        %x_1 = ttg.memdesc_index %x[%i] : !ttg.memdesc<...>
        %w_1 = ttg.memdesc_index %w[%i] : !ttg.memdesc<...>
        %w_2 = ttg.memdesc_trans %w_1 {{order = array<i32: 1, 0>}} : !ttg.memdesc<...>
        %acc_1 = ttng.warp_group_dot %x_1, %w_2, %acc : ...
        %acc_2 = ttng.warp_group_dot %from_registers, %w_2, %acc : ...
    """
    assert buffer_depths(listing.format(x=3)) == ((3, 3),)
    assert buffer_depths(listing.format(x=2)) == ((2, 3),)


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
    good = Compiled("k", "sm90", 8, 128, 0, 98_304, 4, 0, ((3, 3),))
    assert good.problems(tensor_cores=True) == []
    assert good.blocks == 2
    bad = Compiled("k", "sm80", 4, 255, 64, 200_000, 0, 3, ((2, 3), (3, 3)), stores=0)
    assert bad.problems(tensor_cores=True) == [
        "no HMMA instruction",
        "3 spills in a loop",
        "200000 bytes of shared memory",
        "operands with unequal buffers [(2, 3)]",
        "nothing is stored",
    ]
    assert bad.blocks == 0


@pytest.mark.slow
def test_triton_3_6_compiles_every_kernel(tmp_path):
    """The older triton that we support, in a folder of its own."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    env = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    subprocess.run([*install, tmp_path, "triton==3.6.0"], check=True, env=env)
    command = [sys.executable, "-m", "fastvit", "audit", "--arch", "sm90", "--json"]
    env = {**env, "PYTHONPATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    env.pop("TRITON_INTERPRET")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    record = json.loads(done.stdout)
    assert record["passed"]
    assert len(record["kernels"]) > 100
    paths = {name: env[name] for name in ("PYTHONPATH", "TRITON_CACHE_DIR")}
    check_planted(planted_problems(tmp_path / "planted.py", **paths))


def test_the_command_refuses_what_it_does_not_know():
    from typer.testing import CliRunner

    from fastvit.cli.main import app

    run = CliRunner().invoke(app, ["audit", "--arch", "sm75"], env={"TRITON_INTERPRET": "0"})
    assert run.exit_code == 2
    assert "sm75" in run.output
    run = CliRunner().invoke(app, ["audit"])
    assert run.exit_code == 2
    assert "TRITON_INTERPRET" in run.output


def test_the_command_prints_a_table_and_its_verdict():
    printed = fresh.python(
        "-c",
        "from fastvit.cli.main import app\n"
        "app(['audit', '--arch', 'sm90', '--op', 'fp8_quantize'])",
    )
    assert "sm90, fp8_quantize" in printed
    assert "compiled kernels are sound" in printed


KEPT = """
import sys
from fastvit.check import audit
from fastvit.kernels import _tuning
spec = audit.specs_with_kernels()["rms_norm"]
compiled = []
compile_one = audit._compile
audit._compile = lambda launch: compiled.append(launch) or compile_one(launch)
launches = [launch for _, _, launch in audit.distinct_launches(spec, sys.argv[1])][:2]
print([audit.compile_launch(launch) for launch in launches])
print(len(compiled))
"""


def test_what_was_compiled_is_kept(tmp_path):
    """By all that decides the machine code; a damaged record is none."""
    kept = {"FASTVIT_CACHE": str(tmp_path)}
    first, compiled = fresh.python("-c", KEPT, "sm90", **kept).splitlines()
    assert compiled == "2"
    assert fresh.python("-c", KEPT, "sm90", **kept).splitlines() == [first, "0"]
    assert fresh.python("-c", KEPT, "sm80", **kept).splitlines()[1] == "2"
    records = sorted((tmp_path / "audit").iterdir())
    assert len(records) == 4
    for record in records:
        record.write_text("{")
    assert fresh.python("-c", KEPT, "sm90", **kept).splitlines() == [first, "2"]


ONE_KEY = """
import torch
from fastvit.check import audit
from fastvit.kernels import _device
from fastvit.check.launches import recorded
from fastvit.kernels.specs import all_specs

keys, several = {}, []
with _device.emulate("sm90"), recorded() as found:
    for spec in all_specs().values():
        for case in spec.cases:
            for dtype in spec.dtypes:
                inputs = spec.inputs(case, dtype, seed=None)
                spec.op(**inputs)
                if spec.inference:
                    continue
                floats = [v for v in inputs.values() if isinstance(v, torch.Tensor)]
                floats = [v.requires_grad_() for v in floats if v.is_floating_point()]
                for wanted in (floats, floats[:1], floats[-1:]):
                    y = spec.op(**inputs)
                    torch.autograd.grad(y, wanted, torch.empty_like(y), allow_unused=True)
for prepared, arguments in found:
    options = {"num_warps": prepared.tile.num_warps, "num_stages": prepared.tile.num_stages}
    key = audit.Launch(prepared.kernel, arguments, options, "sm90").key()
    if keys.setdefault(prepared, key) != key:
        several.append(prepared.kernel.__name__)
print(len(found), len(keys), several)
"""


def test_a_prepared_launch_is_one_compiled_kernel():
    """Else it would launch what was compiled for other operands."""
    launches, prepared, *several = fresh.python("-c", ONE_KEY).split()
    assert int(launches) > int(prepared) > 100
    assert several == ["[]"]
