"""Runs the source of a Gluon kernel, as it is, on a model of one Hopper multiprocessor.

Each role is a thread; a scheduler lets one thread at a time go on to its next operation, or lets
one asynchronous copy land, chosen at random. The model knows mbarriers (arrivals, bytes, parity),
copies in flight, products in flight (they read their operands when they complete), stores in flight
(they read their buffer as late as they may) and the proxy fence. It raises `Wrong` on a deadlock,
on an overrun barrier, and on any access to a buffer that another access in flight is not done with.

Of threads within a role it knows that one may lag behind: a copy into a buffer that the role has
read since its last barrier is wrong. For the rest Triton puts their barriers in. It does not model
swizzles, registers.

Values are float64 and no store rounds, so that small integers stay exact; within `rounded` they are
float32, rounded where the kernel converts them. Bytes that the kernel packs into wider integers are
a last dimension.
"""

from __future__ import annotations

import ast
import contextlib
import random
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

BEYOND = 512  # elements past a matrix's end at which a box may begin
LATE = 0.15  # share of the copies that land only when nothing else can go on
EAGERNESS = (0.02, 0.3, 0.7)  # chance that a copy lands before a thread goes on


class Wrong(Exception):
    """What a GPU might have got wrong."""


# --------------------------------------------------------------------------- values

_rounds = False


@contextlib.contextmanager
def rounded() -> Iterator[None]:
    """Within, values are float32 and conversions to half dtypes round."""
    global _rounds
    _rounds = True
    try:
        yield
    finally:
        _rounds = False


class Value(np.ndarray):
    """A tensor in registers."""

    def to(self, dtype: Any) -> Value:
        """Rounded to a half dtype, within `rounded`."""
        dtype = getattr(dtype, "torch", dtype)
        if _rounds and dtype in (torch.bfloat16, torch.float16):
            return value(torch.from_numpy(np.array(self)).to(dtype).float().numpy())
        return self

    def permute(self, order: Sequence[int]) -> Any:
        """As of a Gluon tensor."""
        return self.transpose(order)

    def split(self) -> tuple[Any, Any]:
        """As of a Gluon tensor."""
        return self[..., 0], self[..., 1]

    @property
    def type(self) -> SimpleNamespace:
        """As of a Gluon tensor."""
        return SimpleNamespace(layout=None)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """A constant widens no tensor, which to NumPy a subclass of float or int would."""
        plain = [
            np.asarray(x) if isinstance(x, Value) else x + 0 if isinstance(x, _Float) else x
            for x in inputs
        ]
        if "out" in options:
            options["out"] = tuple(map(np.asarray, options["out"]))
        result = getattr(ufunc, method)(*plain, **options)
        return result.view(Value) if isinstance(result, np.ndarray) else result


def value(array: Any) -> Value:
    """`array` as a tensor in registers."""
    return np.asarray(array, np.float32 if _rounds else np.float64).view(Value)


class _Int(int):
    value = property(int)


class Scalar(int):
    """An integer in registers."""

    def to(self, dtype: Any) -> Scalar:
        """As of a Gluon tensor."""
        return self


def _scalar(name: str) -> Any:
    operation = getattr(int, name)

    def apply(self: Scalar, other: Any) -> Any:
        result = operation(self, other)
        return Scalar(result) if isinstance(result, int) else result

    return apply


for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "and", "xor", "rshift", "eq",
):  # fmt: skip
    setattr(Scalar, f"__{_name}__", _scalar(f"__{_name}__"))


class _Float(float):
    value = property(float)


def _constexpr(constant: Any) -> Any:
    kinds: dict[type, Any] = {int: _Int, float: _Float}
    return kinds.get(type(constant), lambda same: same)(constant)


