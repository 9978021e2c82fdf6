"""signed_channels: Σ_j θ_ij g_ij(x) against the example loop, on disk and in memory. Anytime localization."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import delfast
from delfast import InputError
from delfast.experiments.networks import build
from tests import cases
from tests.localization.per_example.loop import cross_entropy, example_gradients, in_double
from tests.networks import Attention, Checkpointed, InPlace, Odd, Shared, Windows


def loop(model: nn.Module, batches: list[Any], name: str) -> Tensor:
    """Compute the sums (N, C) by their definition."""
    weight = dict(model.named_parameters())[name].detach()
    return torch.stack([(weight * g[name]).flatten(1).sum(dim=1) for g in example_gradients(model, batches)])


def assert_channels(model: nn.Module, batches: list[Any]) -> delfast.SignedChannels:
    channels = delfast.signed_channels(model, batches)
    assert channels.matrix.dtype == numpy.float32 and channels.matrix.shape[1] == sum(channels.layers.values())
    for name in channels.layers:
        exact = loop(model, batches, name).numpy()
        assert channels[name].shape == exact.shape
        # computed in float64, returned in float32
        numpy.testing.assert_allclose(
            channels[name], exact, rtol=1e-6, atol=1e-6 * numpy.abs(exact).max(), err_msg=name
        )
    return channels


def images(examples: int, size: int) -> list[Any]:
    return [(torch.randn(examples, 3, size, size), torch.arange(examples) % 3)]


@pytest.mark.parametrize("name", ["everything", "small", "resnet18-thin", "in place", "windows", "attention"])
def test_every_channel_of_every_example(name: str) -> None:
    model, batches = {
        "everything": lambda: (cases.Everything(), cases.everything_batches(6, 4)),
        "small": lambda: (cases.SmallNet(), cases.image_batches(5, 4)),
        "resnet18-thin": lambda: (build("resnet18-thin", 10, 3, 8), images(4, 8)),
        "in place": lambda: (InPlace(), images(5, 4)),
        "windows": lambda: (Windows(), [(torch.randn(4, 3, 2, 4, 4), torch.arange(4))]),
        "attention": lambda: (Attention(), [(torch.randn(5, 4, 8), torch.arange(5) % 3)]),
    }[name]()
    model, batches = in_double(model, batches)
    before = copy.deepcopy(model.state_dict())
    channels = assert_channels(model, batches)
    convolutions_and_linear = {
        f"{prefix}.weight"
        for prefix, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and module.weight.requires_grad
    }
    tied_or_projection = {"second.weight"} | {n for n in channels.layers if n.endswith("in_proj_weight")}
    assert set(channels.layers) ^ convolutions_and_linear <= tied_or_projection
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


def test_in_place_operations_right_behind_a_layer_without_bias() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3, bias=False)
    )
    assert_channels(*in_double(model, images(5, 4)))


def test_shared_tied_checkpointed_and_odd() -> None:
    tokens = [(torch.randint(0, 9, (5, 4)), torch.randint(0, 9, (5,)))]
    channels = assert_channels(Shared().double().eval(), tokens)
    assert list(channels.layers) == ["embedding.weight", "twice.weight"]  # the head's, tied
    assert_channels(*in_double(Checkpointed(False), [(torch.randn(5, 3, 5, 5), torch.arange(5) % 4)]))
    odd = assert_channels(*in_double(Odd(), [(torch.randn(5, 6, 4), torch.arange(5) % 3)]))
    assert list(odd.layers) == ["head.weight"]


def test_reentrant_checkpoints() -> None:
    model, batches = in_double(Checkpointed(False), [(torch.randn(5, 3, 5, 5), torch.arange(5) % 4)])
    plain = delfast.signed_channels(model, batches)
    model.reentrant = True
    again = delfast.signed_channels(model, batches)
    assert again.layers == plain.layers == {"stem.weight": 6, "block.0.weight": 6, "shared.weight": 6, "head.weight": 4}
    numpy.testing.assert_allclose(again.matrix, plain.matrix, rtol=1e-6)


def test_it_is_zero_before_instance_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    model, batches = in_double(model, images(3, 6))
    channels = delfast.signed_channels(model, batches)
    scale = max(float(g["0.weight"].abs().max()) for g in example_gradients(model, batches))
    assert scale > 1e-3 and numpy.abs(channels["0.weight"]).max() < 1e-4 * scale


def test_streamed_to_disk_with_identifiers(tmp_path: Path) -> None:
    model, batches = cases.SmallNet().eval(), cases.image_batches(11, 4)
    identifiers = torch.randperm(11) + 100
    indexed = [(i, x, y) for i, (x, y) in zip(identifiers.split(4), batches, strict=True)]
    memory = delfast.signed_channels(model, batches)
    assert memory.examples.tolist() == list(range(11))
    disk = delfast.signed_channels(model, indexed, path=tmp_path / "channels")
    assert isinstance(disk.matrix, numpy.memmap) and disk.examples.tolist() == identifiers.tolist()
    numpy.testing.assert_array_equal(disk.matrix, memory.matrix)
    again = delfast.SignedChannels.load(tmp_path / "channels")
    assert again.layers == memory.layers
    numpy.testing.assert_array_equal(again["head.weight"], memory["head.weight"])
    with pytest.raises(InputError, match="not to exist"):
        delfast.signed_channels(model, batches, path=tmp_path / "channels")
    with pytest.raises(InputError, match=r"labels in \[0, 10\)"):
        delfast.signed_channels(model, [*batches, (batches[0][0], batches[0][1] + 50)], path=tmp_path / "other")
    with pytest.raises(InputError, match="at least one example"):
        delfast.signed_channels(model, [], path=tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["channels"]  # whole or not at all
    (tmp_path / "channels" / "matrix.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match="write it again"):
        delfast.SignedChannels.load(tmp_path / "channels")


def test_zeroing_a_channel_changes_the_loss_by_about_minus_this() -> None:
    model, batches = in_double(cases.SmallNet(), cases.image_batches(3, 3))
    channels = delfast.signed_channels(model, batches)["features.3.weight"]
    before = cross_entropy(model, batches[0])
    step = 1e-4  # of the way to zero: the derivative
    for channel in (0, 7):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.features[3].weight[channel] *= 1 - step
        slope = (cross_entropy(changed, batches[0]) - before) / step
        numpy.testing.assert_allclose(slope.detach().numpy(), -channels[:, channel], rtol=1e-2, atol=1e-6)


# Anytime localization


@pytest.mark.parametrize("per_example", [False, True])
def test_localize_stops_when_the_mask_is_stable(per_example: bool) -> None:
    x, y = cases.image_batches(96, 96)[0]
    model, dataset = cases.SmallNet(), TensorDataset(x, y)
    seen: list[int] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.extend(int(v) for v in batch[1])
        return cross_entropy(model, batch)

    options: dict[str, Any] = {"per_example": per_example, "batch_size": 8, "seed": 3}
    mask = delfast.localize(model, dataset, 0.4, stop_when_stable=0.5, **options)
    taken = mask.metadata["examples"]
    assert taken in (16, 32, 64) and mask.metadata["overlap"] >= 0.5
    assert mask.metadata["examples_available"] == 96 and mask.metadata["stop_when_stable"] == 0.5
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))[:taken]
    by_hand = delfast.localize(
        model, DataLoader(TensorDataset(x[order], y[order]), batch_size=8), 0.4, per_example=per_example
    )
    assert mask.jaccard(by_hand) >= 0.99
    assert delfast.localize(model, dataset, 0.4, stop_when_stable=0.5, **options).digest == mask.digest
    never = delfast.localize(model, dataset, 0.4, stop_when_stable=1.0, **{**options, "batch_size": 40})
    assert never.metadata["examples"] in (80, 96)
    if not per_example:
        delfast.localize(model, dataset, 0.4, stop_when_stable=0.5, loss_fn=loss_fn, **options)
        assert len(seen) == taken  # no example is computed twice


def test_anytime_errors() -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            raise AssertionError("it was read")

    x, y = cases.image_batches(8, 8)[0]
    dataset = TensorDataset(x, y)
    model = cases.SmallNet()
    for data, options, message in (
        (dataset, {"stop_when_stable": 0.0}, r"stop_when_stable in \(0, 1\], got 0.0"),
        (dataset, {"stop_when_stable": 1.5}, r"stop_when_stable in \(0, 1\], got 1.5"),
        (dataset, {"stop_when_stable": 0.9, "batch_size": 0}, "batch_size to be a count of at least 1, got 0"),
        (dataset, {"stop_when_stable": 0.9, "criterion": "weight"}, "criterion with a gradient"),
        (DataLoader(Stream()), {"stop_when_stable": 0.9}, "map-style Dataset for stop_when_stable, got Stream"),
        (Stream(), {"stop_when_stable": 0.9}, "map-style Dataset for stop_when_stable, got Stream"),
        (TensorDataset(x[:0], y[:0]), {"stop_when_stable": 0.9}, "at least one example, got none"),
    ):
        with pytest.raises(InputError, match=message):
            delfast.localize(model, data, **options)
