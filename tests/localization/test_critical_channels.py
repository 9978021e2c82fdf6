"""CritMem against its loop over examples in float64; the end of its search; the ranking by its counts."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import delfast
from delfast import InputError
from delfast.experiments.networks import build
from delfast.localization.critical_channels import CriticalChannels, critmem
from tests import cases
from tests.localization.critmem_loop import Found, as_found, loop
from tests.localization.per_example.loop import in_double
from tests.networks import Attention, Checkpointed, DeadAtFirst, InPlace, Interleaved, Odd, Windows


class Convolutions(nn.Module):
    """Grouped, depthwise, strided and transposed; two layers that are called twice, one of them on another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.depthwise = nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.strided = nn.Conv2d(6, 6, 3, stride=2, bias=False)
        self.up = nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2)
        self.up_again = nn.ConvTranspose2d(8, 8, 3, padding=1)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.grouped(x).relu()).relu()
        x = self.up(self.strided(x).tanh())
        x = self.up_again(self.up_again(x).relu()).relu()
        return self.head(self.twice(self.twice(x.flatten(2).transpose(1, 2)).tanh().mean(dim=1)).relu())


class SequenceFirst(nn.Module):
    """Layers whose examples lie along dim 1, and interleaved along dim 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.flat, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, 6)
        x = self.first(x.transpose(0, 1)).relu()  # (T, N, 8)
        return self.head(self.flat(x.flatten(0, 1)).view(x.shape).relu().mean(dim=0))


def predicted(model: nn.Module, inputs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return batches whose labels are the network's predictions, so that none is wrong at first."""
    with torch.no_grad():
        return [(x, model(x).argmax(dim=1)) for x in inputs]


def assert_same(
    model: nn.Module, inputs: list[Tensor], max_channels: int = 6, head: str | None = "head"
) -> list[Found]:
    model = model.double().eval()
    batches = predicted(model, [x.double() if x.is_floating_point() else x for x in inputs])
    found = loop(model, batches, max_channels, head)
    assert as_found(critmem(model, batches, max_channels=max_channels, include_head=head is None)) == found
    return found


NETWORKS: dict[str, Callable[[], tuple[nn.Module, list[Tensor]]]] = {
    "small": lambda: (cases.SmallNet(), [torch.randn(n, 3, 8, 8) for n in (9, 7, 1)]),
    "everything": lambda: (cases.Everything(), [torch.randint(0, 11, (n, 6)) for n in (8, 3)]),
    "convolutions": lambda: (Convolutions(), [torch.randn(n, 4, 7, 7) for n in (8, 4)]),
    "sequence first": lambda: (SequenceFirst(), [torch.randn(n, 3, 6) for n in (8, 1, 5)]),
    "in place": lambda: (InPlace(), [torch.randn(n, 3, 4, 4) for n in (8, 5)]),
    "windows": lambda: (Windows(), [torch.randn(6, 3, 2, 4, 4)]),
    "checkpointed": lambda: (Checkpointed(False), [torch.randn(6, 3, 5, 5)]),
}


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("head", ["head", None])
def test_the_same_channels_in_the_same_order(name: str, head: str | None) -> None:
    model, inputs = NETWORKS[name]()
    if name == "windows":
        head = head and "sequence"
    found = assert_same(model, inputs, head=head)
    assert sum(len(channels) for channels, _ in found) > len(found)


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet18-thin", "vit"])
def test_own_networks(name: str) -> None:
    model = build(name, 10, 3, 16)
    head = "fc" if name == "resnet18-thin" else "mlp_head.1"
    assert isinstance(dict(model.named_modules())[head], nn.Linear)
    found = assert_same(model, [torch.randn(4, 3, 16, 16)], 4, head)
    assert any(channels for channels, _ in found)


def test_attention_of_torch() -> None:
    model = Attention()
    names = {n for n, p in model.named_parameters() if n.endswith("weight") and p.ndim > 1}
    batches = predicted(model.double().eval(), [torch.randn(6, 4, 8).double()])
    result = critmem(model, batches, max_channels=5)
    assert set(result.counts) == names and any(len(example.channels) > 1 for example in result.examples)


