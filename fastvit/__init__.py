"""Vision Transformers on Triton kernels: the same weights and outputs, checked."""

try:
    from fastvit import numerics, ops
except ModuleNotFoundError as error:
    if error.name != "fastvit.kernels":
        raise
    raise ImportError(
        "fastvit/kernels is not the link to kernels/ that it should be, since this checkout or "
        "archive was unpacked without symbolic links: run `git config core.symlinks true` and "
        "`git checkout -- fastvit/kernels`, or put a copy of kernels/ there"
    ) from None

# at once: imported later, the subpackage would take the place of the function of its name
from fastvit.accelerate import (
    Calibration,
    Plan,
    accelerate,
    calibrate,
    explain,
    register_transformers,
    restore,
)
from fastvit.models import create_model
from fastvit.variants import list_models
from fastvit.vit import VisionTransformer

__all__ = [
    "Calibration",
    "Plan",
    "VisionTransformer",
    "accelerate",
    "calibrate",
    "create_model",
    "explain",
    "list_models",
    "numerics",
    "ops",
    "register_transformers",
    "restore",
]
