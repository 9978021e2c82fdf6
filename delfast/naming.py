"""Parameters by plain name: without wrappers' prefixes, each tied parameter once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from delfast.errors import InputError
from delfast.sharding import is_dtensor, refuse_flattened, refuse_partial, reshard

# the names under which torch's wrappers of a network or of its blocks hold what they wrap: torch.compile, and
# checkpoint_wrapper and offload_wrapper of torch.distributed.algorithms
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """Return a parameter's name without the parts that wrappers add.

    ``module.`` is removed from the front: of DDP, DataParallel and AveragedModel, which may be nested. ``WRAPPED`` is
    removed everywhere. A submodule called "module" deeper inside stays, and so do parametrizations, which compute a
    weight from other parameters.
    """
    parts = [part for part in name.split(".") if part not in WRAPPED]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside DistributedDataParallel, DataParallel and torch.compile; other wrappers stay."""
    *_, network = wrappers(model)
    return network


def is_parallel(model: nn.Module) -> bool:
    """Return whether the network is inside DistributedDataParallel or DataParallel."""
    return any(isinstance(wrapper, PARALLEL) for wrapper in wrappers(model))


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model, the module that it wraps, and so on to the network."""
    if not isinstance(model, nn.Module):
        raise InputError(f"expected model to be a torch.nn.Module, got {type(model).__name__}; pass the network")
    while True:
        yield model
        if isinstance(model, PARALLEL):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":  # by name: importing torch._dynamo takes a second
            model = model.get_submodule("_orig_mod")
        else:
            return


def unique_parameters(named: Iterable[tuple[str, Tensor]], *, sharded: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield (plain name, parameter), each tensor once under its first name, so that a tied parameter competes once.

    sharded: whether the caller can use DTensors.

    Raises InputError for two parameters of one plain name, for a DTensor that the caller cannot use, and for parameters
    of FSDP1 and DeepSpeed's ZeRO-3.
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
        refuse_flattened(full_name, parameter)
        if not sharded:
            refuse_dtensor(name, parameter, "this call")
        refuse_partial(name, parameter)
        yield name, parameter


def model_parameters(model: nn.Module, *, sharded: bool = False) -> dict[str, Tensor]:
    """Return the parameters by plain name, each tensor once, in the model's order; arguments and errors as above.

    Parameters that FSDP2 has gathered are sharded again first. Raises InputError for FSDP1 and DeepSpeed's ZeRO-3.
    """
    reshard(model)
    return dict(unique_parameters(model.named_parameters(), sharded=sharded))


def trainable_parameters(model: nn.Module, *, sharded: bool = False) -> dict[str, Tensor]:
    """Return the trainable parameters of ``model_parameters``. InputError also for adapters of peft that are merged."""
    refuse_merged(model)
    return {name: p for name, p in model_parameters(model, sharded=sharded).items() if p.requires_grad}


def refuse_merged(model: nn.Module) -> None:
    """Raise InputError for adapters of peft that are merged into the base, where neither scores nor resets reach."""
    for name, module in model.named_modules():
        if hasattr(module, "adapter_layer_names") and getattr(module, "merged", False):
            raise InputError(f"expected adapters apart from their base, got '{name}' merged; call unmerge_adapter()")


def refuse_dtensor(name: str, parameter: Tensor, what: str) -> None:
    """Raise InputError for a sharded parameter, since the ops would silently use one shard only."""
    if is_dtensor(parameter):
        raise InputError(
            f"expected whole parameters for {what}, got '{name}' as a DTensor (FSDP2 or tensor parallelism); call it "
            "before the model is sharded, or train with delfast.optim.MaskedAdamW in place of compact()"
        )
