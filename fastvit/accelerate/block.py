"""Fast classes: subclasses of a library's, by whose forward a module runs on our kernels.

Each looks at its submodules at every forward, and leaves the call to the library's forward where
they carry hooks or have been replaced, so that nothing a user adds later is ignored.

Shape legend: B batch, N tokens, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastvit import _seen
from fastvit.accelerate import fp8
from fastvit.accelerate.plan import Part, PlanRow
from fastvit.kernels._backend import uses_triton
from fastvit.obstacles import Obstacle, global_hook, is_traced, own_forward, patched
from fastvit.parts import Parts, Rope, run

Kind = TypeVar("Kind", bound=type[nn.Module])


def no_more(module: Any) -> Iterable[_seen.Watched]:
    """For `watched` of blocks that nothing but their submodules decides about."""
    return ()


def fast(original: Any) -> Callable[[Kind], Kind]:
    """Decorator of a class that takes the place of a library's class `original`."""

    def dressed(kind: Kind) -> Kind:
        kind.fastvit_original = original  # type: ignore[attr-defined]
        kind.__name__ = original.__name__  # `__qualname__`, by which it is pickled, stays
        _annotate(kind, original)
        return kind

    return dressed


def original_of(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a fast class stands in for; any other class itself."""
    return kind.__dict__.get("fastvit_original", kind)


def library_class(module: nn.Module) -> type[nn.Module]:
    """The library's class of a module, also of one whose fast class FSDP2 made a subclass of."""
    return getattr(type(module), "fastvit_original", type(module))


def applies(module: nn.Module, x: object) -> bool:
    """Whether an op may stand in for the forward of a single layer's original class now."""
    return (
        isinstance(x, Tensor)  # torch.fx traces with proxies
        and not is_traced()
        and patched(library_class(module)) is None
    )


class FastBlock(nn.Module):
    """Base of the fast classes of blocks."""

    fastvit_original: ClassVar[Any]  # the library's class
    # what `run` takes of a block, `Parts` unless a class has a `run` of its own; or why not
    take_apart: ClassVar[Callable[[Any], Any]]
    watched: ClassVar[Callable[[Any], Iterable[_seen.Watched]]] = staticmethod(no_more)

    def examine(self, x: object) -> Any:
        """The `Parts` for `run`, or None where the library's own forward has to run."""
        if not isinstance(x, Tensor) or torch._C._get_tracing_state() is not None:
            return None
        found = _seen.keep(self, look, type(self).watched)
        if type(found) is Obstacle:
            return None
        # PyTorch's fused attention has no second derivative, and kernels are none to lose
        plain = torch.is_grad_enabled() and not uses_triton(x)
        return None if plain and self.spells_attention_out() else found

    def spells_attention_out(self) -> bool:
        """Whether the library's forward does without PyTorch's fused attention."""
        return not all(getattr(module, "fused_attn", True) for module in self.modules())

    def run(
        self, parts: Parts, x: Tensor, mask: Tensor | None = None, rope: Rope | None = None
    ) -> Tensor:
        """[B, N, D] to [B, N, D], as `parts.run` or in e4m3 if the block was given that."""
        own = None if torch.compiler.is_compiling() else self.__dict__.get(fp8.QUANTIZED)
        if own is None or not own.applies(self, parts, x):
            return run(parts, x, mask, rope)
        return own.run(parts, x, mask, rope).to(x.dtype)

    def bias(self) -> Tensor | None:
        """Relative positions added to attention's scores, [1, H, N, N] or [H, N, N], or None."""
        return None


def look(block: Any) -> Any:
    """The parts of an instance of a `FastBlock`, or an `Obstacle`."""
    return take_apart(block, type(block))


def take_apart(block: Any, kind: Any) -> Any:
    """As `look`, of a block that is or may become a `kind` of `FastBlock`."""
    if is_traced():
        return Obstacle("is being traced", lasting=False)
    found = global_hook() or kind.take_apart(block)
    return found if isinstance(found, Obstacle) else patched(kind.fastvit_original) or found


def _annotate(kind: Any, original: Any) -> None:
    """Give a forward its library's annotations, which torch.fx writes into what torch.jit.script
    reads; ours are strings."""
    names = kind.forward.__code__.co_varnames
    theirs = original.forward.__annotations__.items()
    kind.forward.__annotations__ = {n: a for n, a in theirs if n in (*names, "return")}


def fast_class(
    original: type[nn.Module], base: type[nn.Module], module: dict[str, Any], **members: Any
) -> type[nn.Module]:
    """A fast class of `original` with the forward of `base`, under a name in the namespace of a
    `module`, where unpickling finds it."""
    name = f"Fast_{original.__module__.replace('.', '__')}__{original.__name__}"
    doc = f"`{original.__module__}.{original.__name__}` on our kernels."
    members |= {"__module__": module["__name__"], "__doc__": doc}
    kind = type(name, (base, original), members)
    kind.fastvit_original = original  # type: ignore[attr-defined]
    kind.__name__ = original.__name__  # FSDP and transformers find layers by it
    _annotate(kind, original)
    module[name] = kind
    return kind


def original_named(name: str) -> Any:
    """The class that `fast_class` made a name of, if its module has been imported."""
    path = name.removeprefix("Fast_").replace("__", ".")
    module, _, kind = path.rpartition(".")
    return getattr(sys.modules.get(module), kind, None) if name.startswith("Fast_") else None


def block_part(
    name: str,
    block: nn.Module,
    kind: Any,
    runs: str | None,
    library: str,
    is_block: bool = True,
    always: bool = False,
) -> Part:
    """The part of a block for which there is a `kind` of `FastBlock`, or an `Obstacle` instead.

    Args:
        name: of the block in its model.
        runs: the ops that it runs; None to say so by its parts.
        library: what runs otherwise.
        is_block: whether it counts as one.
        always: it becomes a `kind` even where it cannot be fused.
    """
    if isinstance(kind, Obstacle):
        found: Any = kind
    else:
        found = own_forward(block) or take_apart(block, kind)
    obstacle = found if isinstance(found, Obstacle) else None
    if runs is None:
        runs = ops_of(found) if isinstance(found, Parts) else ""
    row = make_row(name, original_of(type(block)), runs, library, obstacle, is_block)
    stays = obstacle is not None and obstacle.lasting and not always
    fast: Any = None if stays or isinstance(kind, Obstacle) else kind
    quantizable = isinstance(found, Parts) and fp8.can_quantize(found)
    return Part(block, fast, row, quantized=fast if quantizable else None)


def model_parts(
    name: str, model: nn.Module, kind: type[nn.Module], library: str, obstacle: Obstacle | None
) -> list[Part]:
    """Of a whole ViT that becomes a `kind`; it has a row where it does not run as that."""
    found = own_forward(model) or obstacle
    parts = [Part(model, kind, row=None, graphed=kind)]
    if found is not None:
        row = make_row(name, original_of(type(model)), "", library, found)
        parts.append(Part(model, None, row))
    return parts


def make_row(
    name: str,
    kind: type,
    runs: str,
    library: str,
    obstacle: Obstacle | None,
    block: bool = False,
) -> PlanRow:
    """The row of a module that runs `runs`, or the library's forward where there is an obstacle."""
    return PlanRow(
        module=name,
        type=kind.__name__,
        fused=obstacle is None,
        runs=runs if obstacle is None else library,
        reason=None if obstacle is None else obstacle.reason,
        block=block,
    )


def ops_of(parts: Parts) -> str:
    """The ops that `parts.run` calls, in words."""
    norms = sorted({_norm_op(norm) for norm in (parts.norm1, parts.norm2)})
    packed = len(parts.qkv) == 1 and parts.q_norm is None and parts.k_norm is None
    gated = parts.gate is not None or parts.gate_half is not None
    whole = [] if gated or parts.hidden_norm is not None else ["mlp"]
    return ", ".join([*norms, "linear", "attention_qkv" if packed else "attention", *whole])


def _norm_op(norm: nn.Module) -> str:
    return "layer_norm" if isinstance(norm, nn.LayerNorm) else "rms_norm"
