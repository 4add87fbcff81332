"""What was found out about a module, kept for as long as the module stays as it was.

A fused block computes from its layers' weights without calling the layers, so at every forward it
has to know that no layer has been hooked, replaced, wrapped or quantised since. Looking at every
layer takes as long as several launches; comparing what there is with what there was runs in C.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as torch_module

SEEN = "fastvit_seen"  # attribute of a module that was looked at; in no copy, pickle or state_dict
Found = TypeVar("Found")
Watched = tuple[Mapping[str, Any], tuple[str, ...]]  # a namespace, and names in it

_forward = operator.attrgetter("forward")  # of a class, where users put another
_dicts_of = operator.itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_modules",
    "_parameters",
)  # fmt: skip
_on_every_module = (  # PyTorch changes these in place
    torch_module._global_backward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_forward_hooks_always_called,
    torch_module._global_forward_hooks_with_kwargs,
)


class _Seen:
    """What was found of a module, and everything below it that could have changed it."""

    def __init__(
        self, module: nn.Module, look: Callable[[Any], Any], watched: Iterable[Watched]
    ) -> None:
        self.look = look
        self.found = look(module)
        # neither the module nor its dict: no cycle keeps its weights alive
        self.own = _getter(_settings(module.__dict__))
        self.own_then = self.own(module.__dict__)
        self.own_size = len(module.__dict__.keys() | {SEEN})  # a method of its own adds a name
        self.children = module._modules
        self.children_then = dict(self.children)
        self.below = tuple(m for m in module.modules() if m is not module)
        self.states = [m.__dict__ for m in self.below]
        self.sizes = [*map(len, self.states)]  # a forward of its own adds a name
        self.classes = [*map(type, self.below)]
        self.dicts = [*map(_dicts_of, self.states)]
        *others, parameters = [*zip(*self.dicts, strict=True)] or [()]
        every = [*itertools.chain.from_iterable(others)]
        parameters = (*parameters, module._parameters)
        self.filled = [(entries, dict(entries)) for entries in every if entries]
        self.empty = [entries for entries in (*every, *parameters) if not entries]
        self.parameters = [entries for entries in parameters if entries]
        self.parameter_classes = self._parameter_classes()
        namespaces = [(state, _settings(state)) for state in self.states]
        getters = ((s, _getter(names)) for s, names in (*namespaces, *watched) if names)
        kinds = {type(module), *self.classes}
        bases = {base for kind in kinds for base in kind.__mro__ if "forward" in base.__dict__}
        forwards = ((kind, _forward) for kind in kinds | bases)
        self.settings = [(space, get, get(space)) for space, get in (*getters, *forwards)]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy or a pickle has seen nothing

    def _parameter_classes(self) -> list[type]:
        return [*map(type, itertools.chain.from_iterable(map(dict.values, self.parameters)))]

    def holds(self, module: nn.Module) -> bool:
        """Whether it does for `module` as it is now."""
        try:
            if (
                module._modules is not self.children  # a shallow copy's, as DataParallel makes them
                or self.children != self.children_then
                or len(module.__dict__) != self.own_size
                or self.own(module.__dict__) != self.own_then
                or [*map(len, self.states)] != self.sizes
                or [*map(type, self.below)] != self.classes
                or [*map(_dicts_of, self.states)]
                != self.dicts  # the same objects compare in no time
                or any(self.empty)
                or self._parameter_classes() != self.parameter_classes
            ):
                return False
            for entries, copy in self.filled:
                if entries != copy:
                    return False
            for space, get, then in self.settings:
                if get(space) != then:
                    return False
        except (KeyError, RuntimeError, ValueError):  # a name is gone; tensors are no truth values
            return False
        return True


def _getter(names: tuple[str, ...]) -> Callable[[Any], Any]:
    return operator.itemgetter(*names) if names else type


def _settings(state: dict[str, Any]) -> tuple[str, ...]:
    """Options that a module keeps as attributes, such as `num_heads`."""
    skipped = ("_", "fastvit_")  # the latter are `accelerate`'s
    return tuple(name for name in state if not name.startswith(skipped) and name != "training")


def keep(
    module: nn.Module,
    look: Callable[[Any], Found],
    watched: Callable[[Any], Iterable[Watched]] = lambda module: (),
) -> Found:
    """`look(module)`, from an earlier call where nothing has changed below `module`: layers, their
    classes, options, hooks and forwards, the classes of their parameters and of its own.

    Args:
        watched: what else decides, such as an attribute of a config.
    """
    if (
        torch.compiler.is_dynamo_compiling()
        or torch.compiler._is_compiling_flag
        or any(_on_every_module)
    ):
        return look(module)
    state = module.__dict__
    seen = state.get(SEEN)
    if seen is None or seen.look is not look or not seen.holds(module):
        seen = state[SEEN] = _Seen(module, look, watched(module))
    return seen.found


def forget(module: nn.Module) -> None:
    """Look anew at the next call."""
    module.__dict__.pop(SEEN, None)
