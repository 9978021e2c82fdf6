"""The operations that a compact step dispatches: by the rules of a CUDA device, and when rows are written."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import delfast
from delfast.compaction.layers import CompactLayer, record_versions
from delfast.compaction.rules import RULES, rule_of, rules_of
from delfast.experiments.networks import build
from delfast.mask import Mask
from delfast.optim import MaskedSGD
from tests.compaction.references import (
    LAYERS,
    Net,
    close,
    cross_entropy,
    expected_gradients,
    gradients_of,
    row_mask,
    step,
)

WRITE = "delfast.write_rows_.default"
HOST_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "scalar_tensor", "_to_copy")


class Operations(TorchDispatchMode):
    """The names of the operations that are dispatched inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function).removeprefix("aten."))
        return function(*args, **(kwargs or {}))


def operations_of(call):
    with Operations() as seen:
        call()
    return seen.names


def writes(call):
    return Counter(operations_of(call))[WRITE]


OPTIMIZERS = {
    "SGD": lambda handle: torch.optim.SGD(handle.parameters(), lr=1e-4, momentum=0.9, foreach=True),
    "MaskedSGD": lambda handle: MaskedSGD(handle.model.named_parameters(), handle.mask, lr=1e-4, momentum=0.9),
}


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_compact_step_by_the_rules_of_a_cuda_device_has_few_operations(kind, layout):
    """At most 1.25 times the dense step's; no read by the host; every step the same, as a captured graph needs."""
    torch.manual_seed(0)
    model = build("resnet18-thin", 10, 3, 32).to(memory_format=layout).eval()
    x, targets = torch.randn(2, 3, 32, 32).contiguous(memory_format=layout), torch.tensor([1, 2])
    mask = delfast.localize(model, [(x, targets)], 0.3)
    model.train()
    dense = copy.deepcopy(model)

    def step_of(network, optimizer):
        def take():
            optimizer.zero_grad()
            functional.cross_entropy(network(x), targets).backward()
            optimizer.step()

        take()
        return take

    plain = operations_of(step_of(dense, torch.optim.SGD(dense.parameters(), lr=1e-4, momentum=0.9, foreach=True)))
    with rules_of("cuda"), delfast.compact(model, mask) as handle:
        assert list(handle.modes.values()).count("rows") >= 15
        take = step_of(model, OPTIMIZERS[kind](handle))
        ours = operations_of(take)
        assert len(ours) <= 1.25 * len(plain), Counter(ours) - Counter(plain)
        assert ours.count(WRITE) == 2 and ours.count("convolution_backward.default") <= 20
        assert not [name for name in ours if name.split(".")[0] in HOST_READS]
        assert all(operations_of(take) == ours for _ in range(2))


