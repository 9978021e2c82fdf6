"""The layer rules, one file for each family of layers.

Importing this package registers them (``layer_types.register_rule``).
"""

from __future__ import annotations

from typing import Any

from delfast.layer_types import function_rules, registered_functions
from delfast.localization.per_example.rules import attention, convolution, embedding, linear, norm

__all__ = ["attention", "convolution", "embedding", "layer_rules", "linear", "norm"]


def layer_rules() -> dict[Any, Any]:
    """Return function -> its rule: a ``LayerRule``, or a ``Composite`` for a function that is made of others."""
    registered = {function: linear.REGISTERED[dim] for function, dim in registered_functions().items()}
    return registered | function_rules()
