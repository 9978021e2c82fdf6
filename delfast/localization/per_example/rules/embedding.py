"""Embeddings."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor
from torch.nn import functional

from delfast.layer_types import register_rule
from delfast.localization.per_example.contributions import Contribution, Lookup
from delfast.localization.per_example.layers import BatchAxis, Call, LayerRule


class Embedding(LayerRule):
    """The rule of an embedding, which reads a row of the table per index."""

    arguments = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    defaults = MappingProxyType({"bias": None, "padding_idx": None, "max_norm": None, "scale_grad_by_freq": False})

    def refusal(self, call: Call) -> str | None:
        return "changes its weights as it reads them (max_norm)" if call["max_norm"] is not None else None

    def leading(self, call: Call) -> int:
        return int(call["input"].ndim)

    def weight(self, call: Call, inputs: Tensor, output_grad: Tensor, axis: BatchAxis) -> Contribution:
        shape, padding_idx = tuple(call["weight"].shape), call["padding_idx"]
        if padding_idx is not None and padding_idx < 0:
            padding_idx += shape[0]
        indices, output_grad = axis.split(inputs).flatten(1), axis.split(output_grad).flatten(1, -2)
        return Lookup(indices, output_grad, shape, padding_idx, bool(call["scale_grad_by_freq"]))


register_rule(Embedding(), functional.embedding)
