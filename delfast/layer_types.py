"""Layer types of other libraries: the dimension of the weight along which their outputs lie.

torch's own layers have one output channel per slice of ``weight`` along dim 0. Some libraries store the weight as
(in, out), such as GPT-2's ``Conv1D`` in transformers. After one registration of the type, scores, masks, reset, compact
training, the masked optimizers and per-example gradients all work by output channel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from delfast.arguments import check_function, describe
from delfast.errors import InputError
from delfast.naming import model_parameters


@dataclass(frozen=True)
class LayerType:
    """The arguments of ``register_layer`` for a type."""

    output_dim: int
    function: Callable[..., Tensor] | None
    linear_forward: Callable[..., Tensor] | None = None  # a forward that only multiplies by a weight (in, out)


_registered: dict[type[nn.Module], LayerType] = {}
_rules: dict[Any, Any] = {}


def register_layer(
    layer_type: type[nn.Module], *, output_dim: int, function: Callable[..., Tensor] | None = None
) -> None:
    """Register a layer type that has a 2-D ``weight`` Parameter, for every model from now on.

    ``Conv1D`` of transformers needs no registration.

    Parameters
    ----------
    layer_type : type
        A subclass of ``torch.nn.Module``; its own subclasses are included.
    output_dim : {0, 1}
        The dimension of ``weight`` along which the layer's outputs lie: 0 for (out, in), 1 for (in, out).
    function : callable, optional
        The function with which the layer's forward pass multiplies its input by ``weight``. It is called as
        ``function(input, weight, bias)``, where the bias may be left out; ``torch.addmm`` keeps its own order of
        arguments. The input is (*, in), the bias (out,) or None, the output (*, out). With ``function``, one pass
        computes the layer's per-example gradients. Without it, each example needs a pass of its own, unless ``forward``
        calls a function that is known. The first batch of a per-example pass compares the function's outputs with
        those of ``torch.nn.functional.linear``.

    Raises
    ------
    InputError
        For another kind of value, and for a type that is registered differently already.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> class Transposed(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.ones(3, 2))  # (in, out)
    ...
    ...     def forward(self, x):
    ...         return x @ self.weight
    >>> delfast.register_layer(Transposed, output_dim=1)
    """
    if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
        raise InputError(
            f"expected layer_type to be a subclass of torch.nn.Module, got {describe(layer_type)}; pass the class"
        )
    if output_dim not in (0, 1) or isinstance(output_dim, bool):
        raise InputError(
            f"expected output_dim to be 0 or 1, got {describe(output_dim)}; pass the dim of weight with the outputs"
        )
    check_function("function", function)
    _register_transformers()
    wanted = LayerType(int(output_dim), function)
    known = _registered.setdefault(layer_type, wanted)
    if (known.output_dim, known.function) != (wanted.output_dim, wanted.function):
        raise InputError(
            f"expected {layer_type.__name__} to be registered once, got output_dim={output_dim} after "
            f"output_dim={known.output_dim} or another function; remove one of the two calls"
        )


def layer_type_of(module_type: type[nn.Module]) -> LayerType | None:
    """Return the registration of this type, or of the nearest base class that has one."""
    _register_transformers()
    return next((_registered[base] for base in module_type.__mro__ if base in _registered), None)


def output_dims(model: nn.Module) -> dict[str, int]:
    """Return, by plain name, the dimension along which a weight's outputs lie, for the weights where it is not 0.

    The first module that has a weight decides for all modules that share it.
    """
    parameters = model_parameters(model, sharded=True)
    dims: dict[int, int] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            known = layer_type_of(type(module)) if name == "weight" and parameter.ndim == 2 else None
            dims.setdefault(id(parameter), 0 if known is None else known.output_dim)
    return {name: dims[id(p)] for name, p in parameters.items() if dims[id(p)]}


def registered_functions() -> dict[Any, int]:
    """Return the ``output_dim`` of every registered function."""
    _register_transformers()
    return {known.function: known.output_dim for known in _registered.values() if known.function is not None}


def register_rule(rule: Any, *functions: Any) -> None:
    """Register how per-example gradients treat functions: a rule of ``delfast.localization.per_example``."""
    _rules.update(dict.fromkeys(functions, rule))


def function_rules() -> dict[Any, Any]:
    """Return the rule of every function that ``register_rule`` was called with."""
    return dict(_rules)


def _register_transformers() -> None:
    """Register transformers' Conv1D if transformers is imported; a model that has such a layer has imported it."""
    module = sys.modules.get("transformers.pytorch_utils")
    layer_type = getattr(module, "Conv1D", None)
    if layer_type is not None and layer_type not in _registered:
        _registered[layer_type] = LayerType(1, torch.addmm, linear_forward=layer_type.forward)
