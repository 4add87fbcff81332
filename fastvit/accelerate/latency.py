"""A pre-norm block for few tokens on a Hopper GPU, in five launches of which none is a norm's: what
``accelerate(model, cuda_graphs=True)`` may capture there for batch 1 to about 4.

Norms are folded into the linears behind them (`kernels/linear/hopper_small.py`), whose launches may
start before the launch ahead of them has ended, and ask for weights that are needed later. A block
leaves statistics of its result's rows beside it for the next one's norm.

No GPU has run the kernels yet, so that they have to be asked for: ``FASTVIT_LATENCY`` is ``off``
(the default: what runs without a graph is captured), ``in-order``, or ``early`` for programmatic
dependent launch too. Where the compiler or a launch refuses, it is as ``off``, after one warning.

Shape legend: B batch, N tokens, D width.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fastvit import parts as whole
from fastvit.accelerate.derived import Derived, Sources
from fastvit.accelerate.fp8 import Form, in_own_capture
from fastvit.kernels import _backend
from fastvit.kernels._backend import uses_triton
from fastvit.kernels._device import multiprocessors
from fastvit.kernels._hopper import hopper_problem
from fastvit.kernels.attention.hopper_small_launch import early_attention_qkv
from fastvit.kernels.linear.hopper_small_launch import (
    HALF,
    MOST_ROWS,
    MOST_TILES,
    Statistics,
    fold,
    row_statistics,
    small_choice,
    small_linear,
)
from fastvit.parts import Parts, Rope, Weights, factor, weights_of

MODES = ("off", "in-order", "early")
STATISTICS = "fastvit_statistics"  # attribute of a block's result: its version, and `Statistics`

_refused: str | None = None  # what a compiler or a launch said
_left_out: ContextVar[bool] = ContextVar("left_out", default=False)
runs = 0  # of blocks in this form


def mode() -> str:
    """What ``FASTVIT_LATENCY`` asks for; a ValueError if that is none of `MODES`."""
    name = os.environ.get("FASTVIT_LATENCY", MODES[0])
    if name not in MODES:
        raise ValueError(f"FASTVIT_LATENCY must be one of {', '.join(MODES)}; got {name!r}")
    return name


def problem(device: torch.device) -> str | None:
    """Why no block on `device` runs in this form, or None if it may."""
    if mode() == "off":
        return "FASTVIT_LATENCY=early asks for them; no GPU has run them yet"
    return _refused or hopper_problem(device)


def in_words(device: torch.device) -> str:
    """For `explain`: what is captured."""
    if (reason := problem(device)) is not None:
        return f"no kernels for few tokens: {reason}"
    early = "" if mode() == "early" else " without programmatic dependent launch"
    return f"up to {MOST_ROWS} tokens a batch on kernels for few{early} (untimed)"


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Within, no block runs in this form."""
    token = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(token)


def refuse(error: Exception) -> None:
    """No more of this form in this process."""
    global _refused
    _refused = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    _backend.warn_once(f"fastvit: CUDA graphs without the kernels for few tokens: {_refused}")


