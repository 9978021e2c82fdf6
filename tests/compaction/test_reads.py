"""Compact layers whose weight other code reads: the rows still get their gradient."""

import copy
import gc
import os
import pickle
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import delfast
from delfast import InputError, TrainingOptions
from delfast.mask import Mask
from tests.compaction.references import (
    LAYERS,
    assert_close,
    compact_gradients,
    dense_then_masked,
    row_mask,
    selected_part,
)
from tests.compaction.weight_readers import READERS, ReadLinear


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
        assert "rows" in handle.modes.values()
        loss(net).backward()
        assert_close(compact_gradients(handle), expected)
        loss(net).backward()  # accumulated, through another graph
        assert_close(compact_gradients(handle), {name: 2 * gradient for name, gradient in expected.items()})


def batches_of(name, count=3):
    net, x = reader(name, torch.float32)
    outputs = net(x).shape[1]
    return net, [(x + step, torch.arange(len(x)) % outputs) for step in range(count)]


def moved_rows(before, model, mask):
    """Return name -> flags of the selected rows or elements that have changed."""
    found = {}
    for name, parameter in model.named_parameters():
        part = mask.parameters[name]
        if part.selected:
            changed = selected_part(parameter.detach() != before[name], part)
            found[name] = changed.flatten(1).any(1) if part.by_row else changed
    return found


def assert_unlearn_moves_every_selected_row(net, batches):
    mask = row_mask(net, 0.4)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    reference, names = copy.deepcopy(net), [name for name, part in mask.parameters.items() if part.selected]
    for model, dense in ((net, []), (reference, names)):
        torch.manual_seed(1)
        training = TrainingOptions(dense=dense)
        delfast.unlearn(model, retain=batches, mask=mask, method="finetune", epochs=3, lr=0.05, training=training)
    learns = moved_rows(before, reference, mask)
    for name, moved in moved_rows(before, net, mask).items():
        assert torch.equal(moved, learns[name]), name
        assert not mask.parameters[name].by_row or moved.any(), name
    for (name, left), (_, right) in zip(net.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4, msg=name)
        assert torch.equal(left[~mask.parameters[name].dense()], before[name][~mask.parameters[name].dense()]), name
    return learns


@pytest.mark.long
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
    """Uses of one layer that may differ from batch to batch."""
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


def test_what_a_read_weight_is():
    """With gradients on, it is an instance of Parameter in the weight's memory; without, the tensor itself."""
    net, _ = reader("linear")
    whole = net.qkv.weight
    with delfast.compact(net, row_mask(net, 0.4)) as handle:
        weight = net.qkv.weight
        assert isinstance(weight, nn.Parameter) and weight.requires_grad and not weight.is_leaf
        assert weight.data_ptr() == whole.data_ptr() and net.get_parameter("qkv.weight").shape == (12, 6)
        with torch.no_grad():
            assert net.qkv.weight is whole
            net.qkv.weight_rows.fill_(3)
            assert (net.qkv.weight == 3).any(1).sum() == len(net.qkv.weight_rows)
        with torch.inference_mode():
            assert net.qkv.weight is whole
        assert dict(net.named_parameters())["qkv.weight"] is whole and not whole.requires_grad
        assert nn.utils.parameters_to_vector(net.parameters()).numel() == sum(p.numel() for p in net.parameters())
        for parameter in handle.parameters():
            parameter.requires_grad_(False)
        assert net.qkv.weight is whole
        for parameter in handle.mask.parameters:
            net.get_parameter(parameter).requires_grad_(True)
    assert net.qkv.weight is whole and whole.requires_grad


@pytest.mark.parametrize("write", ["init", "no_grad", "reset_parameters", "state_dict"])
def test_writes_through_a_read_weight_reach_the_rows(write):
    net, x = reader("linear")
    with delfast.compact(net, row_mask(net, 0.4)):
        net(x)
        if write == "init":
            nn.init.constant_(net.qkv.weight, 2.0)
        elif write == "no_grad":
            with torch.no_grad():
                net.qkv.weight[:] = 2.0
        elif write == "reset_parameters":
            net.qkv.reset_parameters()
        else:
            net.state_dict()["qkv.weight"].fill_(2.0)
        written = net.qkv.weight.detach().clone()
        net(x)
        assert torch.equal(net.qkv.weight, written) and (write == "reset_parameters" or bool((written == 2).all()))
    assert torch.equal(net.qkv.weight, written)


