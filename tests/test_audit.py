"""Offline compile of every kernel, forward and backward: matrix instructions are there,
nothing spills in a loop, shared memory fits. The reader of machine code is tested with planted
listings, and the whole check with a planted kernel, so that a pass means something."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvit.audit import (
    Compiled,
    buffer_depths,
    count_in_sass,
    specs_with_kernels,
    tma_boxes,
)

# A fresh process, because kernels of this one are interpreted.
AUDIT = """
import json, sys
from fastvit import audit
spec = audit.specs_with_kernels()[sys.argv[1]]
real = [case.name for case in spec.bench_cases]
rows = [[row.case, row.dtype, row.problems,
         row.compiled.narrow_loads if row.case in real else None]
        for row in audit.audit_op(spec, sys.argv[2])]
print(json.dumps(rows))
"""


def in_fresh_process(code: str, *args: str, **extra: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | extra
    done = subprocess.run(
        [sys.executable, "-c", code, *args], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


SLOW = [pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm100", "gfx942")]


@pytest.mark.parametrize("arch", ["sm80", "sm90", *SLOW])
@pytest.mark.parametrize("name", specs_with_kernels())
def test_every_kernel_compiles_well(name, arch):
    rows = json.loads(in_fresh_process(AUDIT, name, arch))
    assert bool(rows) != (specs_with_kernels()[name].fp8 and arch in ("sm80", "gfx942"))
    assert not [row for row in rows if row[2]]
    # at the sizes of real models no load is narrower than 4 bytes (patch 14's), most are 16
    assert not [row for row in rows if row[3]]


ROWS = """
import json
from fastvit import audit
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
    count, unreached = json.loads(in_fresh_process(ROWS))
    assert count > 100
    assert not unreached


FORMS = """
import json, sys
from fastvit import audit
from fastvit.kernels import _tuning
spec = audit.specs_with_kernels()["linear"]
tile = _tuning.TileConfig(**json.loads(sys.argv[1]))
found = []
with _tuning.forced("linear", tile):
    for case, dtype, launch in audit.distinct_launches(spec, "sm90"):
        forward = "backward" not in launch.kernel.fn.__module__  # which has tiles of its own
        if forward and case in spec.bench_cases and str(dtype) == "torch.bfloat16":
            compiled = audit.compile_launch(launch, "sm90")
            problems = compiled.problems(tensor_cores=launch.multiplies)
            found.append([compiled.kernel, compiled.num_warps, len(compiled.buffers), problems])
print(json.dumps(found))
"""
FORM = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_stages": 3, "subtiles": 2}


@pytest.mark.slow
@pytest.mark.parametrize("form", [
    FORM | {"num_warps": 4, "backend": "device_tma", "persistent": 1, "warp_specialize": True},
    FORM | {"num_warps": 8, "backend": "device_tma", "persistent": 1},
    FORM | {"num_warps": 8, "backend": "tma", "persistent": 1},
    FORM | {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "subtiles": 1, "split_k": 4},
], ids=str)  # fmt: skip
def test_forms_of_linear_that_a_search_may_choose(form):
    """Those that may be in no table, with every epilogue of a ViT, on sm_90."""
    found = json.loads(in_fresh_process(FORMS, json.dumps(form)))
    assert len(found) > 2
    for kernel, num_warps, products, problems in found:
        assert problems == [], kernel
        # warp specialisation adds two groups of four, and each multiplies
        assert num_warps == (12 if form.get("warp_specialize") else form["num_warps"])
        if form.get("warp_specialize"):
            assert products == 2


