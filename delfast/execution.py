"""Options of every function that passes batches through a network: precision, memory format, CUDA graphs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from delfast.arguments import check_choice, describe
from delfast.errors import InputError
from delfast.sharding import policy_dtypes

Precision = Literal["fp32", "bf16"]
ChannelsLast = Literal["auto", True, False]
CudaGraphs = Literal["auto", True, False]


@dataclass(frozen=True)
class Execution:
    """The options of every function that passes batches through a network.

    precision: "bf16" runs forward passes under ``torch.autocast``; sums over examples stay in float32.
    channels_last: whether images (N, C, H, W) are laid out channels-last before they enter the network. "auto" follows
        the network's convolution weights.
    cuda_graphs: whether passes are captured in CUDA graphs and replayed; see ``delfast.graphs``.
    """

    precision: Precision = "fp32"
    channels_last: ChannelsLast = "auto"
    cuda_graphs: CudaGraphs = "auto"

    def check(self) -> None:
        """Raise InputError for an option that is not one of its choices."""
        check_choice("precision", self.precision, Precision)
        for name, value in (("channels_last", self.channels_last), ("cuda_graphs", self.cuda_graphs)):
            if not isinstance(value, bool) and value != "auto":
                raise InputError(f"expected {name} to be 'auto', True or False, got {describe(value)}; pass one")

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context of a forward pass on ``device``. In float32 a caller's own autocast stays in effect."""
        dtype = torch.bfloat16 if self.precision == "bf16" else _callers_autocast(device)
        if dtype is None:
            return nullcontext()
        # without the cache of converted weights: inside a caller's autocast it outlives the steps that change the
        # weights, and a captured graph must not share it with other passes
        return torch.autocast(device.type, dtype, cache_enabled=False)

    def computed_in(self, device: torch.device, network: nn.Module | None = None) -> str:
        """Return the precision of forward passes on ``device``, for a mask's metadata: a caller's autocast counts.

        A network's MixedPrecisionPolicy of FSDP2 counts too. With several policies all precisions are named.
        """
        cast = torch.bfloat16 if self.precision == "bf16" else _callers_autocast(device)
        dtypes = [dtype or cast for dtype in ([] if network is None else policy_dtypes(network)) or [None]]
        names = {None: "fp32", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return ", ".join(sorted({names.get(dtype, str(dtype)) for dtype in dtypes}))

    def laid_out(self, inputs: Any, network: nn.Module) -> Any:
        """Return the input in the memory format of ``channels_last``, if it is a tensor of images."""
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not inputs.is_floating_point():
            return inputs
        wanted = _has_channels_last(network) if self.channels_last == "auto" else self.channels_last
        return inputs.contiguous(memory_format=torch.channels_last) if wanted else inputs


DEFAULT_EXECUTION = Execution()


def _callers_autocast(device: torch.device) -> torch.dtype | None:
    """Return the dtype of the autocast that is in effect for a device; None if there is none."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _has_channels_last(network: nn.Module) -> bool:
    """Return whether the network's first weight of four dims that has two layouts is channels-last."""
    for parameter in network.parameters():
        if parameter.ndim == 4 and parameter.shape[1] > 1 and parameter.shape[2] * parameter.shape[3] > 1:
            return parameter.is_contiguous(memory_format=torch.channels_last)
    return False
