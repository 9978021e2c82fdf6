"""CritMem against the loop over examples. The channels of all examples are compared before anything is timed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.conftest import Versus
from delfast.experiments.networks import build
from delfast.localization.critical_channels import critmem
from tests.localization.critmem_loop import loop

Found = list[tuple[list[tuple[str, int]], bool]]

EXAMPLES, BATCH, MOST = 256, 64, 5
EVERY = 8  # the loop, which is slow, is timed on every eighth example: 32 of them


def memorised(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network that has memorised 256 images of noise; labels that it gets wrong are replaced."""
    torch.manual_seed(0)
    model, images, labels = build(name, 10, 3, 32), torch.randn(EXAMPLES, 3, 32, 32), torch.randint(0, 10, (EXAMPLES,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(10):
        for batch in torch.randperm(EXAMPLES).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return model, images, model(images).argmax(dim=1)


@pytest.mark.parametrize(("name", "target"), [("resnet18", ">= 3 x"), ("resnet18-thin", "reported")])
def test_critmem_against_the_loop(versus: Versus, name: str, target: str) -> None:
    model, images, labels = memorised(name)
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    subset = range(0, EXAMPLES, EVERY)

    def ours(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Found:
        return [(list(e.channels), e.flipped) for e in critmem(model, batches, max_channels=MOST).examples]

    found, looped = ours(model, batches), loop(model, [(images, labels)], MOST, "fc")
    exact = ours(copy.deepcopy(model).double(), [(x.double(), y) for x, y in batches])
    same, ours_exact, loop_exact = (
        sum(a == b for a, b in zip(one, other, strict=True))
        for one, other in ((found, looped), (found, exact), (looped, exact))
    )
    # float32 decides some near ties by its rounding, in the loop as here
    assert EXAMPLES - ours_exact <= max(2, 2 * (EXAMPLES - loop_exact))
    # each zeroed channel costs one pass of the network, and the end one more: the loop's time is scaled by passes
    looks = sum(len(channels) + 1 for channels, _ in found) / sum(len(looped[x][0]) + 1 for x in subset)
    ratio = looks * versus(
        lambda: ours(model, batches), lambda: loop(model, [(images, labels)], MOST, "fc", subset), rounds=3
    )
    versus.benchmark.extra_info.update(
        examples=EXAMPLES, loop_examples=len(subset), max_channels=MOST, batch=BATCH, same=same,
        ours_as_float64=ours_exact, loop_as_float64=loop_exact, scaled_by=looks,
        channels_per_example=sum(len(channels) for channels, _ in found) / EXAMPLES,
        flipped=sum(flipped for _, flipped in found),
    )  # fmt: skip
    versus.report(f"{ratio:.1f} x the loop's speed, {same / EXAMPLES:.1%} the same", f"{target}, >= 99 % the same")
