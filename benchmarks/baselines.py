"""Baselines in plain PyTorch, as they are commonly written: the other side of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def element_scores(theta: Sequence[Tensor], grad: Sequence[Tensor]) -> list[Tensor]:
    return [(t * g).abs() for t, g in zip(theta, grad, strict=True)]


def channel_scores(theta: Sequence[Tensor], grad: Sequence[Tensor], top_h: Sequence[int]) -> list[Tensor]:
    """Return for each parameter (rows,): the mean of each row's ``top_h`` highest scores; for 1-D ones, the scores."""
    scores = element_scores(theta, grad)
    return [
        score.flatten(1).topk(h, dim=1).values.mean(dim=1) if score.ndim > 1 else score
        for score, h in zip(scores, top_h, strict=True)
    ]


def expanded(channels: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Return the score of each element's channel, in the element's place."""
    return [
        c.view(-1, *[1] * (t.ndim - 1)).expand_as(t) if t.ndim > 1 else c.view_as(t)
        for c, t in zip(channels, like, strict=True)
    ]


def double_argsort(scores: Sequence[Tensor], k: int) -> Tensor:
    """Return the mask, bool (P,), in the usual way: rank every element by sorting twice."""
    flat = torch.cat([score.reshape(-1) for score in scores])
    return torch.argsort(torch.argsort(flat, descending=True)) < k
