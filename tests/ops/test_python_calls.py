"""Calls from native kernels into Python: the references in float64 and the version counters, and their errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from delfast.ops import BACKEND
from tests.ops.calls import NATIVE

pytestmark = pytest.mark.skipif(BACKEND.module is None, reason=f"no native kernels: {BACKEND.reason}")

# per-example sums of a convolution, where the switch of torch's newer or older interface was set
TF32 = """
import json, torch, delfast
{switch}
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 3))
scores = delfast.score(model, [(torch.randn(5, 3, 8, 8), torch.arange(5) % 3)], per_example=True)
print(json.dumps(len(scores.select(0.5).digest)))
"""


def refuse(name: str = "x") -> None:
    wide = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"^expected criterion 'weighted_grad', 'grad' or 'weight', got '{name}'"):
        NATIVE.criticality([wide], [wide], name, "mean", [1])


def test_an_error_of_a_reference_keeps_its_kind_and_text_in_every_thread() -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(refuse, "abcd"))
    refuse("e")


def test_an_earlier_error_is_not_told_again() -> None:
    refuse()
    wide = torch.zeros(3, 2, dtype=torch.float64)
    with pytest.raises(IndexError, match=r"index #0 in \[0, 3\), got 7"):
        NATIVE.write_rows_([wide], [wide[:1].clone()], [torch.tensor([7])], [0])


def test_an_error_that_nobody_asked_for_is_forgotten() -> None:
    assert BACKEND.module is not None
    nothing = "RuntimeError: torch could not call Python"
    with pytest.raises(ValueError, match="invalid literal"):
        BACKEND.module.noted(int)("a")
    assert BACKEND.module.noted(int)("7") == 7
    assert BACKEND.module.last_error() == nothing
    with pytest.raises(ValueError, match="invalid literal"):
        BACKEND.module.noted(int)("a")
    assert BACKEND.module.last_error().startswith("ValueError: invalid literal")
    assert BACKEND.module.last_error() == nothing


class Ended(BaseException):
    """The exception that the handler of SIGTERM raises in these tests."""


@contextmanager
def signaled(number: signal.Signals) -> Iterator[None]:
    """Send this process a signal soon; SIGINT and SIGTERM raise."""

    def end(number: int, frame: object) -> None:
        raise Ended("at once")

    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: end}
    before = {one: signal.signal(one, handler) for one, handler in handlers.items()}
    timer = threading.Timer(0.05, signal.raise_signal, [number])
    timer.start()
    try:
        yield
    finally:
        timer.join()
        for one, handler in before.items():
            signal.signal(one, handler)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Ended)])
def test_no_except_clause_keeps_what_a_signal_raises_during_a_reference(
    number: signal.Signals, kind: type[BaseException]
) -> None:
    refuse()
    wide = [torch.randn(300, 300, dtype=torch.float64) for _ in range(400)]
    with signaled(number), pytest.raises(kind):
        for _ in range(1000):
            try:
                NATIVE.criticality(wide, wide, "weighted_grad", "topk_mean", [30] * len(wide))
            except Exception as error:  # raised first; what the signal raised follows before the next call
                assert kind.__name__ in str(error)
    refuse()


def test_an_interrupt_during_a_change_in_place_is_raised_and_versions_move() -> None:
    values, fresh = torch.zeros(2000, 2000), torch.ones(2000, 2000)
    bits, count, calls = torch.full((250 * 20,), 255, dtype=torch.uint8), 20, 0
    with signaled(signal.SIGINT), pytest.raises(KeyboardInterrupt):
        while calls < 10000:
            calls += 1
            NATIVE.masked_reset_([values] * count, [fresh] * count, bits, [True] * count)
    assert calls and values._version in (count * calls, count * (calls - 1))  # before the call, at the earliest


@pytest.mark.parametrize("op", ["masked_reset_", "per_example_accumulate_"])
def test_copies_are_put_back_past_autograd(op: str) -> None:
    written = torch.zeros(4, 6)[:, ::2].requires_grad_()
    if op == "masked_reset_":
        NATIVE.masked_reset_([written], [torch.ones(4, 3)], torch.tensor([0b1111], dtype=torch.uint8), [True])
    else:
        written = torch.zeros(4, 3, 2)[:, :, ::2].requires_grad_()
        NATIVE.per_example_accumulate_(written, torch.ones(1, 3, 1), torch.ones(1, 4, 1), [1], [0], [1], 1, "abs")
    assert written.eq(1).all() and written._version == 1
    assert written.is_leaf and written.requires_grad


def test_versions_move_for_tensors_that_have_one() -> None:
    values, index = torch.zeros(3, 2), torch.tensor([0b111], dtype=torch.uint8)
    with torch.inference_mode():
        inference = torch.zeros(3, 2)
        NATIVE.masked_reset_([values, inference], [torch.ones(3, 2)] * 2, torch.cat([index, index]), [True, True])
        assert inference.all()
    assert values.all() and values._version == 1


@pytest.mark.parametrize(
    "switch",
    ["torch.backends.cuda.matmul.fp32_precision = 'tf32'", "torch.backends.cuda.matmul.allow_tf32 = True"],
)
def test_scores_whichever_way_tf32_was_chosen(switch: str) -> None:
    result = subprocess.run([sys.executable, "-c", TF32.format(switch=switch)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) > 0


@pytest.mark.parametrize("name", ["float8_e8m0fnu", "float8_e4m3fn", "complex64", "bool"])
def test_ops_of_any_dtype_take_dtypes_that_the_stable_interface_does_not_name(name: str) -> None:
    dtype = getattr(torch, name)
    weight, rows = torch.zeros(4, 6, dtype=torch.uint8), torch.ones(2, 6, dtype=torch.uint8)
    if dtype.itemsize == 1:
        weight, rows = weight.view(dtype), rows.view(dtype)
    else:
        weight, rows = torch.zeros(4, 6, dtype=dtype), torch.ones(2, 6, dtype=dtype)
    NATIVE.write_rows_([weight], [rows], [torch.tensor([0, 3])], [0])
    written = weight.view(torch.uint8).any(1).tolist()
    assert written == [True, False, False, True]
    with pytest.raises(ValueError, match="to be float32, bfloat16 or float16, got"):
        NATIVE.criticality([weight], [weight], "grad", "mean", [1])


def test_memory_that_there_is_not_is_refused_with_torchs_reason() -> None:
    with pytest.raises(RuntimeError, match=r"^torch could not allocate a tensor: .*memory"):
        NATIVE.channel_dot(torch.zeros(1 << 22, 1 << 22, 0), None)
    with pytest.raises(RuntimeError, match=r"^(?!RuntimeError: ).*memory"):  # of the reference
        NATIVE.channel_dot(torch.zeros(1 << 22, 1 << 22, 0, dtype=torch.float64), None)
