"""The published algorithm, transcribed plainly: double argsort over all elements, top-h mean per row.

As the DEL authors describe their code (arXiv 2412.02432): every element gets its score, or its channel's; the k =
int(budget × P) highest of all elements are selected; sorts are stable, so that ties fall to the lower index.
"""

from __future__ import annotations

import torch
from torch import Tensor


def published_mask(
    theta: dict[str, Tensor], grad: dict[str, Tensor] | None, criterion: str, granularity: str, budget: float
) -> dict[str, Tensor]:
    scores = {}
    for name, parameter in theta.items():
        element = {
            "weighted_grad": lambda p=parameter, n=name: (p * grad[n]).abs(),
            "grad": lambda n=name: grad[n].abs(),
            "weight": lambda p=parameter: p.abs(),
        }[criterion]()
        if granularity == "channel" and parameter.ndim > 1:
            rows = element.flatten(1)
            h = max(1, min(int(0.1 * parameter.shape[0]), rows.shape[1]))
            mean = rows.topk(h, dim=1).values.mean(dim=1)
            element = mean.view(-1, *[1] * (parameter.ndim - 1)).expand_as(parameter)
        scores[name] = element
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    ranks = torch.argsort(torch.argsort(flat, descending=True, stable=True), stable=True)
    chosen = ranks < int(budget * flat.numel())
    parts = chosen.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}
