"""Compile kernels for GPUs that are not here, and read what came out.

An op is run on tensors that nobody writes while `launches.recorded` keeps its launches, and Triton
compiles each as for a launch on that GPU: same tiles, same specialisations. Read from the
compiler's output: registers, stack, shared memory, matrix instructions, stores, spills inside
loops, and what Triton has been seen to get wrong with no error:

- where a tile feeds both a product and other arithmetic, one buffer fewer than its partner has, so
  that it is overwritten while the product still reads it;
- boxes of the tensor memory accelerator that are larger than the memory they are copied to;
- a kernel compiled to nothing.

What was read of a kernel is kept in ``$FASTVIT_CACHE/audit`` (else ``~/.cache/fastvit/audit``), by
source, specialisation, target and triton's version. Needs a process without ``TRITON_INTERPRET=1``
that uses no GPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastvit.check import few_tokens
from fastvit.check.launches import recorded
from fastvit.kernels import _device
from fastvit.kernels._launch import Prepared
from fastvit.kernels._spec import Case, OpSpec
from fastvit.kernels._tuning import cache_folder
from fastvit.kernels.specs import all_specs

_SHAPE = r"(\d+(?:x\d+)*)x"  # of a type in TTGIR
# opcode of a matrix instruction on bfloat16 and float16, by architecture
MATRIX_OPCODE = {"sm80": "HMMA", "sm90": "HGMMA", "sm100": "UTCHMMA", "gfx942": "v_mfma"}
FP8_OPCODE = {"sm90": "QGMMA", "sm100": "UTCQMMA"}  # of one on e4m3
ARCHITECTURES = tuple(MATRIX_OPCODE)
# An op, and those whose kernels it launches too: only forms that these do not have count as its
# own. `mlp` and `norm_linear` have none that `norm_mlp` has not.
_MADE_OF = {"norm_mlp": ("linear", "layer_norm"), "patch_embed": ("linear",)}


@dataclass(frozen=True)
class Launch:
    """One recorded launch for a GPU of architecture `arch`."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, int]
    arch: str

    @property
    def multiplies(self) -> bool:
        """Whether the kernel, or a function that it calls, has a matrix product."""
        return _has_product(self.kernel)

    @property
    def opcode(self) -> str:
        """Of the matrix instructions that its operands ask for."""
        fp8 = any(t.dtype == torch.float8_e4m3fn for t in _tensors(self.arguments[:2]))
        return (FP8_OPCODE if fp8 else MATRIX_OPCODE)[self.arch]

    def key(self) -> str:
        """The compiler's input, hashed: launches with equal keys share machine code."""
        from triton.runtime.jit import compute_cache_key

        use_target(self.arch)
        *_, binder = self.kernel.device_caches[self.arch]
        _, specialization, options = binder(*self.arguments, **self.options)
        return f"{self.kernel.cache_key} {compute_cache_key({}, specialization, options)}"


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among a launch's arguments, those in matrices and descriptors too."""
    for given in arguments:
        argument = getattr(given, "base", given)
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


