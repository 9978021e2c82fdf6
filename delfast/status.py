"""What runs, and why."""

from __future__ import annotations

from typing import Any

import torch

from delfast._version import __version__
from delfast.ops import BACKEND


def status() -> dict[str, Any]:
    """Which backend runs the ops and why: plain values, ready for JSON.

    ``backend`` is "native" (the compiled extension) or "torch" (the twins); ``reason`` says why; ``isa`` is the
    instruction set in use on the CPU; ``devices`` those with native kernels; ``built_against`` torch's version then.
    """
    native = BACKEND.module
    return {
        "delfast": __version__,
        "backend": BACKEND.name,
        "reason": BACKEND.reason,
        "isa": native.isa() if native else None,
        "isas": native.isas() if native else [],
        "devices": [device.lower() for device in BACKEND.devices],
        "cuda_available": torch.cuda.is_available(),
        "torch": torch.__version__,
        "built_against": BACKEND.build_info.get("torch"),
        "compiler": BACKEND.build_info.get("compiler"),
        "threads": torch.get_num_threads(),
    }
