"""Parameters by name: wrappers' prefixes removed, tied parameters once, DTensor refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from delfast.errors import InputError

_WRAPPERS = ("module", "_orig_mod")  # DistributedDataParallel and DataParallel; torch.compile


def plain_name(name: str) -> str:
    """``name`` without the parts that DDP (``module.``) and torch.compile (``_orig_mod.``) put in front.

    The wrappers may be nested, in any order. A model's own submodule may be called "module": only leading parts go.
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DDP, DataParallel and torch.compile wrappers."""
    while True:
        for wrapper in _WRAPPERS:
            inner = model._modules.get(wrapper)
            if inner is not None and len(model._modules) == 1 and not list(model.parameters(recurse=False)):
                model = inner
                break
        else:
            return model


def unique_parameters(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(plain name, parameter), each tensor once, under its first name (a tied parameter competes once).

    Raises InputError for two parameters of one name, and for a DTensor.
    """
    seen: set[int] = set()
    names: set[str] = set()
    for full_name, parameter in named:
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        name = plain_name(full_name)
        if name in names:
            raise InputError(
                f"expected parameter names to be unique without wrapper prefixes, got '{name}' twice; rename one"
            )
        names.add(name)
        refuse_dtensor(name, parameter)
        yield name, parameter


def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that compete: ``requires_grad``, each tensor once, by plain name, in the model's order."""
    return {
        name: parameter for name, parameter in unique_parameters(model.named_parameters()) if parameter.requires_grad
    }


def refuse_dtensor(name: str, parameter: Tensor) -> None:
    """Raise InputError for a sharded parameter: the ops would silently see one shard."""
    if type(parameter).__name__ == "DTensor":
        raise InputError(
            f"expected a plain tensor for '{name}', got a DTensor (FSDP2 or tensor parallelism), which is not "
            "supported yet; gather the model first (full_tensor())"
        )