@pytest.mark.parametrize("positions", [0, 10**9], ids=["many positions", "few positions"])
@pytest.mark.parametrize("fraction", [0.3, 0.97, 1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_by_the_rules_of_a_cuda_device(name, fraction, positions, monkeypatch):
    monkeypatch.setitem(RULES["cuda", "linear"].min_positions, torch.float64, positions)
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    mask, x = row_mask(layer, fraction), torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def loss(model):
        return model(x).square().sum()

    expected = expected_gradients(layer, mask, loss)
    of_x, x.grad = x.grad, None
    with rules_of("cuda"), delfast.compact(layer, mask) as handle:
        assert handle.modes["weight"] == ("dense" if fraction == 1 else "rows")
        for count in (1, 2):
            loss(layer).backward()
            close(gradients_of(handle), {name: count * gradient for name, gradient in expected.items()})
            close({"x": x.grad}, {"x": count * of_x})


def test_few_positions_are_those_of_the_dtype_that_autocast_chooses(monkeypatch):
    limits = {torch.float32: 5, torch.bfloat16: 7}
    for dtype, limit in limits.items():
        monkeypatch.setitem(RULES["cuda", "linear"].min_positions, dtype, limit)
    layer = nn.Linear(6, 40)
    with rules_of("cuda"), delfast.compact(layer, row_mask(layer, 0.3)):
        for dtype, limit in limits.items():
            for positions in (limit - 1, limit):
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    output = layer(torch.randn(1, positions, 6))
                used = set()
                stack = [output.grad_fn]
                while stack:
                    node = stack.pop()
                    used.add(type(node).__name__)
                    stack += [below for below, _ in node.next_functions if below is not None]
                assert ("RowsOfLinearBackward" in used) == (positions == limit) != ("RowsOfViewBackward" in used)


def test_gradients_of_gradients_by_torch_s_own_layers_are_right(net, data):
    """Or refused, as for every layer whose gradient is a function of ours."""
    net.double()
    mask, loss = row_mask(net, 0.4), cross_entropy(data, torch.float64)
    reference = copy.deepcopy(net)

    def penalty(model, parameters):
        gradients = torch.autograd.grad(loss(model), parameters, create_graph=True)
        return gradients[0][mask.parameters["twice.bias"].dense()].square().sum()

    expected = expected_gradients(reference, mask, lambda model: penalty(model, [model.twice.bias]))
    with rules_of("cuda"), delfast.compact(net, mask) as handle:
        penalty(net, [net.twice.bias]).backward()
        close({n: g for n, g in gradients_of(handle).items() if g is not None}, expected, 1e-10)


@pytest.mark.parametrize("rules", ["cpu", "cuda"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "MaskedSGD"])
def test_training_by_any_rules_is_dense_training_of_the_mask(net, data, optimizer, rules):
    """Momentum and weight decay included; other elements stay to the bit."""
    mask, loss = row_mask(net.double(), 0.4), cross_entropy(data, torch.float64)
    reference, before = copy.deepcopy(net), {n: p.detach().clone() for n, p in net.named_parameters()}
    settings = {"lr": 0.01, "weight_decay": 0.01} | ({} if optimizer == "AdamW" else {"momentum": 0.9})
    with rules_of(rules), delfast.compact(net, mask) as handle:
        if optimizer == "MaskedSGD":
            optimizers = [MaskedSGD(net.named_parameters(), handle.mask, **settings)]
            optimizers.append(MaskedSGD(reference.named_parameters(), mask, **settings))
        else:
            make = getattr(torch.optim, optimizer)
            optimizers = [make(handle.parameters(), **settings), make(reference.parameters(), **settings)]
        for _ in range(4):
            for model, each in zip((net, reference), optimizers, strict=True):
                each.zero_grad()
                loss(model).backward()
                each.step()
            with torch.no_grad():
                for name, parameter in reference.named_parameters():
                    parameter.copy_(torch.where(mask.parameters[name].dense(), parameter, before[name]))
    for name, parameter in net.named_parameters():
        other = reference.get_parameter(name)
        assert (parameter - other).norm() <= 1e-9 * other.norm(), name
        outside = ~mask.parameters[name].dense()
        assert torch.equal(parameter[outside], before[name][outside]), name


def test_the_guard_restores_every_bit():
    """Signed zeros, infinities, denormal numbers and NaNs outside the mask, under weight decay and momentum."""
    model = nn.Sequential(nn.Linear(2, 8, bias=False), nn.BatchNorm1d(8))
    bits = torch.tensor([0, -(2**31), 1, 0x7F800000, -0x800000, 0x7FC12345, 0x3F800000, 0x00400000], dtype=torch.int32)
    with torch.no_grad():
        model[1].bias.copy_(bits.view(torch.float32))
    mask = Mask.from_dense({"0.weight": torch.ones(8, 2), "1.bias": torch.arange(8) == 6})
    with delfast.compact(model, mask) as handle:
        assert handle.modes["1.bias"] == "guarded"
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 2))[:, 6].square().sum().backward()
            optimizer.step()
    changed = model[1].bias.detach().view(torch.int32) != bits
    assert changed.tolist() == [False] * 6 + [True, False]


def test_rows_are_written_together_after_a_step_and_in_the_pass_that_follows(net, data):
    with delfast.compact(net, row_mask(net, 0.4)) as handle:
        count = len([module for module in net.modules() if isinstance(module, CompactLayer)])
        optimizer, loss = torch.optim.SGD(handle.parameters(), lr=0.1), cross_entropy(data)
        pass_writes = 2  # one for all layers; net.twice has another use, before which its rows may have changed
        assert writes(lambda: loss(net)) == pass_writes
        assert writes(lambda: step(net, data, optimizer)) == count + 1 + 1  # no step came before the pass
        for _ in range(2):
            assert writes(lambda: step(net, data, optimizer)) == pass_writes + 1
        with torch.no_grad():
            assert writes(lambda: loss(net)) == count + 1
        assert writes(lambda: loss(net)) == pass_writes
        assert writes(lambda: net.state_dict()) == count


@pytest.mark.parametrize("what", ["weight_rows", "weight"])
def test_a_layer_that_a_pass_left_out_compares_versions(net, what):
    """The pass has written its rows; other code has changed them, or the weight, since then."""
    with delfast.compact(net, row_mask(net, 0.4)):
        net.depthwise(torch.randn(1, 20, 4, 4))
        with torch.no_grad():
            dict(net.mix.named_parameters())[what].fill_(2.0)
        x = torch.randn(3, 20)
        torch.testing.assert_close(net.mix(x), plain_copy(net).mix(x))
        assert bool((net.mix.weight_rows == 2).all())


CHANGES = {
    "a step": lambda net, handle, kept: optimize(net, handle),
    "a hand-written step": lambda net, handle, kept: [p.data.sub_(0.1 * p.grad) for p in with_gradient(handle)],
    "averages in": lambda net, handle, kept: [p.data.mul_(0.5) for p in handle.parameters()],
    "fill": lambda net, handle, kept: fill(handle.parameters()),
    "fill a weight": lambda net, handle, kept: fill([net.get_parameter("mix.weight")]),
    "save": lambda net, handle, kept: kept.append(copy.deepcopy(net.state_dict())),
    "load": lambda net, handle, kept: net.load_state_dict(kept[-1]),
    "undo and redo": lambda net, handle, kept: (handle.undo(), handle.redo()),
    "training pass": lambda net, handle, kept: passed(net).square().mean().backward(),
    "evaluation": lambda net, handle, kept: torch.no_grad()(passed)(net),
}


