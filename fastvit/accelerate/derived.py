"""Weights computed from a model's own (e4m3), kept beside it and up to date.

They are in no state_dict, no copy and no pickle. At every forward their sources are compared with
what they were: other tensors or other memory make new derived weights; new values in the same
memory are derived into the same memory again, where CUDA graphs read them.

New values are noticed by PyTorch's version counter, which writes through ``parameter.data`` do not
touch: after such a write, call `accelerate` again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

Sources = tuple[Tensor | None, ...]
Build = Callable[..., Sources]


class Derived:
    """The tensors that `build` makes of some sources."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self._lock = threading.Lock()
        self._sources: Sources = ()
        self._aliases: Sources = ()
        self._versions: tuple[int, ...] = ()
        self.tensors: Sources | None = None

    def get(self, *sources: Tensor | None) -> Sources:
        """`build` of `sources`, from now or before."""
        with self._lock:
            if self.tensors is None or not self._follows(sources):
                self._sources = sources
                # these also keep the memory from being given to another tensor
                self._aliases = tuple(None if s is None else s.detach() for s in sources)
                self._versions = _versions(sources)
                self.tensors = self._built()
            else:
                self._refresh()
            return self.tensors

    def refresh(self) -> bool:
        """Whether a source had new values; the derived tensors then have theirs."""
        with self._lock:
            return self._refresh()

    def _refresh(self) -> bool:
        versions = _versions(self._sources)
        if self.tensors is None or versions == self._versions:
            return False
        new_tensors = self._built()
        with torch.inference_mode(False), torch.no_grad():
            for old, new in zip(self.tensors, new_tensors, strict=True):
                if old is not None and new is not None:
                    old.copy_(new)
        _wait(self._sources)
        self._versions = versions
        return True

    def _follows(self, sources: Sources) -> bool:
        return len(sources) == len(self._sources) and all(
            new is old and (new is None or alias is None or new.is_set_to(alias))
            for new, old, alias in zip(sources, self._sources, self._aliases, strict=True)
        )

    def _built(self) -> Sources:
        # tensors of inference mode could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            tensors = self._build(*self._sources)
        _wait(self._sources)
        return tensors


def _versions(sources: Sources) -> tuple[int, ...]:
    return tuple(source._version for source in sources if source is not None)


def _wait(sources: Sources) -> None:
    """For what was just computed, so that a forward on any other stream may read it."""
    source = next((source for source in sources if source is not None), None)
    if source is not None and source.is_cuda and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(source.device).synchronize()