def test_float32_agrees_with_the_loop() -> None:
    model = cases.SmallNet().eval()
    batches = predicted(model, [torch.randn(64, 3, 8, 8)])
    ours, theirs = as_found(critmem(model, batches, max_channels=8)), loop(model, batches, 8)
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 63


@pytest.mark.parametrize("around", [True, False])
def test_16_bits(around: bool) -> None:
    model = cases.SmallNet().eval()
    [(x, y)] = predicted(model, [torch.randn(32, 3, 8, 8)])
    exact = critmem(model, [(x, y)], max_channels=3)
    if around:
        with torch.autocast("cpu", torch.bfloat16):
            result = critmem(model, [(x, y)], max_channels=3)
    else:
        result = critmem(model.bfloat16(), [(x.bfloat16(), y)], max_channels=3)
    firsts = [[e.channels[0] for e in found.examples if e.channels] for found in (result, exact)]
    common = sum((Counter(firsts[0]) & Counter(firsts[1])).values())
    assert len(firsts[1]) == 32 and common >= 24  # predictions and near ties differ in 8 bits
    assert all(mean.dtype == torch.float64 for mean in result.first.values())


# When the search stops


def linear(rows: list[list[float]], head: list[list[float]]) -> nn.Module:
    model = nn.Sequential(
        nn.Linear(len(rows[0]), len(rows), bias=False), nn.Linear(len(head[0]), len(head), bias=False)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(rows))
        model[1].weight.copy_(torch.tensor(head))
    return model.eval()


