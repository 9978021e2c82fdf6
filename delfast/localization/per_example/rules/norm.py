"""Normalizations: by running statistics, and by those of each example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from delfast.layer_types import register_rule
from delfast.localization.per_example.contributions import ChannelGradients, Contribution, Statistics, widened
from delfast.localization.per_example.layers import BatchAxis, Call, LayerRule


class Norm(LayerRule):
    """The rule of a normalization per channel (dim 1): the weight gradient is Σ over positions of δ × its output."""

    def __init__(self, function: Callable[..., Tensor], *arguments: str, **defaults: Any) -> None:
        self.function = function
        self.arguments = arguments
        self.defaults = {"weight": None, "bias": None, **defaults}

    def leading(self, call: Call) -> int:
        return 1

    def refusal(self, call: Call) -> str | None:
        if call.get("training"):
            return "normalizes by the statistics of the batch, so that no example has a gradient of its own"
        return None

    def trailing(self, call: Call) -> int | None:
        return None

    def output_grad_by_channel(self, call: Call, output_grad: Tensor, axis: BatchAxis) -> Tensor:
        return axis.by_channel(output_grad, self.trailing(call))

    def weight(self, call: Call, inputs: Tensor, output_grad: Tensor, axis: BatchAxis) -> Contribution:
        output_grad, shape = self.output_grad_by_channel(call, output_grad, axis), tuple(call["weight"].shape)
        if self.uses_running_statistics(call):
            statistics = Statistics(call["running_mean"], call["running_var"], call["eps"])
            return ChannelGradients(output_grad, shape, axis.by_channel(inputs), statistics)
        plain = {name: widened(v) if isinstance(v, Tensor) else v for name, v in call.items()}
        plain |= {"input": widened(inputs), "weight": None, "bias": None}
        with torch.autocast(inputs.device.type, enabled=False):
            normalized = self.function(**{name: plain[name] for name in self.arguments if name in plain})
        return ChannelGradients(output_grad, shape, axis.by_channel(normalized, self.trailing(call)))

    def uses_running_statistics(self, call: Call) -> bool:
        """Return whether the call normalizes by a mean and a variance per channel that do not depend on the input."""
        return False


class RunningNorm(Norm):
    """The rule of BatchNorm in eval mode, and of InstanceNorm with running statistics."""

    def uses_running_statistics(self, call: Call) -> bool:
        return call.get("running_mean") is not None and not call.get("use_input_stats", False)


class TrailingNorm(Norm):
    """The rule of a normalization over the last dims (LayerNorm, RMSNorm). The dims before them are positions."""

    def leading(self, call: Call) -> int:
        return int(call["input"].ndim) - self.trailing(call)

    def trailing(self, call: Call) -> int:
        return len(call["normalized_shape"])


register_rule(
    RunningNorm(
        functional.batch_norm,
        *("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        eps=1e-5,
    ),
    functional.batch_norm,
)
register_rule(
    RunningNorm(
        functional.instance_norm,
        *("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
        running_mean=None,
        running_var=None,
        use_input_stats=True,
        eps=1e-5,
    ),
    functional.instance_norm,
)
register_rule(Norm(functional.group_norm, "input", "num_groups", "weight", "bias", "eps"), functional.group_norm)
register_rule(
    TrailingNorm(functional.layer_norm, "input", "normalized_shape", "weight", "bias", "eps"), functional.layer_norm
)
register_rule(TrailingNorm(functional.rms_norm, "input", "normalized_shape", "weight", "eps"), functional.rms_norm)
