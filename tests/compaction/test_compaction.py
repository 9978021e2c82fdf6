"""Compact training: gradients equal to dense training with a mask, and nothing else changes."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import delfast
from delfast.compaction import gradients, guard
from delfast.compaction.gradients import MIN_CHANNELS_PER_POSITION, by_offsets
from delfast.compaction.layers import COMPACT, CompactLayer
from delfast.errors import InputError
from delfast.mask import Mask
from delfast.optim import MaskedAdamW, MaskedSGD
from delfast.unlearning.api import full_mask
from tests import cases
from tests.compaction.references import LAYERS, row_mask

ROWS_OF = {"some": 0.3, "many": 0.75, "nearly all": 0.97, "all": 1.0}


def expected_gradients(model, mask, loss):
    """Return dense gradients, masked, by the names of the compact model."""
    reference = copy.deepcopy(model)
    loss(reference).backward()
    found = {}
    for name, parameter in reference.named_parameters():
        part = mask.parameters.get(name)
        if parameter.grad is None or part is None or not part.selected:
            continue
        if part.by_row and part.selected < part.numel and name != "head.weight":  # the head's weight is tied
            found[name.replace("weight", "weight_rows")] = parameter.grad[part.flags]
        else:
            found[name] = torch.where(part.dense(), parameter.grad, 0)
    return found


def close(gradients, expected, tolerance=1e-12):
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm().clamp_min(1e-300), name


def gradients_of(handle):
    return {name: parameter.grad for name, parameter in handle.named_parameters()}


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


class Net(nn.Module):
    """Norms, in-place activations straight after a convolution, groups, a layer called twice, a tied head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(inplace=True))
        self.depthwise = nn.Conv2d(20, 20, 3, padding=1, groups=20, bias=False)
        self.norm = nn.BatchNorm2d(20)
        self.twice = nn.Conv2d(20, 20, 1)
        self.mix = nn.Linear(20, 24)
        self.head = nn.Linear(24, 5)
        self.tied = nn.Linear(24, 5)
        self.tied.weight = self.head.weight

    def forward(self, x):
        x = functional.relu(self.norm(self.depthwise(self.stem(x))))
        x = self.twice(functional.relu(self.twice(x)))
        x = functional.gelu(self.mix(x.mean((2, 3))))
        return self.head(x) + self.tied(x)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(12, 3, 8, 8, generator=generator), torch.randint(0, 5, (12,), generator=generator)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def cross_entropy(data, dtype=torch.float32):
    return lambda model: functional.cross_entropy(model(data[0].to(dtype)), data[1])


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


def test_an_optimizer_from_before_is_refused(net, data):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    before = copy.deepcopy(net.state_dict())
    with delfast.compact(net, row_mask(net, 0.4)):
        cross_entropy(data)(net.eval()).backward()
        with pytest.raises(
            InputError, match=r"made after compact\(\), got one of 'stem.0.weight' without the 'stem.0.wei"
        ):
            optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_is_not_selected_may_not_be_thawed(net, data):
    mask = row_mask(net, 0.4)
    mask = Mask({name: part for name, part in mask.parameters.items() if name.startswith("mix")})
    with delfast.compact(net, mask):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        cross_entropy(data)(net).backward()
        optimizer.step()
        net.requires_grad_(True)
        cross_entropy(data)(net).backward()
        with pytest.raises(
            InputError, match=r"expected no gradient of 'stem\.0\.weight', where the mask selects nothing"
        ):
            optimizer.step()


def test_gradients_are_dropped_while_the_model_is_undone(net, data):
    with delfast.compact(net, row_mask(net, 0.4)) as handle:
        cross_entropy(data)(net).backward()
        with handle.undone():
            net(data[0])
        assert all(parameter.grad is None for parameter in handle.parameters())