@dataclass(frozen=True)
class Compiled:
    """Facts read from the machine code of one launch.

    `registers` are per thread (vector registers on AMD), `stack` bytes per thread, `shared` bytes
    per block, `matrix_ops` and `loop_spills` instruction counts (on AMD all spills count),
    `stores` those that write global memory, `narrow_loads` those of global loads of one or two
    bytes (None on AMD), `buffers` the depths of `buffer_depths`, `boxes` the elements of
    `tma_boxes`, `blocks` how many fit one multiprocessor, `fingerprint` what
    `fastvit.check.ledger` knows the machine code of a Gluon kernel by.
    """

    kernel: str
    arch: str
    num_warps: int
    registers: int
    stack: int
    shared: int
    matrix_ops: int
    loop_spills: int
    buffers: tuple[tuple[int, int], ...]
    narrow_loads: int | None = None
    stores: int = 1
    boxes: tuple[tuple[int, int], ...] = ()
    opcode: str = ""  # counted as `matrix_ops`
    fingerprint: str | None = None

    @property
    def blocks(self) -> int:
        """Blocks that one multiprocessor holds at a time."""
        by_shared = _device.SHARED_MEMORY_OF_SM[self.arch] // max(self.shared, 1)
        if self.arch == "gfx942":  # 4 SIMDs of 512 registers a lane, at most 8 waves each
            waves = 4 * min(8, 512 // (-(-max(self.registers, 1) // 8) * 8))
            return min(by_shared, waves // self.num_warps, 16)
        # 65,536 registers, given to warps in units of 8 a thread; 64 warps
        per_block = -(-max(self.registers, 1) // 8) * 8 * 32 * self.num_warps
        return min(by_shared, 65_536 // per_block, 64 // self.num_warps)

    def problems(self, *, tensor_cores: bool) -> list[str]:
        """What forbids this kernel on this card; empty if nothing does.

        Args:
            tensor_cores: its products are of a half dtype, so matrix instructions must be there.
        """
        found = []
        if tensor_cores and self.matrix_ops == 0:
            found.append(f"no {self.opcode or MATRIX_OPCODE[self.arch]} instruction")
        if self.loop_spills:
            found.append(f"{self.loop_spills} spills in a loop")
        if self.shared > _device.SHARED_MEMORY[self.arch]:
            found.append(f"{self.shared} bytes of shared memory")
        if unequal := sorted({pair for pair in self.buffers if pair[0] != pair[1]}):
            found.append(f"operands with unequal buffers {unequal}")
        if wrong := sorted({pair for pair in self.boxes if pair[0] != pair[1]}):
            found.append(f"boxes that do not fit their memory {wrong}")
        if self.stores == 0:
            found.append("nothing is stored")
        return found


@dataclass(frozen=True)
class Audited:
    """One compiled launch, the case it came from, and what is wrong with it."""

    op: str
    case: str
    dtype: str
    compiled: Compiled
    problems: list[str]


def audit_op(spec: OpSpec, arch: str, *, real: bool = False) -> Iterator[Audited]:
    """Compile every distinct launch of an op's cases for `arch`, or those of real models only."""
    for case, dtype, launch in distinct_launches(spec, arch):
        if real and case not in spec.bench_cases:
            continue
        compiled = compile_launch(launch)
        half = dtype in (torch.bfloat16, torch.float16)
        problems = compiled.problems(tensor_cores=half and launch.multiplies)
        name = str(dtype).removeprefix("torch.")
        yield Audited(spec.name, case.name, name, compiled, problems)


Job = tuple[str, str]  # an op and an architecture


def audit(jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Audited] | Exception]]:
    """`audit_op` of each job in processes of their own, one a core; results as they come. Whatever
    the compiler raises is the result of that job."""
    # those that take longest first
    jobs = sorted(jobs, key=lambda job: ("attention" in job[0], "linear" in job[0]), reverse=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=context) as pool:
        futures = {pool.submit(_audit_job, *job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.exception() or future.result()  # type: ignore[misc]


def _audit_job(op: str, arch: str) -> list[Audited]:
    torch.set_num_threads(1)
    return list(audit_op(specs_with_kernels()[op], arch))


def distinct_launches(spec: OpSpec, arch: str) -> Iterator[tuple[Case, torch.dtype, Launch]]:
    """What `audit_op` compiles, each with the case that it came from first.

    float16 differs from bfloat16 in its opcodes' suffix only, so it gets the shapes of real models,
    and no gradients. An architecture without e4m3 compiles nothing of an op that needs it, and none
    but sm90 anything of Hopper's alone.
    """
    seen = {
        launch.key()
        for name in _MADE_OF.get(spec.name, ())
        for _, _, launch in distinct_launches(all_specs()[name], arch)
    }
    if spec.name in few_tokens.SPECS and arch != "sm90":
        return
    with _device.emulate(arch):
        if spec.fp8 and _device.fp8_problem(torch.device("cpu")):
            return
    hoppers = spec.gpu_cases * (arch == "sm90")
    for case in spec.bench_cases + hoppers + spec.cases:
        real = case in spec.bench_cases
        half = [torch.bfloat16] + [torch.float16] * real
        for dtype in (*half, *({torch.float32} & {*spec.dtypes})):
            gradient = dtype != torch.float16
            for launch in record_launches(spec, case, dtype, arch, gradient=gradient):
                if launch.key() not in seen:
                    seen.add(launch.key())
                    yield case, dtype, launch


def specs_with_kernels() -> dict[str, OpSpec]:
    """The ops that have a kernel of their own, or forms of others' kernels, by name."""
    folder = Path(_device.__file__).parent
    own = {
        name: spec
        for name, spec in all_specs().items()
        if name in _MADE_OF or (folder / spec.op.__module__.split(".")[2] / "kernel.py").exists()
    }
    return own | few_tokens.SPECS


def record_launches(
    spec: OpSpec, case: Case, dtype: torch.dtype, arch: str, *, gradient: bool = False
) -> list[Launch]:
    """The kernel launches that `case` makes on a card of architecture `arch`, with `gradient` those
    of training too.

    Raises:
        RuntimeError: kernels of this process run in the interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: an interpreted kernel cannot be compiled")
    inputs = spec.inputs(case, dtype, seed=None)
    with _device.emulate(arch), recorded() as found:
        spec.op(**inputs)
        floats = [
            value.requires_grad_()
            for value in inputs.values()
            if gradient and isinstance(value, Tensor) and value.is_floating_point()
        ]
        if floats and not spec.inference:
            y = spec.op(**inputs)
            torch.autograd.grad(y, floats, torch.empty_like(y), allow_unused=True)
    return [as_launch(prepared, arguments, arch) for prepared, arguments in found]


def as_launch(prepared: Prepared, arguments: tuple[Any, ...], arch: str) -> Launch:
    """One that `recorded` kept."""
    tile = prepared.tile
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return Launch(prepared.kernel, arguments, options, arch)


def use_target(arch: str) -> None:
    """Let Triton compile for `arch`, one of `ARCHITECTURES`, without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[2:]), 32)
    driver: Any = SimpleNamespace(
        get_current_device=lambda: arch,  # by which kernels keep what they compiled
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    triton.runtime.driver.set_active(driver)


def compile_launch(launch: Launch) -> Compiled:
    """Compile for the launch's architecture, and read the result; or what was read before."""
    if (before := compiled_before(launch)) is not None:
        return before
    kept, compiled = _kept(launch), _compile(launch)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(dataclasses.asdict(compiled)))
        part.replace(kept)
    except OSError:  # no such folder: the next audit compiles again
        pass
    return compiled


def compiled_before(launch: Launch) -> Compiled | None:
    """What this machine has kept of the same machine code."""
    try:
        return _from_json(json.loads(_kept(launch).read_text()))
    except (OSError, ValueError, TypeError):  # nothing was kept, or it is no such record
        return None


def _kept(launch: Launch) -> Path:
    import triton

    of = (launch.key(), launch.arch, triton.__version__, Path(__file__).read_text())
    return cache_folder() / "audit" / f"{hashlib.sha256(repr(of).encode()).hexdigest()}.json"


def _from_json(record: dict[str, Any]) -> Compiled:
    pairs: dict[str, Any] = {n: tuple(map(tuple, record[n])) for n in ("buffers", "boxes")}
    return Compiled(**record | pairs)


def _compile(launch: Launch) -> Compiled:
    use_target(launch.arch)
    kernel = launch.kernel.run(*launch.arguments, grid=(1,), warmup=True, **launch.options)
    return read_compiled(launch.kernel.__name__, launch.arch, launch.opcode, kernel)


def read_compiled(name: str, arch: str, opcode: str, kernel: Any) -> Compiled:
    """`Compiled`, read from a kernel that Triton compiled."""
    ttgir = kernel.asm["ttgir"]
    common: dict[str, Any] = {
        "kernel": name,
        "arch": arch,
        "num_warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        # Gluon's rings are the source's own, whose accesses a simulation follows
        "buffers": buffer_depths(ttgir) if "ttir" in kernel.asm else (),
        "boxes": tma_boxes(ttgir),
        "opcode": opcode,
    }
    if arch.startswith("gfx"):
        code = kernel.asm["amdgcn"]
        return Compiled(
            **common,
            registers=int(_find(r"\.vgpr_count:\s*(\d+)", code)),
            stack=int(_find(r"\.private_segment_fixed_size:\s*(\d+)", code)),
            matrix_ops=len(re.findall(MATRIX_OPCODE[arch], code)),
            loop_spills=int(_find(r"\.vgpr_spill_count:\s*(\d+)", code)),
            stores=len(re.findall(r"\b(?:global|buffer|flat)_(?:store|atomic)", code)),
        )
    sass, usage = _disassemble(kernel.asm["cubin"])
    matrix_ops, loop_spills = count_in_sass(sass, opcode)
    gluon = "ttir" not in kernel.asm
    return Compiled(
        **common,
        registers=int(_find(r"REG:(\d+)", usage)),
        stack=int(_find(r"STACK:(\d+)", usage)),
        matrix_ops=matrix_ops,
        loop_spills=loop_spills,
        narrow_loads=len(re.findall(r"\bLDG\.E\.[US](?:8|16)\b", sass)),
        stores=len(re.findall(r"\b(?:STG|UTMASTG|RED|REDG|ATOM|ATOMG)\b", sass)),
        fingerprint=fingerprint(sass) if gluon else None,
    )


def fingerprint(sass: str) -> str:
    """Of the instructions in ``cuobjdump -sass``: sha256, without addresses, encodings, headers."""
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?;)", sass, re.MULTILINE)
    if not lines:
        raise ValueError("no instruction in the listing")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def buffer_depths(ttgir: str) -> tuple[tuple[int, int], ...]:
    """How many buffers the two operands of each asynchronous product have, where a pipelined loop
    stages both through shared memory."""
    depth = {
        name: int(count)
        for name, count in re.findall(
            r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", ttgir
        )
    }
    # a view (one buffer of the ring, transposed perhaps) stands for the ring it came from
    views = dict(re.findall(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", ttgir))
    products = re.findall(r"ttng\.(?:warp_group_dot|tc_gen5_mma) (%\w+), (%\w+),", ttgir)
    pairs = ((depth.get(_origin(a, views)), depth.get(_origin(b, views))) for a, b in products)
    return tuple((a, b) for a, b in pairs if a is not None and b is not None)


def _origin(name: str, views: dict[str, str]) -> str:
    while name in views:
        name = views[name]
    return name


def tma_boxes(ttgir: str) -> tuple[tuple[int, int], ...]:
    """Elements of each box that the tensor memory accelerator loads, and of the memory it goes
    to."""
    copies = re.findall(
        rf"ttng\.async_tma_copy_global_to_local .*?tensordesc<(?:tensor<)?{_SHAPE}"
        rf".*?-> !ttg\.memdesc<{_SHAPE}",
        ttgir,
    )
    return tuple((_product(box), _product(memory)) for box, memory in copies)


def _product(shape: str) -> int:
    return math.prod(int(size) for size in shape.split("x"))


def count_in_sass(sass: str, opcode: str) -> tuple[int, int]:
    """Matrix instructions in all, and spills (LDL, STL) inside loops.

    Args:
        sass: ``cuobjdump -sass`` of one kernel.
        opcode: of the matrix instruction, such as ``HGMMA``.
    """
    lines = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^/;]+);", sass)
    ]
    spills = [address for address, text in lines if re.search(r"\b(LDL|STL)\b", text)]
    in_loops = set()
    for address, text in lines:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and (start := int(branch[1], 16)) < address:  # backward: a loop
            in_loops.update(at for at in spills if start <= at <= address)
    return sum(bool(re.search(rf"\b{opcode}\b", text)) for _, text in lines), len(in_loops)


def _has_product(kernel: Any) -> bool:
    from triton.runtime.jit import JITFunction

    found, pending = set(), [kernel]
    while pending:
        function = pending.pop()
        found.add(function)
        called = (function.__globals__.get(name) for name in function.fn.__code__.co_names)
        pending += [f for f in called if isinstance(f, JITFunction) and f not in found]
    return any(re.search(r"\b(tl\.dot|warpgroup_mma)\(", function.src) for function in found)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """SASS and resource usage of a cubin, by the tools that ship in triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        # cuobjdump calls nvdisasm, which lies beside it
        env = os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
        run = [
            subprocess.run(
                [tool, flag, path], env=env, check=True, capture_output=True, text=True
            ).stdout
            for flag in ("-sass", "-res-usage")
        ]
    return run[0], run[1]


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no {pattern}: {text[:200]!r}")
    return match[1]
