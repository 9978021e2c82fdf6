"""Peak memory of localization over the model, and what the processes exchange to select."""

from __future__ import annotations

import math
import sys

import pytest

from benchmarks.distributed import bytes_to_select, llama_2_7b, measure_memory


def test_bytes_to_select_for_llama_2_7b():
    assert sum(map(math.prod, llama_2_7b())) == 6_738_415_616
    channels, elements = (count / 2**20 for count in bytes_to_select(llama_2_7b()))
    assert channels == pytest.approx(6.4, abs=0.06)
    assert elements == pytest.approx(803, abs=1)  # the mask itself, one bit an element


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak from /proc")
def test_peak_bytes_per_parameter():
    found = measure_memory()
    assert found["channels, several batches"] <= 5.0 and found["single parameters, several batches"] <= 5.0
    assert found["channels, one batch"] <= 1.0
    assert found["one process"] - 0.5 > found["FSDP2 on 2 processes"] > found["FSDP2 on 4 processes"] + 0.5
