"""Per-example gradients against a plain loop over examples, in float64: every layer, geometry and network."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from delfast.experiments.networks import build
from tests import cases
from tests.localization.per_example.loop import assert_parity, in_double
from tests.networks import Attention, InPlace, Shared, Windows


class On(nn.Module):
    """``layer`` after a pointwise layer and before a sum of squares, so that its δ and inputs are a middle layer's."""

    def __init__(self, layer: nn.Module, before: nn.Module | None = None) -> None:
        super().__init__()
        self.before = before
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if self.before is None else self.before(x))


def squares(model: nn.Module, batch: Any) -> Tensor:
    """Return losses (N,) of any output with the examples along dim 0."""
    output = model(batch[0])
    weights = torch.linspace(-1, 2, output.shape[1:].numel(), dtype=output.dtype).view(output.shape[1:])
    return ((output.tanh() + weights) ** 2).flatten(1).sum(dim=1)


def check(layer: nn.Module, *shape: int, before: nn.Module | None = None) -> None:
    model, batches = in_double(On(layer, before), [(torch.randn(3, *shape),), (torch.randn(1, *shape),)])
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    assert_parity(model, batches, squares)


# Layers

CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2},
    {"stride": 3, "padding": 2},
    {"padding": "same"},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "replicate"},
    {"dilation": 2, "padding": 1},
    {"groups": 2, "stride": 2},
    {"groups": 4, "padding": 1, "bias": False},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("kernel", [2, 3])
def test_convolutions(dims: int, options: dict[str, Any], kernel: int) -> None:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 8, kernel, **options)
    check(layer, 4, *(7, 6, 5)[:dims])


def test_convolutions_of_uneven_geometry() -> None:
    check(nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(0, 1), dilation=(2, 1), groups=2), 4, 9, 5)
    check(nn.Conv2d(3, 5, (1, 4), padding="same"), 3, 1, 7)
    check(nn.Conv3d(2, 3, (1, 3, 2), stride=(2, 1, 1), padding=(0, 1, 0)), 2, 3, 5, 4)
    check(nn.Conv2d(1, 1, 1), 1, 1, 1)
    check(nn.Conv2d(4, 4, 3, padding=1, groups=4), 4, 6, 5, before=nn.Conv2d(4, 4, 1))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"stride": 3, "output_padding": 2, "padding": 1},
        {"dilation": 3, "output_padding": 2, "stride": 2, "padding": 2},
        {"groups": 2, "bias": False, "padding": 1},
    ],
    ids=str,
)
def test_transposed_convolutions(dims: int, options: dict[str, Any]) -> None:
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1](4, 6, 3, **options)
    check(layer, 4, *(4, 3, 2)[:dims])


@pytest.mark.parametrize("shape", [(5,), (1,), (7, 5), (2, 3, 5)])
def test_linear(shape: tuple[int, ...]) -> None:
    check(nn.Linear(shape[-1], 6), *shape)
    check(nn.Linear(shape[-1], 1, bias=False), *shape, before=nn.Linear(shape[-1], shape[-1]))


def test_norms() -> None:
    for dims, norm in ((1, nn.BatchNorm1d), (2, nn.BatchNorm2d), (3, nn.BatchNorm3d)):
        layer = norm(4)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        check(layer, 4, *(5, 3, 2)[:dims])
    check(nn.BatchNorm1d(4), 4)
    check(nn.LayerNorm(5), 5)
    check(nn.LayerNorm(5), 2, 3, 5, before=nn.Linear(5, 5))
    check(nn.LayerNorm((3, 5)), 2, 3, 5)
    check(nn.LayerNorm(5, bias=False), 2, 5)
    check(nn.RMSNorm(5), 3, 5)
    check(nn.GroupNorm(2, 6), 6, 3, 5)
    check(nn.GroupNorm(6, 6), 6, 7)
    for dims, norm in ((1, nn.InstanceNorm1d), (2, nn.InstanceNorm2d), (3, nn.InstanceNorm3d)):
        check(norm(4, affine=True), 4, *(5, 3, 2)[:dims])
        check(norm(4, affine=True, track_running_stats=True), 4, *(5, 3, 2)[:dims])


