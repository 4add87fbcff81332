"""An op described once as data: tests, numerics and benchmarks all read this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# draws one normal tensor of the given shape in the case's dtype, on the case's device
Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One set of sizes and options.

    `sizes` feeds the FLOP and byte formulas, `make` draws the keyword arguments that the op and
    its reference both take.
    """

    name: str
    sizes: dict[str, int]
    make: Callable[[Draw], dict[str, Any]]


@dataclass(frozen=True)
class OpSpec:
    """What there is to know about an op.

    Args:
        name: the noun used in every room: folder, function, test file, benchmark case.
        op: the public function.
        reference: plain PyTorch, any float dtype, same keyword arguments; in float64 it is truth,
            in the tested dtype the yardstick.
        cases: small and odd shapes for tests and the certificate.
        bench_cases: the shapes of real models, for benchmarks.
        flops: multiply and add counted apart, from a case's sizes.
        bytes: least traffic to and from memory, from a case's sizes and the element size.
        inference: it has no gradient, and its operands keep their dtypes under autocast.
        fp8: it reads or writes e4m3, which not every architecture has (`_device.fp8_problem`), and
            has no form in float64.
    """

    name: str
    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    cases: tuple[Case, ...]
    bench_cases: tuple[Case, ...]
    flops: Callable[[dict[str, int]], int]
    bytes: Callable[[dict[str, int], int], int]
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.float32, torch.float16, torch.bfloat16))
    inference: bool = False
    fp8: bool = False

    def inputs(
        self, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Keyword arguments of `case`: one seed gives the same values, rounded, in every dtype.
        On the meta device they have shapes only."""
        meta = device == "meta"
        generator = None if meta else torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
            if meta:
                return torch.empty(shape, dtype=dtype, device=device)
            values = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
            return (values * std + mean).to(dtype)

        return case.make(draw)


def all_specs() -> dict[str, OpSpec]:
    """Every op's spec by name, in the order of a ViT's forward."""
    from fastvit.kernels.attention.spec import SPECS as attention
    from fastvit.kernels.layer_norm.spec import SPECS as layer_norm
    from fastvit.kernels.linear.spec import SPECS as linear
    from fastvit.kernels.mlp.spec import SPECS as mlp
    from fastvit.kernels.norm_linear.spec import SPECS as norm_linear
    from fastvit.kernels.patch_embed.spec import SPECS as patch_embed

    specs = patch_embed + layer_norm + linear + norm_linear + attention + mlp
    return {spec.name: spec for spec in specs}
