"""Compile kernels for GPUs that are not here, and read what came out.

A launcher is run on meta tensors while `JITFunction.run` only records its arguments, so what is
compiled is what a real launch would compile: same tiles, same specialisations. Read from the
compiler's output: registers, stack, shared memory, matrix instructions, spills inside loops, and
how many buffers each operand of a pipelined product got. (Where a tile feeds both a product and
other arithmetic, Triton may give it one buffer fewer than its partner and overwrite it while the
product still reads it, with no error.)

Needs a process without ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastvit.kernels import _device
from fastvit.kernels._library import OPS
from fastvit.kernels._spec import Case, OpSpec, all_specs

# opcode of a matrix instruction on bfloat16 and float16, by architecture
MATRIX_OPCODE = {"sm80": "HMMA", "sm90": "HGMMA", "sm100": "UTCHMMA", "gfx942": "v_mfma"}
ARCHITECTURES = tuple(MATRIX_OPCODE)
_TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments by name, its compile options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    def is_constant(self, parameter: Any) -> bool:
        """Whether the compiler sees the value of a parameter: constexpr, None, 1."""
        value = self.arguments[parameter.name]
        return parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1)

    def key(self) -> tuple[object, ...]:
        """What the compiler specialises on: launches with equal keys share machine code."""
        arguments = tuple(
            str(value) if self.is_constant(parameter) else (_type_name(value), _is_aligned(value))
            for parameter in self.kernel.params
            for value in [self.arguments[parameter.name]]
        )
        return (self.kernel.__name__, arguments, tuple(self.options.items()))


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one launch holds.

    `registers` are per thread (vector registers on AMD), `stack` bytes per thread, `shared` bytes
    per block, `matrix_ops` and `loop_spills` instruction counts (on AMD all spills count),
    `narrow_loads` those of global loads of one or two bytes (None on AMD),
    `buffers` the depths of `buffer_depths`, `blocks` how many fit one multiprocessor.
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
            found.append(f"no {MATRIX_OPCODE[self.arch]} instruction")
        if self.loop_spills:
            found.append(f"{self.loop_spills} spills in a loop")
        if self.shared > _device.SHARED_MEMORY[self.arch]:
            found.append(f"{self.shared} bytes of shared memory")
        if unequal := sorted({pair for pair in self.buffers if pair[0] != pair[1]}):
            found.append(f"operands with unequal buffers {unequal}")
        return found


@dataclass(frozen=True)
class Audited:
    """One compiled launch, the case it came from, and what is wrong with it."""

    op: str
    case: str
    dtype: str
    compiled: Compiled
    problems: list[str]


def audit_op(spec: OpSpec, arch: str) -> Iterator[Audited]:
    """Compile every distinct launch of an op's cases for `arch`.

    float16 differs from bfloat16 in its opcodes' suffix only, so it gets the shapes of real models.
    """
    seen = set()
    for case in spec.bench_cases + spec.cases:
        half = [torch.bfloat16] + [torch.float16] * (case in spec.bench_cases)
        for dtype in (*half, torch.float32):
            for launch in record_launches(spec, case, dtype, arch):
                if launch.key() in seen:
                    continue
                seen.add(launch.key())
                compiled = compile_launch(launch, arch)
                tensor_cores = dtype in half and spec.flops(case.sizes) > 0
                problems = compiled.problems(tensor_cores=tensor_cores)
                name = str(dtype).removeprefix("torch.")
                yield Audited(spec.name, case.name, name, compiled, problems)


def specs_with_kernels() -> dict[str, OpSpec]:
    """The ops that have a kernel of their own, by name."""
    folder = Path(_device.__file__).parent
    return {
        name: spec
        for name, spec in all_specs().items()
        if (folder / spec.op.__module__.split(".")[2] / "kernel.py").exists()
    }


@contextlib.contextmanager
def _recording(launches: list[Launch]) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        options = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
        launches.append(Launch(self, arguments, options))

    with mock.patch.object(JITFunction, "run", record):
        yield


def record_launches(spec: OpSpec, case: Case, dtype: torch.dtype, arch: str) -> list[Launch]:
    """The kernel launches that `case` makes on a card of architecture `arch`.

    Raises:
        RuntimeError: kernels of this process run in the interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: an interpreted kernel cannot be compiled")
    launches: list[Launch] = []
    with (
        _device.emulate(arch),
        _recording(launches),
        mock.patch(f"{spec.op.__module__}.uses_triton", return_value=True),
    ):
        _call_launcher(spec, spec.inputs(case, dtype, device="meta"))
    return launches


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile for `arch`, one of `ARCHITECTURES`, and read the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if launch.is_constant(parameter):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type_name(value)
        if _is_aligned(value):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
    else:
        target = GPUTarget("cuda", int(arch[2:]), 32)
    compiled = triton.compile(source, target=target, options=launch.options)
    common = {
        "kernel": launch.kernel.__name__,
        "arch": arch,
        "num_warps": launch.options["num_warps"],
        "shared": compiled.metadata.shared,
        "buffers": buffer_depths(compiled.asm["ttgir"]),
    }
    if arch.startswith("gfx"):
        code = compiled.asm["amdgcn"]
        return Compiled(
            **common,
            registers=int(_find(r"\.vgpr_count:\s*(\d+)", code)),
            stack=int(_find(r"\.private_segment_fixed_size:\s*(\d+)", code)),
            matrix_ops=len(re.findall(MATRIX_OPCODE[arch], code)),
            loop_spills=int(_find(r"\.vgpr_spill_count:\s*(\d+)", code)),
        )
    sass, usage = _disassemble(compiled.asm["cubin"])
    matrix_ops, loop_spills = count_in_sass(sass, MATRIX_OPCODE[arch])
    return Compiled(
        **common,
        registers=int(_find(r"REG:(\d+)", usage)),
        stack=int(_find(r"STACK:(\d+)", usage)),
        matrix_ops=matrix_ops,
        loop_spills=loop_spills,
        narrow_loads=len(re.findall(r"\bLDG\.E\.[US](?:8|16)\b", sass)),
    )


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

    def ring(name: str) -> int | None:
        while name in views:
            name = views[name]
        return depth.get(name)

    products = re.findall(r"ttng\.(?:warp_group_dot|tc_gen5_mma) (%\w+), (%\w+),", ttgir)
    pairs = [(ring(a), ring(b)) for a, b in products]
    return tuple((a, b) for a, b in pairs if a is not None and b is not None)


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


def _call_launcher(spec: OpSpec, inputs: dict[str, Any]) -> None:
    """The public function, down to the launcher and past the checks of the dispatcher."""
    op = OPS[spec.name]
    with mock.patch.object(type(op), "__call__", lambda self, *args: self.launch(*args)):
        spec.op(**inputs)


def _is_aligned(value: Any) -> bool:
    """Pointers are taken to be, as PyTorch's are; numbers are if 16 divides them."""
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def _type_name(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPE_NAMES[value.dtype]}"
    if isinstance(value, int):
        return "i32" if value < 2**31 else "i64"
    return f"tensordesc<{_TYPE_NAMES[value.base.dtype]}{list(value.block_shape)}>"


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