class Dtype:
    """A dtype as Gluon has it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.torch, self.primitive_bitwidth = dtype, 8 * dtype.itemsize


# --------------------------------------------------------------------------- memory


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.count = self.pending = self.phase = self.bytes = 0

    def init(self, count: int) -> None:
        """Arrivals that complete a phase."""
        if self.count:
            raise Wrong("a barrier initialised twice")
        self.count = self.pending = count

    def arrive(self, count: int = 1) -> None:
        """`count` of them."""
        if self.pending < count:
            raise Wrong("more arrivals than a phase takes")
        self.pending -= count
        self._complete()

    def expect(self, size: int) -> None:
        """One arrival, and `size` bytes to come."""
        self.bytes += size
        self.arrive()

    def landed(self, size: int) -> None:
        """`size` bytes came."""
        self.bytes -= size
        self._complete()

    def _complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count

    def passed(self, parity: int) -> bool:
        """Whether the current phase is another than that of `parity`."""
        return self.phase != parity


class Buffer:
    """A tile in shared memory."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.data = np.full(shape, np.nan)
        self.shape, self.dtype = shape, dtype
        self.reading = 0  # by products or stores in flight
        self.landing = 0  # copies in flight into it
        self.dirty: Any = None  # the thread whose plain stores no fence has followed

    def permute(self, order: Sequence[int]) -> View:
        """As of shared memory."""
        return View(self, lambda data: data.transpose(order))

    def reshape(self, shape: Sequence[int]) -> View:
        """As of shared memory."""
        return View(self, lambda data: data.reshape(shape))

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Any:
        """As integers of twice the width."""
        pairs = (*shape, 2)
        assert np.prod(pairs) == self.data.size
        return SimpleNamespace(store=lambda given: self.store(given.reshape(self.shape)))

    def about_to_read(self) -> None:
        """Raises where a copy may still change it."""
        if self.landing:
            raise Wrong("read while a copy lands")

    def about_to_write(self) -> None:
        """Raises where it is in use."""
        if self.landing or self.reading:
            raise Wrong("written while in use")

    def about_to_leave(self) -> None:
        """To a copy or a product, which do not see plain stores before a fence."""
        self.about_to_read()
        if self.dirty is not None:
            raise Wrong("read without a fence")

    def index(self, row: Any) -> View:
        """A row."""
        return View(self, lambda data: data[int(row)])

    def load(self, layout: Any) -> Value:
        """To registers."""
        return View(self, lambda data: data).load(layout)

    def store(self, given: Value) -> None:
        """From registers."""
        View(self, lambda data: data).store(given)


class View:
    """A buffer seen with another shape or order of its dimensions."""

    def __init__(self, buffer: Buffer, see: Callable[[np.ndarray], np.ndarray]) -> None:
        self.buffer, self.see = buffer, see
        self.shape = see(buffer.data).shape

    def permute(self, order: Sequence[int]) -> View:
        """As of shared memory."""
        return View(self.buffer, lambda data: self.see(data).transpose(order))

    def load(self, layout: Any) -> Value:
        """To registers."""
        self.buffer.about_to_read()
        _machine.mine().read.add(self.buffer)
        return value(self.see(self.buffer.data).copy())

    def store(self, given: Value) -> None:
        """From registers."""
        self.buffer.about_to_write()
        array = np.array(given)
        assert array.shape == self.shape
        self.see(self.buffer.data)[...] = array
        self.buffer.dirty = threading.current_thread()

    def slice(self, start: int, length: int) -> View:
        """As of shared memory."""
        return View(self.buffer, lambda data: self.see(data)[start : start + length])


class Product:
    """An accumulator that products in flight still change."""

    def __init__(self, before: Any) -> None:
        self.value, self.running = before, 0
        self.shape, self.type = before.shape, before.type

    def _read(self, *_: Any) -> Any:
        raise Wrong("a product in flight is read")

    __mul__ = __add__ = __getitem__ = __array__ = _read  # type: ignore[assignment]


class Array:
    """Buffers or barriers of one allocation."""

    def __init__(self, items: list[Any], shape: Sequence[int], dtype: Any) -> None:
        self.items, self.shape, self.dtype = items, shape, dtype

    def index(self, i: int) -> Any:
        """One of them."""
        i = int(i)
        if not 0 <= i < len(self.items):
            raise Wrong(f"index {i} of {len(self.items)}")
        return self.items[i]


