"""Multi-head attention: a function made of projections. Each projection is a linear layer, which has a rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from delfast.layer_types import register_rule


@dataclass(frozen=True)
class Composite:
    """The rule of a function that is made of other functions: ``compute`` computes the same by calling these."""

    compute: Callable[..., Any]


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``torch.nn.functional.multi_head_attention_forward`` with every projection by ``linear``.

    Inside, tensors are (N, T, E): what is added to them has the examples along dim 0.
    """
    if is_causal and attn_mask is None:
        raise RuntimeError("expected an attn_mask with is_causal=True, got None; pass the causal mask")
    is_batched = query.dim() == 3
    data = {id(t): t.transpose(0, 1) if is_batched else t.unsqueeze(0) for t in (query, key, value)}
    q, k, v = (data[id(t)] for t in (query, key, value))  # the same tensor is projected once
    weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    if use_separate_proj_weight:
        q, k, v = _separate_projections((q, k, v), weights, in_proj_bias)
    else:
        q, k, v = _packed_projections((q, k, v), in_proj_weight, in_proj_bias)
    mask = _merged_mask(attn_mask, key_padding_mask if is_batched else _first(key_padding_mask), q, num_heads)
    if bias_k is not None and bias_v is not None:
        k, v, mask = _longer(k, v, mask, *(t.expand(len(k), 1, -1) for t in (bias_k, bias_v)))
    q, k, v = (
        t.reshape(*t.shape[:2], num_heads, t.shape[2] // num_heads).transpose(1, 2) for t in (q, k, v)
    )  # (N, heads, T, E / heads)
    if static_k is not None:
        k = static_k.view(len(q), num_heads, *static_k.shape[1:])
    if static_v is not None:
        v = static_v.view(len(q), num_heads, *static_v.shape[1:])
    if add_zero_attn:
        k, v, mask = _longer(k, v, mask, *(t.new_zeros(*t.shape[:2], 1, t.shape[3]) for t in (k, v)))
    dropout = dropout_p if training else 0.0
    attention: Tensor | None = None
    if need_weights:
        scores = (q / q.shape[3] ** 0.5) @ k.transpose(2, 3)
        attention = functional.dropout((scores if mask is None else scores + mask).softmax(dim=3), dropout)
        output = attention @ v
    else:
        output = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
    output = output.permute(2, 0, 1, 3).flatten(2)  # (T, N, E), contiguous
    output = functional.linear(output, out_proj_weight, out_proj_bias)
    if attention is not None and average_attn_weights:
        attention = attention.mean(dim=1)
    if is_batched:
        return output, attention
    return output.squeeze(1), None if attention is None else attention.squeeze(0)


def _first(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.unsqueeze(0)


def _packed_projections(data: tuple[Tensor, ...], weight: Any, bias: Tensor | None) -> list[Tensor]:
    """Project q, k and v by the parts of one weight (3 E, E).

    Each different tensor is projected by the whole weight, since a part of a parameter has no rule.
    """
    projected = {id(t): functional.linear(t, weight, bias).chunk(3, dim=2) for t in data}
    return [projected[id(t)][part] for part, t in enumerate(data)]


def _separate_projections(
    data: tuple[Tensor, ...], weights: tuple[Tensor | None, ...], bias: Tensor | None
) -> list[Tensor]:
    biases = [None] * 3 if bias is None else bias.chunk(3)
    projected: list[Tensor] = []
    for t, weight, part in zip(data, weights, biases, strict=True):
        assert weight is not None
        output = functional.linear(t, weight)
        projected.append(output if part is None else output + part)
    return projected


def _merged_mask(attention: Tensor | None, padding: Tensor | None, q: Tensor, num_heads: int) -> Tensor | None:
    """Return the sum of both masks, as numbers to add to the scores (N, heads, T, S)."""
    masks = []
    if attention is not None:
        attention = _as_numbers(attention, q)
        masks.append(attention if attention.dim() == 2 else attention.view(len(q), num_heads, *attention.shape[1:]))
    if padding is not None:
        masks.append(_as_numbers(padding, q)[:, None, None, :])
    return None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]


def _as_numbers(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))


def _longer(
    k: Tensor, v: Tensor, mask: Tensor | None, more_k: Tensor, more_v: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Append one position to k and v, which all others may attend to."""
    mask = None if mask is None else functional.pad(mask, (0, 1))
    return torch.cat((k, more_k), dim=-2), torch.cat((v, more_v), dim=-2), mask


register_rule(Composite(multi_head_attention), functional.multi_head_attention_forward)
