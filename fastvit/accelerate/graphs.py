"""CUDA graphs of a ViT's forward: one launch in the place of some hundred.

A graph is captured at the first forward of each shape of input and replayed from then on. It reads
the weights where they lie, so changed values show at once. All else that a forward depends on is
compared with what it was at the capture; where it differs (weights moved or replaced, another head,
an attribute set) the graphs are dropped and captured again.

On the GPU, a graph's input and output lie in its memory pool. A replay copies the input in, runs
and copies the output out, all on the caller's stream; an event orders it after the replay before,
which may have been on another stream.
"""

from __future__ import annotations

import contextlib
import operator
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from fastvit.accelerate import latency
from fastvit.accelerate.fp8 import QUANTIZED, own_capture
from fastvit.kernels import _backend

GRAPHS = "fastvit_graphs"  # attribute of a ViT that was given `Graphs`
MAX_GRAPHS = 8  # of one model; the least recently used goes first

Forward = Callable[[Tensor], Any]
Replay = Callable[[Tensor], Tensor]


class CaptureError(RuntimeError):
    """A forward that runs, but not into a graph."""


class Recorder:
    """All that is asked of torch.cuda, for the graphs of one model on one GPU.

    The graphs share a memory pool: no two run at a time, and what one leaves there has been copied
    before the next one runs.
    """

    _one_capture = threading.Lock()  # in a process at a time, as torch.cuda.graph demands

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.replayed = torch.cuda.Event()

    @staticmethod
    def serves(x: Tensor) -> bool:
        """Whether a forward of `x` can go through a graph now."""
        return x.is_cuda and not torch.cuda.is_current_stream_capturing()

    def capture(self, forward: Forward, x: Tensor) -> Replay:
        """A graph of `forward`, as a function that gives its output as a new tensor.

        Raises:
            CaptureError: `forward` does something that a graph cannot hold.
            Exception: whatever `forward` raises without a graph.
        """
        caller = torch.cuda.current_stream(self.device)
        # torch.cuda.graph leaves its own stream set where a capture fails: put back the caller's
        with torch.cuda.device(self.device), torch.cuda.stream(caller):
            self.stream.wait_stream(caller)
            self.stream.wait_event(self.replayed)  # a library's workspace may be that of a graph
            with torch.cuda.stream(self.stream):
                forward(torch.empty_like(x).copy_(x))  # compiles, and loads libraries
            caller.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with (
                    self._one_capture,
                    _fresh_workspaces(),
                    torch.cuda.graph(graph, self.pool, self.stream, "thread_local"),
                ):
                    static_x = torch.empty_like(x)
                    static_y = forward(static_x)
            except Exception as error:
                raise CaptureError(f"{type(error).__name__}: {error}") from error
        if not isinstance(static_y, Tensor):
            raise CaptureError(f"the model gives a {type(static_y).__name__}, not one tensor")

        def replay(x: Tensor) -> Tensor:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.replayed)
            static_x.copy_(x)
            graph.replay()
            y = static_y.clone()
            self.replayed.record(stream)
            return y

        return replay


