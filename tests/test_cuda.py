"""Every op on a GPU: the CPU kernels' results, on the current stream, without waiting, inside CUDA graphs.

Without a device these are skipped; the same kernels then run on the CPU in test_cpp.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import delfast
from delfast.compaction.layers import record_versions
from delfast.localization.scores import Scores
from delfast.ops import BACKEND, OPS
from delfast.optim import MaskedAdamW, MaskedSGD
from tests import cases
from tests.cases import FORMS
from tests.networks import Recurrent
from tests.ops.calls import AGGREGATES, CRITERIA, HYPER, NATIVE, masked_arguments, run_update, sample_calls

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
    pytest.mark.skipif("CUDA" not in BACKEND.devices, reason=f"no CUDA kernels: {delfast.status()['cuda']}"),
]
UPDATES = ["masked_sgd_", "masked_adamw_"]
NUMBERS = range(len(OPS) + 1)  # of sample_call


def copied(value: Any, device: str) -> Any:
    """Tensors, also inside tuples, lists and dicts, copied to a device."""
    return torch.utils._pytree.tree_map(lambda x: x.to(device, copy=True) if isinstance(x, Tensor) else x, value)


def on_device(value: Any) -> Any:
    return copied(value, "cuda")


def on_cpu(value: Any) -> Any:
    return copied(value, "cpu")


def tensors_in(value: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, Tensor)]


def assert_same(result: Any, expected: Any, what: object = "") -> None:
    """Equal to the bit: one tensor, or several in the same order."""
    results, wanted = (tensors_in(on_cpu(value)) for value in (result, expected))
    assert len(results) == len(wanted) > 0
    for number, (a, b) in enumerate(zip(results, wanted, strict=True)):
        assert torch.equal(a, b), (what, number)


Tensors = list[Tensor]


def in_all_strides(first: Tensors, second: Tensors) -> Iterator[tuple[str, list[Tensors], list[Tensors]]]:
    """(name, both on the CPU, both on the device), the second in other strides than the first."""
    lists = first, on_device(first), second, on_device(second)
    host, device, other_host, other_device = (list(cases.strided(tensors)) for tensors in lists)
    for number, (name, tensors) in enumerate(host):
        yield name, [tensors, other_host[-number][1]], [device[number][1], other_device[-number][1]]


# Results


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_criticality_equals_the_cpu_kernels(dtype: torch.dtype, aggregate: str) -> None:
    for grad_dtype in (dtype, torch.float32):
        theta, grad = cases.parameters(dtype=dtype, grad_dtype=grad_dtype)
        h = cases.top_h(theta)
        for criterion in CRITERIA:
            for name, host, device in in_all_strides(theta, grad):
                expected = NATIVE.criticality(*host, criterion, aggregate, h)
                assert_same(NATIVE.criticality(*device, criterion, aggregate, h), expected, (criterion, name))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_outputs_along_another_dimension_are_scored_without_a_copy(dtype: torch.dtype, aggregate: str) -> None:
    """A Conv1D's weight (in, out), and a transposed convolution's (in, out, height, width) seen by its outputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(768, 1024), (3000, 256), (65, 33), (256, 64, 4, 4), (40, 20, 3, 3)]
    theta, grad = ([torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(2))
    host = [[t.movedim(1, 0) for t in tensors] for tensors in (theta, grad)]
    device = [[t.movedim(1, 0) for t in on_device(tensors)] for tensors in (theta, grad)]
    h = cases.top_h(host[0])
    expected = NATIVE.criticality(*host, "weighted_grad", aggregate, h)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = NATIVE.criticality(*device, "weighted_grad", aggregate, h)
    assert torch.cuda.max_memory_allocated() - before <= 2**13  # the scores: 1,397 floats
    assert_same(result, expected)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_select_elements_equals_the_cpu_kernels(dtype: torch.dtype, criterion: str) -> None:
    theta, grad = cases.parameters(dtype=dtype)
    total = sum(t.numel() for t in theta)
    for name, host, device in in_all_strides(theta, grad):
        for k in (0, 1, total // 3, total - 1, total, total + 5):
            expected = NATIVE.select_elements(*host, criterion, k)
            assert_same(NATIVE.select_elements(*device, criterion, k), expected, (name, k))


def test_a_nonfinite_score_is_named_on_the_device() -> None:
    theta, grad = cases.parameters()
    grad[7].view(-1)[3] = float("nan")
    grad[12][5, 6] = float("inf")
    bits, info = NATIVE.select_elements(on_device(theta), on_device(grad), "weighted_grad", 10)
    assert info.tolist() == [7, 0] and not bits.any()


@pytest.mark.parametrize("shares", [(0.3,), (0.0001, 0.9999)])
@pytest.mark.parametrize("values", ["random", "few", "nonfinite"])
def test_many_elements_are_selected_as_on_the_cpu(shares: tuple[float, ...], values: str) -> None:
    """So many that a bracket is sampled; it misses where values are few."""
    generator = torch.Generator().manual_seed(0)
    theta = [torch.randn(count, generator=generator) for count in (700_001, 10, 1_500_000)]
    if values == "few":
        theta = [t.round() for t in theta]
    if values == "nonfinite":
        theta[2][77] = float("nan")
    total = sum(t.numel() for t in theta)
    for share in shares:
        expected = NATIVE.select_elements(theta, [], "weight", int(share * total))
        assert_same(NATIVE.select_elements(on_device(theta), [], "weight", int(share * total)), expected, share)


@pytest.mark.parametrize("cut_last", [False, True])
def test_select_units_equals_the_cpu_kernels(cut_last: bool) -> None:
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(0, 3000, (seed % 5 + 1,), generator=generator).tolist()
        lengths = torch.randint(1, 9, (seed % 5 + 1,), generator=generator).tolist()
        scores = torch.randint(0, 500, (sum(counts),), generator=generator).float()
        total = sum(count * length for count, length in zip(counts, lengths, strict=True))
        for k in (0, 1, total // 2, max(0, total - 1), total):
            expected = NATIVE.select_units(scores, counts, lengths, k, cut_last)
            assert_same(NATIVE.select_units(on_device(scores), counts, lengths, k, cut_last), expected, (seed, k))


@pytest.mark.parametrize("op", UPDATES)
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_masked_updates_equal_the_cpu_kernels(op: str, by_rows: bool, dtype: torch.dtype) -> None:
    for hyper in HYPER[op]:
        theta, _ = cases.parameters(dtype=dtype)
        arguments = masked_arguments(theta, op, hyper.get("momentum", 1.0), by_rows)
        params, state = on_device(theta), on_device(arguments)
        for step in range(3):
            grads = cases.parameters(seed=step + 1, dtype=dtype)[1]
            run_update(getattr(NATIVE, op), theta, grads, arguments, hyper)
            run_update(getattr(NATIVE, op), params, on_device(grads), state, hyper)
        # AdamW's bias corrections are powers in double, whose last bit is each library's own
        near = {"rtol": 0, "atol": 0} if op == "masked_sgd_" else {"rtol": 1e-6, "atol": 1e-7}
        near = near if dtype == torch.float32 or op == "masked_sgd_" else {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
        torch.testing.assert_close(on_cpu(params), theta, **near)
        torch.testing.assert_close(on_cpu(state["state"]), arguments["state"], rtol=near["rtol"], atol=near["atol"])
        assert_same(state["steps"], arguments["steps"])


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_reset_copies_exactly_in_any_strides(by_rows: bool, dtype: torch.dtype) -> None:
    theta, fresh = cases.parameters(dtype=dtype)
    arguments = masked_arguments(theta, "masked_reset_", by_rows=by_rows)
    bits, by_row = arguments["bits"], arguments["by_row"]
    for name, host, device in in_all_strides(theta, fresh):
        NATIVE.masked_reset_(*host, bits, by_row)
        NATIVE.masked_reset_(*device, on_device(bits), by_row)
        assert_same(device[0], host[0], name)


@pytest.mark.parametrize("op", UPDATES)
def test_found_inf_and_grad_scale_stay_on_the_device(op: str) -> None:
    theta, grads = (on_device(t) for t in cases.parameters())
    plain, scaled, skipped = (on_device(theta) for _ in range(3))
    arguments = [on_device(masked_arguments(cases.parameters()[0], op)) for _ in range(3)]
    number = {value: torch.tensor(value, device="cuda") for value in (0.0, 1.0, 1024.0)}
    run = getattr(NATIVE, op)
    run_update(run, plain, grads, arguments[0], HYPER[op][0])
    large = [g * 1024 for g in grads]
    with never_waiting():
        amp = {"grad_scale": number[1024.0], "found_inf": number[0.0]}
        run_update(run, scaled, large, arguments[1], HYPER[op][0], **amp)
        run_update(run, skipped, grads, arguments[2], HYPER[op][0], found_inf=number[1.0])
    assert_same(scaled, plain)
    assert_same(skipped, theta)
    assert not arguments[2]["steps"].any() and not arguments[2]["state"].any()


@pytest.mark.parametrize("op", UPDATES)
@pytest.mark.parametrize("by_rows", [True, False])
def test_a_plan_made_outside_or_inside_a_captured_graph(op: str, by_rows: bool) -> None:
    theta, grads = (on_device(t) for t in cases.parameters())
    host = masked_arguments(cases.parameters()[0], op, by_rows=by_rows)
    run, expected = getattr(NATIVE, op), on_device(theta)
    plain = on_device(host)
    for _ in range(2):
        run_update(run, expected, grads, plain, HYPER[op][0])
    plan = NATIVE.masked_plan(theta, on_device(host["bits"]), host["by_row"])
    for form in ("bits", "outside", "inside"):
        params, arguments = on_device(theta), on_device(host)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            if form != "bits":
                inside = form == "inside"
                arguments["bits"] = NATIVE.masked_plan(params, arguments["bits"], host["by_row"]) if inside else plan
            run_update(run, params, grads, arguments, HYPER[op][0])
        for _ in range(2):
            graph.replay()
        assert_same(params, expected, form)
        assert_same(arguments["state"], plain["state"], form)


def test_a_step_of_a_planned_mask_is_two_launches() -> None:
    theta, grads = (on_device(t) for t in cases.parameters())
    arguments = on_device(masked_arguments(cases.parameters()[0], "masked_sgd_"))
    arguments["bits"] = NATIVE.masked_plan(theta, arguments["bits"], arguments["by_row"])
    step = launches(lambda: run_update(NATIVE.masked_sgd_, theta, grads, arguments, HYPER["masked_sgd_"][0]))
    assert step == 2


@pytest.mark.slow
def test_more_than_2_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 20 << 30:
        pytest.skip(f"needs 20 GiB of free memory on the device, {free / 2**30:.1f} are")
    rows, length = 2**16 + 1, 2**15
    theta = torch.zeros(rows, length, dtype=torch.bfloat16, device="cuda")
    theta[-1, -1] = 3
    scores = NATIVE.criticality([theta], [], "weight", "max", [1])
    assert scores[-1] == 3 and not scores[:-1].any()
    bits, _ = NATIVE.select_elements([theta], [], "weight", 1)
    assert bits[-1] == 128 and not bits[:-1].any()
    rows_bits = torch.zeros((rows + 7) // 8, dtype=torch.uint8, device="cuda")
    rows_bits[-1] = 1
    NATIVE.masked_reset_([theta], [theta - 1], rows_bits, [True])
    assert theta[-1, -1] == 2 and theta[-1, 0] == -1 and theta[0, 0] == 0


# Execution


@contextmanager
def never_waiting() -> Iterator[None]:
    """An operation that makes the host wait for the device is an error inside."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def rows_of_every_length() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A call that runs every kernel of criticality, with more shared memory than a kernel gets unasked."""
    theta, grad = ([torch.randn(5, length) for length in (1, 40, 3000, 12000, 20000)] for _ in range(2))
    return NATIVE.criticality, (theta, grad, "weighted_grad", "topk_mean", cases.top_h(theta)), {}


def sample_call(number: int) -> tuple[Callable[[], Any], list[Tensor]]:
    """Call ``number`` on the device, and every tensor that it reads or writes."""
    packet, args, kwargs = on_device([*sample_calls(), rows_of_every_length()][number])
    return lambda: packet(*args, **kwargs), tensors_in((args, kwargs))


@pytest.mark.parametrize("number", NUMBERS)
def test_no_op_waits_for_the_device(number: int) -> None:
    call, _ = sample_call(number)
    call()
    with never_waiting():
        call()


@pytest.mark.parametrize("number", NUMBERS)
def test_an_op_replays_in_a_cuda_graph(number: int) -> None:
    """The graph works on what its tensors hold when it is replayed."""
    call, tensors = sample_call(number)
    expected_call, expected_tensors = sample_call(number)
    before = on_device(tensors)
    call()  # loads the kernels, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for copies in (tensors, expected_tensors):
        for tensor, value in zip(copies, before, strict=True):
            tensor.copy_(value * 0.5 if tensor.is_floating_point() else value)
    for _ in range(2):
        graph.replay()
        expected = expected_call()
        assert_same([result, tensors], [expected, expected_tensors])


@pytest.mark.parametrize("number", NUMBERS)
def test_an_op_runs_on_the_current_stream(number: int) -> None:
    """On a stream that is busy with its inputs, an op waits for them; nothing of it goes to another stream."""
    call, tensors = sample_call(number)
    expected_call, expected_tensors = sample_call(number)
    values = on_device(expected_tensors)
    expected = expected_call()
    for tensor in tensors:
        tensor.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: some tens of milliseconds
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
        result = call()
    stream.synchronize()
    assert_same([result, tensors], [expected, expected_tensors])


@pytest.mark.parametrize("number", NUMBERS)
def test_an_op_runs_on_its_tensors_device(number: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    packet, args, kwargs = [*sample_calls(), rows_of_every_length()][number]
    first, second = (copied((args, kwargs), f"cuda:{index}") for index in (0, 1))
    results = [packet(*args, **kwargs) for args, kwargs in (first, second)]
    assert torch.cuda.current_device() == 0
    assert_same([results[1], second], [results[0], first])


def launches(call: Callable[[], Any]) -> int:
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum("delfast" in event.name for event in profile.events())


def test_the_number_of_launches_does_not_grow_with_the_number_of_parameters() -> None:
    def counts(tensors: int) -> list[int]:
        theta, grad = ([torch.randn(8, 40, device="cuda") for _ in range(tensors)] for _ in range(2))
        h, bits = [4] * tensors, torch.full((tensors,), 5, dtype=torch.uint8, device="cuda")
        index = torch.arange(1, 8, device="cuda")
        return [
            launches(lambda: NATIVE.criticality(theta, grad, "weighted_grad", "topk_mean", h)),
            launches(lambda: NATIVE.select_elements(theta, grad, "weighted_grad", 100)),
            launches(lambda: NATIVE.masked_reset_(theta, grad, bits, [True] * tensors)),
            launches(lambda: NATIVE.write_rows_(theta, [g[1:] for g in grad], [index] * tensors, [0] * tensors)),
        ]

    few = counts(2)
    assert all(few) and counts(30) == few


# in the package


def test_masks_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    model = cases.SmallNet()
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    on_host = Scores(dict(model.named_parameters()), gradients, "weighted_grad", 1)
    model_there = cases.SmallNet().cuda()
    model_there.load_state_dict(model.state_dict())
    there = Scores(dict(model_there.named_parameters()), on_device(gradients), "weighted_grad", 1)
    for granularity in ("channel", "param"):
        for policy in ("whole", "exact"):
            masks = [scores.select(0.3, granularity, policy=policy) for scores in (on_host, there)]
            assert masks[0].digest == masks[1].digest


def test_a_compact_step_replays_in_a_cuda_graph() -> None:
    """Replays train as eager steps do; the weights hold the rows, and count as holding them."""
    torch.manual_seed(0)
    model = cases.SmallNet().cuda().to(memory_format=torch.channels_last)
    images, targets = on_device(cases.image_batches()[0])
    images = images.contiguous(memory_format=torch.channels_last)
    mask = delfast.localize(model, [(images, targets)], budget=0.4)
    eager = copy.deepcopy(model)

    def stepper(network: nn.Module) -> Callable[[], None]:
        handle = delfast.compact(network, mask)
        optimizer = MaskedSGD(network.named_parameters(), handle.mask, lr=0.01, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), targets).backward()
            optimizer.step()

        return step

    step, eager_step = stepper(model), stepper(eager)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    for _ in range(5):
        eager_step()
    torch.autograd.graph.increment_version(list(model.parameters()))
    record_versions(model.modules())
    for (name, found), (_, expected) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=name)
    before = {name: parameter._version for name, parameter in model.named_parameters()}
    torch.testing.assert_close(model.eval()(images), eager.eval()(images), rtol=1e-4, atol=1e-5)
    assert before == {name: parameter._version for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("optimizer_class", [MaskedSGD, MaskedAdamW])
def test_a_whole_job_with_a_grad_scaler(optimizer_class: type[MaskedSGD] | type[MaskedAdamW]) -> None:
    torch.manual_seed(0)
    model = cases.SmallNet().cuda().to(memory_format=torch.channels_last)
    batches = [(images.cuda(), targets.cuda()) for images, targets in cases.image_batches()]
    mask = delfast.localize(model, batches, budget=0.4)
    delfast.reset_(model, mask, init=cases.SmallNet, seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer_class(model.named_parameters(), mask=mask, lr=0.01)
    scaler = torch.amp.GradScaler("cuda")
    for images, targets in batches:
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    for name, parameter in model.named_parameters():
        chosen = mask.parameters[name].dense().to(parameter.device)
        assert torch.equal(parameter[~chosen], before[name][~chosen])
        assert not chosen.any() or not torch.equal(parameter[chosen], before[name][chosen])


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_rnns_in_eval_mode_are_localized(kind: type[nn.RNNBase]) -> None:
    """Localize although cuDNN has no gradient of an RNN in eval mode."""
    model, x, y = Recurrent(kind).eval(), torch.randn(6, 4, 6), torch.arange(6) % 3
    there = copy.deepcopy(model).cuda()
    for per_example in (False, True):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the CPU computes in float32
            here, found = (delfast.score(m, [(x, y)], per_example=per_example).gradients for m in (model, there))
        for name, expected in (here or {}).items():
            torch.testing.assert_close((found or {})[name].cpu(), expected, rtol=1e-3, atol=1e-5)
    batches: Any = [(torch.arange(6, device="cuda"), x, y)]
    assert delfast.signed_channels(there, batches).examples.tolist() == list(range(6))
    delfast.critmem(there, batches)
    delfast.unlearn(there, method="influence", forget=batches, retain=batches * 3)
    assert not there.rnn.training and there.rnn.dropout == 0.5


def test_mappings_and_namedtuples_move_to_the_device() -> None:
    model = cases.SmallNet().cuda()
    for batch, loss_fn in FORMS.values():
        delfast.localize(model, [batch], loss_fn=loss_fn)


def test_tensors_on_two_devices_are_refused_in_one_line() -> None:
    theta = [torch.rand(4, 5, device="cuda"), torch.rand(4, 5)]
    with pytest.raises(ValueError, match="expected parameter #1 on cuda:0, got it on cpu; move all tensors to one"):
        NATIVE.criticality(theta, theta, "grad", "mean", [1, 1])
    bits = torch.tensor([5], dtype=torch.uint8)
    with pytest.raises(ValueError, match="on cpu; move all"):
        NATIVE.masked_reset_(theta[:1], theta[:1], bits, [True])
