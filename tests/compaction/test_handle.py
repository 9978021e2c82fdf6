"""The handle: state dicts, optimizer state, undo and redo."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

import delfast
from delfast.compaction.layers import COMPACT, CompactLayer
from delfast.errors import InputError
from tests.compaction.references import (
    Net,
    all_but,
    cross_entropy,
    row_mask,
    step,
)


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


def test_what_is_loaded_stays_loaded_after_a_step(net, data):
    """Build, make compact, load a checkpoint, train: as a resumed job does."""
    mask = row_mask(net, 0.4)
    other = {name: value + 1 if value.is_floating_point() else value for name, value in net.state_dict().items()}
    with delfast.compact(net, mask) as handle:
        net.load_state_dict(other)
        step(net, data, torch.optim.AdamW(handle.parameters(), lr=0.01, weight_decay=0.1))
    assert all_but(mask, {name: other[name] for name, _ in net.named_parameters()}, net)[0] == 0


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