@contextlib.contextmanager
def _fresh_workspaces() -> Iterator[None]:
    """Let cuBLAS take workspaces from the graph's pool, which no other stream writes to."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


class Snapshot:
    """State that a model's forward depends on, beside its input and PyTorch's settings.

    It does not keep the model, whose attribute leads to it: one that is deleted is freed at once.
    """

    def __init__(self, model: nn.Module) -> None:
        states = [module.__dict__ for module in model.modules()]
        self._model = weakref.ref(model)
        self._model_state = _own_state(model)
        self._states = states[1:]
        self._attributes = [state.copy() for state in self._states]
        self._hooks = [
            state[kind] for state in states for kind in ("_forward_hooks", "_forward_pre_hooks")
        ]
        owners = [
            state[kind] for state in states for kind in ("_parameters", "_buffers", "_modules")
        ]
        self._owners = [owner for owner in owners for _ in owner]
        self._names = list(chain.from_iterable(owners))
        self._members = [member for owner in owners for member in owner.values()]
        self._tensors = [member for member in self._members if isinstance(member, Tensor)]
        # these also keep the memory that a graph reads
        self._aliases = [tensor.detach() for tensor in self._tensors]
        self._plain = not any("forward" in state for state in states)
        kinds = {base for module in model.modules() for base in type(module).__mro__}
        self._kinds = [(kind.__dict__, dict(kind.__dict__)) for kind in kinds]  # and methods
        self._quantized = [state[QUANTIZED] for state in states if QUANTIZED in state]
        self._derived = [own.tensors() for own in self._quantized]  # kept as the aliases are

    def holds(self, model: nn.Module) -> bool:
        """Whether this is of `model`, and all as it was but for hooks and the values of weights."""
        members = map(dict.get, self._owners, self._names)
        return (
            model is self._model()  # a shallow copy shares its `Graphs`
            and all(map(operator.is_, members, self._members))
            and all(map(Tensor.is_set_to, self._tensors, self._aliases))
            and _equal(_own_state(model), self._model_state)
            and _equal(self._states, self._attributes)
            and all(methods == then for methods, then in self._kinds)
        )

    def refresh(self) -> bool:
        """Whether weights had new values that others are derived from; those then have too."""
        return any([own.refresh() for own in self._quantized])

    def allows_graphs(self) -> bool:
        """Whether every module is without hooks and runs the forward of its class."""
        return self._plain and not any(self._hooks)


def _own_state(model: nn.Module) -> dict[str, object]:
    return {name: value for name, value in model.__dict__.items() if name != GRAPHS}


def _equal(a: object, b: object) -> bool:
    try:
        return bool(a == b)
    except Exception:  # attributes may be anything; a tensor in place of another has no one truth
        return False


class Graphs:
    """The CUDA graphs of one model, by input shape and settings, for any thread to call.

    Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._clear()

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()

    def clear(self) -> None:
        """Drop all graphs, and the memory that they hold."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        # None for what a graph cannot hold
        self._replays: OrderedDict[tuple[object, ...], Replay | None] = OrderedDict()
        self._snapshot: Snapshot | None = None
        self._recorder: Recorder | None = None

    def forward(self, model: nn.Module, forward: Forward, x: Tensor) -> Tensor | None:
        """`forward(x)` by a graph, captured if there is none yet; None where there can be none."""
        key = _key(x)
        with self._lock:
            replay = self._replays.get(key)
            y = None if replay is None else replay(x)
            # looked at while the GPU is busy: a replay in vain costs time only
            if self._snapshot is None or not self._snapshot.holds(model):
                self._clear()
                self._snapshot = Snapshot(model)
                y = None
            elif self._snapshot.refresh() and replay is not None:
                y = replay(x)
            if not self._snapshot.allows_graphs():
                return None
            if key not in self._replays:
                replay = self._replays[key] = self._capture(forward, x)
                self._snapshot = Snapshot(model)  # a forward may set attributes
                if len(self._replays) > MAX_GRAPHS:
                    self._replays.popitem(last=False)
                y = None if replay is None else replay(x)
            self._replays.move_to_end(key)
            return y

    def _capture(self, forward: Forward, x: Tensor) -> Replay | None:
        """A graph, perhaps without the blocks' form for few tokens; None where there is none."""
        before = latency.runs
        try:
            return self._capture_once(forward, x)
        except CaptureError as error:
            problem = error
        if latency.runs > before:
            with latency.left_out(), contextlib.suppress(CaptureError):
                replay = self._capture_once(forward, x)
                latency.refuse(problem)
                return replay
        words = " ".join(str(problem).split())[:300]
        warnings.warn(
            f"fastvit: no CUDA graph for an input of {list(x.shape)}, which runs without: {words}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None

    def _capture_once(self, forward: Forward, x: Tensor) -> Replay:
        self._recorder = self._recorder or Recorder(x.device)
        device = x.device.type
        try:
            # a graph of inference tensors would take no input outside of inference mode, and cached
            # casts of weights would not see them change
            with (
                own_capture(),
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(
                    device,
                    torch.get_autocast_dtype(device),
                    enabled=torch.is_autocast_enabled(device),
                    cache_enabled=False,
                ),
            ):
                return self._recorder.capture(forward, x)
        except CaptureError:
            self._recorder = None  # its pool may still be marked as recording
            raise


def _key(x: Tensor) -> tuple[object, ...]:
    device = x.device.type
    return (
        x.shape,
        x.dtype,
        x.device,
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
        torch.get_float32_matmul_precision(),
        _backend.current_path(),
    )


def run(model: nn.Module, forward: Callable[..., Any], x: Any, **options: Any) -> Any:
    """`forward(x, **options)`, by a CUDA graph where `model` was given `Graphs` and one applies:
    on a GPU, in eval mode, without gradients, hooks or options, and while nothing is traced."""
    graphs = model.__dict__.get(GRAPHS)
    if graphs is None or options or torch.compiler.is_compiling() or not _applies(model, x):
        return forward(x, **options)
    y = graphs.forward(model, forward, x)
    return forward(x) if y is None else y


def _applies(model: nn.Module, x: object) -> bool:
    return (
        type(x) is Tensor
        and x.numel() > 0
        and not model.training
        and not getattr(model, "_is_replica", False)  # of nn.DataParallel, made for one forward
        and not torch.is_grad_enabled()
        and Recorder.serves(x)
        and not _has_any_global_hook()
        and torch._C._get_tracing_state() is None  # torch.jit.trace
        and forward_ad._current_level < 0
        and peek_interpreter_stack() is None  # vmap, jvp
        and torch._C._len_torch_dispatch_stack() == 0  # FLOP counters, fake tensors
    )


class Graphed(nn.Module):
    """Base of a class whose forward goes through `run`."""

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Before the weights move or change dtype, drop the graphs that hold the old memory."""
        graphs = self.__dict__.get(GRAPHS)
        if graphs is not None:
            graphs.clear()
        return super()._apply(*args, **kwargs)
