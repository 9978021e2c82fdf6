"""Hooks that a user has registered, which a replay of a captured pass would not run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_hooks


def foreign_hooks(watched: Iterable[nn.Module | Optimizer]) -> str | None:
    """Return the first hook, as text, that a replay would not run; None if there is none but delfast's own."""
    for name, hook in _hooks(watched):
        own = getattr(hook, "func", hook)  # of a functools.partial
        if not str(getattr(own, "__module__", "")).startswith("delfast."):
            return f"{name} ({getattr(own, '__qualname__', type(own).__name__)})"
    return None


def _hooks(watched: Iterable[nn.Module | Optimizer]) -> Iterator[tuple[str, Any]]:
    tables: list[tuple[str, Any]] = [
        ("a hook of all modules", module_hooks._global_forward_hooks),
        ("a hook of all modules", module_hooks._global_forward_pre_hooks),
        ("a hook of all modules", module_hooks._global_backward_hooks),
        ("a hook of all modules", module_hooks._global_backward_pre_hooks),
        ("a hook of all optimizers", optimizer_hooks._global_optimizer_pre_hooks),
        ("a hook of all optimizers", optimizer_hooks._global_optimizer_post_hooks),
    ]
    for each in watched:
        if isinstance(each, Optimizer):
            tables += [("a hook of the optimizer", each._optimizer_step_pre_hooks)]
            tables += [("a hook of the optimizer", each._optimizer_step_post_hooks)]
            continue
        for name, module in each.named_modules():
            what = f"a hook of module '{name}'"
            tables += [(what, module._forward_hooks), (what, module._forward_pre_hooks)]
            tables += [(what, module._backward_hooks), (what, module._backward_pre_hooks)]
        for name, parameter in each.named_parameters():
            what = f"a hook of '{name}'"
            tables += [(what, parameter._backward_hooks), (what, parameter._post_accumulate_grad_hooks)]
    for what, table in tables:
        for hook in (table or {}).values():
            yield what, hook
