"""The host's cost of one more batch: dispatched operations, and reads from the device, which wait for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import delfast
from delfast.experiments.networks import build
from delfast.localization.critical_channels import critmem
from delfast.localization.per_example import PerExampleGradients
from delfast.localization.per_example.passes import NotStatic
from delfast.naming import trainable_parameters
from tests import cases
from tests.localization.per_example.loop import cross_entropy, in_double
from tests.localization.per_example.routing import routed
from tests.networks import Attention, DeadAtFirst

# operations that wait for the device: they read a number from it, or the shape of their result depends on values
READS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal.default", "item")


class Dispatched(TorchDispatchMode):
    """A count of the operations inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return self.names.total()

    @property
    def reads(self) -> int:
        return sum(count for name, count in self.names.items() if any(read in name for read in READS))


def of_one_more_batch(job: Callable[[int], Any]) -> tuple[float, float]:
    """Return the operations and the reads that one more batch adds to ``job(batches)``, after its first batches."""
    job(1)  # what is cached for good
    counted = []
    for batches in (3, 5):
        with Dispatched() as dispatched:
            job(batches)
        counted.append(dispatched)
    return (counted[1].count - counted[0].count) / 2, (counted[1].reads - counted[0].reads) / 2


def resnet(examples: int = 2) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = build("resnet18-thin", 10, 3, 32).eval().to(memory_format=torch.channels_last)
    images = torch.randn(examples, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return model, (images, torch.arange(examples) % 10)


def plain(model: nn.Module, batch: Any) -> int:
    """Return the operations of a plain forward and backward pass."""
    with Dispatched() as dispatched:
        torch.autograd.grad(functional.cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))
    return dispatched.count


def job(kind: str, model: nn.Module, batch: Any) -> Callable[[int], Any]:
    # a loss of the user's, since delfast's own checks the labels
    return {
        "score": lambda n: delfast.score(model, [batch] * n, "grad", per_example=True, loss_fn=cross_entropy),
        "squares": lambda n: delfast.score(model, [batch] * n, "squared_grad", per_example=True, loss_fn=cross_entropy),
        "signed channels": lambda n: delfast.signed_channels(model, [batch] * n, loss_fn=cross_entropy),
    }[kind]


# measured: 1.21 for each
@pytest.mark.parametrize("examples", [2, 6])
@pytest.mark.parametrize("kind", ["score", "squares", "signed channels"])
def test_operations_of_a_batch_of_resnet(kind: str, examples: int) -> None:
    model, batch = resnet(examples)
    operations, reads = of_one_more_batch(job(kind, model, batch))
    assert reads == 0
    assert operations <= 1.3 * plain(model, batch)


@pytest.mark.parametrize("kind", ["score", "squares", "signed channels"])
def test_operations_of_a_batch_of_a_transformer(kind: str) -> None:
    model, batch = Attention().eval(), (torch.randn(6, 5, 8), torch.arange(6) % 3)
    operations, reads = of_one_more_batch(job(kind, model, batch))
    assert reads == 0
    assert operations <= 1.9 * plain(model, batch)  # views of each linear layer's input and δ by channel


