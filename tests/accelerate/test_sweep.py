"""Every submodule of a model of every library and family, hooked, given a forward of its own,
wrapped, and its class patched: always the library's numbers, and the hooks fire as often."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from library_models import GATED, LIBRARIES, OTHERS, Case
from test_what_users_do import NEAR, twice
from timm_models import error
from torch import Tensor, nn

from fastvit.accelerate import accelerate
from fastvit.accelerate.block import original_of

pytestmark = pytest.mark.slow
ALL = {**LIBRARIES, **GATED, **OTHERS}


def doubled(result: Any) -> Any:
    return twice(lambda _: result)(None)


class Wrapped(nn.Module):
    """As an adapter does it, with the layer's attributes within reach."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__["_modules"]["inner"]
        return inner if name == "inner" else getattr(inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return doubled(self.inner(*args, **kwargs))


@contextmanager
def hooked(model: Any, name: str, method: str, hook: Callable[..., Any]) -> Iterator[None]:
    handle = getattr(model.get_submodule(name), method)(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def own_forward(model: Any, name: str) -> Iterator[None]:
    module = model.get_submodule(name)
    forward = module.forward
    module.forward = lambda *args, **kwargs: doubled(forward(*args, **kwargs))
    try:
        yield
    finally:
        del module.forward


@contextmanager
def wrapped(model: Any, name: str) -> Iterator[None]:
    parent, _, child = name.rpartition(".")
    owner, module = model.get_submodule(parent), model.get_submodule(name)
    owner._modules[child] = Wrapped(module)
    try:
        yield
    finally:
        owner._modules[child] = module


def output_hook(model: Any, name: str) -> Any:
    return hooked(model, name, "register_forward_hook", lambda _, args, out: doubled(out))


def input_hook(model: Any, name: str) -> Any:
    def hook(module: nn.Module, args: Any) -> Any:
        return tuple(2 * a if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    return hooked(model, name, "register_forward_pre_hook", hook)


CHANGES = {
    "forward hook": output_hook,
    "pre-hook": input_hook,
    "own forward": own_forward,
    "wrapped": wrapped,
}


def result_of(case: Case, model: Any) -> Tensor | Exception:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return case.run(model)
    except Exception as problem:
        return problem


def assert_same(ours: Tensor | Exception, theirs: Tensor | Exception, what: str) -> None:
    if isinstance(theirs, Exception):
        return  # what does not work with the library need not with us
    assert isinstance(ours, Tensor), f"{what}: {ours!r}"
    if bool(theirs.isfinite().all()):
        assert error(ours, theirs) <= NEAR, what


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_every_submodule_changed(make, change):
    case = make()
    twin = copy.deepcopy(case.model)
    accelerate(case.model)
    compared = 0
    for name, _ in twin.named_modules():
        if name == "":
            continue
        with change(twin, name):
            theirs = result_of(case, twin)
        with change(case.model, name):
            ours = result_of(case, case.model)
        assert_same(ours, theirs, name)
        compared += isinstance(theirs, Tensor)
    assert compared > 10
    assert_same(result_of(case, case.model), result_of(case, twin), "after all changes")


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_every_class_patched(make, monkeypatch):
    case = make()
    twin = copy.deepcopy(case.model)
    accelerate(case.model)
    for kind in {original_of(type(module)) for module in twin.modules()}:
        if kind is nn.ModuleList:
            continue
        assert_same(result_of(case, case.model), result_of(case, twin), "unpatched")
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", twice(kind.forward))
            theirs, ours = result_of(case, twin), result_of(case, case.model)
        assert_same(ours, theirs, kind.__name__)


@pytest.mark.parametrize(
    "method", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_every_submodule_with_a_backward_hook(make, method):
    case = make()
    twin = copy.deepcopy(case.model)
    accelerate(case.model)
    for name, _ in twin.named_modules():
        counts = []
        for model in (twin, case.model):
            seen: list[str] = []
            with hooked(model, name, method, lambda *args, seen=seen: seen.append("fired")):
                try:
                    case.run(model).square().sum().backward()
                except RuntimeError as problem:  # a view, changed in place, with the library too
                    seen.append(str(problem))
            counts.append(len(seen))
        assert counts[0] == counts[1], name
