"""Compile kernels for GPUs that are not here, and read what came out.

A launcher is run on meta tensors while `JITFunction.run` only records its arguments, so what is
compiled is what a real launch would compile: same tiles, same specialisations. Read from the
machine code: registers, stack, shared memory, matrix instructions, and spills (LDL/STL) inside
loops.

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
from fastvit.kernels._spec import Case, OpSpec

# opcode of a matrix instruction on bfloat16 and float16, by architecture
MATRIX_OPCODE = {"sm80": "HMMA", "sm90": "HGMMA"}
_TYPE_NAMES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments by name, its compile options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    def key(self) -> tuple[object, ...]:
        """What the compiler specialises on: launches with equal keys share machine code."""
        arguments = tuple(
            _type_name(value) if isinstance(value, Tensor)
            else (str(value) if parameter.is_constexpr or value is None or value == 1
                  else (_type_name(value), value % 16 == 0))
            for parameter in self.kernel.params
            for value in [self.arguments[parameter.name]]
        )  # fmt: skip
        return (self.kernel.__name__, arguments, tuple(self.options.items()))


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one launch holds.

    `registers` are per thread, `stack` bytes per thread, `shared` bytes per block, `matrix_ops`
    and `loop_spills` instruction counts.
    """

    kernel: str
    arch: str
    registers: int
    stack: int
    shared: int
    matrix_ops: int
    loop_spills: int

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
        return found


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
    """Compile for `arch` (``sm80``, ``sm90``, ...) and read the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type_name(value)
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", int(arch[2:]), 32)
    compiled = triton.compile(source, target=target, options=launch.options)
    sass, usage = _disassemble(compiled.asm["cubin"])
    matrix_ops, loop_spills = count_in_sass(sass, MATRIX_OPCODE[arch])
    return Compiled(
        kernel=launch.kernel.__name__,
        arch=arch,
        registers=int(_find(r"REG:(\d+)", usage)),
        stack=int(_find(r"STACK:(\d+)", usage)),
        shared=compiled.metadata.shared,
        matrix_ops=matrix_ops,
        loop_spills=loop_spills,
    )


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


def _type_name(value: Any) -> str:
    if isinstance(value, Tensor):
        return _TYPE_NAMES[value.dtype]
    return "i32" if value < 2**31 else "i64"


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
