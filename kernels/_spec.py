"""An op described once as data: tests, numerics and benchmarks all read this."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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


def drawn(name: str, sizes: dict[str, int], options: dict[str, Any], **shapes: str) -> Case:
    """A case of normal tensors and `options`: ``x="MK"`` is a tensor of `sizes` M and K,
    ``weight="NK/K"`` is divided by the square root of K, "" stands for None."""

    def make(draw: Draw) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        for argument, shape in shapes.items():
            letters, _, fan_in = shape.partition("/")
            std = sizes[fan_in] ** -0.5 if fan_in else 1.0
            dims = (sizes[letter] for letter in letters)
            inputs[argument] = draw(*dims, std=std) if letters else None
        return inputs | options

    return Case(name, sizes, make)


def changed(case: Case, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Case:
    """`case` with other values of those inputs that `change` gives."""

    def make(draw: Draw) -> dict[str, Any]:
        inputs = case.make(draw)
        return inputs | change(inputs)

    return replace(case, make=make)


def shifted(case: Case) -> Case:
    """`case` with the mean of x far from zero."""
    return changed(case, lambda inputs: {"x": inputs["x"] + 30.0})


def vit_b(case: Callable[..., Case], *sizes: Any, **options: Any) -> tuple[Case, ...]:
    """`case` of ViT-B's rows at batch 1 and 256."""
    return tuple(case(f"ViT-B, batch {b}", 197 * b, *sizes, **options) for b in (1, 256))


def no_flops(sizes: dict[str, int]) -> int:
    """As PyTorch's counter: only products of matrices count."""
    return 0


def product_flops(sizes: dict[str, int]) -> int:
    """Of one product [M, K] by [K, N]."""
    return 2 * sizes["M"] * sizes["K"] * sizes["N"]


@dataclass(frozen=True)
class OpSpec:
    """What there is to know about an op.

    Args:
        name, op: in tests, the certificate and benchmarks; the public function.
        reference: plain PyTorch, any float dtype, same keyword arguments; in float64 it is truth,
            in the tested dtype the yardstick.
        cases: small and odd shapes for tests and the certificate.
        bench_cases: the shapes of real models, for benchmarks.
        gpu_cases: `_hopper_cases`, for a GPU only.
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
    gpu_cases: tuple[Case, ...] = ()

    def inputs(
        self, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int | None = 0
    ) -> dict[str, Any]:
        """Keyword arguments of `case`: one seed gives the same values, rounded, in every dtype.
        With None they are left unwritten, and take no memory."""
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)

        def draw(
            *shape: int, std: float = 1.0, mean: float = 0.0, dtype: torch.dtype = dtype,
            bounds: tuple[float, float] = (-math.inf, math.inf),
        ) -> Tensor:  # fmt: skip
            if generator is None:
                return torch.empty(shape, dtype=dtype, device=device)
            values = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
            return (values * std + mean).clamp(*bounds).to(dtype)

        return case.make(draw)
