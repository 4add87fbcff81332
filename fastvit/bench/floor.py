"""The least time a ViT can take on a GPU, layer by layer: arithmetic from sizes, no measurement.

FLOPs (a multiply and an add are two) and bytes (each operand read once, each result written once)
come from the formulas of the ops' specs. A layer takes at least the longer of computing at the
GPU's peak rate and moving at its peak bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastvit.kernels.specs import all_specs
from fastvit.variants import ViTConfig, find_variant

ITEMSIZE = 2  # bytes, bfloat16 or float16


@dataclass(frozen=True)
class Peak:
    """Dense bfloat16 FLOP/s and bytes/s of one GPU."""

    gpu: str
    flops: float
    bandwidth: float
    source: str


_SPARSE = "which gives twice this rate, with sparsity"
GPUS = {
    "a100": Peak("NVIDIA A100 80GB SXM", 312e12, 2.039e12, "NVIDIA's A100 datasheet"),
    "h100": Peak("NVIDIA H100 SXM", 989.5e12, 3.35e12, f"NVIDIA's H100 datasheet, {_SPARSE}"),
    "h200": Peak("NVIDIA H200 SXM", 989.5e12, 4.8e12, f"NVIDIA's H200 datasheet, {_SPARSE}"),
    "b200": Peak("NVIDIA B200 (HGX)", 2250e12, 8e12, f"NVIDIA's B200 datasheet, {_SPARSE}"),
    "mi300x": Peak("AMD MI300X", 1307.4e12, 5.3e12, "AMD's MI300X datasheet"),
}


@dataclass(frozen=True)
class Layer:
    """One kind of layer; FLOPs and bytes are of all `count` of them."""

    name: str
    count: int
    flops: int
    bytes: int

    def seconds(self, peak: Peak) -> float:
        """The least time of all of them."""
        return max(self.flops / peak.flops, self.bytes / peak.bandwidth)

    def bound(self, peak: Peak) -> str:
        """What that time goes into."""
        return "compute" if self.flops / peak.flops > self.bytes / peak.bandwidth else "memory"


def layers(name: str, batch: int) -> list[Layer]:
    """The layers of a model's forward, in order.

    Args:
        name: one of `fastvit.list_models`.
        batch: images.

    Raises:
        ValueError: an unknown name, with the three nearest.
    """
    cfg = ViTConfig(**find_variant(name)[0])
    specs = all_specs()
    table = []
    for layer, count, op, sizes in _sizes(cfg, batch):
        spec = specs[op]
        flops, size = spec.flops(sizes), spec.bytes(sizes, ITEMSIZE)
        table.append(Layer(layer, count, count * flops, count * size))
    return table


def _sizes(cfg: ViTConfig, b: int) -> Iterator[tuple[str, int, str, dict[str, int]]]:
    """Name, count, op and its sizes. B images, N tokens, D width, H heads, M rows."""
    height, width = _pair(cfg.img_size)
    patch_h, patch_w = _pair(cfg.patch_size)
    d, heads, depth = cfg.embed_dim, cfg.num_heads, cfg.depth
    prefix, patches = int(cfg.class_token) + cfg.reg_tokens, height // patch_h * (width // patch_w)
    n, hidden = prefix + patches, int(d * cfg.mlp_ratio)
    m = b * n

    def linear(rows: int, k: int, out: int, residual: int = 0) -> dict[str, int]:
        return {"M": rows, "K": k, "N": out, "residual": residual}

    def attention(queries: int) -> dict[str, int]:
        return {"B": b, "H": heads, "N": queries, "M": n, "d": d // heads}

    k = cfg.in_chans * patch_h * patch_w
    yield "patch_embed", 1, "patch_embed", {"B": b, "N": patches, "P": prefix, "D": d, "K": k}
    yield "norm1, norm2", 2 * depth, "layer_norm", {"M": m, "D": d}
    yield "attn.qkv", depth, "linear", linear(m, d, 3 * d)
    if cfg.qk_norm:
        yield "attn.q_norm, k_norm", 2 * depth, "layer_norm", {"M": m, "D": d}
    yield "attention", depth, "attention_qkv", attention(n)
    yield "attn.proj", depth, "linear", linear(m, d, d, 1)
    yield "mlp.fc1", depth, "linear", linear(m, d, hidden)
    yield "mlp.fc2", depth, "linear", linear(m, hidden, d, 1)
    if cfg.pre_norm:
        yield "norm_pre", 1, "layer_norm", {"M": m, "D": d}
    if cfg.final_norm and not cfg.norm_after_pool:
        yield "norm", 1, "layer_norm", {"M": m, "D": d}
    if cfg.global_pool == "map":
        yield "attn_pool.q", 1, "linear", linear(1, d, d)
        yield "attn_pool.kv", 1, "linear", linear(m, d, 2 * d)
        yield "attn_pool", 1, "attention", attention(1)
        yield "attn_pool.proj", 1, "linear", linear(b, d, d)
        yield "attn_pool.fc1", 1, "linear", linear(b, d, hidden)
        yield "attn_pool.fc2", 1, "linear", linear(b, hidden, d, 1)
    if cfg.final_norm and cfg.norm_after_pool:
        yield "fc_norm", 1, "layer_norm", {"M": b, "D": d}
    if cfg.num_classes:
        yield "head", 1, "linear", linear(b, d, cfg.num_classes)


def _pair(size: object) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)  # pyright: ignore
