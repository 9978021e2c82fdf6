"""Rules by measurement: how the weight gradient of a compact layer's selected rows is computed.

Two ways give the same gradient. *Gather* the output gradient's channels of the selected rows and multiply these alone,
or compute the *dense* weight gradient and take its selected rows. Which one is faster depends on the device, the kind
of layer, the share of its rows that is selected, the number of positions (examples x tokens), and the dtype.

``python -m benchmarks.compact_rules [--device cuda]`` measures both ways over a grid of shapes and writes
``benchmarks/results/compact_rules-DEVICE.json``. What the rows below come from:

- CPU: two cores with AMX; ``benchmarks/test_steps.py`` measures whole networks.
- CUDA: steps of whole networks on an H100 with torch 2.11, masks of 0.3. Convolutions lose: gathering channels takes
  1.3 to 1.8 ms of ResNet-50's step and saves less. ViT-B's linear layers gain on 12,608 tokens (a step takes 0.82 to
  0.86 of the dense one's device time). A classifier head on 64 or 128 rows is too small for another launch to pay.
  Between 128 and 12,608 tokens and above a share of 0.3 nothing is measured yet: the limits keep the dense way where
  arithmetic does not clearly outweigh one more launch and the copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

LayerKind = Literal["linear", "convolution"]

# Minimum number of channels per position of the feature map from which a product for each position of the kernel beats
# oneDNN's weight gradient. Channels of the tensor that is not on the rows' side: the input, or the output gradient of a
# transposed convolution. Speed against oneDNN, measured on two cores with AMX: 512 channels on maps of 4x4, 1.1 to 1.2
# times in float32 and 4 times in bfloat16; 256 on 8x8, 0.6 and 1.5 times; 128 on 4x4, 2.5 times in bfloat16; 64 on 8x8,
# 0.75 times. Measure again: benchmarks/test_steps.py.
MIN_CHANNELS_PER_POSITION = {torch.float32: 16, torch.bfloat16: 4}


@dataclass(frozen=True)
class Rule:
    """The conditions for gathering, for one kind of layer on one kind of device.

    max_gathered_fraction: the largest share of blocks of 16 channels (of groups, in a convolution with groups) that is
        gathered; 0: never.
    min_positions: from how many positions on, by dtype; 0 for a dtype that is not listed.
    min_channels_per_position: by dtype, when a convolution multiplies offset by offset; never for other dtypes.
    dense_by_torch: where channels are not gathered, torch's own layer runs, with the fewest operations; else our
        function computes the dense gradient.
    """

    max_gathered_fraction: float
    min_positions: Mapping[torch.dtype, int] = field(default_factory=dict)
    min_channels_per_position: Mapping[torch.dtype, float] = field(default_factory=dict)
    dense_by_torch: bool = True

    def gathers(self, selected: int, total: int) -> bool:
        """Return whether so few of the blocks of channels, or of the groups, are selected that gathering may pay."""
        return selected <= self.max_gathered_fraction * total

    def has_enough_positions(self, positions: int, dtype: torch.dtype) -> bool:
        """Return whether the layer has so many positions that gathering pays."""
        return positions >= self.min_positions.get(dtype, 0)

    def multiplies_by_offsets(self, channels: int, positions: int, dtype: torch.dtype) -> bool:
        """Return whether the feature map of a convolution is so small that a product for each offset is faster."""
        return channels >= self.min_channels_per_position.get(dtype, math.inf) * positions


DENSE = Rule(0.0)
RULES: dict[tuple[str, LayerKind], Rule] = {
    ("cpu", "linear"): Rule(0.9, dense_by_torch=False),
    ("cpu", "convolution"): Rule(0.9, {}, MIN_CHANNELS_PER_POSITION, dense_by_torch=False),
    ("cuda", "linear"): Rule(
        0.5, {torch.float64: 1024, torch.float32: 1024, torch.bfloat16: 4096, torch.float16: 4096}
    ),
    ("cuda", "convolution"): DENSE,
}

_forced: str | None = None


def rule_of(device: torch.device, kind: LayerKind) -> Rule:
    """Return the rule of a layer on this device; where nothing is measured, the dense way."""
    return RULES.get((_forced or device.type, kind), DENSE)


@contextmanager
def rules_of(device_type: str) -> Iterator[None]:
    """Use the rules of another device, in all threads, for tests on machines without it."""
    global _forced
    before, _forced = _forced, device_type
    try:
        yield
    finally:
        _forced = before
