"""Every op refuses bad arguments, and none end the process: kernels, references and fake kernels alike."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from delfast.ops import BACKEND, OPS
from tests import ROOT
from tests.ops.calls import NATIVE, sample_calls

CHECKS = {op.name: op.check for op in OPS}
NUMBERS = range(len(OPS))
LEAST, MOST = -(2**63), 2**63 - 1


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def fuzz(seed: int, count: int, backend: str = "") -> None:
    result = run_python("-m", "tests.ops.fuzz_ops", str(seed), str(count), DELFAST_BACKEND=backend)
    assert result.returncode == 0, f"ended with {result.returncode}:\n{result.stderr[-4000:]}"
    assert "right" in result.stdout


@pytest.mark.long
def test_no_arguments_end_the_process() -> None:
    fuzz(0, 200)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["", "torch"])
@pytest.mark.parametrize("seed", range(1, 11))
def test_no_arguments_end_the_process_in_many_calls(seed: int, backend: str) -> None:
    fuzz(seed, 3000, backend)


SCORES = torch.rand(6)
SELECTIONS: list[tuple[tuple[Any, ...], str]] = [
    ((SCORES, [-1, 7], [1, 1], 3, True), "expected counts and lengths >= 0, got -1 of 1 for parameter #0"),
    ((SCORES, [LEAST, LEAST, 6], [1, 1, 1], 3, True), "expected counts and lengths >= 0"),
    ((SCORES, [MOST, MOST, 8], [1, 1, 1], 3, True), "expected counts that sum to the 6 scores|fewer than 2\\^63"),
    ((SCORES, [6], [MOST], 3, True), "expected fewer than 2\\^63 elements in all, got 6 units of"),
    ((SCORES, [6], [-2], 3, True), "expected counts and lengths >= 0, got 6 of -2"),
    ((SCORES, [6], [1], -1, True), "expected k >= 0 elements to select, got -1"),
    ((SCORES, [5], [1], 3, True), "expected counts that sum to the 6 scores, got 5"),
    ((SCORES, [5, 2], [1, 1], 3, True), "got 2 for parameter #1 where 1 are left"),
    ((SCORES, [6], [1, 1], 3, True), "expected one count and one length per parameter, got 1 and 2"),
]


@pytest.mark.parametrize(("arguments", "message"), SELECTIONS)
def test_sizes_of_select_units(arguments: tuple[Any, ...], message: str) -> None:
    refused_alike("select_units", arguments, message)


def refused_alike(name: str, arguments: tuple[Any, ...], message: str) -> None:
    """The kernel, the check of the reference and the fake kernel refuse the call in one line."""
    meta = torch.utils._pytree.tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, arguments)
    for function, given in (
        (getattr(NATIVE, name), arguments),
        (CHECKS[name], arguments),
        (getattr(NATIVE, name), meta),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            function(*given)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [2**31, 2**61, 2**62, MOST])
@pytest.mark.parametrize("place", [3, 4, 5])  # stride, padding, dilation
def test_geometry_near_the_ends_of_int64(number: int, place: int) -> None:
    arguments: list[Any] = [torch.zeros(3, 2, 1), torch.rand(4, 2, 1), torch.rand(4, 3, 1), [1], [0], [1], 1, "abs"]
    arguments[place] = [number]
    refused_alike(
        "per_example_accumulate_", tuple(arguments), r"expected stride, dilation, padding and kernel below 2\^31"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_far_beyond_the_input_takes_no_memory(isa: str, dims: int, dtype: torch.dtype) -> None:
    """Both taps of the kernel read padding, except for one of the dilation's size."""
    sums = torch.zeros(3, 2, *[2] * dims)
    inputs, output_grad = torch.randn(4, 2, *[1] * dims).to(dtype), torch.randn(4, 3, *[1] * dims).to(dtype)
    far, near = 2**30 - 1, 0
    NATIVE.per_example_accumulate_(sums, inputs, output_grad, [7] * dims, [far] * dims, [2 * far] * dims, 1, "abs")
    assert not sums.any()
    inputs = torch.randn(4, 2, *[2] * dims).to(dtype)
    NATIVE.per_example_accumulate_(sums, inputs, output_grad, [2**31 - 1] * dims, [near] * dims, [1] * dims, 1, "abs")
    expected = torch.einsum("nm,ncp->nmcp", output_grad.flatten(1).double(), inputs.flatten(2).double()).abs().sum(0)
    torch.testing.assert_close(sums.flatten(2).double(), expected, rtol=1e-5, atol=1e-6)


