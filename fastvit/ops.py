"""The functional interface: differentiable ops, Triton on a GPU, plain PyTorch on a CPU."""

from fastvit.kernels._backend import backend, set_backend
from fastvit.kernels.attention.op import attention, attention_packed, attention_qkv
from fastvit.kernels.layer_norm.op import layer_norm, rms_norm
from fastvit.kernels.linear.op import linear
from fastvit.kernels.linear.reference import ACTIVATIONS
from fastvit.kernels.mlp.op import mlp
from fastvit.kernels.norm_linear.op import norm_linear
from fastvit.kernels.patch_embed.op import patch_embed

__all__ = [
    "ACTIVATIONS",
    "attention",
    "attention_packed",
    "attention_qkv",
    "backend",
    "layer_norm",
    "linear",
    "mlp",
    "norm_linear",
    "patch_embed",
    "rms_norm",
    "set_backend",
]
