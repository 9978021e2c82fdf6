"""What runs, and why."""

from __future__ import annotations

from typing import Any

import torch

from delfast._version import __version__
from delfast.ops import BACKEND


def status() -> dict[str, Any]:
    """Which backend runs the ops and why: plain values, ready for JSON.

    ``backend`` is "native" (the compiled extension) or "torch" (the twins); ``reason`` says why; ``isa`` is the
    instruction set in use on the CPU; ``devices`` those with native kernels; ``cuda`` says what becomes of tensors on a
    GPU, and why; ``built_against`` is torch's version then.
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
        return "not loaded: the twins run on every device"
    built = BACKEND.build_info["cuda"]
    if not built:
        why = BACKEND.build_info.get("cuda_failure", "the extension was built without")
        return f"not built: {why}; on a GPU the twins run"
    text = f"built with CUDA {built['toolkit']} for {' '.join(built['architectures'])}"
    if not torch.cuda.is_available():
        return f"{text}; no CUDA device is here, so the CPU kernels run"
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{text}; runs on {', '.join(names)}"
