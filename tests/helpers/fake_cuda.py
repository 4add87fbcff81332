"""torch.cuda's part in CUDA graphs, played on a CPU: operations are recorded with the memory that
they read and write, as a graph does, so that stale graphs show."""

import contextlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastvit.accelerate import graphs


class Tape(TorchDispatchMode):
    """Runs operations and keeps them, with the memory that each reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.empty_like.default:  # which does nothing on the GPU
            # aliases: a graph knows addresses, and nothing of what a parameter is given later
            self.steps.append(tree_map_only(Tensor, Tensor.detach, (func, args, kwargs or {}, out)))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.steps:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if not isinstance(old, Tensor):  # what Python asked about a tensor
                    continue
                views = old.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()
                if not views:
                    old.copy_(new)


class Cuda:
    """In the place of torch.cuda's streams, events and graphs. `log` has what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log = self.log = []
        self.captures = 0
        self.pools = 0
        self.fail: Exception | None = None  # of the next capture
        cuda = self
        real_graph = inspect.signature(torch.cuda.graph)

        class Stream:
            def __init__(self, device: torch.device | None = None) -> None: ...

            def wait_stream(self, other: "Stream") -> None:
                log.append("wait_stream")

            def wait_event(self, event: "Event") -> None:
                log.append("wait_event")

        class Event:
            def record(self, stream: Stream) -> None:
                log.append("record")

        class CUDAGraph:
            def __init__(self) -> None:
                self.tape = Tape()

            def replay(self) -> None:
                log.append("replay")
                self.tape.replay()

        @contextlib.contextmanager
        def graph(*args: Any, **kwargs: Any):
            given = real_graph.bind(*args, **kwargs).arguments
            assert given["capture_error_mode"] == "thread_local"
            assert isinstance(given["stream"], Stream)
            assert given["pool"] == cuda.pools
            assert torch.is_inference_mode_enabled() is torch.is_grad_enabled() is False
            log.append("capture")
            with given["cuda_graph"].tape:
                yield
            cuda.captures += 1
            if cuda.fail is not None:
                raise cuda.fail

        def graph_pool_handle() -> int:
            self.pools += 1
            return self.pools

        main = Stream()
        for name, value in {
            "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph,
            "current_stream": lambda device: main, "graph_pool_handle": graph_pool_handle,
            "stream": contextlib.nullcontext, "device": contextlib.nullcontext,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
        monkeypatch.setattr(graphs.Recorder, "serves", lambda x: True)
