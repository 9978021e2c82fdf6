"""Builds and loads stream.c: a plain two-input stream kernel, the yardstick of memory bandwidth."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def load_stream() -> Callable[[Tensor, Tensor], float]:
    """``stream(a, b)`` reads two float32 tensors once, on torch's number of threads."""
    library = Path(tempfile.mkdtemp()) / "stream.so"
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    source = Path(__file__).parent / "stream.c"
    subprocess.run([os.environ.get("CC", "cc"), *flags, str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).stream
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    function.restype = ctypes.c_double

    def stream(a: Tensor, b: Tensor) -> float:
        return float(function(a.data_ptr(), b.data_ptr(), a.numel(), torch.get_num_threads()))

    return stream
