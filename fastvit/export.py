"""Leaving Python: a ViT as a `torch.export` program, an AOTInductor package or an ONNX file.

Every export is loaded again and held against the model. Its graph has PyTorch's own ops only, so
that it runs where fastvit is not installed; on a GPU the package's kernels are Inductor's. (To keep
our kernels in a graph for Python, call `torch.export.export` yourself.)

Shape legend: B batch, C channels, H and W in pixels, p patch size.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fastvit import numerics, ops

FORMATS = {"torch": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}  # and how their files end
MAX_SIDE = 4096  # pixels, where the size is dynamic
AGREEMENT = 1e-4  # of the largest output, float32: far above rounding, far below a bug


@dataclass(frozen=True)
class Check:
    """The loaded export beside the model on images of one shape.

    Attributes:
        shape: [B, C, H, W].
        max_error: largest difference from the model's output, relative to the largest output.
        passed: `max_error` is at most 1e-4 in float32; in half precision, the error against
            float64 is at most twice the model's own (see `numerics`).
    """

    shape: tuple[int, ...]
    max_error: float
    passed: bool


@dataclass(frozen=True)
class Exported:
    """An exported file, and how it compares with the model.

    Attributes:
        path: the file.
        format: ``torch``, ``aoti`` or ``onnx``.
        operators: kinds of operator in the graph.
        checks: one for every shape that was tried.
    """

    path: Path
    format: str
    operators: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether the loaded export agreed with the model on every shape."""
        return all(check.passed for check in self.checks)


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    to: str = "torch",
    *,
    img_size: Sequence[int] | None = None,
    in_chans: int = 3,
    dynamic_size: bool = False,
) -> Exported:
    """Write `model` to `path` for any batch size, load it again and compare.

    Args:
        model: images [B, C, H, W] to one tensor, in eval mode; accelerated or not.
        path: the file to write.
        to: ``torch`` for `torch.export.load`, ``aoti`` for `torch._inductor.aoti_load_package` or
            C++'s `AOTIModelPackageLoader` (needs a C++ compiler), ``onnx`` (needs onnxscript, and
            onnxruntime to compare).
        img_size: (H, W); None for the model's own, ``patch_embed.img_size``.
        in_chans: C.
        dynamic_size: let H and W vary too, by whole patches up to 4096 pixels. The model must take
            images of any size (``dynamic_img_size=True``).

    Returns:
        What was written and how it compares; `Exported.passed` says whether it agrees.

    Raises:
        ValueError: an unknown format or a file name with another ending, a model in training mode
            or without a known image size.
        ImportError: the format's package is not installed.
        RuntimeError: no C++ compiler for ``aoti``; the graph holds operators that are not
            PyTorch's own.
        torch.export's errors: the forward cannot be traced.
    """
    if to not in FORMATS:
        raise ValueError(f"format {to!r} is not one of {', '.join(FORMATS)}")
    if Path(path).suffix != FORMATS[to]:
        raise ValueError(f"{os.fspath(path)!r} does not end in {FORMATS[to]}, as {to} needs")
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    _check_tools(to)
    h, w = _image_size(model, img_size)
    p_h, p_w = _patch_size(model) if dynamic_size else (1, 1)
    parameter = next(model.parameters())
    like = {"dtype": parameter.dtype, "device": parameter.device}
    shapes: dict[int, Any] = {0: Dim("batch")}
    if dynamic_size:
        shapes[2] = p_h * Dim("rows", min=2, max=MAX_SIDE // p_h)
        shapes[3] = p_w * Dim("columns", min=2, max=MAX_SIDE // p_w)
    # a size of 1 and equal sizes would be taken for constants
    example = torch.randn(2, in_chans, h, w + p_w * dynamic_size, **like)
    sizes = [(1, h, w), (3, h, w)]
    sizes += [(2, 2 * p_h, 3 * p_w), (1, h + p_h, w)] if dynamic_size else []
    with torch.no_grad(), ops.backend("torch"):
        program = torch.export.export(model, (example,), dynamic_shapes=(shapes,), strict=False)
        _check_graph(program)
        _write(program, Path(path), to)
        loaded = load_exported(path, to)
        checks = _compare(model, loaded, [torch.randn(b, in_chans, *s, **like) for b, *s in sizes])
    return Exported(Path(path), to, _operators(program), tuple(checks))


def load_exported(path: str | os.PathLike[str], to: str) -> Callable[[Tensor], Tensor]:
    """An export as a function of images.

    Args:
        path: a file of `export_model`.
        to: its format.

    Raises:
        ValueError: an unknown format.
        ImportError: ``onnx`` without onnxruntime.
    """
    if to == "torch":
        return torch.export.load(Path(path)).module()
    if to == "aoti":
        return torch._inductor.aoti_load_package(os.fspath(path))
    if to != "onnx":
        raise ValueError(f"format {to!r} is not one of {', '.join(FORMATS)}")
    onnxruntime = _import("onnxruntime")
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    (name,) = (argument.name for argument in session.get_inputs())

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0]).to(images)

    return run


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"exporting to ONNX needs {name}: pip install {name}") from error


def _check_tools(to: str) -> None:
    """Now rather than after the wait."""
    if to == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            _import(name)
    if to == "aoti":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise RuntimeError("AOTInductor needs a C++ compiler, such as g++") from error


def _image_size(model: Any, img_size: Sequence[int] | None) -> tuple[int, int]:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = img_size or size
    if size is None or len(size) != 2:
        raise ValueError("img_size must be (height, width): the model does not say its own")
    return size[0], size[1]


def _patch_size(model: Any) -> tuple[int, int]:
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if size is None:
        raise ValueError("dynamic_size needs a model with patch_embed.patch_size")
    return (size, size) if isinstance(size, int) else tuple(size)


def _operators(program: ExportedProgram) -> tuple[str, ...]:
    calls = {node.target for node in program.graph.nodes if node.op == "call_function"}
    return tuple(sorted(str(c) for c in calls if isinstance(c, torch._ops.OpOverload)))


def _check_graph(program: ExportedProgram) -> None:
    foreign = [name for name in _operators(program) if not name.startswith("aten.")]
    if foreign:
        raise RuntimeError(f"the graph holds operators not of PyTorch: {', '.join(foreign)}")


def _write(program: ExportedProgram, path: Path, to: str) -> None:
    if to == "torch":
        torch.export.save(program, path)
    elif to == "aoti":
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    else:
        onnx_program = torch.onnx.export(program, dynamo=True, verbose=False)
        assert onnx_program is not None
        onnx_program.save(path)


def _compare(
    model: nn.Module, loaded: Callable[[Tensor], Tensor], batches: list[Tensor]
) -> list[Check]:
    checks = []
    for images in batches:
        theirs, ours = model(images), loaded(images)
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        passed = error <= AGREEMENT
        if images.dtype.itemsize < 4:
            truth = copy.deepcopy(model).double()(images.double())
            passed = numerics.measure("output", ours, truth, theirs).passed
        checks.append(Check(tuple(images.shape), error, passed))
    return checks