def test_what_cannot_be_done_to_a_read_weight_is_an_error():
    net, _ = reader("linear")
    before = copy.deepcopy(net.state_dict())
    with delfast.compact(net, row_mask(net, 0.4)):
        with pytest.raises(RuntimeError, match="modified inplace"):  # of a Parameter too
            net.qkv.weight.mul_(2)
        with pytest.raises(ValueError, match="non-leaf"):
            torch.optim.SGD([net.qkv.weight], lr=0.1)
        with pytest.raises(RuntimeError, match="requires_grad flags of leaf"):
            net.qkv.weight.requires_grad_(False)
        with pytest.raises(InputError, match=r"keep its weight, got its removal; assign, parametrize, norm"):
            nn.utils.parametrizations.weight_norm(net.qkv)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with (
        pytest.warns(FutureWarning, match="weight_norm"),
        pytest.raises(InputError, match="got a tensor in its place"),
        delfast.compact(net, row_mask(net, 0.4)),
    ):
        nn.utils.weight_norm(net.qkv)
    assert type(net.qkv) is nn.Linear and "weight_rows" not in net.qkv._parameters


def test_another_tensor_in_the_place_of_a_weight_is_an_error_and_stays_as_it_is():
    """functional_call replaces a weight during a call, as for weight averages; an assignment replaces it for good."""
    net, x = reader("read and called")
    averages = {name: torch.ones_like(value) for name, value in net.state_dict().items()}
    with delfast.compact(net, row_mask(net, 0.4)) as handle:
        expected = net(x).detach()
        with pytest.raises(InputError, match=r"keep its weight, got another tensor; assign, .* after undo\(\)"):
            torch.func.functional_call(net, averages, x)
        assert all(bool((value == 1).all()) for value in averages.values())
        torch.testing.assert_close(net(x), expected)
        with handle.undone():
            torch.func.functional_call(net, averages, x)
        net.load_state_dict({name: value.clone() for name, value in averages.items()}, assign=True)
        assert bool((net.first.weight_rows == 1).all())
        net.float()(x.float())
        net.first.weight = nn.Parameter(torch.full((10, 6), 2.0))
        with pytest.raises(InputError, match="got another tensor"):
            net(x.float())
    assert bool((net.first.weight == 2).all()) and bool((net.conv.weight == 1).all())


def test_checkpointing_compile_copies_and_pickles_have_the_same_gradients():
    net, x = reader("read and called")
    mask, loss = row_mask(net, 0.4), squares(x)
    expected = dense_then_masked(net, mask, loss)
    with delfast.compact(net, mask) as handle:
        through = x.clone().requires_grad_()
        runs = {
            "checkpoint": lambda _: checkpoint(net, x, use_reentrant=False),
            "reentrant": lambda _: checkpoint(net, through, use_reentrant=True),
            "functional_call": lambda x: torch.func.functional_call(net, dict(net.named_parameters()), x),
        }
        for run in runs.values():
            loss(run).backward()
            assert_close(compact_gradients(handle), expected)
            net.zero_grad()
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            loss(other).backward()
            expected_rows = expected["first.weight"]
            assert (other.first.weight_rows.grad - expected_rows).norm() <= 1e-10 * expected_rows.norm()
        assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.long