def test_a_step_between_forward_and_backward_is_an_error(net, data):
    with delfast.compact(net, row_mask(net, 0.4)) as handle:
        loss = cross_entropy(data)(net)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(0.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


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


def all_but(mask, before, model):
    """Return the number of state entries that changed outside the mask, and whether any changed inside."""
    outside, inside, state = 0, False, model.state_dict()
    for name, value in before.items():
        changed = state[name].view(torch.int32) != value.view(torch.int32)
        part = mask.parameters.get(name)
        chosen = part.dense() if part is not None else torch.zeros_like(changed)
        outside += int(changed[~chosen].sum())
        inside = inside or bool(changed[chosen].any())
    return outside, inside


OPTIMIZERS = {
    "fused AdamW": lambda handle: torch.optim.AdamW(handle.parameters(), lr=0.01, weight_decay=0.1, fused=True),
    "foreach SGD, all parameters": lambda handle: torch.optim.SGD(
        handle.model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True
    ),
    "Adagrad": lambda handle: torch.optim.Adagrad(handle.parameters(), lr=0.01, weight_decay=0.1),
    "MaskedSGD": lambda handle: MaskedSGD(
        handle.model.named_parameters(), handle.mask, lr=0.1, momentum=0.9, weight_decay=0.1
    ),
    "MaskedAdamW": lambda handle: MaskedAdamW(handle.model.named_parameters(), handle.mask, lr=0.01),
}


@pytest.mark.parametrize("kind", ["rows", "elements", "whole and none"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_else_moves_by_a_bit(net, data, optimizer, kind):
    mask = row_mask(net, 0.4)
    if kind == "elements":
        generator = torch.Generator().manual_seed(1)
        mask = Mask.from_dense({n: torch.rand(p.shape, generator=generator) < 0.3 for n, p in net.named_parameters()})
    elif kind == "whole and none":
        mask = Mask.from_dense(
            {n: torch.full(p.shape, n.startswith(("mix", "norm"))) for n, p in net.named_parameters()}
        )
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2)
    with delfast.compact(net, mask) as handle:
        steps = OPTIMIZERS[optimizer](handle)
        for step in range(6):
            steps.zero_grad()
            loss = cross_entropy(data)(net) * (float("inf") if step == 3 else 1)  # that step is skipped
            scaler.scale(loss).backward()
            scaler.unscale_(steps)
            nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
            scaler.step(steps)
            scaler.update()
            outside, _ = all_but(mask, before, net) if step == 2 else (0, None)
            assert not outside
        saved = {name: value.clone() for name, value in net.state_dict().items()}
        assert saved.keys() == Net().state_dict().keys()
    outside, inside = all_but(mask, before, net)
    assert outside == 0 and inside
    assert all(torch.equal(saved[name], parameter) for name, parameter in net.named_parameters())


def test_optimizer_state_is_of_the_selected_rows():
    model = nn.Sequential(nn.Linear(50, 40, bias=False), nn.Linear(40, 30, bias=False))
    with delfast.compact(model, row_mask(model, 0.3)) as handle:
        optimizer = torch.optim.AdamW(handle.parameters())
        model(torch.randn(4, 50)).sum().backward()
        optimizer.step()
        held = sum(state["exp_avg"].numel() for state in optimizer.state.values())
        assert held == 12 * 50 + 9 * 40 == handle.mask.selected


def test_training_compact_is_training_dense_with_masked_gradients(net, data):
    net.double()
    mask, loss = row_mask(net, 0.4), cross_entropy(data, torch.float64)
    reference = copy.deepcopy(net)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        loss(reference).backward()
        for name, parameter in reference.named_parameters():
            parameter.grad *= mask.parameters[name].dense()
        optimizer.step()
    with delfast.compact(net, mask) as handle:
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.05, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            loss(net).backward()
            optimizer.step()
    for (name, left), (_, right) in zip(net.named_parameters(), reference.named_parameters(), strict=True):
        assert (left - right).norm() <= 1e-10 * right.norm(), name


def test_the_backward_pass_ends_at_the_lowest_selected_layer(net, data):
    mask = Mask.from_dense({n: torch.full(p.shape, n.startswith("head")) for n, p in net.named_parameters()})
    with delfast.compact(net, mask):
        seen = []
        net.mix.register_full_backward_hook(lambda *_: seen.append("mix"))
        hidden = net.mix(torch.randn(2, 20))
        assert not hidden.requires_grad
        cross_entropy(data)(net).backward()
    assert not seen and all(p.requires_grad for p in net.parameters())


def test_state_dicts_are_the_original_s(net, data):
    mask = row_mask(net, 0.4)
    plain = copy.deepcopy(net)
    with delfast.compact(net, mask) as handle:
        assert all(torch.equal(net.state_dict()[name], value) for name, value in plain.state_dict().items())
        other = {name: value + 1 if value.is_floating_point() else value for name, value in plain.state_dict().items()}
        net.load_state_dict(other)
        rows = dict(handle.named_parameters())["twice.weight_rows"]
        assert torch.equal(rows, other["twice.weight"][mask.parameters["twice.weight"].flags])
        torch.testing.assert_close(net(data[0]), _loaded(plain, other)(data[0]))
        with pytest.raises(RuntimeError, match=r"Missing key.*twice\.weight"):
            net.load_state_dict({name: value for name, value in other.items() if name != "twice.weight"})
        average = torch.optim.swa_utils.AveragedModel(net)
        average.update_parameters(net)
        assert average.module.state_dict().keys() == other.keys()
        copied = pickle.loads(pickle.dumps(net))
        assert isinstance(copied.mix, CompactLayer) and copied.state_dict().keys() == other.keys()
    net.load_state_dict(plain.state_dict())


def test_state_dict_has_rows_that_no_forward_pass_has_seen(net):
    mask = row_mask(net, 0.4)
    with delfast.compact(net, mask) as handle:
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.fill_(7)
        state = {name: value.clone() for name, value in net.state_dict().items()}
    for name in ("twice.weight", "mix.weight"):
        flags = mask.parameters[name].flags
        assert (state[name][flags] == 7).all() and (state[name][~flags] != 7).all()


def step(net, data, optimizer):
    optimizer.zero_grad()
    cross_entropy(data)(net).backward()
    optimizer.step()


def test_what_is_loaded_stays_loaded_after_a_step(net, data):
    """Build, make compact, load a checkpoint, train: as a resumed job does."""
    mask = row_mask(net, 0.4)
    other = {name: value + 1 if value.is_floating_point() else value for name, value in net.state_dict().items()}
    with delfast.compact(net, mask) as handle:
        net.load_state_dict(other)
        step(net, data, torch.optim.AdamW(handle.parameters(), lr=0.01, weight_decay=0.1))
    assert all_but(mask, {name: other[name] for name, _ in net.named_parameters()}, net)[0] == 0


def test_a_gradient_from_before_moves_nothing(net, data):
    mask = row_mask(net, 0.4)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    cross_entropy(data)(net).backward()
    with delfast.compact(net, mask):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
        cross_entropy(data)(net).backward()  # no zero_grad before the first step
        optimizer.step()
    assert all_but(mask, before, net)[0] == 0


def test_a_masked_optimizer_of_another_mask_is_guarded_too(net, data):
    mask = row_mask(net, 0.4)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with delfast.compact(net, mask) as handle:
        wide = full_mask(net)
        step(net, data, MaskedSGD(net.named_parameters(), wide, lr=0.1, weight_decay=0.5))
        assert wide.digest != handle.mask.digest
    assert all_but(mask, before, net)[0] == 0


def test_double_backward_is_refused(net, data):
    with delfast.compact(net, row_mask(net, 0.4)) as handle:
        gradients = torch.autograd.grad(cross_entropy(data)(net), list(handle.parameters()), create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            sum(gradient.square().sum() for gradient in gradients).backward()


def test_writes_into_the_weights_are_seen(net, data):
    """Weight averages that user code writes through the tensors of ``state_dict()``."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    with delfast.compact(net, row_mask(net, 0.4)) as handle:
        step(net, data, torch.optim.SGD(handle.parameters(), lr=0.1))
        for name, value in net.state_dict().items():
            value.copy_(other.state_dict()[name])
        torch.testing.assert_close(net.eval()(data[0]), other.eval()(data[0]))


def test_modules_that_read_weights_directly_see_every_step():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 16)
    with delfast.compact(net, row_mask(net, 0.4)) as handle:
        assert handle.modes["linear1.weight"] == "rows" and handle.modes["self_attn.out_proj.weight"] == "guarded"
        optimizer = torch.optim.SGD(handle.parameters(), lr=1.0)
        net(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            fast = net.eval()(x)  # reads linear1.weight, calls nothing
            torch.testing.assert_close(fast, net.train()(x))


def test_averages_with_buffers_leave_the_rows_where_they_are(net, data):
    with delfast.compact(net, row_mask(net, 0.4)) as handle:
        average = torch.optim.swa_utils.AveragedModel(
            net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
        )
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
        expected = {name: parameter.detach().clone() for name, parameter in Net().named_parameters()}
        for count in range(3):
            step(net, data, optimizer)
            average.update_parameters(net)
            for name, value in expected.items():
                now = net.state_dict()[name]
                value.copy_(now if not count else torch.lerp(value, now, 0.1))
        assert not [name for name, _ in net.named_buffers() if "row" in name]
        state = average.module.state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_partial_load_keeps_the_rest(net):
    with delfast.compact(net, row_mask(net, 0.4)) as handle:
        rows = dict(handle.named_parameters())["twice.weight_rows"]
        with torch.no_grad():
            rows.fill_(3)
        net.load_state_dict({"mix.bias": torch.zeros(24)}, strict=False)
        assert (rows == 3).all()


@pytest.mark.parametrize("what", ["Guard", "plan_rows", "empty_like", "index_select"])
def test_a_failure_while_it_is_made_undoes_it(net, monkeypatch, what):
    places = {"Guard": sys.modules["delfast.compaction.handle"], "plan_rows": sys.modules["delfast.compaction.layers"]}
    module = places.get(what, torch.Tensor if what == "index_select" else torch)
    works, calls = getattr(module, what), []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == (1 if what == "Guard" else 3):  # of layers the third: the first two are compact by then
            raise MemoryError
        return works(*arguments)

    before, mask = copy.deepcopy(net.state_dict()), row_mask(net, 0.4)
    with monkeypatch.context() as patch:
        patch.setattr(module, what, fail)
        with pytest.raises(MemoryError):
            delfast.compact(net, mask)
    assert len(calls) in (1, 3) and all(type(m) not in COMPACT.values() for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())
    assert not [name for name, _ in net.named_parameters() if "rows" in name]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_an_optimizer_within_an_optimizer(net, data):
    class Outer(torch.optim.SGD):
        def step(self, closure=None):
            inner.step()
            return super().step(closure)

    mask = row_mask(net, 0.4)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with delfast.compact(net, mask) as handle:
        inner = torch.optim.SGD(handle.parameters(), lr=0.1, weight_decay=0.1)
        outer = Outer(handle.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(2):
            outer.zero_grad()
            cross_entropy(data)(net).backward()
            outer.step()
    assert all_but(mask, before, net) == (0, True)


def test_guarded_parameters_are_known_by_themselves_and_not_by_where_they_lay(net):
    with delfast.compact(net, row_mask(net, 0.4)) as handle:
        guarded = [name for name, mode in handle.modes.items() if mode == "guarded"]
        ids = {id(dict(net.named_parameters())[name]) for name in guarded}
        net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
        fresh = [nn.Parameter(torch.ones(3)) for _ in range(200)]
        assert not ids & guard._registry.guards.keys()
        others = [parameter for parameter in fresh if id(parameter) in ids]  # in the memory of the old ones
        before = [parameter.detach().clone() for parameter in others]
        for parameter in others:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(others, lr=0.1).step()
        assert all((parameter != old).all() for parameter, old in zip(others, before, strict=True))


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


def _loaded(model, state):
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    return model


def test_undo_and_redo_keep_the_parameters_that_an_optimizer_has(net, data):
    plain_names = [name for name, _ in net.named_parameters()]
    handle = delfast.compact(net, row_mask(net, 0.4))
    compact_parameters = dict(handle.named_parameters())
    handle.undo()
    handle.undo()
    assert [name for name, _ in net.named_parameters()] == plain_names and type(net.mix) is nn.Linear
    with torch.no_grad():
        net.mix.weight.mul_(2)
    handle.redo()
    handle.redo()
    assert all(parameter is compact_parameters[name] for name, parameter in handle.named_parameters())
    rows = net.mix.weight[handle.original_mask.parameters["mix.weight"].flags]
    assert torch.equal(compact_parameters["mix.weight_rows"], rows)
    assert "rows: 4" in repr(handle)
    handle.undo()


def test_the_handle_undoes_itself_after_an_error(net):
    with pytest.raises(KeyError), delfast.compact(net, row_mask(net, 0.4)):
        raise KeyError
    assert type(net.mix) is nn.Linear and all(p.requires_grad for p in net.parameters())


def test_what_cannot_be_trained_by_rows_is_guarded(net, data):
    mask = row_mask(net, 0.4)

    class Own(nn.Linear):
        pass

    net.mix = Own(20, 24)
    with delfast.compact(net, mask, dense=["module.twice.weight"]) as handle:
        guarded = {name for name, mode in handle.modes.items() if mode == "guarded"}
        assert {"mix.weight", "twice.weight", "head.weight", "norm.weight"} <= guarded
        cross_entropy(data)(net).backward()
        outside = net.mix.weight.grad[~mask.parameters["mix.weight"].flags]
        assert not outside.any()


def test_bad_arguments_change_nothing(net):
    mask = row_mask(net, 0.4)
    with pytest.raises(InputError, match=r"'mux\.weight', which is no trainable parameter"):
        delfast.compact(net, mask, dense=["mux.weight"])
    with pytest.raises(InputError, match="dense to be a list of names"):
        delfast.compact(net, mask, dense="mix.weight")
    with pytest.raises(InputError, match="does not have"):
        delfast.compact(nn.Linear(2, 2), mask)
    with pytest.raises(InputError, match="call compact\\(\\) first, then wrap"):
        delfast.compact(nn.DataParallel(net), mask)
    assert type(net.mix) is nn.Linear and all(p.requires_grad for p in net.parameters())
