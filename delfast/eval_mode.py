"""Eval mode for a pass that leaves the model as it was, and networks that such a pass would change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from delfast.errors import InputError
from delfast.naming import plain_name, unwrap
from delfast.sole_use import sole_use


@contextmanager
def evaluating(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Put the model into eval mode inside the context, and restore its modes and buffers afterwards.

    With ``gradients``, ``torch.inference_mode`` is off inside. An RNN, LSTM or GRU then runs in training mode without
    dropout, because cuDNN computes its gradients in training mode only; the results equal those of eval mode.

    Raises InputError before anything runs: for layers that write their weights during a forward pass (see
    ``refuse_writing_layers``), for a model that another thread uses, and with ``gradients`` for a model made in
    inference mode. Raises InputError afterwards if a forward pass has written any other parameter.
    """
    refuse_writing_layers(model)
    if gradients:
        refuse_inference_tensors(model)
    with sole_use(model), torch.inference_mode(False) if gradients else nullcontext():
        modes = [(module, module.training) for module in model.modules()]
        recurrent: list[Any] = [module for module in model.modules() if gradients and _is_rnn(module)]
        dropouts = [module.dropout for module in recurrent]
        buffers = [(module, dict(module._buffers)) for module in model.modules()]
        saved = [(b, _version(b), b.detach().clone()) for _, own in buffers for b in own.values() if b is not None]
        versions = Versions(dict(model.named_parameters()), model)
        model.eval()
        try:
            for module in recurrent:
                module.training, module.dropout = True, 0.0
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, dropout in zip(recurrent, dropouts, strict=True):
                module.dropout = dropout
            for module, own in buffers:  # a forward pass may also have replaced, removed or added buffers
                now = dict(module._buffers)
                for name in now.keys() - own.keys():
                    del module._buffers[name]
                for name, buffer in own.items():
                    if now.get(name) is not buffer:
                        module._buffers[name] = buffer
            with torch.no_grad():
                for tensor, version, values in saved:
                    if _version(tensor) != version:
                        tensor.copy_(values)
        versions.check()


class Versions:
    """Version counters of named parameters, which show whether a forward pass wrote to one in place.

    ``model``'s compact weights are left out, because a compact layer's forward pass writes the trained rows into its
    weight. Assignments through ``.data`` do not change a version counter.
    """

    def __init__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> None:
        compact = _compact_weights(model)
        self._parameters = {name: p for name, p in parameters.items() if id(p) not in compact}
        self._versions = self._now()

    def _now(self) -> list[int]:
        return [_version(parameter) for parameter in self._parameters.values()]

    def check(self) -> None:
        """Raise InputError, with the parameter's name, if one was written in place since this object was made."""
        now = self._now()
        if now == self._versions:
            return
        changed = [name for name, *two in zip(self._parameters, self._versions, now, strict=True) if two[0] != two[1]]
        raise InputError(
            f"expected a forward pass that only reads the parameters, '{plain_name(changed[0])}' was written in it, "
            "which no mask can prevent; write it after the optimizer's step instead"
        )


def refuse_writing_layers(model: nn.Module) -> None:
    """Raise InputError for layers whose forward pass writes parameters, whatever the mask and the mode.

    These are Embedding and EmbeddingBag with ``max_norm``, and lazy modules, whose parameters have no shape yet.
    """
    for name, module in unwrap(model).named_modules():
        where = plain_name(f"{name}.weight" if name else "weight")
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            limit = f"({module.norm_type:g}, 0, {module.max_norm:g})"
            raise InputError(
                f"'{where}' changes its weights as it reads them (max_norm), also outside a mask; shorten its rows "
                f"once, weight.data.renorm_{limit}, and set the layer's max_norm to None"
            )
    for name, parameter in (*unwrap(model).named_parameters(), *unwrap(model).named_buffers()):
        if is_lazy(parameter):
            raise InputError(
                f"expected '{plain_name(name)}' to have a shape, its module is lazy; run a forward pass first"
            )


def refuse_inference_tensors(model: nn.Module) -> None:
    """Raise InputError for parameters or buffers made inside ``torch.inference_mode()``, which autograd cannot use."""
    for name, tensor in (*unwrap(model).named_parameters(), *unwrap(model).named_buffers()):
        if tensor.is_inference():
            raise InputError(
                f"expected a model made outside torch.inference_mode(), got '{plain_name(name)}' made inside; make or "
                "deepcopy it outside"
            )


def _is_rnn(module: nn.Module) -> bool:
    """Return whether the module runs torch's own RNN forward pass, where training mode affects dropout only."""
    own = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)
    return isinstance(module, nn.RNNBase) and type(module).forward in own


def _compact_weights(model: nn.Module) -> set[int]:
    """Return the ids of the compact layers' weights and of their trained rows."""
    return {
        id(parameter)
        for module in model.modules()
        if "weight_rows" in module._parameters
        for name, parameter in module.named_parameters(recurse=False)
        if name.startswith("weight")
    }


def _version(tensor: Tensor) -> int:
    """Return the version counter of a tensor; -1 for an inference tensor, which has none."""
    return -1 if tensor.is_inference() else tensor._version