def test_compiled_reads_follow_the_optimizer():
    net, x = reader("read and called")
    mask, loss = row_mask(net, 0.4), squares(x)
    with delfast.compact(net, mask) as handle:
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        optimizer = torch.optim.AdamW(handle.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss(net).backward()
            expected = compact_gradients(handle)
            optimizer.zero_grad()
            loss(compiled).backward()
            assert_close(compact_gradients(handle), expected)
            optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.slow
def test_compiled_by_inductor():
    net, x = reader("read and called")
    mask, loss = row_mask(net, 0.4), squares(x)
    expected = dense_then_masked(net, mask, loss)
    with delfast.compact(net, mask) as handle:
        loss(torch.compile(net, fullgraph=True)).backward()
        assert_close(compact_gradients(handle), expected)


def test_a_step_between_a_read_and_its_backward_pass_is_an_error():
    """Every gradient that needs the weight is refused, even the input gradient alone."""
    net, x = reader("linear")
    x.requires_grad_()
    for wanted in ("all", "input"):
        with delfast.compact(net, row_mask(net, 0.4)) as handle:
            optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
            squares(x)(net).backward()
            loss = squares(x)(net)
            loss_of_same_step = squares(x)(net)
            loss_of_same_step.backward()  # another pass with the same rows: nothing has changed
            torch.autograd.grad(loss, x, retain_graph=True)
            optimizer.step()
            with pytest.raises(RuntimeError, match="inplace"):
                torch.autograd.grad(loss, x) if wanted == "input" else loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_it_gives_the_dense_network(dtype):
    net, x = reader("read and called", torch.float32)
    mask = row_mask(net, 0.4)
    exact = dense_then_masked(copy.deepcopy(net).double(), mask, squares(x.double()))

    def loss(model):
        with torch.autocast("cpu", dtype):
            return squares(x)(model)

    dense = dense_then_masked(net, mask, loss)
    with delfast.compact(net, mask) as handle:
        loss(net).backward()
        for name, gradient in compact_gradients(handle).items():
            assert gradient.dtype == torch.float32
            error, allowed = ((g - exact[name]).norm() / exact[name].norm() for g in (gradient, dense[name]))
            assert error <= 2 * allowed + torch.finfo(dtype).eps, name


def test_the_fast_path_of_an_encoder_layer_is_left_where_rows_need_a_gradient():
    """The network is in eval mode; only the rows of a layer that the fast path reads require a gradient."""
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).double().eval()
    mask = row_mask(net, 0.4)
    mask = Mask({name: part for name, part in mask.parameters.items() if name == "linear1.weight"})
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    reference = copy.deepcopy(net)
    reference(x).square().sin().sum().backward()
    with delfast.compact(net, mask) as handle:
        net(x).square().sin().sum().backward()
        expected = {"linear1.weight": selected_part(reference.linear1.weight.grad, mask.parameters["linear1.weight"])}
        assert_close(compact_gradients(handle), expected)


class LateReader(ReadLinear):
    """A network that uses a weight only in batches whose first number is positive."""

    def forward(self, x):
        return super().forward(x) if x[0, 0] > 0 else self.out(x.repeat(1, 2))


def test_a_weight_that_only_later_batches_read_is_trained():
    torch.manual_seed(0)
    net = LateReader()
    x, targets = torch.randn(4, 6).abs(), torch.arange(4) % 3
    assert_unlearn_moves_every_selected_row(net, [(-x, targets), (x, targets)])


class HeldReader(ReadLinear):
    """A network that holds a Parameter from before compact()."""

    def __init__(self):
        super().__init__()
        self.held = [self.qkv.weight]

    def forward(self, x):
        return self.out(functional.linear(x, self.held[0], self.qkv.bias).tanh())


def test_a_held_weight_is_reported_and_dense_trains_it():
    torch.manual_seed(0)
    net, batches = HeldReader(), [(torch.randn(6, 6), torch.arange(6) % 3)]
    mask = row_mask(net, 0.4)
    for dense, moves in (((), False), (["qkv.weight"], True), (["module.qkv.weight"], True)):
        before = copy.deepcopy(net.state_dict())
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            training = TrainingOptions(dense=dense)
            delfast.unlearn(net, retain=batches, mask=mask, method="finetune", epochs=2, lr=0.1, training=training)
        found = [str(each.message) for each in seen if "no gradient reached" in str(each.message)]
        assert bool(found) == (not moves) and all("'qkv.weight': the selected" in text for text in found)
        assert moved_rows(before, net, mask)["qkv.weight"].all() == moves
    with pytest.raises(InputError, match=r"'qkv\.wait', which is no trainable parameter"):
        delfast.unlearn(net, retain=batches, mask=mask, method="finetune", training=TrainingOptions(dense=["qkv.wait"]))
    with pytest.raises(InputError, match=r"expected no dense= for 'ssd', which trains nothing"):
        training = TrainingOptions(dense=["qkv.weight"])
        delfast.unlearn(net, retain=batches, forget=[*batches], mask=mask, method="ssd", training=training)