PLANT = """
import torch, triton, triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
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
def product(x_desc, w_desc, SIZE: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr, K):
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for k in tl.range(0, K, BLOCK_K, warp_specialize=WARPS):
        x = x_desc.load([0, k])
        w = w_desc.load([0, k])
        acc = tl.dot(x, w.T, acc)
    return acc

@triton.jit
def warp_specialized(x_desc, w_desc, y_ptr, K, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    # descriptors made by the host, and a store through pointers
    acc = product(x_desc, w_desc, SIZE, BLOCK_K, True, K)
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i[:, None] * SIZE + i[None, :], acc)

@triton.jit
def nothing(x_desc, w_desc, y_ptr, K, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    # its product is not used
    product(x_desc, w_desc, SIZE, BLOCK_K, False, K)

f32 = torch.empty(1, device="meta")
b16 = torch.empty(1, device="meta", dtype=torch.bfloat16)

def descriptors(size):
    matrix = torch.empty(size, 768, device="meta", dtype=torch.bfloat16)
    box = TensorDescriptor.from_tensor(matrix, [size, 64])
    return {"x_desc": box, "w_desc": box, "y_ptr": f32, "K": 768, "SIZE": size, "BLOCK_K": 64}

for kernel, arguments, options, arch in (
    (spilling, {"x_ptr": f32, "y_ptr": f32, "n": 64, "SIZE": 64}, (1, 1), "sm90"),
    (shared_tile, {"x_ptr": b16, "w_ptr": b16, "y_ptr": f32, "K": 768, "SIZE": 128,
                   "BLOCK_K": 64}, (8, 3), "sm90"),
    (warp_specialized, descriptors(128), (4, 3), "sm90"),
    (warp_specialized, descriptors(64), (4, 3), "sm90"),
    (warp_specialized, descriptors(128), (8, 3), "sm90"),
    (nothing, descriptors(128), (4, 3), "sm100"),
):
    options = dict(zip(("num_warps", "num_stages"), options))
    launch = audit.Launch(kernel, arguments, options)
    try:
        compiled = audit.compile_launch(launch, arch)
        print(compiled.problems(tensor_cores=True))
    except RuntimeError as error:
        print(error)
"""


def planted_problems(path: Path, **env: str) -> list[str]:
    path.write_text(PLANT)  # Triton reads the source of a kernel from its file
    return in_fresh_process(
        "import runpy, sys; runpy.run_path(sys.argv[1])", str(path), **env
    ).splitlines()


def check_planted(problems: list[str]) -> None:
    spilling, shared_tile, boxes, same_work, no_effect, nothing = problems
    assert "no HGMMA instruction" in spilling
    assert "spills in a loop" in spilling
    assert shared_tile == "['operands with unequal buffers [(2, 3)]']"
    # 3.6 compiles it, 3.7 finds the error itself
    assert boxes in ("['boxes that do not fit their memory [(8192, 4096)]']",
                     "PassManager::run failed")  # fmt: skip
    assert same_work == "['two groups of warps do the same work']"
    assert no_effect == "['warp specialisation had no effect']"
    assert nothing == "['no UTCHMMA instruction', 'nothing is stored']"


def test_planted_bad_kernels_are_caught(tmp_path):
    check_planted(planted_problems(tmp_path / "planted.py"))


def test_boxes_are_compared_with_the_memory_they_go_to():
    """What triton 3.6 makes of `warp_specialized` above with 128 rows: two groups of warps get 64
    of them each, from boxes of 128."""
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


def test_buffers_that_were_given_to_a_group_of_warps():
    listing = """
        %x = ttg.local_alloc : () -> !ttg.memdesc<{x}x64x64xbf16, #shared, #smem, mutable>
        %w = ttg.local_alloc : () -> !ttg.memdesc<3x128x64xbf16, #shared, #smem, mutable>
        ttg.warp_specialize(%K, %x, %w) attributes {{requestedRegisters = array<i32: 232>}}
        default {{
        }}
        partition0(%K_1: i32, %arg9: !ttg.memdesc<...> loc("f":29:0), %arg10: ...) num_warps(4) {{
          %x_1 = ttg.memdesc_index %arg9[%i] : !ttg.memdesc<...>
          %w_1 = ttg.memdesc_index %arg10[%i] : !ttg.memdesc<...>
          %acc_1 = ttng.warp_group_dot %x_1, %w_1, %acc : ...
        }}
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
    problems = planted_problems(tmp_path / "planted.py", **paths)
    check_planted(problems)
    assert "(8192, 4096)" in problems[2]


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
    printed = in_fresh_process(
        "from fastvit.cli.main import app; app(['audit', '--arch', 'sm90', '--op', 'rms_norm'])"
    )
    assert "sm90, rms_norm" in printed
    assert "compiled kernels are sound" in printed
