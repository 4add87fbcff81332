"""Compile kernels for GPUs that are not here, and read what came out.

A launcher is run on meta tensors while `JITFunction.run` only records its arguments, so what is
compiled is what a real launch would compile: same tiles, same specialisations. Read from the
compiler's output: registers, stack, shared memory, matrix instructions, stores, spills inside
loops, and what Triton has been seen to get wrong with no error:

- where a tile feeds both a product and other arithmetic, one buffer fewer than its partner has, so
  that it is overwritten while the product still reads it;
- under warp specialisation, boxes of the tensor memory accelerator that are larger than the memory
  they are copied to (3.6; 3.7 refuses to compile), or two groups of warps that do the same work;
- a kernel compiled to nothing.

Needs a process without ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import contextlib
import math
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
from fastvit.kernels._library import Gradient, Op
from fastvit.kernels._spec import Case, OpSpec, all_specs

_SHAPE = r"(\d+(?:x\d+)*)x"  # of a type in TTGIR
# opcode of a matrix instruction on bfloat16 and float16, by architecture
MATRIX_OPCODE = {"sm80": "HMMA", "sm90": "HGMMA", "sm100": "UTCHMMA", "gfx942": "v_mfma"}
FP8_OPCODE = {"sm90": "QGMMA", "sm100": "UTCQMMA"}  # of one on e4m3
ARCHITECTURES = tuple(MATRIX_OPCODE)
# An op, and those whose kernels it launches too: only forms that these do not have count as its
# own. `mlp` and `norm_linear` have none that `norm_mlp` has not.
_MADE_OF = {"norm_mlp": ("linear", "layer_norm"), "patch_embed": ("linear",)}
_TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments by name, its compile options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def multiplies(self) -> bool:
        """Whether the kernel, or a function that it calls, has a matrix product."""
        return _has_product(self.kernel)

    def opcode(self, arch: str) -> str:
        """Of the matrix instructions that its operands ask for."""
        weight = next((v for k, v in self.arguments.items() if k.startswith("weight")), None)
        fp8 = getattr(getattr(weight, "base", weight), "dtype", None) == torch.float8_e4m3fn
        return (FP8_OPCODE if fp8 else MATRIX_OPCODE)[arch]

    def is_constant(self, parameter: Any) -> bool:
        """Whether the compiler sees the value of a parameter: constexpr, None, 1."""
        value = self.arguments[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        return parameter.is_constexpr or value is None or one

    def is_aligned(self, parameter: Any) -> bool:
        """Whether it sees that 16 divides it. Pointers are taken to be, as PyTorch's are."""
        value = self.arguments[parameter.name]
        number = isinstance(value, int) and not parameter.do_not_specialize
        return isinstance(value, Tensor) or (number and value % 16 == 0)

    def key(self) -> tuple[object, ...]:
        """What the compiler specialises on: launches with equal keys share machine code."""
        arguments = tuple(
            str(value)
            if self.is_constant(parameter)
            else (_type_name(value), self.is_aligned(parameter))
            for parameter in self.kernel.params
            for value in [self.arguments[parameter.name]]
        )
        return (self.kernel.__name__, arguments, tuple(self.options.items()))


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one launch holds.

    `num_warps` are those of a block, with warp specialisation more than the launch asks for;
    `registers` are per thread (vector registers on AMD), `stack` bytes per thread, `shared` bytes
    per block, `matrix_ops` and `loop_spills` instruction counts (on AMD all spills count),
    `stores` those that write global memory, `narrow_loads` those of global loads of one or two
    bytes (None on AMD), `buffers` the depths of `buffer_depths`, `boxes` the elements of
    `tma_boxes`, `warp_groups` what is wrong with them by `warp_group_problems`, `blocks` how many
    fit one multiprocessor.
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
    warp_groups: tuple[str, ...] = ()
    opcode: str = ""  # counted as `matrix_ops`

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
        return [*found, *self.warp_groups]