def test_no_warning_where_every_row_has_had_a_gradient_or_nothing_was_trained():
    net, x = reader("linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with delfast.compact(net, row_mask(net, 0.4)) as handle, handle.undone():
            net(x)
        with delfast.compact(net, row_mask(net, 0.4)) as handle:
            optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
            optimizer.step()  # without any gradient: only the steps that follow show what is used
            squares(x)(net).backward()
            optimizer.step()


@pytest.mark.parametrize("groups", [1, 4, 12])
def test_another_default_device_changes_nothing(groups):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(12, 24, 3, groups=groups), nn.Flatten(), nn.Linear(24 * 4, 3)).double()
    mask, loss = row_mask(net, 0.3), squares(torch.randn(2, 12, 4, 4, dtype=torch.float64))
    expected = dense_then_masked(net, mask, loss)
    torch.set_default_device("meta")
    try:
        with delfast.compact(net, mask) as handle:
            assert handle.mask.selected == mask.selected and len(handle.mask.digest) == 64
            loss(net).backward()
            assert_close(compact_gradients(handle), expected)
            torch.optim.SGD(handle.parameters(), lr=0.1).step()
        net.float()
        batches, before = (
            [(torch.randn(2, 12, 4, 4, device="cpu"), torch.tensor([0, 2], device="cpu"))],
            net.state_dict(),
        )
        init = {name: value + 1 for name, value in before.items()}
        delfast.unlearn(net, retain=batches, forget=[*batches], mask=mask, init=init, epochs=1)
    finally:
        torch.set_default_device(None)
    assert all(parameter.device.type == "cpu" for parameter in net.parameters())


def train_in_one_of(rank, processes, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    net, x = reader("linear")
    with delfast.compact(net, row_mask(net, 0.4)) as handle:
        wrapped = nn.parallel.DistributedDataParallel(net)  # which waits for the gradient of every Parameter
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            squares(x + rank + step)(wrapped).backward()
            optimizer.step()
    torch.save(net.state_dict(), f"{results}/{rank}.pt")
    dist.barrier()
    del wrapped
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo by a shared file is tested on Linux")
def test_two_processes_share_the_gradient_of_a_read_weight(tmp_path):
    if os.listdir("/sys/class/net") == []:
        pytest.skip("gloo needs a network interface, be it the loopback, and there is none")
    start_processes(train_in_one_of, (2, tmp_path / "store", tmp_path), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    net, x = reader("linear")
    mask = row_mask(net, 0.4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (0.5 * squares(x + step)(net) + 0.5 * squares(x + 1 + step)(net)).backward()
        for name, parameter in net.named_parameters():
            parameter.grad *= mask.parameters[name].dense()
        optimizer.step()
    for name, value in net.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize("is_written", [True, False])
def test_writes_into_the_weight_of_a_copy_reach_its_rows(make, is_written):
    """The rows are equal before and after the copy, for any versions of the copied tensors."""
    net, x = reader("linear")
    with delfast.compact(net, row_mask(net, 0.4)):
        net(x)
        with torch.no_grad():
            net.qkv.weight[0] = 7.0
            if not is_written:
                net.qkv.weight_rows.fill_(3.0)
        other = make(net)
        assert torch.equal(other.qkv.weight, net.qkv.weight)
        for value in (5.0, 6.0):
            with torch.no_grad():
                dict(other.named_parameters())["qkv.weight"].fill_(value)
            other(x)
            assert bool((other.qkv.weight == value).all()) and bool((other.qkv.weight_rows == value).all())


def test_a_model_made_compact_in_inference_mode_is_trained_outside():
    net, x = reader("read and called")
    mask, loss = row_mask(net, 0.4), squares(x)
    expected = dense_then_masked(net, mask, loss)
    with torch.inference_mode():
        handle = delfast.compact(net, mask)
        net(x)
        with handle.undone():
            net(x)
        with pytest.raises(InputError, match=r"made outside torch.inference_mode\(\), got 'first.weight' made inside"):
            delfast.compact(reader("read and called")[0], mask)
    loss(net).backward()
    assert_close(compact_gradients(handle), expected)
    handle.undo()
    assert not any(parameter.is_inference() for parameter in net.parameters())


def test_no_warning_where_a_closure_has_computed_the_gradients():
    net, x = reader("linear")
    with warnings.catch_warnings(), delfast.compact(net, row_mask(net, 0.4)) as handle:
        warnings.simplefilter("error")
        optimizer = torch.optim.LBFGS(handle.parameters(), lr=0.01, max_iter=1)

        def closure():
            optimizer.zero_grad()
            loss = squares(x)(net)
            loss.backward()
            return loss

        optimizer.step(closure)
        handle.undo()