class OnCard(Tensor):
    """A tensor without memory whose device is a GPU."""

    @staticmethod
    def __new__(cls, like: Tensor) -> OnCard:
        result: OnCard = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device="cuda:0")  # type: ignore[attr-defined]
        return result

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("expected dispatch to the kernel")


def mixed(number: int, first: Any, other: Any) -> list[tuple[Any, list[Any], dict[str, Any], str]]:
    """Call ``number`` with every tensor put through ``first``, except for one that goes through ``other``: once for
    each that is not the first; and how messages name that one."""
    packet, args, kwargs = sample_calls()[number]
    names = [argument.name for argument in packet.default._schema.arguments]
    values = dict(zip(names, args, strict=False)) | kwargs
    shown = {"theta": "parameter", "params": "parameter", "grad": "gradient", "grads": "gradient", "fresh": "gradient"}
    shown |= {"weights": "weight", "rows": "rows", "indices": "index", "sums": "sums"}
    places = []
    for name, value in values.items():
        if isinstance(value, Tensor):
            places.append((name, None, name))
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            places += [(name, i, f"{shown[name]} #{i}") for i in range(len(value))]
    calls = []
    for odd_name, odd_place, role in places[1:]:
        changed = {
            name: [(other if (name, i) == (odd_name, odd_place) else first)(v) for i, v in enumerate(value)]
            if isinstance(value, list) and value and isinstance(value[0], Tensor)
            else (other if name == odd_name else first)(value)
            if isinstance(value, Tensor)
            else value
            for name, value in copy.copy(values).items()
        }
        arguments = [changed.pop(name) for name in names[: len(args)]]
        calls.append((packet, arguments, changed, role))
    return calls


@pytest.mark.parametrize("number", NUMBERS)
def test_tensors_on_the_cpu_and_on_meta_are_refused(number: int) -> None:
    """The fake kernel gets such a call; the CPU's kernel, which shares its check with CUDA's, is called past it."""
    for packet, args, kwargs, role in mixed(number, lambda t: t, lambda t: t.to("meta")):
        with pytest.raises(ValueError, match=f"expected {role} on cpu, got it on meta; move all tensors to one device"):
            packet(*args, **kwargs)
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        with pytest.raises(ValueError, match=f"expected {role} on cpu, got it on meta; move all tensors to one device"):
            packet.default.redispatch(key, *args, **kwargs)


@pytest.mark.skipif("CUDA" not in BACKEND.devices, reason="no CUDA kernels in this build")
@pytest.mark.parametrize("number", [n for n in NUMBERS if "CUDA" in OPS[n].natively_on])
def test_tensors_on_a_card_and_on_the_cpu_are_refused_without_a_card(number: int) -> None:
    for packet, args, kwargs, role in mixed(number, OnCard, lambda t: t):
        if role in ("state", "steps", "grad_scale"):  # read after the parameters' memory; OnCard has none
            continue
        message = f"expected {role} on cuda:0, got it on cpu; move all tensors to one device"
        with torch._C._DisableTorchDispatch(), pytest.raises(ValueError, match=message) as caught:
            packet(*args, **kwargs)
        assert "\n" not in str(caught.value)


WITH_TWO_LIBRARIES = """
import ctypes, sys
assert ctypes.CDLL(sys.argv[1]).shown_length(1234567) == 7
import torch, delfast.ops
theta = [torch.rand(4, 5), torch.rand(4, 5)]
try:
    torch.ops.delfast.criticality(theta, [theta[0], torch.rand(4, 6)], "grad", "mean", [1, 1])
except ValueError as error:
    print(error)
"""


@pytest.mark.long
@pytest.mark.skipif(BACKEND.module is None, reason=f"no native kernels: {BACKEND.reason}")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_messages_need_no_stream_of_the_locale(tmp_path: Path) -> None:
    """A module with a C++ library of its own, loaded first, takes the locale's facets: a number in a stream then cuts
    a message off, or ends the process."""
    source, module = tmp_path / "own.cpp", tmp_path / "own.so"
    source.write_text(
        "#include <sstream>\n"
        'extern "C" int shown_length(int x) { std::ostringstream s; s << x; return int(s.str().size()); }\n'
    )
    flags = ["-shared", "-fPIC", "-static-libstdc++", "-static-libgcc"]
    if subprocess.run(["g++", *flags, str(source), "-o", str(module)]).returncode:
        pytest.skip("no static libstdc++")
    result = run_python("-c", WITH_TWO_LIBRARIES, str(module))
    expected = "expected gradient #1 to have shape (4, 5) like its parameter, got (4, 6); pass the gradients in the"
    assert result.returncode == 0 and expected in result.stdout, (result.returncode, result.stdout, result.stderr)
