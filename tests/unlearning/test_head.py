"""The search for the head: networks with several heads, with other layers that run last, and without a head."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import delfast
from delfast import InputError
from delfast.unlearning.head import find_head
from tests import cases

BATCH = (torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))


class Net(nn.Module):
    """A body, layers by name, and a function of (network, features) that makes the output."""

    def __init__(self, output: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output(self, self.body(x))


def pooled(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 2), nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(pooled(x)).relu()).sigmoid()[:, :, None, None]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lm_head = nn.Embedding(5, 6), nn.Linear(6, 5, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Any:
        return SimpleNamespace(logits=self.lm_head(self.embedding(tokens)).float(), hidden=None)


class Scaled(nn.Module):
    """A layer with a parameter of its own and another in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.fc = nn.Parameter(torch.ones(())), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


def with_auxiliary(net: Any, x: Tensor) -> Tensor:
    logits = net.fc(pooled(x))
    net.kept = net.auxiliary(pooled(x))  # runs last
    return logits


FOUND = {
    "squeeze and excitation, convolutional classifier": (
        Net(lambda n, x: n.classifier(n.se(x).mean((2, 3), True)).flatten(1),
            classifier=nn.Conv2d(6, 10, 1), se=SqueezeExcite()),
        "classifier",
    ),
    "auxiliary output computed last": (
        Net(with_auxiliary, fc=nn.Linear(6, 10), auxiliary=nn.Linear(6, 10)),
        "fc",
    ),
    "two heads, one returned": (
        Net(lambda n, x: (n.fc(pooled(x)), n.distilled(pooled(x)))[0], fc=nn.Linear(6, 10), distilled=nn.Linear(6, 10)),
        "fc",
    ),
    "Sequential with Dropout and Flatten after": (
        Net(lambda n, x: n.top(x.mean((2, 3), True)),
            top=nn.Sequential(nn.Conv2d(6, 10, 1), nn.Dropout(0.5), nn.Flatten(), nn.Identity())),
        "top.0",
    ),
    "views and casts": (
        Net(lambda n, x: n.fc(pooled(x)).double().reshape(2, -1, 12).float().view(-1, 12)[:, :10].contiguous(),
            fc=nn.Linear(6, 12)),
        "fc",
    ),
    "called twice": (
        Net(lambda n, x: (n.fc(pooled(x)), n.fc(pooled(x).relu()))[1], fc=nn.Linear(6, 10)),
        "fc",
    ),
    "two names": (
        (lambda fc: Net(lambda n, x: n.other(pooled(x)), fc=fc, other=fc))(nn.Linear(6, 10)),
        "fc",
    ),
    "parametrized, without a bias": (
        Net(lambda n, x: n.fc(pooled(x)), fc=weight_norm(nn.Linear(6, 10, bias=False))),
        "fc",
    ),
    "normalization last": (
        Net(lambda n, x: n.norm(n.fc(pooled(x))), fc=nn.Linear(6, 10), norm=nn.BatchNorm1d(10)),
        "norm",
    ),
    "the network itself": (nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), "1"),
}  # fmt: skip

ASKED = {
    "two heads, their mean (distillation)": (
        Net(lambda n, x: (n.fc(pooled(x)) + n.distilled(pooled(x))) / 2,
            fc=nn.Linear(6, 10), distilled=nn.Linear(6, 10)),
        "got none .the nearest: 'fc', 'distilled'.",
    ),
    "two heads, side by side": (
        Net(lambda n, x: torch.cat([n.a(pooled(x)), n.b(pooled(x))], 1), a=nn.Linear(6, 5), b=nn.Linear(6, 5)),
        "got none .the nearest: 'a', 'b'.",
    ),
    "softmax after": (Net(lambda n, x: n.fc(pooled(x)).softmax(1), fc=nn.Linear(6, 10)), "the nearest: 'fc'"),
    "written into": (Net(lambda n, x: n.fc(pooled(x)).div_(2), fc=nn.Linear(6, 10)), "the nearest: 'fc'"),
    "pooled after": (Net(lambda n, x: pooled(n.last(x)), last=nn.Conv2d(6, 10, 1)), "the nearest: 'last'"),
    "shared head, a sum": (
        Net(lambda n, x: n.fc(pooled(x)) + n.fc(pooled(x).relu()), fc=nn.Linear(6, 10)),
        "the nearest: 'fc'",
    ),
    "a layer around a layer": (Net(lambda n, x: n.top(pooled(x)), top=Scaled()), "the nearest: 'top', 'top.fc'"),
    "functional": (
        Net(lambda n, x: nn.functional.linear(n.norm(pooled(x)), n.table.weight),
            norm=nn.LayerNorm(6), table=nn.Embedding(10, 6)),
        "the nearest: 'norm', 'table'",
    ),
    "no layer at all": (nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(10)), "got none; name"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_the_head_is_the_layer_whose_output_is_the_networks(case: str) -> None:
    network, name = FOUND[case]
    assert find_head(network, BATCH) == name
    assert not any(module._forward_hooks for module in network.modules())
    assert find_head(network, BATCH, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none")) == name


@pytest.mark.parametrize("case", ASKED)
def test_where_there_is_none_or_more_than_one_it_is_asked_for(case: str) -> None:
    network, message = ASKED[case]
    with pytest.raises(InputError, match=message):
        find_head(network, BATCH)


def test_with_a_loss_fn_it_is_what_the_model_returned() -> None:
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]).logits.transpose(1, 2), batch[0], reduction="none").mean(1)

    assert find_head(Tied(), (tokens,), loss_fn) == "lm_head"
    network = Net(
        lambda n, x: (n.fc if x.mean() > 0 else n.other)(pooled(x)), fc=nn.Linear(6, 10), other=nn.Linear(6, 10)
    )

    def twice(model: Any, batch: Any) -> Tensor:
        model.output = lambda n, x: n.fc(pooled(x))
        first = model(batch[0])
        model.output = lambda n, x: n.other(pooled(x))
        return (first + model(batch[0])).sum(1)

    with pytest.raises(InputError, match=r"got 2 \(the nearest: 'fc', 'other'\)"):
        find_head(network, BATCH, twice)
    with pytest.raises(InputError, match="loss_fn did not call the model"):
        find_head(network, BATCH, lambda m, b: m.fc(pooled(m.body(b[0]))).sum(1))