@dataclass(frozen=True)
class Audited:
    """One compiled launch, the case it came from, and what is wrong with it."""

    op: str
    case: str
    dtype: str
    compiled: Compiled
    problems: list[str]


def audit_op(spec: OpSpec, arch: str) -> Iterator[Audited]:
    """Compile every distinct launch of an op's cases for `arch`."""
    for case, dtype, launch in distinct_launches(spec, arch):
        compiled = compile_launch(launch, arch)
        half = dtype in (torch.bfloat16, torch.float16)
        problems = compiled.problems(tensor_cores=half and launch.multiplies)
        name = str(dtype).removeprefix("torch.")
        yield Audited(spec.name, case.name, name, compiled, problems)


def distinct_launches(spec: OpSpec, arch: str) -> Iterator[tuple[Case, torch.dtype, Launch]]:
    """What `audit_op` compiles, each with the case that it came from first.

    float16 differs from bfloat16 in its opcodes' suffix only, so it gets the shapes of real models,
    and no gradients. An architecture without e4m3 compiles nothing of an op that needs it.
    """
    seen = {
        launch.key()
        for name in _MADE_OF.get(spec.name, ())
        for _, _, launch in distinct_launches(all_specs()[name], arch)
    }
    with _device.emulate(arch):
        if spec.fp8 and _device.fp8_problem(torch.device("cpu")):
            return
    for case in spec.bench_cases + spec.cases:
        real = case in spec.bench_cases
        half = [torch.bfloat16] + [torch.float16] * real
        for dtype in (*half, torch.float32):
            gradient = dtype != torch.float16
            for launch in record_launches(spec, case, dtype, arch, gradient=gradient):
                if launch.key() not in seen:
                    seen.add(launch.key())
                    yield case, dtype, launch


