"""``attn_implementation="fastvit"``: `ops.attention` among transformers' attention functions.

Its mask is registered under the same name, without which transformers drops masks silently.

Shape legend: B batch, N queries, M keys, H heads, d head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import ops
from fastvit._compat import import_transformers

import_transformers()  # before all else of transformers

try:
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface
    from transformers.utils import output_capturing
except ImportError as error:
    raise ImportError(f"fastvit takes models of transformers 5 only: {error}") from error

NAME = "fastvit"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`ops.attention` under the signature of transformers' attention functions.

    Args:
        module: the layer; its ``is_causal`` holds where the argument is None.
        query: [B, H, N, d].
        key, value: [B, G, M, d], G dividing H (grouped queries).
        attention_mask: broadcasts to [B, H, N, M]; bool (True takes part) or values to add.
        dropout: probability of dropping a weight.
        scaling: of the scores; None for 1/sqrt(d).
        is_causal: where there is no mask, whether a token sees itself and earlier ones only.
        position_bias: values to add to the scores, beside the mask.
        kwargs: ignored where they change nothing here.

    Returns:
        [B, N, H, d], and the weights [B, H, N, M] if ``output_attentions`` asked for them.

    Raises:
        ValueError: an option that changes the scores and that this function does not have.
    """
    for name in ("softcap", "s_aux", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation={NAME!r} does not support {name}")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)  # as transformers' own functions assume
    n, m = query.shape[2], key.shape[2]
    if attention_mask is None and is_causal and n > 1:
        attention_mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril()
    if position_bias is not None:
        attention_mask = _add_bias(position_bias, attention_mask)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kwargs.get("output_attentions") or wants_maps():
        out, weights = attention_maps(query, key, value, attention_mask, scale, dropout)
        return out.transpose(1, 2).contiguous(), weights
    out = ops.attention(query, key, value, attention_mask, dropout, scale)
    return out.transpose(1, 2).contiguous(), None


def attention_maps(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`ops.attention` spelled out, for who wants to see its weights.

    Returns:
        [B, H, N, d] and the weights [B, H, N, M] (after dropout, as transformers gives them).
    """
    scores = q @ k.transpose(-2, -1) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, dropout_p)
    return weights @ v, weights


def _add_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    return bias + mask


def attention_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """The mask for `attention_forward`, by transformers' rules for ``sdpa``: None where none is
    needed, else values to add (layers may add a position bias to them), the lowest of `dtype` for
    what takes no part."""
    mask = sdpa_mask(*args, **kwargs)
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def register() -> None:
    """Make ``attn_implementation="fastvit"`` known to transformers, mask included."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def wants_maps() -> bool:
    """Whether a model that is running now was asked for its attention maps."""
    collector = output_capturing._active_collector
    if torch.compiler.is_compiling() and not collector.compiling:
        return False  # a layer is compiled by itself
    wanted = collector.get()
    return wanted is not None and "attentions" in wanted


def is_capturing(hook: Any) -> bool:
    """Whether a hook is transformers' own, for ``hidden_states`` and ``attentions``."""
    return getattr(hook, "__module__", None) == output_capturing.__name__
