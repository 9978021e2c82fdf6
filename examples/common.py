"""Shared by the examples: handwritten digits with a hundred wrong labels, and the report of what was forgotten."""

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import delfast

WRONG = 100


def digits() -> tuple[Tensor, Tensor]:
    """Return images (1797, 1, 8, 8) and labels (1797,). The first 100 labels are wrong: the forget set."""
    data = load_digits()
    images, labels = torch.tensor(data.images).float()[:, None] / 16, torch.tensor(data.target)
    labels[:WRONG] = (labels[:WRONG] + 1) % 10
    return images, labels


def report(
    before: nn.Module, after: nn.Module, mask: delfast.Mask, logits: Callable[..., Tensor] = nn.Module.__call__
) -> None:
    """Print how many wrong labels each network predicts, and how many elements outside the mask changed."""
    images, labels = digits()
    for name, model in (("before", before), ("after", after)):
        remembered = (logits(model.eval(), images[:WRONG]).argmax(1) == labels[:WRONG]).sum()
        print(f"{name}: {remembered} of {WRONG} wrong labels remembered")
    old, flags = dict(before.named_parameters()), mask.to_dense()
    changed = sum(int(((p != old[name]) & ~flags[name]).sum()) for name, p in after.named_parameters())
    print(f"changed outside the mask: {changed}")