def specs_with_kernels() -> dict[str, OpSpec]:
    """The ops that have a kernel of their own, or forms of others' kernels, by name."""
    folder = Path(_device.__file__).parent
    return {
        name: spec
        for name, spec in all_specs().items()
        if name in _MADE_OF or (folder / spec.op.__module__.split(".")[2] / "kernel.py").exists()
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
    launches: list[Launch] = []
    with (
        _device.emulate(arch),
        _recording(launches),
        mock.patch(f"{spec.op.__module__}.uses_triton", return_value=True),
    ):
        _call_launcher(spec, spec.inputs(case, dtype, device="meta"), gradient=gradient)
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
        if launch.is_aligned(parameter):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
    else:
        target = GPUTarget("cuda", int(arch[2:]), 32)
    compiled = triton.compile(source, target=target, options=launch.options)
    ttgir = compiled.asm["ttgir"]
    common: dict[str, Any] = {
        "kernel": launch.kernel.__name__,
        "arch": arch,
        "num_warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "buffers": buffer_depths(ttgir),
        "boxes": tma_boxes(ttgir),
        "warp_groups": warp_group_problems(compiled.asm["ttir"], ttgir),
        "opcode": launch.opcode(arch),
    }
    if arch.startswith("gfx"):
        code = compiled.asm["amdgcn"]
        return Compiled(
            **common,
            registers=int(_find(r"\.vgpr_count:\s*(\d+)", code)),
            stack=int(_find(r"\.private_segment_fixed_size:\s*(\d+)", code)),
            matrix_ops=len(re.findall(MATRIX_OPCODE[arch], code)),
            loop_spills=int(_find(r"\.vgpr_spill_count:\s*(\d+)", code)),
            stores=len(re.findall(r"\b(?:global|buffer|flat)_(?:store|atomic)", code)),
        )
    sass, usage = _disassemble(compiled.asm["cubin"])
    matrix_ops, loop_spills = count_in_sass(sass, launch.opcode(arch))
    return Compiled(
        **common,
        registers=int(_find(r"REG:(\d+)", usage)),
        stack=int(_find(r"STACK:(\d+)", usage)),
        matrix_ops=matrix_ops,
        loop_spills=loop_spills,
        narrow_loads=len(re.findall(r"\bLDG\.E\.[US](?:8|16)\b", sass)),
        stores=len(re.findall(r"\b(?:STG|UTMASTG|RED|REDG|ATOM|ATOMG)\b", sass)),
    )


def buffer_depths(ttgir: str) -> tuple[tuple[int, int], ...]:
    """How many buffers the two operands of each asynchronous product have, where a pipelined loop
    stages both through shared memory."""
    found = []
    first, *partitions = re.split(r"\n\s*partition\d+\(", ttgir)
    depth = {
        name: int(count)
        for name, count in re.findall(
            r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", first
        )
    }
    captured = re.search(r"ttg\.warp_specialize\(([^)]*)\)", first)
    for section in (first, *partitions):
        # a view (one buffer of the ring, transposed perhaps) stands for the ring it came from, and
        # an argument of a group of warps for what the group was given
        views = dict(re.findall(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", section))
        if section is not first and captured:
            arguments = re.findall(r"(%\w+): ", section.split("num_warps(")[0])
            views |= dict(zip(arguments, captured[1].split(", "), strict=True))
        products = re.findall(r"ttng\.(?:warp_group_dot|tc_gen5_mma) (%\w+), (%\w+),", section)
        pairs = [tuple(depth.get(_origin(name, views)) for name in pair) for pair in products]
        found += [pair for pair in pairs if None not in pair]
    return tuple(found)


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


def warp_group_problems(ttir: str, ttgir: str) -> tuple[str, ...]:
    """What is wrong with the groups of warps of a kernel whose source asks for specialisation."""
    if "tt.warp_specialize" not in ttir:
        return ()
    if "ttg.warp_specialize(" not in ttgir:
        return ("warp specialisation had no effect",)
    plain = re.sub(r"\bloc\(.*|async_task_id = array<i32: \d+>,? ?|[#%][\w#:]+", "", ttgir)
    bodies = [
        body.split("ttg.warp_return")[0].partition("\n")[2]  # without the header
        for body in re.split(r"\n\s*partition\d+\(", plain)[1:]
    ]
    if any("warp_group_dot" in body and bodies.count(body) > 1 for body in bodies):
        return ("two groups of warps do the same work",)
    return ()


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


def _call_launcher(spec: OpSpec, inputs: dict[str, Any], *, gradient: bool) -> None:
    """The public function, down to the launchers and past the checks of the dispatcher."""

    def call(op: Op, *args: Any) -> Any:
        y = op.launch(*args)
        if gradient and op.gradient is not None:
            _launch_gradient(op, op.gradient, y, args)
        return y

    with mock.patch.object(Op, "__call__", call):
        spec.op(**inputs)


def _launch_gradient(op: Op, gradient: Gradient, y: Tensor, args: tuple[Any, ...]) -> None:
    """The training form and the backward of `op`, with every gradient wanted."""
    if gradient.forward is not None:
        y, *kept = gradient.forward(*args)
    else:
        kept = []
    names = [argument.name for argument in op.overload._schema.arguments]
    saved = tuple(
        None if name in gradient.unsaved else arg for name, arg in zip(names, args, strict=True)
    )
    needs = [isinstance(arg, Tensor) and arg.is_floating_point() for arg in saved]
    output = y if gradient.saves_output else None
    gradient.backward(torch.empty_like(y), output, kept, saved, needs)


def _has_product(kernel: Any) -> bool:
    from triton.runtime.jit import JITFunction

    found, pending = set(), [kernel]
    while pending:
        function = pending.pop()
        found.add(function)
        called = (function.__globals__.get(name) for name in function.fn.__code__.co_names)
        pending += [f for f in called if isinstance(f, JITFunction) and f not in found]
    return any("tl.dot(" in function.src for function in found)


def _type_name(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPE_NAMES[value.dtype]}"
    if isinstance(value, int):
        return "i32" if value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
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