@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 2}, {"padding_idx": -1}, {"scale_grad_by_freq": True}], ids=str
)
def test_embedding(options: dict[str, Any]) -> None:
    model = On(nn.Linear(5, 3), nn.Embedding(7, 5, **options)).double().eval()
    tokens = torch.randint(0, 7, (4, 6))
    tokens[0, :] = 2
    assert_parity(model, [(tokens,), (torch.randint(0, 7, (3, 2, 2)),), (torch.randint(0, 7, (1, 1)),)], squares)
    assert_parity(On(nn.Linear(5, 3), model.before).double(), [(torch.randint(0, 7, (4,)),)], squares)


def test_operands_in_any_memory() -> None:
    layers = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 2, stride=2), nn.BatchNorm2d(4))
    model, [(x,)] = in_double(layers, [(torch.randn(3, 4, 9, 8),)])
    for name, [same] in cases.strided([x]):
        assert torch.equal(same, x), name
        assert_parity(model, [(same,)], squares)
    last = model.to(memory_format=torch.channels_last)
    sums = assert_parity(last, [(x.contiguous(memory_format=torch.channels_last),)], squares)
    means = sums.mean(3)
    assert all(means[name].stride() == p.stride() for name, p in last.named_parameters() if p.ndim == 4)
    linear, [(x,)] = in_double(nn.Linear(5, 4), [(torch.randn(7, 5, 3).transpose(1, 2),)])
    assert_parity(linear, [(x,)], lambda m, b: m(b[0]).sum(dim=(1, 2)))  # δ is one number, expanded


def test_no_example_adds_nothing() -> None:
    model, batches = in_double(cases.SmallNet(), [cases.image_batches(1, 1)[0]])
    empty = (batches[0][0][:0], batches[0][1][:0])
    assert_parity(model, [empty, *batches, empty])
    assert_parity(nn.Linear(3, 2).double(), [(torch.randn(0, 3).double(),), (torch.randn(2, 3).double(),)], squares)


# Uses


def test_in_place_operations_on_outputs() -> None:
    model, batches = in_double(InPlace(), [(torch.randn(5, 3, 4, 4), torch.randint(0, 3, (5,)))])
    assert_parity(model, batches)


def test_uses_of_one_example_add_before_the_absolute_value() -> None:
    batch = (torch.randint(0, 9, (5, 4)), torch.randint(0, 9, (5,)))
    sums = assert_parity(Shared().double().eval(), [batch])
    several = ("embedding.weight", "twice.weight", "norm.bias", "bias")
    assert {name: sums.uses[name] for name in several} == dict.fromkeys(several, 2)


@pytest.mark.parametrize(("n", "t"), [(4, 3), (4, 4), (2, 2), (1, 3)])
def test_examples_need_not_lie_alone_along_the_first_dim(n: int, t: int) -> None:
    model, batches = in_double(Windows(), [(torch.randn(n, t, 2, 4, 4), torch.randint(0, 5, (n,)))])
    sums = assert_parity(model, batches)
    if n > 1:
        assert sums.findings.axes["sequence.weight"].dim == 1 and sums.findings.axes["windows.weight"].dim == 0


def test_torchs_own_transformer() -> None:
    model, batches = in_double(Attention(), [(torch.randn(3, 5, 8), torch.randint(0, 3, (3,)))])
    assert_parity(model, batches)


