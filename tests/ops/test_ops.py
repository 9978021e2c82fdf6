"""Every op: native kernels against their references, in every dtype, layout and instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from delfast.ops import BACKEND, OPS
from delfast.ops.checks import check_write_rows
from delfast.ops.layout import as_rows, flat_rows, pack, padded_state, plan_bytes, row_length, unit_count, unpack
from tests import cases
from tests.ops.calls import (
    AGGREGATES,
    CRITERIA,
    HYPER,
    NATIVE,
    OF_ONE_LAYER,
    REFERENCE,
    STATES,
    calls_on,
    masked_arguments,
    needs_native,
    run_update,
    sample_calls,
)
from tests.tolerances import assert_within_budget


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1001])
def test_pack_and_unpack_are_inverse(count: int) -> None:
    flags = torch.rand(count) < 0.4
    bits = pack(flags)
    assert bits.numel() == (count + 7) // 8 and torch.equal(unpack(bits, count), flags)
    assert all(bool(bits[i // 8] >> (i % 8) & 1) == bool(flags[i]) for i in range(count))


@needs_native
def test_every_op_is_benchmarked() -> None:
    assert {*calls_on([(4, 4)]), *OF_ONE_LAYER} == {op.name for op in OPS}


# criticality


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_criticality_within_budget(isa: str, dtype: torch.dtype, aggregate: str) -> None:
    for grad_dtype in {dtype, torch.float32}:
        theta, grad = cases.parameters(dtype=dtype, grad_dtype=grad_dtype)
        h = cases.top_h(theta)
        for criterion in CRITERIA:
            result = NATIVE.criticality(theta, grad, criterion, aggregate, h)
            reference = REFERENCE["criticality"](theta, grad, criterion, aggregate, h)
            wide = [t.double() for t in theta], [g.double() for g in grad]
            parts = []  # the reference rounds its answer to float32: aggregate in float64 here
            for t, g, top in zip(*wide, h, strict=True):
                scores = {"weighted_grad": t * g, "grad": g, "weight": t}[criterion].abs()
                rows = scores.reshape(unit_count(t.shape), row_length(t.shape) if t.numel() else 0)
                if rows.numel() == 0:
                    continue
                parts.append(
                    {
                        "topk_mean": lambda r=rows, k=top: r.topk(k, dim=1).values.mean(dim=1),
                        "mean": lambda r=rows: r.mean(dim=1),
                        "sum": lambda r=rows: r.sum(dim=1),
                        "max": lambda r=rows: r.amax(dim=1),
                    }[aggregate]()
                )
            assert_within_budget(result, torch.cat(parts), reference)


@needs_native
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_criticality_is_bit_identical_on_any_isa_and_thread_count(
    aggregate: str, one_and_two_threads: tuple[int, int]
) -> None:
    assert BACKEND.module is not None
    theta, grad = cases.parameters()
    theta, grad = [*theta, torch.randn(300, 700)], [*grad, torch.randn(300, 700)]
    before, results = BACKEND.module.isa(), []
    for name in BACKEND.module.isas():
        BACKEND.module.force_isa(name)
        for threads in one_and_two_threads:
            torch.set_num_threads(threads)
            results.append(NATIVE.criticality(theta, grad, "weighted_grad", aggregate, cases.top_h(theta)))
    BACKEND.module.force_isa(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_criticality_in_any_strides(isa: str) -> None:
    theta, grad = cases.parameters()
    h = cases.top_h(theta)
    for aggregate in AGGREGATES:
        expected = NATIVE.criticality(theta, grad, "weighted_grad", aggregate, h)
        for (_, other_theta), (_, other_grad) in zip(
            cases.strided(theta), reversed(list(cases.strided(grad))), strict=True
        ):
            result = NATIVE.criticality(other_theta, other_grad, "weighted_grad", aggregate, h)
            torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)  # order within a row may differ


@pytest.mark.parametrize("values", ["ties", "zeros", "denormals", "one_large"])
def test_criticality_of_degenerate_rows(isa: str, values: str) -> None:
    row = {
        "ties": torch.full((3, 500), 0.25),
        "zeros": torch.zeros(3, 500),
        "denormals": torch.rand(3, 500) * 1e-40,
        "one_large": torch.cat([torch.full((3, 499), 1e-30), torch.full((3, 1), 1e30)], dim=1),
    }[values]
    for h in (1, 2, 50, 499, 500):
        result = NATIVE.criticality([row], [], "weight", "topk_mean", [h])
        exact = row.double().topk(h, dim=1).values.mean(dim=1)
        torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-45)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_criticality_never_hides_a_nonfinite_score(isa: str, bad: float, aggregate: str) -> None:
    theta = torch.rand(4, 100)
    theta[2, 57] = bad
    result = NATIVE.criticality([theta], [], "weight", aggregate, [10])
    assert result.isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_criticality_never_hides_a_nan_with_its_sign_bit_set(isa: str, criterion: str, aggregate: str) -> None:
    theta, grad = torch.rand(4, 100), torch.rand(4, 100)
    for values in (theta, grad):
        values.view(torch.int32)[2, 57] = -0x400000  # 0xffc00000
    result = NATIVE.criticality([theta], [grad], criterion, aggregate, [10])
    assert result.isfinite().tolist() == [True, True, False, True]
    assert int(NATIVE.select_elements([theta], [grad], criterion, 10)[1][0]) == 0


# selection


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_select_elements_equals_the_reference(isa: str, dtype: torch.dtype, criterion: str) -> None:
    theta, grad = cases.parameters(dtype=dtype)  # 16-bit values tie often
    total = sum(t.numel() for t in theta)
    for k in (0, 1, total // 3, total - 1, total, total + 5):
        result, info = NATIVE.select_elements(theta, grad, criterion, k)
        expected, expected_info = REFERENCE["select_elements"](theta, grad, criterion, k)
        assert info.tolist() == expected_info.tolist() == [-1, min(k, total)]
        assert torch.equal(result, expected)
        assert int(unpack(result, 8 * result.numel()).sum()) == min(k, total)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_select_elements_counts_what_scores_above_0(isa: str, dtype: torch.dtype) -> None:
    theta = [(torch.arange(count) % 3).to(dtype) for count in (5, 0, 70_000)]
    total = sum(t.numel() for t in theta)
    above = sum(int(t.count_nonzero()) for t in theta)
    for k in (0, 1, above - 1, above, above + 1, total - 1, total, total + 5):
        bits, info = NATIVE.select_elements(theta, [], "weight", k)
        expected, expected_info = REFERENCE["select_elements"](theta, [], "weight", k)
        assert info.tolist() == expected_info.tolist() == [-1, min(k, above)]
        assert torch.equal(bits, expected)


def test_select_elements_counts_in_logical_order_whatever_the_strides(isa: str) -> None:
    theta, grad = cases.parameters()
    theta = [t.round() for t in theta]  # many ties, so that their order shows
    total = sum(t.numel() for t in theta)
    expected, _ = REFERENCE["select_elements"](theta, grad, "weight", total // 3)
    for name, other in cases.strided(theta):
        result, _ = NATIVE.select_elements(other, [], "weight", total // 3)
        assert torch.equal(result, expected), name


def test_select_elements_ties_fall_to_the_lower_index(isa: str) -> None:
    theta = [torch.ones(70_000), torch.ones(300, 400)]  # more than one chunk each
    for k in (1, 69_999, 70_000, 70_001, 150_000):
        bits, _ = NATIVE.select_elements(theta, [], "weight", k)
        assert torch.equal(unpack(bits, 190_000), torch.arange(190_000) < k)  # both are whole bytes long


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_select_elements_names_the_first_nonfinite_parameter(isa: str, bad: float) -> None:
    theta, grad = cases.parameters()
    grad[7].view(-1)[3] = bad
    grad[12][5, 6] = bad
    _, info = NATIVE.select_elements(theta, grad, "weighted_grad", 10)
    assert int(info[0]) == 7 == int(REFERENCE["select_elements"](theta, grad, "weighted_grad", 10)[1][0])


@pytest.mark.parametrize("cut_last", [False, True])
def test_select_units_equals_the_reference(cut_last: bool) -> None:
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(0, 20, (seed % 5,), generator=generator).tolist()
        lengths = torch.randint(1, 9, (seed % 5,), generator=generator).tolist()
        scores = torch.randint(0, 12, (sum(counts),), generator=generator).float()  # ties and zeros
        total = sum(count * length for count, length in zip(counts, lengths, strict=True))
        for k in (0, 1, total // 2, max(0, total - 1), total):
            result = NATIVE.select_units(scores, counts, lengths, k, cut_last)
            expected = REFERENCE["select_units"](scores, counts, lengths, k, cut_last)
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True)), (seed, k)


def test_select_units_takes_a_prefix_and_stops_at_the_first_that_does_not_fit() -> None:
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0])
    bits, info = NATIVE.select_units(scores, [1, 1, 2], [3, 10, 1], 5, True)
    assert bits.tolist() == [1, 0, 0]  # not the smaller ones behind it
    assert info.tolist() == [1, 2, -1, 1, 2]


# masked updates


@pytest.mark.parametrize("op", ["masked_sgd_", "masked_adamw_"])
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_masked_update_equals_the_reference(isa: str, op: str, by_rows: bool, dtype: torch.dtype) -> None:
    for hyper in HYPER[op]:
        momentum = hyper.get("momentum", 1.0)
        theta, _ = cases.parameters(dtype=dtype)
        native, reference = [t.clone() for t in theta], [t.clone() for t in theta]
        mine, theirs = (masked_arguments(theta, op, momentum, by_rows) for _ in range(2))
        for step in range(3):
            grads = cases.parameters(seed=step + 1, dtype=dtype)[1]
            run_update(getattr(NATIVE, op), native, grads, mine, hyper)
            run_update(REFERENCE[op], reference, grads, theirs, hyper)
        # the same float32 formula in the same order; the reference may fuse a product and a sum
        near = (
            {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
            if dtype != torch.float32
            else {"rtol": 1e-5, "atol": 1e-6}
        )
        for before, a, b, chosen in zip(theta, native, reference, mine["chosen"], strict=True):
            torch.testing.assert_close(a, b, **near)
            assert torch.equal(a[~chosen], before[~chosen])
            assert bool(chosen.any()) is False or not torch.equal(a[chosen], before[chosen])
        torch.testing.assert_close(mine["state"], theirs["state"], rtol=1e-5, atol=1e-6)
        assert mine["steps"].tolist() == [3.0] * len(theta)


@pytest.mark.parametrize("shape", [(8, 4, 1, 1), (8, 1, 3, 3), (1, 4, 3, 3), (4, 6, 3, 3)])
@pytest.mark.parametrize("function", ["native", "reference"])
def test_element_masks_of_channels_last_parameters(shape: tuple[int, ...], function: str) -> None:
    reset = NATIVE.masked_reset_ if function == "native" else REFERENCE["masked_reset_"]
    flags = torch.rand(shape) < 0.5
    param = torch.zeros(shape).to(memory_format=torch.channels_last)
    reset([param], [torch.ones(shape)], pack(flags), [False])
    assert torch.equal(param.bool(), flags)


@pytest.mark.parametrize("by_rows", [True, False])
def test_masked_update_in_any_strides(isa: str, by_rows: bool) -> None:
    theta, grads = cases.parameters()
    hyper = HYPER["masked_sgd_"][0]
    expected = [t.clone() for t in theta]
    run_update(NATIVE.masked_sgd_, expected, grads, masked_arguments(expected, "masked_sgd_", by_rows=by_rows), hyper)
    for (name, params), (_, other_grads) in zip(
        cases.strided(theta), reversed(list(cases.strided(grads))), strict=True
    ):
        arguments = masked_arguments(params, "masked_sgd_", by_rows=by_rows)
        run_update(NATIVE.masked_sgd_, params, other_grads, arguments, hyper)
        assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True)), name


def test_untouched_entries_keep_their_bits_nan_payloads_too(isa: str) -> None:
    payloads = torch.tensor([0x7F800001, 0x7FC12345, -0x3EDCBB, 0x00000001], dtype=torch.int32).repeat(64)
    for dtype, view in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)):
        raw = payloads if view == torch.int32 else (payloads >> 16).to(torch.int16) | 1
        param = raw.clone().view(dtype).view(16, -1)
        flags = torch.zeros(param.shape, dtype=torch.bool)
        flags[:, ::5] = True
        NATIVE.masked_reset_([param], [torch.ones_like(param)], pack(flags), [False])
        assert torch.equal(param.view(view)[~flags], raw.view(16, -1)[~flags])
        assert bool((param[flags] == 1).all())


def test_state_follows_the_rows_own_memory_order(isa: str) -> None:
    """The reference and the kernel agree on it for channels-last parameters, and as_rows reads it back."""
    theta, grads = (list(dict(cases.strided(t))["channels_last"]) for t in cases.parameters())
    reference = [t.clone() for t in theta]
    mine, theirs = (masked_arguments(theta, "masked_sgd_") for _ in range(2))
    run_update(NATIVE.masked_sgd_, theta, grads, mine, HYPER["masked_sgd_"][1])
    run_update(REFERENCE["masked_sgd_"], reference, grads, theirs, HYPER["masked_sgd_"][1])
    torch.testing.assert_close(mine["state"], theirs["state"])
    start = 0
    for t, grad, chosen, by_row in zip(theta, grads, mine["chosen"], mine["by_row"], strict=True):
        values = mine["state"][start : start + int(chosen.sum())]
        if by_row and t.numel():  # maximize: the first buffer is the negated gradient
            rows = chosen.flatten(1)[:, 0]
            torch.testing.assert_close(as_rows(values, t), -grad[rows])
            assert torch.equal(flat_rows(as_rows(values, t), t), values)
        start += padded_state(len(values))


def test_reset_copies_exactly(isa: str) -> None:
    for dtype in cases.DTYPES:
        theta, fresh = cases.parameters(dtype=dtype)
        for by_rows in (True, False):
            params = [t.clone() for t in theta]
            mask = masked_arguments(theta, "masked_reset_", by_rows=by_rows)
            NATIVE.masked_reset_(params, fresh, mask["bits"], mask["by_row"])
            expected = [t.clone() for t in theta]
            REFERENCE["masked_reset_"](expected, fresh, mask["bits"], mask["by_row"])
            assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("op", ["masked_sgd_", "masked_adamw_"])
def test_a_plan_takes_the_place_of_bits_and_padding_is_left_alone(isa: str, op: str, by_rows: bool) -> None:
    for run in (getattr(NATIVE, op), REFERENCE[op]):
        theta, grads = cases.parameters()
        params = [t.clone() for t in theta]
        mine, theirs = (masked_arguments(theta, op, by_rows=by_rows) for _ in range(2))
        used = torch.zeros(len(mine["state"]), dtype=torch.bool)
        start = 0
        for chosen in mine["chosen"]:
            assert start % 4 == 0
            size = STATES[op] * int(chosen.sum())
            used[start : start + size] = True
            start += padded_state(size)
        assert start == len(used) and not used.all()
        mine["state"][~used] = theirs["state"][~used] = float("nan")
        mine["bits"] = NATIVE.masked_plan(theta, mine["bits"], mine["by_row"])
        for _ in range(2):
            run_update(run, params, grads, mine, HYPER[op][0])
            run_update(run, theta, grads, theirs, HYPER[op][0])
        assert all(torch.equal(a, b) for a, b in zip(params, theta, strict=True))
        assert torch.equal(mine["state"].view(torch.int32), theirs["state"].view(torch.int32))
        assert mine["state"][~used].isnan().all() and not mine["state"][used].isnan().any()


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    shapes=st.lists(
        st.one_of(
            st.tuples(st.integers(0, 5000)),
            st.tuples(st.integers(0, 300), st.integers(0, 70)),
            st.tuples(st.integers(0, 5), st.integers(500, 3000), st.just(3)),
        ),
        max_size=4,
    ),
    rows=st.integers(0, 15),
    large=st.booleans(),
)
def test_plans_begin_with_the_bits_and_their_size_is_that_of_the_shapes(
    shapes: list[tuple[int, ...]], rows: int, large: bool
) -> None:
    if large:
        shapes = [*shapes, (2**13, 2**12 + 5)]  # more than 2^25 elements
    params = [torch.empty(1).expand(shape) for shape in shapes]
    by_row = [bool(rows >> i & 1) for i in range(len(params))]
    units = [unit_count(p.shape) if row else p.numel() for p, row in zip(params, by_row, strict=True)]
    bits = torch.cat([torch.empty(0, dtype=torch.uint8), *(pack(torch.arange(n) % 3 == 0) for n in units)])
    plan, expected = NATIVE.masked_plan(params, bits, by_row), REFERENCE["masked_plan"](params, bits, by_row)
    assert torch.equal(plan, expected) and plan.numel() == plan_bytes(shapes, by_row)
    assert torch.equal(plan[: bits.numel()], bits) and plan.numel() > bits.numel()


@pytest.mark.parametrize("op", ["masked_sgd_", "masked_adamw_"])
def test_one_number_may_have_any_shape(isa: str, op: str) -> None:
    theta, grads = cases.parameters()
    numbers = dict(grad_scale=torch.tensor([[2.0]]), found_inf=torch.zeros(1, 1), lr_tensor=torch.tensor([0.5]))
    for update in (getattr(NATIVE, op), REFERENCE[op]):
        expected, actual = ([t.clone() for t in theta] for _ in range(2))
        flat = {name: number.reshape(()) for name, number in numbers.items()}
        run_update(update, expected, grads, masked_arguments(theta, op), HYPER[op][0], **flat)
        run_update(update, actual, grads, masked_arguments(theta, op), HYPER[op][0], **numbers)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("op", ["masked_sgd_", "masked_adamw_"])
def test_grad_scale_and_found_inf(isa: str, op: str) -> None:
    hyper = HYPER[op][0]
    theta, grads = cases.parameters()
    plain, scaled, skipped = ([t.clone() for t in theta] for _ in range(3))
    run_update(getattr(NATIVE, op), plain, grads, masked_arguments(theta, op), hyper)
    run_update(
        getattr(NATIVE, op),
        scaled,
        [g * 1024 for g in grads],
        masked_arguments(theta, op),
        hyper,
        grad_scale=torch.tensor(1024.0),
        found_inf=torch.tensor(0.0),
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))
    arguments = masked_arguments(theta, op)
    run_update(getattr(NATIVE, op), skipped, grads, arguments, hyper, found_inf=torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(skipped, theta, strict=True))
    assert arguments["steps"].tolist() == [0.0] * len(theta)


@pytest.mark.parametrize("op", ["masked_reset_", "masked_sgd_"])
def test_in_place_ops_bump_version_counters(op: str) -> None:
    theta, grads = cases.parameters()
    before = [t._version for t in theta]
    arguments = masked_arguments(theta, "masked_sgd_")
    if op == "masked_reset_":
        NATIVE.masked_reset_(theta, grads, arguments["bits"], arguments["by_row"])
    else:
        run_update(NATIVE.masked_sgd_, theta, grads, arguments, HYPER[op][0])
    assert all(t._version > version for t, version in zip(theta, before, strict=True))


# gathering


@pytest.mark.parametrize("dtype", [*cases.DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 3), (5, 1000), (40000, 33)])
def test_gather_columns_copies_them(shape: tuple[int, int], dtype: torch.dtype, one_and_two_threads: Any) -> None:
    source = torch.randn(shape).to(dtype)
    for columns in (
        torch.arange(shape[1]),
        torch.arange(0, shape[1], 2),
        torch.arange(0),
        torch.arange(shape[1]).flip(0),
    ):
        for threads in one_and_two_threads:
            torch.set_num_threads(threads)
            result = NATIVE.gather_columns(source, columns)
            assert torch.equal(result, source[:, columns]) and result.is_contiguous()


@needs_native
def test_gather_columns_refuses_what_it_cannot_read() -> None:
    source = torch.zeros(2, 3)
    for columns in (torch.tensor([3]), torch.tensor([-1])):
        with pytest.raises(IndexError, match=r"columns in \[0, 3\)"):
            NATIVE.gather_columns(source, columns)
    with pytest.raises(ValueError, match="contiguous int64"):
        NATIVE.gather_columns(source, torch.tensor([0], dtype=torch.int32))
    with pytest.raises(ValueError, match="contiguous matrix"):
        NATIVE.gather_columns(source.t(), torch.tensor([0]))
    with pytest.raises(ValueError, match="2, 4 or 8 bytes"):
        NATIVE.gather_columns(source.bool(), torch.tensor([0]))


# writing rows


def written_case(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, int]:
    """A weight, rows, their index and its dimension."""
    shapes: dict[str, tuple[tuple[int, ...], int]] = {
        "linear": ((40, 7), 0),
        "columns": ((9, 40), 1),
        "vector": ((40,), 0),
        "convolution": ((40, 3, 3, 3), 0),
        "channels last": ((40, 3, 3, 3), 0),
        "rows contiguous": ((40, 3, 3, 3), 0),
        "strided": ((40, 6), 0),
        "strided columns": ((6, 40), 1),
        "middle": ((4, 40, 5), 1),
        "wide": ((40, 30000), 0),
        "many columns": ((3000, 40), 1),
        "no length": ((40, 0), 0),
    }
    shape, dim = shapes[case]
    index = torch.randperm(40)[:17]
    weight = torch.randn(shape).to(dtype)
    rows = torch.randn(*shape[:dim], 17, *shape[dim + 1 :]).to(dtype)
    if case in ("channels last", "rows contiguous"):
        weight = weight.to(memory_format=torch.channels_last)
        rows = rows if case == "rows contiguous" else rows.to(memory_format=torch.channels_last)
    if case.startswith("strided"):
        weight, rows = weight.t().contiguous().t(), torch.stack([rows, rows], -1)[..., 0]
    return weight, rows, index, dim


WRITTEN = ("linear", "columns", "vector", "convolution", "channels last", "rows contiguous", "strided")
WRITTEN += ("strided columns", "middle", "wide", "many columns", "no length")


@pytest.mark.parametrize("function", [NATIVE.write_rows_, REFERENCE["write_rows_"]], ids=["native", "reference"])
@pytest.mark.parametrize("dtype", [*cases.DTYPES, torch.float64, torch.complex64, torch.uint8])
def test_write_rows_copies_them_to_the_bit(function: Any, dtype: torch.dtype, one_and_two_threads: Any) -> None:
    """All weights in one call; versions stay."""
    torch.manual_seed(0)
    given = [written_case(case, dtype) for case in WRITTEN]
    for threads in one_and_two_threads:
        torch.set_num_threads(threads)
        weights = [weight.clone() for weight, *_ in given]
        assert all(w.stride() == weight.stride() for w, (weight, *_) in zip(weights, given, strict=True))
        versions = [weight._version for weight in weights]
        function(weights, *map(list, zip(*(rest for _, *rest in given), strict=True)))
        assert [weight._version for weight in weights] == versions
        for case, weight, (before, rows, index, dim) in zip(WRITTEN, weights, given, strict=True):
            assert torch.equal(weight, before.index_copy(dim, index, rows)), case


def test_write_rows_keeps_every_bit_of_a_nan() -> None:
    bits = torch.tensor([[0x7F800001, -0x400000], [0x7FC12345, -1]], dtype=torch.int32)
    weight = torch.zeros(3, 2)
    NATIVE.write_rows_([weight], [bits.view(torch.float32)], [torch.tensor([2, 0])], [0])
    assert torch.equal(weight.view(torch.int32)[[2, 0]], bits)


@pytest.mark.parametrize("function", [NATIVE.write_rows_, "reference"], ids=["native", "reference"])
def test_write_rows_refuses_what_does_not_fit(function: Any) -> None:
    """Nothing is written then."""
    if function == "reference":
        function = _reference_with_checks
    weight, rows, index = torch.zeros(4, 3), torch.ones(2, 3), torch.tensor([0, 3])
    for error, message, passed in (
        (IndexError, r"index #1 in \[0, 4\), got 4", ([rows, rows], [index, index + 1], [0, 0])),
        (IndexError, r"index #0 in \[0, 4\), got -1", ([rows], [index - 1], [0])),
        (ValueError, r"rows #0 of shape \(2, 3\), got \(3, 2\)", ([rows.t()], [index], [0])),
        (ValueError, r"dim of weight #0 in \[0, 2\), got 2", ([rows], [index], [2])),
        (ValueError, r"dim of weight #0 in \[0, 2\), got -1", ([rows], [index], [-1])),
        (ValueError, "index #0 to be contiguous int64", ([rows], [index.int()], [0])),
        (ValueError, "rows #0 to be .*loat.* like their weight", ([rows.double()], [index], [0])),
        (ValueError, "lists of equal length, got 1 weights, 1 rows, 2 indices and 1 dims", ([rows], [index] * 2, [0])),
    ):
        weights = [weight] * len(passed[0])
        with pytest.raises(error, match=message):
            function(weights, *passed)
        assert not weight.any()
    with pytest.raises(IndexError, match=r"index #0 in \[0, 0\), got 0"):
        function([torch.zeros(0)], [torch.ones(1)], [torch.tensor([0])], [0])
    expanded = torch.zeros(1, 3).expand(4, 3)
    with pytest.raises(ValueError, match="memory of their own"):
        function([expanded], [rows], [index], [0])


def _reference_with_checks(*given: Any) -> None:
    check_write_rows(*given)
    REFERENCE["write_rows_"](*given)


# the registry


def test_the_table_is_complete() -> None:
    assert {packet.default.name().removeprefix("delfast::") for packet, _, _ in sample_calls()} == set(REFERENCE)


@pytest.mark.parametrize("number", range(len(OPS)))
def test_opcheck(number: int) -> None:
    packet, args, kwargs = sample_calls()[number]
    torch.library.opcheck(packet.default, args, kwargs)


@pytest.mark.parametrize("number", range(len(OPS)))
def test_compile_does_not_break_on_an_op(number: int) -> None:
    packet, args, kwargs = sample_calls()[number]
    torch.compiler.reset()  # the lambda below counts as one function, which may be compiled eight times only
    eager_args = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)
    compiled = torch.compile(lambda *a: packet(*a, **kwargs), fullgraph=True, backend="aot_eager")
    expected, result = packet(*eager_args, **kwargs), compiled(*args)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    torch.testing.assert_close(list(args[0]), list(eager_args[0]), rtol=0, atol=0)  # in-place results too


@needs_native
def test_errors_say_what_was_expected_and_what_came() -> None:
    theta, grad = [torch.rand(4, 5)], [torch.rand(4, 6)]
    with pytest.raises(ValueError, match=r"gradient #0 to have shape \(4, 5\).*got \(4, 6\)"):
        NATIVE.criticality(theta, grad, "grad", "mean", [1])
    with pytest.raises(ValueError, match="one gradient per parameter, got 1 parameters and 0 gradients"):
        NATIVE.select_elements(theta, [], "weighted_grad", 1)
    with pytest.raises(ValueError, match="expected parameter #0 to be float32, bfloat16 or float16, got"):
        NATIVE.criticality([theta[0].long()], [theta[0].long()], "grad", "mean", [1])
    with pytest.raises(ValueError, match=r"expected criterion .* got 'nonsense'"):
        NATIVE.criticality(theta, theta, "nonsense", "mean", [1])
    with pytest.raises(ValueError, match=r"top_h of parameter #0 in \[1, 5\], got 6"):
        NATIVE.criticality(theta, theta, "grad", "topk_mean", [6])
    before, some = theta[0].clone(), torch.tensor([5], dtype=torch.uint8)
    for bits, by_row, message in (
        (torch.zeros(2, dtype=torch.uint8), True, "got 1 bytes more"),
        (some, False, "expected 3 bytes of bits for parameter #0, got 1"),
        (torch.tensor([16], dtype=torch.uint8), True, "bits past the last of the 4 of parameter #0 to be zero"),
    ):
        with pytest.raises(ValueError, match=message):
            NATIVE.masked_reset_(theta, theta, bits, [by_row])
    arguments = {"state": torch.zeros(4), "steps": torch.zeros(1), "bits": some, "by_row": [True]}
    with pytest.raises(ValueError, match=r"state to be contiguous float32 \(12,\), got Float \(4\)"):
        run_update(NATIVE.masked_sgd_, theta, theta, arguments, HYPER["masked_sgd_"][0])
    other = NATIVE.masked_plan([theta[0].flatten()], torch.zeros(3, dtype=torch.uint8), [False])
    for reset in (NATIVE.masked_reset_, REFERENCE["masked_reset_"]):  # of the same size
        with pytest.raises(ValueError, match="expected a plan of these 1 parameters, got one of other shapes"):
            reset(theta, theta, other, [True])
    with pytest.raises(ValueError, match=f"got {other.numel() - 2} bytes more"):
        NATIVE.masked_reset_(theta, theta, other[:-1], [True])
    with pytest.raises(ValueError, match="got 2 bytes more; the mask is of other parameters"):
        NATIVE.masked_plan(theta, torch.zeros(3, dtype=torch.uint8), [True])
    with pytest.raises(ValueError, match="expected lists of equal length, got 1 parameters, 2 gradients"):
        NATIVE.masked_reset_(theta, theta * 2, some, [True])
    assert torch.equal(theta[0], before)