@pytest.mark.parametrize(
    "family", ["squeezenet1_1", "mobilenet_v3_small", "densenet121", "efficientnet_b0", "regnet_y_400mf"]
)
def test_published_networks(family: str) -> None:
    models = pytest.importorskip("torchvision.models")
    network = getattr(models, family)(num_classes=4)
    batch = (torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    expected = {
        "squeezenet1_1": "classifier.1", "mobilenet_v3_small": "classifier.3", "densenet121": "classifier",
        "efficientnet_b0": "classifier.1", "regnet_y_400mf": "fc",
    }[family]  # fmt: skip
    if family == "squeezenet1_1":  # pooling comes after its convolution
        with pytest.raises(InputError, match=r"the nearest: 'classifier\.1'"):
            find_head(network, batch)
    else:
        assert find_head(network, batch) == expected


def test_a_scripted_network_needs_the_name() -> None:
    with pytest.warns(FutureWarning):
        scripted = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)))
    with pytest.raises(InputError, match="the head's name for a ScriptModule"):
        find_head(scripted, BATCH)


@pytest.mark.slow  # compiling takes seconds
def test_compiled_parts_run_as_they_are_written() -> None:
    compiled = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    network = Net(lambda n, x: n.fc(n.block(pooled(x))), block=nn.Linear(6, 6), fc=nn.Linear(6, 10))
    network.block = torch.compile(network.block, backend=backend, fullgraph=True)  # type: ignore[assignment]
    network.fc.compile(backend=backend, fullgraph=True)
    assert find_head(network, BATCH) == "fc" and not compiled
    assert type(network.block).__name__ == "OptimizedModule" and network.fc._compiled_call_impl is not None
    network(BATCH[0])
    assert len(compiled) == 2
    network.block, network.top = nn.Identity(), torch.compile(nn.Sequential(nn.Linear(6, 10)), backend=backend)
    network.output = lambda n, x: n.top(pooled(x))
    assert find_head(network, BATCH) == "top._orig_mod.0"
    result = delfast.unlearn(network, retain=[BATCH], forget=[BATCH], init=copy.deepcopy(network), epochs=1)
    assert {"top.0.weight", "top.0.bias"} <= result.mask.parameters.keys()


def test_the_head_is_found_through_a_compiled_loss_fn() -> None:
    def loss(model: Any, batch: Any) -> Any:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    compiled = torch.compile(loss, backend="eager")
    assert find_head(cases.SmallNet(), BATCH, compiled) == "head"  # type: ignore[arg-type]


def test_unlearn_trains_the_head_that_it_found_or_was_given() -> None:
    network, _ = FOUND["squeeze and excitation, convolutional classifier"]
    before = network.classifier.weight.detach().clone()
    result = delfast.unlearn(network, forget=[BATCH], retain=[BATCH], init=copy.deepcopy(network), epochs=1)
    assert result.head == "classifier" and bool((network.classifier.weight != before).all())
    asked, _ = ASKED["softmax after"]
    with pytest.raises(InputError, match="name the classifier head"):
        delfast.unlearn(asked, forget=[BATCH], retain=[BATCH], init=copy.deepcopy(asked), epochs=1)
    init = copy.deepcopy(asked)
    assert delfast.unlearn(asked, forget=[BATCH], retain=[BATCH], init=init, epochs=1, head="fc").head == "fc"
    assert find_head(cases.SmallNet(), BATCH) == "head"


def test_a_loop_of_ones_own_trains_what_unlearn_trains() -> None:
    """The lines of docs/distributed.md."""
    batches = cases.image_batches()
    model = cases.SmallNet()
    result = delfast.unlearn(
        cases.SmallNet(), retain=batches, forget=[*batches], init=cases.SmallNet, budget=0.3, epochs=1, lr=0.1
    )
    mask = delfast.localize(model, batches, budget=0.3)
    head = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith("head.")}
    trained = mask.widen(list(head), head)
    assert trained.selected > mask.selected
    assert result.mask.names == trained.names and result.head == "head"
    assert all(trained[name].dense().all() and result.mask[name].dense().all() for name in head)