class Descriptor:
    """A tensor behind a TMA descriptor.

    Args:
        array: written in place by stores.
        block: shape of a box.
        writes: counts stores to each element.
    """

    def __init__(
        self, array: np.ndarray, block: tuple[int, ...], dtype: torch.dtype, writes: Any = None
    ) -> None:
        self.array, self.block, self.layout = array, block, None
        self.block_type = SimpleNamespace(shape=block, element_ty=Dtype(dtype))
        self.writes = np.zeros(array.shape, int) if writes is None else writes

    def box(self, coordinates: Sequence[int]) -> tuple[slice, ...]:
        """Clipped."""
        triples = list(zip(map(int, coordinates), self.block, self.array.shape, strict=True))
        if not all(0 <= at < size + BEYOND for at, _, size in triples):
            raise Wrong(f"coordinates {coordinates}")
        return tuple(slice(at, max(at, min(at + step, size))) for at, step, size in triples)


class Pointer:
    """To a vector in global memory, of values of the `kind` that Gluon would name."""

    def __init__(
        self, array: np.ndarray, at: Any = 0, writes: Any = None, kind: str | None = None
    ) -> None:
        self.array, self.at = array, at
        self.writes = np.zeros(array.shape, int) if writes is None else writes
        self.dtype = SimpleNamespace(
            element_ty=kind or ("int1" if array.dtype == bool else "float")
        )

    def __add__(self, offset: Any) -> Pointer:
        at = self.at + np.asarray(offset)
        return Pointer(self.array, at, self.writes, self.dtype.element_ty)

    def to(self, dtype: str) -> Pointer:
        """To integers of two elements each, which a store takes as a last dimension."""
        assert (self.dtype.element_ty, dtype) == ("float8e4nv", "int16")
        assert not np.any(self.at % 2)
        return Pointer(self.array, self.at // 2, self.writes, dtype)


# --------------------------------------------------------------------------- one block


class Machine:
    """One block of threads. `eager` is one of `EAGERNESS`."""

    def __init__(self, seed: int, program: int, programs: int, eager: float) -> None:
        self.random = random.Random(seed)
        self.program, self.programs, self.eager = program, programs, eager
        self.copies: list[tuple[bool, Callable[[], None]]] = []  # in flight, and whether they dally
        self.arrays: list[Array] = []
        self.threads: list[threading.Thread] = []
        self.state: dict[Any, SimpleNamespace] = {}
        self.back = threading.Semaphore(0)
        self.error: BaseException | None = None

    def spawn(self, function: Callable[..., Any], args: Sequence[Any], warps: int) -> None:
        """A role."""

        def body() -> None:
            me = self.mine()
            me.go.acquire()
            try:
                if self.error is None:
                    function(*args)
            except BaseException as error:
                self.error = self.error or error
            me.done = True
            self.back.release()

        thread = threading.Thread(target=body, daemon=True)
        self.state[thread] = SimpleNamespace(
            go=threading.Semaphore(0), done=False, until=None, products=[], stores=[], warps=warps,
            read=set(),  # buffers, since the last barrier
        )  # fmt: skip
        self.threads.append(thread)
        thread.start()

    def mine(self) -> SimpleNamespace:
        """State of the role that asks."""
        return self.state[threading.current_thread()]

    def pause(self, until: Callable[[], bool] | None = None) -> None:
        """Let others go first."""
        if self.error:
            raise Wrong("stopped")
        me = self.mine()
        me.until = until
        self.back.release()
        me.go.acquire()
        if self.error:
            raise Wrong("stopped")

    def run(self) -> None:
        """All roles to their end."""
        while self.error is None:
            alive = [x for x in self.threads if not self.state[x].done]
            if not alive:
                break
            ready = [x for x in alive if self.state[x].until is None or self.state[x].until()]
            prompt = [copy for late, copy in self.copies if not late]
            if (prompt and self.random.random() < self.eager) or (self.copies and not ready):
                copy = self.random.choice(prompt or [copy for _, copy in self.copies])
                self.copies = [pair for pair in self.copies if pair[1] is not copy]
                copy()
                continue
            if not ready:
                self.error = Wrong(f"deadlock of {len(alive)} roles")
                break
            thread = self.random.choice(ready)
            self.state[thread].until = None
            self.state[thread].go.release()
            self.back.acquire()
        if self.error is not None:
            for x in self.threads:
                self.state[x].go.release()
            raise self.error
        if self.copies or any(s.stores or s.products for s in self.state.values()):
            raise Wrong("copies, stores or products in flight at the end")


_machine: Any = None
brought: set[int] = set()  # elements from which the last launch asked the L2 cache for 512 bytes


def run(
    kernel: Callable[..., Any], args: Sequence[Any], *, warps: int, programs: int, seed: int
) -> None:
    """Launch `programs` blocks, one after another in any order."""
    global _machine
    brought.clear()
    order = list(range(programs))
    random.Random(seed).shuffle(order)
    for program in order:
        eager = EAGERNESS[seed % len(EAGERNESS)]
        _machine = Machine(seed * 1000 + program, program, programs, eager)
        _machine.spawn(kernel, args, warps)
        _machine.run()


def launch(
    space: dict[str, Any], prepared: Any, tensors: Sequence[Any], written: Sequence[Any], *,
    programs: int, seed: int,
) -> list[np.ndarray]:  # fmt: skip
    """What a launch of the product's own leaves in those tensors that it writes, every element
    exactly once.

    Args:
        space: as `load` gives it.
        prepared: a `_launch.Prepared`.
        tensors: as `_launch.run` is given them, `written` among them.
        programs: at most so many.
    """
    memory: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def remember(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if id(x) not in memory:
            dtype = torch.bool if x.dtype == torch.bool else torch.double
            wide, count = (
                torch.empty_strided(x.shape, x.stride(), dtype=kind) for kind in (dtype, torch.int)
            )
            memory[id(x)] = wide.copy_(x), count.zero_()
        return memory[id(x)]

    args = list(prepared.arguments(*tensors))
    for i, given in enumerate(args):
        box = prepared.boxes[i] if i < len(prepared.boxes) else None
        if i < len(prepared.boxes) and box is None:
            args[i] = None
        elif box is not None:
            made = box.make(given)
            seen, count = (x.as_strided(made.shape, made.strides) for x in remember(given))
            block = tuple(made.block_shape)
            args[i] = Descriptor(seen.numpy(), block, given.dtype, count.numpy())
        elif isinstance(given, torch.Tensor):
            flat, count = (x.view(-1).numpy() for x in remember(given))
            kind = "float8e4nv" if given.dtype == torch.float8_e4m3fn else None
            args[i] = Pointer(flat, writes=count, kind=kind)
        elif type(given) is int:
            args[i] = Scalar(given)
    kernel, warps = space[prepared.kernel.fn.__name__], prepared.tile.num_warps
    run(kernel, args, warps=warps, programs=min(programs, prepared.programs), seed=seed)
    if not all((memory[id(x)][1] == 1).all() for x in written):
        raise Wrong("an element not written exactly once")
    return [memory[id(x)][0].numpy() for x in written]


# --------------------------------------------------------------------------- Gluon's names


def _barrier(bar: Any) -> Barrier:
    return bar.items[0] if isinstance(bar, Array) else bar


class _Barriers:
    MBarrierLayout = staticmethod(lambda: "barrier")
    init = staticmethod(lambda bar, count: _barrier(bar).init(count))

    @staticmethod
    def wait(bar: Any, phase: Any) -> None:
        parity = int(phase)
        assert parity in (0, 1)
        _machine.pause(lambda: _barrier(bar).passed(parity))

    @staticmethod
    def arrive(bar: Any, count: int = 1, pred: Any = True) -> None:
        _machine.pause()
        if pred:
            _barrier(bar).arrive(count)

    @staticmethod
    def expect(bar: Any, size: int, pred: Any = True) -> None:
        _machine.pause()
        if pred:
            _barrier(bar).expect(size)


class _Tma:
    @staticmethod
    def async_copy_global_to_shared(
        desc: Descriptor, coordinates: Any, bar: Any, buffer: Buffer, pred: Any = True
    ) -> None:
        _machine.pause()
        if not pred:
            return
        buffer.about_to_write()
        if buffer in _machine.mine().read:
            raise Wrong("filled before all threads have read")
        buffer.landing += 1
        box = desc.box(coordinates)
        assert tuple(buffer.shape) == tuple(desc.block)

        def land() -> None:
            part = desc.array[box]
            buffer.data = np.zeros(desc.block)
            buffer.data[tuple(map(slice, part.shape))] = part
            buffer.landing -= 1
            _barrier(bar).landed(buffer.data.size * desc.block_type.element_ty.torch.itemsize)

        _machine.copies.append((_machine.random.random() < LATE, land))

    @staticmethod
    def async_copy_shared_to_global(desc: Descriptor, coordinates: Any, buffer: Buffer) -> None:
        _machine.pause()
        buffer.about_to_leave()
        buffer.reading += 1
        box = desc.box(coordinates)

        def read() -> None:
            part = desc.array[box]
            part[...] = buffer.data[tuple(map(slice, part.shape))]
            desc.writes[box] += 1
            buffer.reading -= 1

        _machine.mine().stores.append(read)

    @staticmethod
    def store_wait(pendings: int) -> None:
        _machine.pause()
        stores = _machine.mine().stores
        while len(stores) > pendings:
            stores.pop(0)()


def _fence() -> None:
    for array in _machine.arrays:
        for item in array.items:
            if isinstance(item, Buffer) and item.dirty is threading.current_thread():
                item.dirty = None


def _meet() -> None:
    """A barrier of all threads of the role that asks."""
    _machine.pause()
    _machine.mine().read.clear()


def _mma(a: Any, b: Any, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    _machine.pause()
    in_memory = [getattr(x, "buffer", x) for x in (a, b) if not isinstance(x, Value)]
    for x in in_memory:
        x.about_to_leave()
        x.reading += 1
    if not isinstance(acc, Product):
        acc = Product(acc)
    acc.running += 1

    def matrix(x: Any) -> Value:
        if isinstance(x, View):
            return value(x.see(x.buffer.data))
        return x if isinstance(x, Value) else value(x.data)

    def complete() -> None:
        product = matrix(a) @ matrix(b)
        acc.value = acc.value + product if use_acc else product
        acc.running -= 1
        for x in in_memory:
            x.reading -= 1
        _machine.mine().read.update(in_memory)

    _machine.mine().products.append(complete)
    return acc


def _mma_wait(pending: int, deps: tuple[Any, ...]) -> Any:
    _machine.pause()
    products = _machine.mine().products
    while len(products) > pending:
        products.pop(0)()
    done = [value(x.value) if isinstance(x, Product) and not x.running else x for x in deps]
    return done[0] if len(done) == 1 else tuple(done)


def _allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
    if layout == "barrier":
        items: list[Any] = [Barrier() for _ in range(shape[0])]
    elif len(shape) == 2:  # one tile
        items = [Buffer(tuple(shape), dtype)]
    else:
        items = [Buffer(tuple(shape[1:]), dtype) for _ in range(shape[0])]
    _machine.arrays.append(Array(items, shape, dtype))
    return items[0] if len(shape) == 2 and layout != "barrier" else _machine.arrays[-1]


def _load(
    pointer: Pointer, mask: Any = True, other: float = np.nan, cache_modifier: str = ""
) -> Any:
    if pointer.array.dtype.kind == "i":
        return Scalar(pointer.array[pointer.at])
    inside = (pointer.at >= 0) & (pointer.at < len(pointer.array))
    if (np.asarray(mask) & ~inside).any():
        raise Wrong("load past a vector's end")
    return value(np.where(mask, pointer.array[np.where(inside, pointer.at, 0)], other))


def _store(pointer: Pointer, given: Any, mask: Any = True) -> None:
    _machine.pause()
    at = pointer.at
    if pointer.dtype.element_ty == "int16":
        at, mask = 2 * at[..., None] + np.arange(2), np.asarray(mask)[..., None]
    at, values, mask = np.broadcast_arrays(at, given, mask)
    if not np.isin(at[mask], np.arange(len(pointer.array))).all():
        raise Wrong("store past an end")
    pointer.array[at[mask]] = values[mask]
    np.add.at(pointer.writes, at[mask], 1)


def _atomic_add(pointer: Pointer, given: int, sem: str, scope: str) -> int:
    _machine.pause()
    assert (sem, scope) == ("acq_rel", "gpu")
    before = int(pointer.array[pointer.at])
    pointer.array[pointer.at] += given
    return before


def _specialize(roles: Any, warps: Sequence[int], registers: Sequence[int]) -> None:
    assert len(roles) == len(warps) + 1 == len(registers) + 1
    for (function, args), count in zip(roles, [_machine.mine().warps, *warps], strict=True):
        _machine.spawn(function, args, count)


def _assembly(code: str, constraints: str, args: Any, **_: Any) -> Any:
    if "nanosleep" in code:  # a fence for the compiler
        assert int(args[0]) >= 0
        return args[0]
    if "prefetch.L2" in code:
        pointer, unit, units = args
        assert code.count("$3") == 1
        brought.update(pointer.at[np.broadcast_to(unit < units, pointer.at.shape)].tolist())
        return value(np.zeros(unit.shape))
    for name, function in (("ex2", np.exp2), ("lg2", np.log2)):
        if code.startswith(f"{name}.approx"):
            return value(function(args[0]))
    if "e4m3x2" in code:
        return _e4m3_pairs(code, args)
    assert code == "fma.rn.sat.f32 $0, $1, $2, 0f3F000000;"
    cdf = np.clip(args[0] * args[1] + value(0.5), 0, 1)
    return np.where(np.isnan(cdf), value(0), cdf).view(Value)  # .sat makes 0 of NaN


def _e4m3_pairs(code: str, args: Sequence[Any]) -> Value:
    """PTX that ends in two values of e4m3, of which the first is the low byte."""
    if not _rounds:
        assert "f16x2" not in code
        return value(np.stack([x * (args[2] if len(args) > 2 else 1) for x in args[:2]], -1))
    shape = args[0].shape
    registers = {f"${i + 1}": np.broadcast_to(np.float32(x), shape) for i, x in enumerate(args)}

    def operand(name: str) -> np.ndarray:
        if name.startswith("0x"):  # one float16 twice
            bits = struct.pack("<H", int(name, 16) & 0xFFFF)
            return np.full((2, *shape), struct.unpack("<e", bits)[0])
        return registers[name].astype(np.float64)

    operations: dict[str, Callable[..., np.ndarray]] = {
        "mov": lambda x: x,
        "min": np.fmin,
        "mul": np.multiply,
        "fma": lambda x, y, z: x * y + z,
        "cvt": lambda high, *low: np.stack([*low, high]) if low else high,
    }
    for line in re.split(r";\s*", code.strip("{} ")):
        instruction, *names = re.split(r"[,\s]+", line)
        name, *modifiers = instruction.split(".")
        if name not in operations:
            assert instruction in ("", ".reg")
            continue
        result = operations[name](*map(operand, names[1:]))
        narrow = "e4m3x2" in modifiers
        if "sat" in modifiers:
            result = np.where(np.isnan(result), 0, np.clip(result, 0, 1))
        if "satfinite" in modifiers:
            result = result.clip(*((-448, 448) if narrow else (-65504, 65504)))
        kind = torch.float32 if modifiers == ["f32"] else torch.float16
        kind = torch.float8_e4m3fn if narrow else kind
        registers[names[0]] = torch.from_numpy(result).to(kind).float().numpy()
    return value(np.moveaxis(registers["$0"], 0, -1))


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, np.ndarray):
        return value(np.where(condition, a, b))
    return a if condition else b


def _check(condition: Any) -> None:
    assert condition


def _rsqrt(x: Value) -> Value:
    with np.errstate(all="ignore"):  # of what was never written, and is not used
        return value(1 / np.sqrt(x))


def _erf(x: Value) -> Value:
    return value(torch.erf(torch.from_numpy(np.array(x))).numpy())


class _SharedLayout:
    def __init__(self, *_: Any) -> None: ...

    get_default_for = staticmethod(lambda *a: None)


_maths: dict[str, Any] = {
    "constexpr": _constexpr,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "exp": lambda x: value(np.exp(x)),
    "erf": _erf,
    "sigmoid": lambda x: value(1 / (1 + np.exp(-x))),
}
GL = SimpleNamespace(
    **_maths,
    int64="int64",
    float32=torch.float32,
    static_range=range,
    to_tensor=Scalar,
    int1="int1",
    int16="int16",
    int32="int32",
    float8e4nv="float8e4nv",
    pointer_type=lambda dtype: dtype,
    cdiv=lambda a, b: -(-a // b),
    where=_where,
    max=lambda x, axis: x.max(axis),
    sum=lambda x, axis: x.sum(axis),
    full=lambda shape, fill, dtype, layout: value(np.full(shape, fill)),
    store=_store,
    barrier=_meet,
    rsqrt=_rsqrt,
    atomic_add=_atomic_add,
    BlockedLayout=lambda *a: None,
    DistributedLinearLayout=lambda *a: None,
    SwizzledSharedLayout=lambda *a: None,
    DotOperandLayout=lambda *a: None,
    SliceLayout=lambda *a: None,
    NVMMADistributedLayout=lambda *a: None,
    NVMMASharedLayout=_SharedLayout,
    arange=lambda a, b, layout: np.arange(a, b),
    convert_layout=lambda given, layout, assert_trivial=False: given,
    zeros=lambda shape, dtype, layout: value(np.zeros(shape)),
    program_id=lambda axis: Scalar(_machine.program),
    num_programs=lambda axis: Scalar(_machine.programs),
    num_warps=lambda: _machine.mine().warps,
    static_assert=_check,
    load=_load,
    allocate_shared_memory=_allocate,
    warp_specialize=_specialize,
    inline_asm_elementwise=_assembly,
)
TL = SimpleNamespace(**_maths, where=lambda c, a, b: value(np.where(c, a, b)))


def _jit(function: Any = None, **_: Any) -> Any:
    return function if function is not None else _jit


def load(*paths: Path, edits: Sequence[tuple[str, str]] = (), **extra: Any) -> dict[str, Any]:
    """What the files define, each seeing what those before it do, with Gluon's and Triton's names
    ours and every import left out.

    Args:
        edits: pairs of text and what takes its place wherever it stands: planted faults.
        extra: further names.
    """
    space: dict[str, Any] = {
        "gluon": SimpleNamespace(jit=_jit), "triton": SimpleNamespace(jit=_jit), "gl": GL,
        "tl": TL, "mbarrier": _Barriers, "tma": _Tma, "fence_async_shared": _fence,
        "warpgroup_mma": _mma, "warpgroup_mma_wait": _mma_wait, "struct": struct,
        "range": lambda *bounds: map(Scalar, range(*bounds)), **extra,
    }  # fmt: skip
    sources = [path.read_text() for path in paths]
    for old, new in edits:
        assert any(old in source for source in sources), f"no {old!r} in {paths}"
        sources = [source.replace(old, new) for source in sources]
    for path, source in zip(paths, sources, strict=True):
        tree = ast.parse(source)
        tree.body = [x for x in tree.body if not isinstance(x, ast.Import | ast.ImportFrom)]
        exec(compile(tree, str(path), "exec"), space)
    return space
