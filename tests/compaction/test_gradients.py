"""The gradients of dense-then-masked training, layer by layer and compiled."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import delfast
from delfast.compaction import gradients
from delfast.compaction.gradients import by_offsets
from delfast.compaction.layers import COMPACT
from delfast.compaction.rules import MIN_CHANNELS_PER_POSITION
from delfast.errors import InputError
from delfast.mask import Mask
from tests import cases
from tests.compaction.references import (
    LAYERS,
    close,
    cross_entropy,
    expected_gradients,
    gradients_of,
    row_mask,
)

ROWS_OF = {"some": 0.3, "many": 0.75, "nearly all": 0.97, "all": 1.0}


@pytest.mark.parametrize("minimum", [float("inf"), 0], ids=["at once", "by offsets"])
@pytest.mark.parametrize("fraction", ROWS_OF)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_the_dense_ones_masked(name, fraction, minimum, monkeypatch):
    monkeypatch.setitem(MIN_CHANNELS_PER_POSITION, torch.float64, minimum)
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    mask, x = row_mask(layer, ROWS_OF[fraction]), torch.randn(shape, dtype=torch.float64)
    for inputs in (x, cases._channels_last(x) if x.ndim > 2 else x.t().contiguous().t()):
        inputs = inputs.detach().requires_grad_()

        def loss(model, inputs=inputs):
            return model(inputs).sin_().square().sum()  # in place, straight after the layer

        expected = expected_gradients(layer, mask, loss)
        of_inputs = inputs.grad.clone()
        inputs.grad = None
        with delfast.compact(layer, mask) as handle:
            assert handle.modes["weight"] == ("dense" if fraction == "all" else "rows")
            changed = fraction != "all" or getattr(layer, "groups", None) == 1
            assert type(layer) in (COMPACT.values() if changed else COMPACT)
            loss(layer).backward()
            close(gradients_of(handle), expected)
            close({"inputs": inputs.grad}, {"inputs": of_inputs})
        assert type(layer) in COMPACT and set(dict(layer.named_parameters())) <= {"weight", "bias"}
        layer.zero_grad()


@pytest.mark.parametrize("dtype", MIN_CHANNELS_PER_POSITION)
def test_small_maps_take_a_product_for_each_offset(dtype, monkeypatch):
    """Other maps and layers with groups do not; benchmarks/test_steps.py measures which is faster."""
    calls = []
    monkeypatch.setattr(gradients, "by_offsets", lambda *given: calls.append(given) or by_offsets(*given))
    channels = 9 * MIN_CHANNELS_PER_POSITION[dtype]
    for side, small in ((3, True), (4, False)):
        for groups in (1, 2):
            torch.manual_seed(0)
            layer, x = nn.Conv2d(channels, 64, 3, padding=1, groups=groups), torch.randn(4, channels, side, side)
            exact = copy.deepcopy(layer).double()
            exact(x.double()).square().sum().backward()
            mask = row_mask(layer, 0.5)
            calls.clear()
            low = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
            with delfast.compact(layer, mask), torch.autocast("cpu", torch.bfloat16):
                with low:  # the backward pass is within autocast, whatever the forward pass was
                    loss = layer(x).float().square().sum()
                loss.backward()
                expected = exact.weight.grad[mask.parameters["weight"].flags]
                bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
                assert (layer.weight_rows.grad - expected).norm() <= bound * expected.norm()
            assert len(calls) == (small and groups == 1)


@pytest.mark.long
@pytest.mark.parametrize("dynamic", [None, True])
def test_products_for_each_offset_compile(dynamic, monkeypatch):
    """Some rows are selected, or all."""
    monkeypatch.setitem(MIN_CHANNELS_PER_POSITION, torch.float32, 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, padding=1))
    mask = Mask.from_dense(
        {n: (torch.arange(p.shape[0]) < (3 if n == "0.weight" else 8)).reshape(-1, *[1] * (p.ndim - 1)).expand(p.shape)
         for n, p in model.named_parameters()}
    )  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    with delfast.compact(model, mask) as handle:
        assert handle.modes["0.weight"] == "rows" and type(model[2]) in COMPACT.values()
        model(x).square().sum().backward()
        expected = {name: gradient.clone() for name, gradient in gradients_of(handle).items()}
        model.zero_grad()
        torch.compile(model, fullgraph=True, dynamic=dynamic)(x).square().sum().backward()
        close(gradients_of(handle), expected, 1e-5)


def test_a_whole_network_has_the_dense_gradients(net, data):
    net.double()
    mask, loss = row_mask(net, 0.4), cross_entropy(data, torch.float64)
    expected = expected_gradients(net, mask, loss)
    with delfast.compact(net, mask) as handle:
        assert handle.modes["twice.weight"] == "rows" and handle.modes["head.weight"] == "guarded"  # it is tied
        loss(net).backward()
        close(gradients_of(handle), expected)
        loss(net).backward()  # accumulated
        close(gradients_of(handle), {name: 2 * gradient for name, gradient in expected.items()})


@pytest.mark.long
def test_checkpointing_two_forward_passes_and_compile_give_the_same(net, data):
    net.double()
    mask, loss = row_mask(net, 0.4), cross_entropy(data, torch.float64)
    expected = expected_gradients(net, mask, loss)
    with delfast.compact(net, mask) as handle:

        def checkpointed(x):
            return checkpoint(net, x, use_reentrant=False)

        loss(checkpointed).backward()
        close(gradients_of(handle), expected)
        net.zero_grad()
        (0.25 * loss(net) + 0.75 * loss(net)).backward()
        close(gradients_of(handle), expected)
        net.zero_grad()
        compiled = torch.compile(net, fullgraph=True)
        loss(compiled).backward()
        close(gradients_of(handle), expected)
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
        optimizer.step()  # the graph must see the rows move
        net.zero_grad()
        loss(compiled).backward()
        moved = {name: gradient.clone() for name, gradient in gradients_of(handle).items()}
        net.zero_grad()
        loss(net).backward()
        close(gradients_of(handle), moved)


@pytest.mark.long
def test_compile_in_float32_is_within_the_error_budget(net, data):
    mask, loss = row_mask(net, 0.4), cross_entropy(data)
    exact = expected_gradients(copy.deepcopy(net).double(), mask, cross_entropy(data, torch.float64))
    dense = expected_gradients(net, mask, lambda model: loss(torch.compile(model, fullgraph=True)))
    with delfast.compact(net, mask) as handle:
        loss(torch.compile(net, fullgraph=True)).backward()
        compact = gradients_of(handle)
    errors = [sum((g[name] - exact[name]).norm() / exact[name].norm() for name in exact) for g in (compact, dense)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_a_compiled_model_goes_on_learning(net, data, kind):
    """A fused kernel changes a parameter without a new version; a compiled forward pass gives the weight one."""
    states = []
    for compiled in (False, True):
        model = copy.deepcopy(net).double()
        loss = cross_entropy(data, torch.float64)
        with delfast.compact(model, row_mask(model, 0.4)) as handle:
            optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01, **{kind: True})
            run = torch.compile(model) if compiled else model
            losses = []
            for _ in range(4):
                optimizer.zero_grad()
                losses.append(loss(run))
                losses[-1].backward()
                optimizer.step()
        assert losses[-1] < losses[0]
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_it_gives_the_dense_network(net, data, dtype):
    mask = row_mask(net, 0.4)
    exact = expected_gradients(copy.deepcopy(net).double(), mask, cross_entropy(data, torch.float64))

    def loss(model):
        with torch.autocast("cpu", dtype):
            return cross_entropy(data)(model)

    dense = expected_gradients(net, mask, loss)
    with delfast.compact(net, mask) as handle:
        loss(net).backward()
        for name, gradient in gradients_of(handle).items():
            assert gradient.dtype == torch.float32
            error, allowed = ((g - exact[name]).norm() / exact[name].norm() for g in (gradient, dense[name]))
            assert error <= 2 * allowed + torch.finfo(dtype).eps, name


def test_the_backward_pass_ends_at_the_lowest_selected_layer(net, data):
    mask = Mask.from_dense({n: torch.full(p.shape, n.startswith("head")) for n, p in net.named_parameters()})
    with delfast.compact(net, mask):
        seen = []
        net.mix.register_full_backward_hook(lambda *_: seen.append("mix"))
        hidden = net.mix(torch.randn(2, 20))
        assert not hidden.requires_grad
        cross_entropy(data)(net).backward()
    assert not seen and all(p.requires_grad for p in net.parameters())


def test_double_backward_is_refused(net, data):
    with delfast.compact(net, row_mask(net, 0.4)) as handle:
        gradients = torch.autograd.grad(cross_entropy(data)(net), list(handle.parameters()), create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            sum(gradient.square().sum() for gradient in gradients).backward()


def test_empty_batches_and_single_examples():
    layer, conv = nn.Linear(6, 40), nn.Conv2d(3, 40, 3)
    for net, shapes in ((layer, [(0, 6), (6,)]), (conv, [(0, 3, 8, 8)])):
        mask = row_mask(net, 0.4)
        for shape in shapes:
            x = torch.randn(shape)
            expected = expected_gradients(net, mask, lambda model, x=x: model(x).square().sum())
            with delfast.compact(net, mask) as handle:
                net(x).square().sum().backward()
                for name, gradient in gradients_of(handle).items():
                    torch.testing.assert_close(gradient, expected[name])


def test_hooks_of_the_user_s_and_sparse_gradients(net, data):
    seen = []
    net.mix.weight.register_hook(lambda gradient: seen.append(gradient.shape))
    mask = row_mask(net, 0.4)
    with delfast.compact(net, mask) as handle:
        assert handle.modes["mix.weight"] == "guarded"
        cross_entropy(data)(net).backward()
    assert seen == [(24, 20)]
    embedding = nn.Embedding(5, 3, sparse=True)
    with pytest.raises(InputError, match="sparse=False"):
        delfast.compact(embedding, row_mask(embedding, 0.4))