class Free(nn.Module):
    """Operations in which a free parameter meets the data."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.register = nn.Parameter(torch.randn(2, 4))
        self.position = nn.Parameter(torch.randn(1, 9, 4))
        self.table = nn.Parameter(torch.randn(7, 4))
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.gamma = nn.Parameter(torch.randn(4))
        self.projection = nn.Parameter(torch.randn(4, 3))
        self.mixed = nn.ParameterList([nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(4))])
        self.start = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:  # (N, 5, 4)
        x = x + self.start  # before anything requires a gradient
        x = torch.cat((self.token.expand(len(x), -1, -1), self.register.repeat(len(x), 1, 1), x), dim=1)
        x += self.position[:, : x.shape[1]]
        index = torch.arange(x.shape[1]) % 7
        x = x * self.temperature.exp().clamp(max=100) + self.table[index].unsqueeze(0)
        x = torch.where(x > 0, x, x * self.gamma)
        x = (x - self.mixed[0] * self.mixed[1].sigmoid()).tanh()
        return (x @ self.projection)[:, 0] + x.mean(dim=1) @ self.projection


class ChangedInPlace(nn.Module):
    """A tensor computed from a parameter and changed in place before it meets the data."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.scale, self.kept = (nn.Parameter(torch.randn(1, 4)) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        shift = self.shift.clone()
        shift[:, :2].zero_()
        scale = self.scale * 2
        scale.detach().add_(1)
        return self.head((x * scale + shift).tanh() * self.kept)


def test_what_is_changed_in_place_is_not_taken_for_what_it_was() -> None:
    # not one example: (1, 4) data look like one more parameter then, and more goes example by example
    model, batches = in_double(ChangedInPlace(), [(torch.randn(n, 4), torch.arange(n) % 3) for n in (5, 2, 1)])
    assert_parity(model, batches[:2], unknown={"shift", "scale"})
    # one example that needs no gradient cannot be distinguished from a constant, whatever the batches before it
    assert_parity(model, batches, unknown=dict(model.named_parameters()))


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_free_parameters(n: int) -> None:
    model, batches = in_double(Free(), [(torch.randn(n, 5, 4), torch.randint(0, 3, (n,)))])
    assert_parity(model, batches)


# Networks


def images(examples: int, size: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(examples, 3, size, size), torch.randint(0, 10, (examples,)))]


def test_everything() -> None:
    model, batches = in_double(cases.Everything(), cases.everything_batches())
    assert_parity(model, batches)


@pytest.mark.long
@pytest.mark.parametrize(("name", "size"), [("resnet18-thin", 8), ("vit", 8)])
def test_own_networks(name: str, size: int) -> None:
    model, batches = in_double(build(name, 10, 3, size), images(3, size))
    assert_parity(model, batches)


def test_depthwise_network() -> None:
    model, batches = in_double(torchvision.models.mobilenet_v3_small(num_classes=10), images(2, 8))
    assert_parity(model, batches)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), ("resnet50", 16), ("vit", 32)])
def test_own_networks_at_their_size(name: str, size: int) -> None:
    model, batches = in_double(build(name, 10, 3, size), images(3, size))
    assert_parity(model, batches)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t", "swin_v2_t", "vit_b_16"])
def test_torchvisions_networks(name: str) -> None:
    options = {"image_size": 32} if name == "vit_b_16" else {}
    model, batches = in_double(getattr(torchvision.models, name)(num_classes=10, **options), images(3, 32))
    # Swin v2: layers that compute a bias for all examples at once, and a bias that is changed in place before its use
    odd = {n for n, _ in model.named_parameters() if name == "swin_v2_t" and ("cpb_mlp" in n or "qkv" in n)}
    assert_parity(model, batches, unknown=odd)


@pytest.mark.slow
def test_a_wide_sweep_of_convolutions() -> None:
    for kernel, stride, padding, dilation, groups in itertools.product(
        (1, 2, 3, 5), (1, 2, 3), (0, 1, 2), (1, 2), (1, 3)
    ):
        layer = nn.Conv2d(3, 6, kernel, stride, padding, dilation, groups)
        check(layer, 3, 9, 10)