class Folded(Form):
    """The form of one block. `after` is that of the next one, if there is one."""

    after: Folded | None = None

    def __init__(self) -> None:
        super().__init__()
        self.count: Tensor | None = None

    def __reduce__(self) -> tuple[type[Folded], tuple[()]]:
        return Folded, ()

    def applies(self, block: nn.Module, parts: Parts, x: Tensor) -> bool:
        return (
            in_own_capture()
            and not _left_out.get()
            and super().applies(block, parts, x)
            and uses_triton(x)
            and problem(x.device) is None
            and _takes(parts, x)
        )

    def tensors(self) -> list[Sources | None]:
        return [*super().tensors(), (self.count,)]

    def run(
        self, parts: Parts, x: Tensor, mask: Tensor | None = None, rope: Rope | None = None
    ) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        global runs
        runs += 1
        try:
            return self._run(parts, x, mask, rope)
        except Exception as error:
            if _backend.current_path() == "triton":
                raise
            refuse(error)
            return whole.run(parts, x, mask, rope)

    def _run(self, parts: Parts, x: Tensor, mask: Tensor | None, rope: Rope | None) -> Tensor:
        early = mode() == "early"
        if self.count is None:
            self.count = torch.zeros(MOST_TILES, dtype=torch.int32, device=x.device)
        common: dict[str, Any] = {"count": self.count, "early": early}
        version, left = getattr(x, STATISTICS, (None, None))
        statistics = row_statistics(x) if left is None or version != x._version else left
        first, last = self._weight("fc1"), weights_of(parts.fc2)[0]

        h = self._behind("qkv", parts.norm1, _qkv(parts), x, statistics, first, common)
        out = _attend(parts, h, mask, rope, early=early)
        x, statistics = small_linear(
            out, *weights_of(parts.out), scale=factor(parts.scale1), residual=x, coming=last,
            keep=True, **common,
        )  # fmt: skip
        after = None if self.after is None else self.after._weight("qkv")
        h = self._hidden(parts, x, statistics, after, common)
        y, kept = small_linear(
            h, *weights_of(parts.fc2), scale=factor(parts.scale2), residual=x, keep=True, **common
        )
        setattr(y, STATISTICS, (y._version, kept))
        return y

    def _hidden(
        self, parts: Parts, x: Tensor, statistics: Any, coming: Tensor | None, common: Any
    ) -> Tensor:
        """fc2's input: fc1, its activation and gate."""
        gated = parts.gate is not None or parts.gate_half is not None
        options = common if gated else {**common, "activation": parts.activation}
        h = self._behind("fc1", parts.norm2, _fc1(parts), x, statistics, coming, options)
        if gated:
            activation = whole.ops.ACTIVATIONS[parts.activation or "none"]
            halves = h.chunk(2, dim=-1)
            which = parts.gate_half or 0
            h = activation(halves[which]) * halves[1 - which]
        return whole.apply_norm(parts.hidden_norm, h).contiguous()

    def _behind(
        self, name: str, norm: Any, layers: Sequence[Weights], x: Tensor, statistics: Statistics,
        coming: Tensor | None, options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """The linears behind a norm, as one: [B, N, all their outputs]."""
        weights, biases = zip(*layers, strict=True)
        # a bias that is put together anew at every forward is added to what is kept
        kept = all(b is None or isinstance(b, nn.Parameter) for b in biases)
        derived = self.derived.setdefault(name, Derived(_fold))
        sources = (*weights_of(norm), *weights, *(biases if kept else [None] * len(biases)))
        weight, bias, colsum = derived.get(*sources)
        assert weight is not None
        assert bias is not None
        if not kept:
            bias = bias + _together(weights, biases)
        y, _ = small_linear(
            x, weight, bias, colsum=colsum, statistics=statistics, eps=norm.eps, coming=coming,
            **options,
        )  # fmt: skip
        return y

    def _weight(self, name: str) -> Tensor | None:
        """What is kept of a linear's weight, if it has run."""
        derived = self.derived.get(name)
        return None if derived is None or derived.tensors is None else derived.tensors[0]


def _fold(gamma: Tensor | None, beta: Tensor | None, *layers: Tensor | None) -> Sources:
    """`fold` of all `layers`: their weights, then their biases."""
    weights: Any = layers[: len(layers) // 2]
    return fold(gamma, beta, torch.cat(weights), _together(weights, layers[len(weights) :]))


def _together(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    return torch.cat(
        [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
    )


def _qkv(parts: Parts) -> list[Weights]:
    return [parts.qkv_weights(layer) for layer in parts.qkv]


def _fc1(parts: Parts) -> list[Weights]:
    """With the gate in front of it."""
    layers = [parts.fc1] if parts.gate is None else [parts.gate, parts.fc1]
    return [weights_of(layer) for layer in layers]


def _attend(
    parts: Parts, qkv: Tensor, mask: Tensor | None, rope: Rope | None, *, early: bool
) -> Tensor:
    """[B, N, outputs of all of queries, keys and values] to a packed [B, N, H*d]."""
    sizes = [len(weight) for weight, _ in _qkv(parts)]
    one = len({*sizes}) == 1  # else keys and values have fewer heads
    if early and one and {mask, rope, parts.q_norm, parts.k_norm} == {None}:
        out = early_attention_qkv(qkv, parts.heads, parts.scale)
        if out is not None:
            return whole.apply_norm(parts.out_norm, out)
    projected = [qkv] if one else qkv.split(sizes, dim=-1)
    return whole.attend_projected(parts, projected, mask, rope).contiguous()


def _takes(parts: Parts, x: Tensor) -> bool:
    """Whether there is a kernel for each linear of a block with input `x`."""
    read = x, weights_of(parts.out)[0], weights_of(parts.fc2)[0]
    if not (
        x.dtype in HALF
        and x.dim() == 3
        and not torch.is_autocast_enabled(x.device.type)
        and all(tensor.is_contiguous() and not tensor.data_ptr() & 15 for tensor in read)
    ):
        return False
    rows, processors = x.shape[0] * x.shape[1], multiprocessors(x.device)
    for group, keep in (
        (_qkv(parts), False), ([weights_of(parts.out)], True), (_fc1(parts), False),
        ([weights_of(parts.fc2)], True),
    ):  # fmt: skip
        weights = [weight for weight, _ in group]
        n, k = sum(map(len, weights)), weights[0].shape[1]
        choice = small_choice(rows, n, k, processors, keep=keep)
        if isinstance(choice, str) or any(weight.dtype != x.dtype for weight in weights):
            return False
    return True


def forms(blocks: Sequence[nn.Module]) -> dict[nn.Module, Folded]:
    """Of the blocks of a model in their order; a ValueError as `mode`'s."""
    mode()
    found = {block: Folded() for block in blocks}
    for one, after in itertools.pairwise(found.values()):
        one.after = after
    return found
