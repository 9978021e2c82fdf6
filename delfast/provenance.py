"""Provenance of an artefact: versions, digests, and the configuration that made it."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from delfast._version import __version__
from delfast.backend import status


def digest_tensor(tensor: Tensor) -> bytes:
    """Return the SHA-256 of a tensor's dtype, shape and values in row-major order; the device does not matter."""
    values = tensor.detach().to("cpu").contiguous().reshape(-1)
    raw = values.view(torch.uint8).numpy() if values.numel() else numpy.empty(0, dtype=numpy.uint8)
    total = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + b"\0")
    total.update(raw.data)  # without a copy: the images of a mapped file may exceed the memory
    return total.digest()


def digest_state(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) of a state dict: names in sorted order, dtypes, shapes and values."""
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode() + b"\0" + digest_tensor(state[name]))
    return total.hexdigest()


def digest_indices(indices: Tensor) -> str:
    """Return the SHA-256 (hex) of example indices, as int64, in the order given."""
    return digest_tensor(indices.to(torch.int64)).hex()


def provenance(**facts: object) -> dict[str, Any]:
    """Return versions, machine and backend of this process, and the caller's facts (seed, configuration, digests)."""
    return {
        "delfast": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "backend": status(),
        **facts,
    }
