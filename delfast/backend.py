"""The backend in use, and the reason for it."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from delfast._version import __version__
from delfast.ops import BACKEND


def status() -> dict[str, Any]:
    """Return the backend that runs the ops, the reason for it, and the versions in use.

    Returns
    -------
    dict of str to object
        Plain values, ready for JSON: ``delfast`` and ``torch`` (versions); ``backend``, "native" (the compiled
        extension) or "torch" (the PyTorch reference implementations), and ``reason``, why it was chosen; ``isa``,
        the instruction set in use on the CPU, and ``isas``, those of this build that the CPU supports; ``devices``
        that have native kernels; ``cuda``, which code runs for tensors on a GPU, and why; ``cuda_available``;
        ``built_against``, the version of torch that the extension was built with, and its ``compiler``; ``threads``,
        the number that torch uses.

    Examples
    --------
    >>> import delfast
    >>> delfast.status()["backend"] in ("native", "torch")
    True
    """
    native = BACKEND.module
    return {
        "delfast": __version__,
        "backend": BACKEND.name,
        "reason": BACKEND.reason,
        "isa": native.isa() if native else None,
        "isas": native.isas() if native else [],
        "devices": [device.lower() for device in BACKEND.devices],
        "cuda": _cuda(),
        "cuda_available": torch.cuda.is_available(),
        "torch": torch.__version__,
        "built_against": BACKEND.build_info.get("torch"),
        "compiler": BACKEND.build_info.get("compiler"),
        "threads": torch.get_num_threads(),
    }


def _cuda() -> str:
    if BACKEND.module is None:
        return "not loaded: the reference implementations run on every device"
    built = BACKEND.build_info["cuda"]
    if not built:
        why = BACKEND.build_info.get("cuda_failure", "the extension was built without")
        return f"not built: {why}; on a GPU the reference implementations run"
    text = f"built with CUDA {built['toolkit']} for {' '.join(built['architectures'])}"
    if driver_is_too_old():
        return f"{text}; they cannot run: the driver supports CUDA {'.'.join(map(str, driver_cuda() or ()))} at most"
    if not torch.cuda.is_available():
        return f"{text}; no CUDA device is here, so the CPU kernels run"
    devices = []
    for number in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(number)
        able = any(_runs_on(architecture, capability) for architecture in built["architectures"])
        wanted = ".".join(map(str, capability))
        devices.append(
            torch.cuda.get_device_name(number)
            + ("" if able else f" (not: install again with TORCH_CUDA_ARCH_LIST={wanted})")
        )
    return f"{text}; runs on {', '.join(devices)}"


def driver_is_too_old() -> bool:
    """Return whether the driver is of an older major version of CUDA than the kernels.

    Machine code runs on every driver of the major version that compiled it, or of a later one (NVIDIA, "CUDA
    Compatibility", section "Minor Version Compatibility").
    """
    built, driver = BACKEND.build_info.get("cuda"), driver_cuda()
    return bool(built and driver and driver[0] < int(built["toolkit"].split(".")[0]))


def driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA, (major, minor), that the driver supports; None without a driver that answers."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Return whether code for ``architecture`` runs on a GPU of this compute capability.

    Machine code runs on GPUs of the same major version and of the same or a later minor version; PTX runs on all later
    GPUs, unless it is for a family ("f") (CUDA C++ Programming Guide, "Compatibility").
    """
    number = architecture.removesuffix("+PTX")
    major, minor = (int(part) for part in number.rstrip("af").split("."))
    if number.endswith("a"):  # for GPUs of exactly this capability
        return capability == (major, minor)
    later = capability >= (major, minor)
    return later and (capability[0] == major or (architecture.endswith("+PTX") and not number.endswith("f")))