@pytest.mark.parametrize("name", ["everything", "embedding"])
def test_nothing_is_read_for_a_batch(name: str) -> None:
    torch.manual_seed(0)
    if name == "everything":
        model: nn.Module = cases.Everything().eval()
        batch = cases.everything_batches(6)[0]
    else:
        model = nn.Sequential(
            nn.Embedding(9, 4, padding_idx=1, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(20, 3)
        )
        batch = (torch.randint(0, 9, (6, 5)), torch.arange(6) % 3)
    for kind in ("score", "signed channels"):
        assert of_one_more_batch(job(kind, model, batch))[1] == 0, kind


class ScaledByArray(nn.Module):
    """A network with an array of NumPy, which cannot be intercepted: every batch is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).tanh() / torch.as_tensor(numpy.array(2.0, dtype=numpy.float32)))


def test_a_compared_batch_reads_once() -> None:
    model, batch = ScaledByArray().eval(), (torch.randn(6, 4), torch.arange(6) % 3)
    for kind in ("score", "signed channels"):
        assert of_one_more_batch(job(kind, model, batch))[1] == 1, kind


def test_critmem_reads_as_often_as_it_searches() -> None:
    model, (images, _) = resnet(6)
    batch = (images, model(images).argmax(dim=1))
    for steps in (1, 2):
        operations, reads = of_one_more_batch(lambda n, steps=steps: critmem(model, [batch] * n, max_channels=steps))
        # a pass: whether losses and scores are finite, which weights have channels to zero, the examples to go on with
        assert reads <= 4 * (steps + 1)
        assert operations <= 1.5 * plain(model, batch) * (steps + 1)


# Static passes


def summed(model: nn.Module, batches: list[Any], static: list[bool]) -> tuple[PerExampleGradients, int, int]:
    sums = PerExampleGradients(model, trainable_parameters(model), cross_entropy, "abs")
    reads = runs = 0
    for batch, is_static in zip(batches, static, strict=True):
        if is_static and sums.passes.is_static(batch):
            with Dispatched() as dispatched:
                sums.passes.run_static(batch)
            reads, runs = reads + dispatched.reads, runs + 1
        else:
            sums.add(batch)
    return sums, reads, runs


@pytest.mark.parametrize("name", ["resnet18-thin", "vit", "everything", "attention"])
def test_a_static_pass_adds_what_an_ordinary_one_adds(name: str) -> None:
    torch.manual_seed(0)
    model, batches = {
        "resnet18-thin": lambda: (build("resnet18-thin", 10, 3, 8).eval(), [
            (torch.randn(n, 3, 8, 8), torch.randint(0, 10, (n,))) for n in (6, 6, 5, 6)
        ]),
        "vit": lambda: (build("vit", 10, 3, 8).eval(), [(torch.randn(6, 3, 8, 8), torch.randint(0, 10, (6,)))] * 2),
        "everything": lambda: (cases.Everything().eval(), cases.everything_batches(6) * 3),
        "attention": lambda: (Attention().eval(), [(torch.randn(n, 5, 8), torch.arange(n) % 3) for n in (6, 6, 5)]),
    }[name]()  # fmt: skip
    before = [p.requires_grad for p in model.parameters()]
    expected, _, _ = summed(model, batches, [False] * len(batches))
    sums, reads, runs = summed(model, batches, [True] * len(batches))
    assert runs == len(batches) - 1 and reads == 0
    assert [p.requires_grad for p in model.parameters()] == before
    for name, total in expected.sums.items():
        assert torch.equal(sums.sums[name], total), name
    assert {id(t) for t in sums.state().values()} == {id(t) for t in sums.sums.values()}


class Branched(nn.Module):
    """A network that calls another function for some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.other = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x.sigmoid() if self.other else x.tanh())


def test_a_static_pass_that_differs_adds_nothing() -> None:
    model, batch = Branched().eval(), (torch.randn(6, 4), torch.arange(6) % 3)
    sums = PerExampleGradients(model, trainable_parameters(model), cross_entropy, "abs")
    assert not sums.passes.is_static(batch)
    sums.add(batch)
    assert sums.passes.is_static(batch) and not sums.passes.is_static((batch[0][:4], batch[1][:4]))
    before = {name: total.clone() for name, total in sums.sums.items()}
    model.other = True
    with pytest.raises(NotStatic, match="makes other calls than its trial"):
        sums.passes.run_static(batch)
    assert all(torch.equal(total, before[name]) for name, total in sums.sums.items())
    sums.add(batch)  # by the comparison
    for name, total in sums.sums.items():
        assert not torch.equal(total, before[name]), name


def test_what_is_not_static() -> None:
    model, [(x, y)] = in_double(DeadAtFirst(), [(torch.randn(6, 4), torch.arange(6) % 3)])
    x[:, 0] = -1
    sums = PerExampleGradients(model, trainable_parameters(model), cross_entropy, "abs")
    sums.add((x, y))
    assert not sums.passes.is_static((x, y))  # a layer whose δ was zero has no example axis yet
    model, batches = routed("shuffled values", 0)
    sums = PerExampleGradients(model, trainable_parameters(model), cross_entropy, "abs")
    sums.add(batches[0])
    assert not sums.passes.is_static(batches[0])  # it routes by data: a comparison checks every batch


def test_layers_on_one_input_share_its_conversion_by_autocast() -> None:
    class Projects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.query, self.key, self.value = (nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).float().tanh()
            return (self.query(x) * self.key(x) + self.value(x)).float()

    model, batch = Projects().eval(), (torch.randn(6, 4), torch.arange(6) % 3)
    sums = PerExampleGradients(model, trainable_parameters(model), cross_entropy, "abs")
    with torch.autocast("cpu", torch.bfloat16):
        sums.add(batch)
        with Dispatched() as ours:
            sums.add(batch)
        with Dispatched() as theirs:
            torch.autograd.grad(cross_entropy(model, batch).sum(), list(model.parameters()))
    counts = [dispatched.names["aten._to_copy.default"] for dispatched in (ours, theirs)]
    # forward and backward, autograd converts x for each of the three, and their weights' gradients
    assert counts[0] < counts[1] - 3, counts