def passed(net):
    return net(torch.linspace(-1, 1, 192).view(1, 3, 8, 8).expand(3, -1, -1, -1))


def with_gradient(handle):
    return [parameter for parameter in handle.parameters() if parameter.grad is not None]


def optimize(net, handle):
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    passed(net).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def fill(parameters):
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter.add_(0.01 * number)


def plain_copy(net):
    """Return a plain network with the values that ``net`` stands for; nothing is written by this."""
    plain, values = Net().eval(), dict(net.named_buffers()) | dict(net.named_parameters())
    for name, layer in net.named_modules():
        if isinstance(layer, CompactLayer):
            rows, weight = layer.weight_rows.detach(), layer.whole.detach()
            is_written = layer.row_versions == (layer.whole._version - 1, layer.weight_rows._version)
            values[f"{name}.weight"] = weight if is_written else weight.index_copy(layer.row_dim, layer.row_index, rows)
    plain.load_state_dict({name: values[name] for name in plain.state_dict() if name != "tied.weight"}, strict=False)
    return plain


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=6), st.sampled_from(["cpu", "cuda"]))
@example(["a step", "training pass", "a hand-written step", "evaluation"], "cpu")  # in passes with gradients
@example(["a step", "averages in"], "cpu")
@example(["a step", "averages in", "evaluation"], "cpu")  # without
def test_no_pass_uses_other_rows_than_the_parameters_hold(changes, rules):
    """Whatever changed the rows: ``.data`` has no version, and ``Optimizer`` is not the only one to step."""
    torch.manual_seed(0)
    net = Net().eval()
    with rules_of(rules), delfast.compact(net, row_mask(net, 0.4)) as handle:
        kept, with_gradients = [copy.deepcopy(net.state_dict())], len(changes) % 2 == 0
        for change in changes:
            CHANGES[change](net, handle, kept)
            if change == "a step":
                continue
            expected = plain_copy(net)
            with torch.set_grad_enabled(with_gradients):
                found = passed(net)
            with torch.no_grad():
                torch.testing.assert_close(found, passed(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rules", ["cpu", "cuda"])
def test_a_replayed_step_counts_as_an_optimizer_s(net, data, rules):
    """A replay writes rows and weights without this module, and increments their versions."""
    with rules_of(rules), delfast.compact(net, row_mask(net, 0.4)) as handle:
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
        net.eval()
        step(net, data, optimizer)
        layers = [module for module in net.modules() if isinstance(module, CompactLayer)]
        for layer in layers:  # as a replayed step would
            layer.weight_rows.data.add_(1.0)
            layer.whole.data.index_copy_(layer.row_dim, layer.row_index, layer.weight_rows.data)
            torch.autograd.graph.increment_version([layer.weight_rows, layer.whole])
        before = [(layer.whole._version, layer.weight_rows._version) for layer in layers]
        assert operations_of(lambda: record_versions(net.modules())) == []
        assert writes(lambda: cross_entropy(data)(net)) == 2  # as after a step, and net.twice at its second call
        assert [(layer.whole._version, layer.weight_rows._version) for layer in layers] == before
        torch.testing.assert_close(net(data[0]), plain_copy(net)(data[0]))
        loss = cross_entropy(data)(net)
        step(net, data, optimizer)
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()


def test_the_plan_follows_the_weight_to_another_device(net):
    """No rule is measured for meta: torch's own layers run there."""
    with delfast.compact(net, row_mask(net, 0.4)):
        assert net.mix.row_plan.gathered is not None and net.mix.row_plan.kept is None
        rows = net.mix.row_index.tolist()
        assert rule_of(torch.device("meta"), "linear").dense_by_torch
        moved = copy.deepcopy(net).to("meta")
        assert moved.mix.row_plan.gathered is None and moved.mix.row_plan.kept.device.type == "meta"
        assert moved(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 5)
        with rules_of("cuda"):
            again = copy.deepcopy(net).double()
        assert again.mix.row_index.tolist() == rows


@pytest.mark.long
def test_layers_by_torch_compile(net, data):
    net.double()
    mask, loss = row_mask(net, 0.4), cross_entropy(data, torch.float64)
    expected = expected_gradients(net, mask, loss)
    with rules_of("cuda"), delfast.compact(net, mask) as handle:
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        loss(compiled).backward()
        close(gradients_of(handle), expected)
        torch.optim.SGD(handle.parameters(), lr=0.1).step()
        net.zero_grad()
        loss(compiled).backward()
        moved = {name: gradient.clone() for name, gradient in gradients_of(handle).items()}
        net.zero_grad()
        loss(net).backward()
        close(gradients_of(handle), moved)