def test_stop_rules() -> None:
    # hidden units 0 and 1 support class 0 by 1 and 2, unit 2 supports class 1 by 2.5
    model = linear([[1.0], [2.0], [2.5]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    x = torch.tensor([[1.0]])
    right, wrong = (x, torch.tensor([0])), (x, torch.tensor([1]))
    found = critmem(model, [right, wrong])
    assert as_found(found) == [([("0.weight", 1)], True), ([], True)]  # unit 1 alone is enough; wrong from the start
    assert [e.example for e in found.examples] == [0, 1]
    # 4.5 for class 0 against a bias: every unit has to go, and K may be smaller
    deep = linear([[1.0], [2.0], [1.5]], [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert as_found(critmem(deep, [right], max_channels=2)) == [([("0.weight", 1), ("0.weight", 2)], False)]
    # all zeroed: the logits are equal, the prediction is still the first class, and no score is positive
    order = [("0.weight", 1), ("0.weight", 2), ("0.weight", 0)]
    assert as_found(critmem(deep, [right])) == [(order, False)]
    # no channel supports the label
    against = linear([[1.0]], [[0.0], [0.0]])
    assert as_found(critmem(against, [right])) == [([], False)]


def test_ties_fall_to_the_lower_parameter_and_row() -> None:
    model = linear([[1.0], [1.0], [1.0]], [[1.0, 1.0, 1.0], [0.5, 0.5, 0.5]])
    model = nn.Sequential(nn.Linear(1, 1, bias=False), *model)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    x, y = torch.ones(2, 1), torch.tensor([0, 0])
    # row 0 of the first layer removes all of it, which is three times what a hidden unit does
    assert as_found(critmem(model, [(x, y)], max_channels=1))[0][0] == [("0.weight", 0)]
    model[0].weight.requires_grad_(False)
    assert as_found(critmem(model, [(x, y)], max_channels=2))[1][0] == [("1.weight", 0), ("1.weight", 1)]
    one = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), nn.Linear(1, 2, bias=False)).eval()
    with torch.no_grad():
        for layer, weight in zip(one, ([[1.0]], [[1.0]], [[1.0], [0.0]]), strict=True):
            layer.weight.copy_(torch.tensor(weight))
    assert as_found(critmem(one, [(x[:1], y[:1])], max_channels=1))[0][0] == [("0.weight", 0)]


def test_an_example_does_not_depend_on_its_batch() -> None:
    model = cases.SmallNet().double().eval()
    x = torch.randn(12, 3, 8, 8).double()
    whole = critmem(model, predicted(model, [x]))
    for parts in (x.split(1), x.split(5)):
        assert critmem(model, predicted(model, list(parts))).examples == whole.examples


def test_preserving_the_others() -> None:
    # unit 0 supports both examples' labels, unit 1 supports the first one's alone, a little less
    model = linear([[1.0, 1.0], [0.9, 0.0]], [[1.0, 1.0], [0.0, 0.0]])
    batch = (torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    plain, spared = (critmem(model, [batch], max_channels=1, preserve=w) for w in (0.0, 1.0))
    assert [e.channels for e in plain.examples] == [(("0.weight", 0),), (("0.weight", 0),)]
    # by hand: loss log(1 + e^-z), so s = p z_i with p = 1 / (1 + e^z); half of the other's score is taken off
    z, p = [[1.0, 0.9], [3.0, 0.0]], [1 / (1 + 2.718281828**1.9), 1 / (1 + 2.718281828**3)]
    s = [[p[x] * z[x][i] for i in range(2)] for x in range(2)]
    by_hand = [max(range(2), key=lambda i: s[x][i] - s[1 - x][i] / 2) for x in range(2)]
    assert by_hand == [1, 0] and [e.channels for e in spared.examples] == [(("0.weight", i),) for i in by_hand]


# The ranking


def test_counts_and_scores() -> None:
    model = cases.SmallNet().eval()
    batches = predicted(model, [torch.randn(10, 3, 8, 8), torch.randn(6, 3, 8, 8)])
    result = critmem(model, [(torch.arange(len(y)) + 50, x, y) for x, y in batches])
    assert [e.example for e in result.examples] == [*range(50, 60), *range(50, 56)]
    counted = Counter(channel for e in result.examples for channel in e.channels)
    assert {(n, i): int(c) for n, count in result.counts.items() for i, c in enumerate(count) if c} == counted
    signed = delfast.signed_channels(model, batches)
    for name, mean in result.first.items():
        expected = (-torch.from_numpy(signed[name])).clamp(min=0).mean(dim=0) * (name != "head.weight")
        torch.testing.assert_close(mean.float(), expected, rtol=1e-4, atol=1e-7)
    units = result.unit_scores()
    for name, scores in units.items():
        count, mean = result.counts[name], result.first[name]
        assert torch.equal(scores.floor(), count.float()) and bool(((scores > count) == (mean > 0)).all())
    scores = delfast.score(model, batches, "critmem")
    assert scores.examples == 16 and scores.gradients is None
    expected = [units.get(n, torch.zeros(p.shape[0])) for n, p in model.named_parameters()]
    assert torch.equal(scores.channel_scores(), torch.cat(expected))
    assert torch.equal(scores.channel_scores("sum"), scores.channel_scores())


def test_a_tie_break_never_outranks_a_count() -> None:
    counts = torch.tensor([0, 1, 1, 50_000, 50_001, 2**24 - 2])
    first = torch.tensor([1e30, 0.0, 1.0, 1e30, 0.0, 1e30], dtype=torch.float64)
    scores = CriticalChannels((), {"w": counts}, {"w": first}).unit_scores()["w"]
    assert scores.dtype == torch.float32 and torch.equal(scores.floor().long(), counts)
    assert scores.tolist() == sorted(scores.tolist()) and scores[2] == 1.5


def test_masks() -> None:
    model = cases.SmallNet().eval()
    batches = predicted(model, [torch.randn(16, 3, 8, 8)])
    scores = delfast.score(model, batches, "critmem")
    mask = scores.select(0.2)
    assert mask.metadata["criterion"] == "critmem" and mask.metadata["examples"] == 16
    assert delfast.localize(model, batches, 0.2, criterion="critmem").digest == mask.digest
    flags = torch.cat([p.flags for p in mask.parameters.values()])
    units = scores.channel_scores()
    assert units[flags].min() >= units[~flags].max() and not mask.parameters["head.weight"].flags.any()
    few = delfast.score(model, batches, "critmem", max_channels=1).channel_scores()
    assert few.floor().sum() == 16 and not torch.equal(few, units)


@pytest.mark.long
def test_it_does_not_depend_on_the_number_of_threads(one_and_two_threads: tuple[int, int]) -> None:
    model = build("resnet18-thin", 10, 3, 16).eval()
    batches = predicted(model, [torch.randn(8, 3, 16, 16)])
    results = []
    for threads in (*one_and_two_threads, one_and_two_threads[1]):
        torch.set_num_threads(threads)
        results.append(critmem(model, batches, max_channels=5))
    assert results[0].examples == results[1].examples == results[2].examples
    assert all(torch.equal(first, results[2].first[name]) for name, first in results[1].first.items())


def test_the_model_is_left_as_it_was() -> None:
    model = cases.SmallNet()
    model.train()
    model.features[1].eval()
    model.features[0].weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    x = torch.randn(6, 3, 8, 8)
    evaluated = copy.deepcopy(model).eval()
    batches = predicted(evaluated, [x])
    result = critmem(model, batches)
    assert "features.0.weight" not in result.counts and result.examples == critmem(evaluated, batches).examples
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        critmem(model, [*batches, (x[:, :2], batches[0][1])])
    assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert bool((model.head.weight.grad == 1).all()) and model.features[3].weight.grad is None


def test_batches_of_any_form() -> None:
    model = cases.SmallNet().double().eval()
    [(x, y)] = predicted(model, [torch.randn(6, 3, 8, 8).double()])
    dicts = [{"image": x, "label": y}]
    found = critmem(model, dicts, logits_fn=lambda model, batch: (model(batch["image"]), batch["label"]))
    assert found.examples == critmem(model, [(x, y)]).examples
    with pytest.raises(InputError, match="examples along dim 0"):
        critmem(model, [{"image": x, "label": y, "step": torch.tensor(3)}], logits_fn=lambda m, b: (b, b))
    with pytest.raises(InputError, match="logits for 4 examples, got 8"):
        critmem(model, dicts, logits_fn=lambda m, b: (m(b["image"]).repeat(2, 1), b["label"].repeat(2)))


def test_layers_that_a_first_trial_could_not_see() -> None:
    model, [(x, _)] = in_double(DeadAtFirst(), [(torch.randn(6, 4), torch.arange(6))])
    dead, alive = x.clone(), x.clone()
    dead[:, 0], alive[:, 0] = -1, 1
    batches = predicted(model, [dead, alive])
    assert as_found(critmem(model, batches, max_channels=4)) == loop(model, batches, 4, None)  # the head runs first


def test_without_a_convolution_or_linear_layer_among_others() -> None:
    model, batches = in_double(Odd(), [(torch.randn(5, 6, 4), torch.arange(5) % 3)])
    batches = predicted(model, [x for x, _ in batches])
    assert list(critmem(model, batches, include_head=True).counts) == ["head.weight"]


# Errors


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(dim=1))


def test_layers_that_are_refused() -> None:
    images = torch.randn(4, 3, 5, 5)
    for model, x, message in (
        (Interleaved(), torch.randn(4, 6, 4), r"'mixed.weight' mixes the examples.*; freeze it"),
        (Tied(), torch.randint(0, 9, (4, 3)), "'embedding.weight' is used by layers of more than one kind"),
        (Checkpointed(True), images, "is computed where gradients are switched off"),
        (nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)), torch.randn(4, 4), "statistics"),
        (nn.ReLU(), torch.randn(4, 4), "expected a trainable convolution or linear layer besides the head, got none"),
    ):
        batches = [(x, torch.zeros(4, dtype=torch.long))]
        with pytest.raises(InputError, match=message) as caught:
            critmem(model, batches, include_head=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="besides the head, got none"):
        critmem(nn.Linear(4, 3), [(torch.randn(4, 4), torch.arange(4) % 3)])
    frozen = Interleaved().double()
    frozen.mixed.weight.requires_grad_(False)
    batches = predicted(frozen, [torch.randn(4, 6, 4).double()])
    assert as_found(critmem(frozen, batches, include_head=True)) == loop(frozen, batches, 50, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_name_the_parameter(bad: float) -> None:
    model = cases.SmallNet().eval()
    with torch.no_grad():
        model.features[3].weight[2, 1, 0, 0] = bad
    model.features[0].weight.requires_grad_(False)
    with pytest.raises(InputError, match=r"expected finite weights, got NaN or infinity in 'features.3.weight'"):
        critmem(model, cases.image_batches(4, 4))
    model = cases.SmallNet().eval()
    with pytest.raises(InputError, match="expected finite losses, got NaN or infinity; check the inputs"):
        critmem(model, [(x * bad, y) for x, y in cases.image_batches(4, 4)])


class Steep(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * float("inf")


def test_scores_alone_that_are_not_finite() -> None:
    class Model(cases.SmallNet):
        def forward(self, images: Tensor) -> Tensor:
            return self.head(Steep.apply(self.features(images)).mean(dim=(2, 3)))

    with pytest.raises(InputError, match=r"expected finite scores, got NaN or infinity for 'features.0.weight'"):
        critmem(Model(), cases.image_batches(1, 1))


def test_bad_arguments() -> None:
    model, batches = cases.SmallNet(), cases.image_batches(4, 4)

    def never(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("the model ran")

    for bad in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="max_channels to be a count of at least 1"):
            critmem(model, batches, max_channels=bad)
        with pytest.raises(InputError, match="max_channels to be a count of at least 1"):
            delfast.score(model, batches, "critmem", max_channels=bad)
    with pytest.raises(InputError, match="preserve to be at least 0, got -1"):
        critmem(model, batches, preserve=-1)
    with pytest.raises(InputError, match="at least one example, got none"):
        critmem(model, [])
    with pytest.raises(InputError, match=r"labels in \[0, 10\), got 12 to 12"):
        critmem(model, [(batches[0][0], torch.full((4,), 12))])
    with pytest.raises(InputError, match="expected a forget set for criterion 'critmem'"):
        delfast.score(model, criterion="critmem")
    with pytest.raises(InputError, match="expected no loss_fn for criterion"):
        delfast.score(model, batches, "critmem", loss_fn=never)
    with pytest.raises(InputError, match="expected a criterion with a gradient for per_example=True, got 'critmem'"):
        delfast.score(model, batches, "critmem", per_example=True)
    with pytest.raises(InputError, match="scores channels, not their elements; use granularity='channel'"):
        delfast.localize(model, batches, criterion="critmem", granularity="param")
    with pytest.raises(InputError, match="scores channels, not their elements"):
        delfast.score(model, batches, "critmem").select(0.3, "param")
    data = torch.utils.data.TensorDataset(*batches[0])
    with pytest.raises(InputError, match="criterion with a gradient for stop_when_stable, got 'critmem'"):
        delfast.localize(model, data, criterion="critmem", stop_when_stable=0.9)
    assert functional.cross_entropy(model.eval()(batches[0][0]), batches[0][1]).isfinite()


def test_as_many_examples_as_the_trial_had_take_two_passes(caplog: pytest.LogCaptureFixture) -> None:
    """No dim grows then, so that one example is searched alone; the others stay together, and nothing is logged."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    batches = predicted(model, [torch.randn(n, 6, dtype=torch.float64) for n in (12, 4)])
    sizes.clear()
    with caplog.at_level(logging.WARNING, "delfast"):
        result = critmem(model, batches, max_channels=1, include_head=True)
    assert sizes[:2] == [4, 12] and sizes[-4:] == [3, 1, 3, 1] and not caplog.records  # 4: the trial alone
    assert as_found(result) == loop(model, batches, 1, None)
