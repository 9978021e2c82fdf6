"""Calls from native kernels into Python: the references in float64 and the version counters, and their errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

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


def test_an_interrupt_during_a_reference_ends_the_program() -> None:
    refuse()
    wide = [torch.randn(300, 300, dtype=torch.float64) for _ in range(400)]
    timer = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(1000):
            try:
                NATIVE.criticality(wide, wide, "weighted_grad", "topk_mean", [30] * len(wide))
            except RuntimeError as error:
                assert "KeyboardInterrupt" in str(error)
    timer.join()


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
    says_why = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    with pytest.raises(RuntimeError, match=r"^torch could not allocate a tensor" + (": .*memory" if says_why else "$")):
        NATIVE.channel_dot(torch.zeros(1 << 22, 1 << 22, 0), None)
