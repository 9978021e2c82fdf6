"""Compact layers whose weight is read by other code: the gradient comes to the rows all the same."""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import delfast
from delfast.compact.layers import COMPACT, CompactLayer
from delfast.errors import InputError
from delfast.mask import Mask
from tests.test_compact import LAYERS, row_mask
from tests.weight_readers import READERS, ReadAndCalled, ReadLinear


def dense_then_masked(model, mask, loss):
    """name -> gradient of the selected rows, or of the selected elements; of a model that is not compact."""
    reference = copy.deepcopy(model)
    loss(reference).backward()
    return {
        name: _selected(parameter.grad, mask.parameters[name])
        for name, parameter in reference.named_parameters()
        if parameter.grad is not None and mask.parameters[name].selected
    }


def compact_gradients(handle):
    """The same of a compact model."""
    parameters = dict(handle.model.named_parameters())
    found = {}
    for name, way in handle.ways.items():
        gradient = parameters[name.replace("weight", "weight_rows") if way == "rows" else name].grad
        if gradient is not None and way != "frozen":
            found[name] = gradient if way == "rows" else _selected(gradient, handle.original_mask.parameters[name])
    return {name: gradient.clone() for name, gradient in found.items()}


def _selected(gradient, part):
    return gradient[part.flags] if part.by_row else gradient[part.dense()]


def assert_close(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm(), name


def squares(x):
    return lambda model: model(x).sin().square().sum()


def reader(name, dtype=torch.float64):
    torch.manual_seed(0)
    make, shape = READERS[name]
    return make().to(dtype), torch.randn(6, *shape, dtype=dtype)


@pytest.mark.parametrize("name", READERS)
def test_gradients_are_the_dense_ones_masked(name):
    net, x = reader(name)
    mask, loss = row_mask(net, 0.4), squares(x)
    expected = dense_then_masked(net, mask, loss)
    with delfast.compact(net, mask) as handle:
        assert "rows" in handle.ways.values()
        loss(net).backward()
        assert_close(compact_gradients(handle), expected)
        loss(net).backward()  # accumulated, through another graph
        assert_close(compact_gradients(handle), {name: 2 * gradient for name, gradient in expected.items()})


def batches_of(name, count=3):
    net, x = reader(name, torch.float32)
    outputs = net(x).shape[1]
    return net, [(x + step, torch.arange(len(x)) % outputs) for step in range(count)]


def moved_rows(before, model, mask):
    """name -> bool, for each selected row or element: has any entry of it moved?"""
    found = {}
    for name, parameter in model.named_parameters():
        part = mask.parameters[name]
        if part.selected:
            changed = _selected(parameter.detach() != before[name], part)
            found[name] = changed.flatten(1).any(1) if part.by_row else changed
    return found


def assert_unlearn_moves_every_selected_row(net, batches):
    mask = row_mask(net, 0.4)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    reference, names = copy.deepcopy(net), [name for name, part in mask.parameters.items() if part.selected]
    for model, dense in ((net, []), (reference, names)):
        torch.manual_seed(1)
        delfast.unlearn(model, retain=batches, mask=mask, method="finetune", epochs=3, lr=0.05, dense=dense)
    learns = moved_rows(before, reference, mask)
    for name, moved in moved_rows(before, net, mask).items():
        assert torch.equal(moved, learns[name]), name
        assert not mask.parameters[name].by_row or moved.any(), name
    for (name, left), (_, right) in zip(net.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4, msg=name)
        assert torch.equal(left[~mask.parameters[name].dense()], before[name][~mask.parameters[name].dense()]), name
    return learns


@pytest.mark.parametrize("name", READERS)
def test_unlearn_moves_every_selected_row(name):
    learns = assert_unlearn_moves_every_selected_row(*batches_of(name))
    assert all(moved.all() for name, moved in learns.items() if name.endswith("weight")), learns


USES = {
    "call": lambda layer, x: layer(x),
    "whole": lambda layer, x: layer.weight * 2,
    "some rows": lambda layer, x: layer.weight[: len(layer.weight) // 2],
    "one row": lambda layer, x: layer.weight[1],
    "a column": lambda layer, x: layer.weight.select(1, 0),
    "transposed": lambda layer, x: layer.weight.transpose(0, 1).sin(),
    "chunks": lambda layer, x: layer.weight.chunk(3)[1],
    "gathered": lambda layer, x: layer.weight[torch.tensor([0, 2, 2])],
    "twice": lambda layer, x: layer.weight * layer.weight,
    "norm": lambda layer, x: layer.weight.flatten(1).norm(dim=1) * functional.normalize(layer.weight.flatten(1)).sum(),
    "without gradient": lambda layer, x: layer.weight.detach().square() * x.sum(),
    "as a Parameter": lambda layer, x: dict(weight=layer.get_parameter("weight"))["weight"].square(),
    "data": lambda layer, x: layer.weight.data.sum() * x.sum(),
}


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.sampled_from(sorted(LAYERS)),
    st.lists(st.lists(st.sampled_from(sorted(USES)), max_size=4), min_size=1, max_size=3),
    st.sampled_from([0.05, 0.3, 0.75, 0.97, 1.0]),
    st.integers(0, 100),
)
def test_any_use_of_a_weight_has_its_gradient(name, batches, fraction, seed):
    """Uses of one layer, batch by batch: those of a later batch need not be those of the first."""
    torch.manual_seed(seed)
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mask = row_mask(layer, fraction, seed)

    def losses(uses):
        return lambda module: x.sum() + sum(USES[use](module, x).sin().sum() for use in uses)

    with delfast.compact(layer, mask) as handle:
        for uses in batches:
            with handle.undone():
                expected = dense_then_masked(layer, mask, losses(uses))
                of_x, x.grad = x.grad, None
            losses(uses)(layer).backward()
            assert_close(compact_gradients(handle), expected)
            assert (x.grad - of_x).norm() <= 1e-12 * of_x.norm()
            x.grad = None
            layer.zero_grad()
            with torch.no_grad():
                for parameter in handle.parameters():
                    parameter.add_(0.1)
