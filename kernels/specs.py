"""Every op's description, in the order of a ViT's forward."""

import importlib

from fastvit.kernels._spec import OpSpec

OPS = "patch_embed", "layer_norm", "linear", "norm_linear", "attention", "mlp", "linear_fp8"


def all_specs() -> dict[str, OpSpec]:
    """By name."""
    modules = [importlib.import_module(f"fastvit.kernels.{op}.spec") for op in OPS]
    return {spec.name: spec for module in modules for spec in module.SPECS}
