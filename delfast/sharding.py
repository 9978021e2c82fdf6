"""Parameters that several processes hold together: DTensors of FSDP2, HSDP and tensor parallelism.

DTensor itself slices and exchanges; the functions here return the part of a parameter, or of a tensor of the same
shape, that this process holds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from delfast.errors import InputError

# settings of an FSDP2 parameter group with which each backward pass adds the gradients of all processes
SUMMING: dict[str, Any] = {
    "gradient_divide_factor": 1.0,
    "force_sum_reduction_for_comms": True,  # or gloo refuses the factor
    "reduce_grads": True,
    "all_reduce_grads": True,
}
# the attributes of an FSDP2 parameter that hold its copies: gathered, and sharded within a node after a forward pass
COPIES = ("_unsharded_param", "_sharded_post_forward_param")


def is_dtensor(tensor: object) -> bool:
    """Return whether several processes hold the tensor together."""
    return type(tensor).__name__ == "DTensor"  # by name: importing torch.distributed.tensor takes a second


def is_laid_out(network: nn.Module) -> bool:
    """Return whether several processes hold a parameter of the network together, trainable or not."""
    return any(map(is_dtensor, network.parameters()))


def is_flat(tensor: object) -> bool:
    """Return whether FSDP1 has flattened several parameters into this one."""
    return type(tensor).__name__ == "FlatParameter"


def local_part(tensor: Any) -> Tensor:
    """Return the part of a tensor that this process holds, detached; a plain tensor is held as a whole."""
    part: Tensor
    if not is_dtensor(tensor):
        part = tensor.detach()
    else:
        with torch.inference_mode(False):  # in inference mode torch cannot detach a DTensor
            part = tensor.detach().to_local()
    return part


def whole(tensor: Any) -> Any:
    """Return a network's output as one tensor; a DTensor is gathered from the processes that hold it together."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def version_of(tensor: Tensor) -> int:
    """Return a count of the changes in place of a tensor; of a DTensor also those of the part that is held here."""
    return tensor._version + local_part(tensor)._version if is_dtensor(tensor) else tensor._version


def part_of(whole: Tensor, parameter: Any) -> Tensor:
    """Return the part of ``whole`` that this process holds of ``parameter``, a tensor of the same shape.

    Nothing is exchanged. The part of a DTensor is on the device of its mesh.
    """
    return _part(whole, parameter, parameter.placements) if is_dtensor(parameter) else whole.detach()


def rows_of(values: Tensor, parameter: Any, dim: int = 0) -> Tensor:
    """Return the values (rows,) of the rows, slices along ``dim``, that this process holds at least in part.

    values: (parameter.shape[dim],). Nothing is exchanged.
    """
    if not is_dtensor(parameter):
        return values
    from torch.distributed.tensor import Replicate

    along = [p if p.is_replicate() or p.dim == dim else Replicate() for p in parameter.placements]
    shape = [1] * parameter.ndim
    shape[dim] = len(values)
    return _part(values.view(shape), parameter, along).flatten()


def _part(whole: Tensor, parameter: Any, placements: list[Any]) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    whole = whole.detach()
    part: Tensor = distribute_tensor(whole, parameter.device_mesh, placements, src_data_rank=None).to_local()
    return part


def held_part(value: Any, parameter: Any) -> Tensor:
    """Return the part of ``value`` that belongs to this process's part of ``parameter``, a tensor of the same shape.

    A DTensor of other placements is redistributed, and gathered first if its mesh is another.
    """
    if not is_dtensor(value):
        return part_of(value, parameter)
    value = value.detach()
    if not is_dtensor(parameter) or value.device_mesh != parameter.device_mesh:
        return part_of(value.full_tensor(), parameter)
    if value.placements != parameter.placements:
        value = value.redistribute(placements=parameter.placements)
    return local_part(value)


def local_gradient(name: str, parameter: Any) -> Tensor:
    """Return the gradient of the part of a DTensor that this process holds.

    A gradient of other placements is redistributed. Raises InputError for one that is no DTensor on the same mesh.
    """
    gradient = parameter.grad
    if not is_dtensor(gradient) or gradient.device_mesh != parameter.device_mesh:
        found = "one on another mesh" if is_dtensor(gradient) else f"a {type(gradient).__name__}"
        raise InputError(
            f"expected the gradient of '{name}' as a DTensor on the parameter's device mesh, got {found}; distribute "
            "it like the parameter"
        )
    if gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    part: Tensor = gradient.to_local()  # without detach(), which costs a dispatch of DTensor
    return part


def with_whole_rows(parameter: Any, dim: int = 0) -> Any:
    """Return a DTensor of the same values whose rows, the slices along ``dim``, each lie in one process.

    What is split along another dimension is exchanged, so that it is split along ``dim``. Plain tensors and DTensors
    with whole rows are returned as they are.
    """
    if not is_dtensor(parameter) or all(p.is_replicate() or p.dim == dim for p in parameter.placements):
        return parameter
    from torch.distributed.tensor import Shard

    return parameter.detach().redistribute(
        placements=[p if p.is_replicate() else Shard(dim) for p in parameter.placements]
    )


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters that FSDP2 leaves in place after a forward pass, so that DTensors are there again.

    Raises InputError for layouts whose parameters are no DTensors: FSDP1 and DeepSpeed's ZeRO-3.
    """
    for name, parameter in model.named_parameters():
        refuse_flattened(name, parameter)
    for module in fsdp_modules(model):
        module.reshard()


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules to which ``fully_shard`` was applied."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a sharded model has imported it
    if fsdp is None:
        return []
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def fsdp_groups(model: nn.Module) -> list[Any]:
    """Return FSDP2's parameter groups: the parameters that it gathers, and whose gradients it adds, together."""
    return list({id(group): group for module in fsdp_modules(model) for group in _groups_of(module)}.values())


def _groups_of(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.10 has one for each module
    return [group for group in ([state._fsdp_param_group] if groups is None else groups) if group is not None]


def resharded(tensors: Iterable[Any]) -> dict[int, Any]:
    """Shard the modules again whose gathered copies are among the tensors; return parameters by the id of their copy.

    FSDP2 leaves the copies of a module in place after a forward pass without a backward one. torch's table of modules
    shows whose they are: nothing in a copy refers to its parameter.
    """
    fsdp, states = map(sys.modules.get, ("torch.distributed.fsdp", "torch.distributed._composable_state"))
    if fsdp is None or states is None:  # a sharded model has imported both
        return {}
    wanted, found = set(map(id, tensors)), {}
    for module in list(states._module_state_mapping):
        if not isinstance(module, fsdp.FSDPModule):
            continue
        held = [each for group in _groups_of(module) for each in group.fsdp_params]
        copies = {
            id(copy): each.sharded_param
            for each in held
            for kind in COPIES
            if (copy := getattr(each, kind, None)) is not None
        }
        if own := copies.keys() & wanted:
            found.update({key: copies[key] for key in own})
            module.reshard()
    return found


def forget_forward(model: nn.Module) -> None:
    """Let FSDP2 forget a forward pass that was not completed, or that no backward pass will follow."""
    for module in fsdp_modules(model):
        if module._get_fsdp_state()._is_root and hasattr(module, "reset_iter_state"):
            module.reset_iter_state()


def _waits(fsdp_param: Any) -> bool:
    """Return whether an FSDP2 parameter has a gradient that is not reduced yet."""
    whole = getattr(fsdp_param, "_unsharded_param", None)  # made by the first forward pass
    return fsdp_param.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None)


@contextmanager
def adding_gradients(model: nn.Module) -> Iterator[None]:
    """Let FSDP2 add the gradients of its processes inside the context, in at least float32, instead of averaging them.

    torch has setters for this without getters, so the settings are read from the groups. Raises InputError for
    gradients that wait for their reduction, to which those computed inside would be added, and for an all-reduce hook.
    """
    groups = fsdp_groups(model)
    for group in groups:
        if any(map(_waits, group.fsdp_params)) or group._partial_reduce_output is not None:
            raise InputError(
                "expected no gradients that wait for their reduction, got some from a backward pass with "
                "set_requires_gradient_sync(False) or set_requires_all_reduce(False); finish the optimizer step first"
            )
        if group._all_reduce_hook is not None:
            raise InputError(
                "expected FSDP2 without set_all_reduce_hook(), got a hook, which may add gradients of other processes; "
                "remove it while the model is scored"
            )
    contexts = [module._get_fsdp_state()._state_ctx for module in fsdp_modules(model)]
    saved = [(group, {name: getattr(group, name) for name in (*SUMMING, "mp_policy")}) for group in groups]
    last = [context.is_last_backward for context in contexts]
    try:
        for group in groups:
            vars(group).update(SUMMING)
            _set_policy(group, _reducing_in_float32(group))
        for context in contexts:
            context.is_last_backward = True
        yield
    finally:
        for group, settings in saved:
            vars(group).update(settings)
            _set_policy(group, settings["mp_policy"])
        for context, is_last in zip(contexts, last, strict=True):
            context.is_last_backward = is_last


def _reducing_in_float32(group: Any) -> Any:
    """Return a group's MixedPrecisionPolicy with a dtype of at least float32 for the sums over processes.

    Without a ``reduce_dtype`` FSDP2 adds gradients in the dtype in which they were computed.
    """
    policy = group.mp_policy
    computed_in = [policy.param_dtype or each.sharded_param.dtype for each in group.fsdp_params]
    if all((policy.reduce_dtype or dtype).itemsize >= 4 for dtype in computed_in):
        return policy
    return replace(policy, reduce_dtype=torch.float32)


def _set_policy(group: Any, policy: Any) -> None:
    group.mp_policy = policy
    if hasattr(group, "_reduce_dtype"):  # else the first forward pass reads the policy
        group._init_mp_dtypes()


def policy_dtypes(model: nn.Module) -> list[torch.dtype | None]:
    """Return the dtypes, each once, in which FSDP2 computes by its MixedPrecisionPolicy; None: in the parameters'."""
    return list({group.mp_policy.param_dtype: None for group in fsdp_groups(model)})


def refuse_flattened(name: str, parameter: Any) -> None:
    """Raise InputError for a parameter of FSDP1 or DeepSpeed's ZeRO-3, which is no tensor of the parameter's shape."""
    if is_flat(parameter) or "_fsdp_wrapped_module" in name.split("."):
        raise InputError(
            f"expected parameters as whole tensors or DTensors, got '{name}' flattened by FSDP1 "
            "(FullyShardedDataParallel); use FSDP2 (torch.distributed.fsdp.fully_shard), or unwrap the model first"
        )
    if hasattr(parameter, "_st_info"):  # set by DistributedDataParallel
        raise InputError(
            f"expected parameters as whole tensors or DTensors, got '{name}' as the local part that "
            "DistributedDataParallel leaves of tensor parallelism; use FSDP2 (torch.distributed.fsdp.fully_shard) over "
            "the other mesh dimension"
        )
    if hasattr(parameter, "ds_id"):
        raise InputError(
            f"expected parameters as whole tensors or DTensors, got '{name}' partitioned by DeepSpeed ZeRO-3; use "
            "FSDP2 (torch.distributed.fsdp.fully_shard), or gather the model first"
        )


def refuse_gathered(name: str, parameter: Any) -> None:
    """Raise InputError for a parameter without memory: FSDP2 gathered it for a forward pass, and has freed it since."""
    held = local_part(parameter)
    if held.numel() and not held.untyped_storage().size():
        raise InputError(
            f"expected '{name}' as the DTensor that FSDP2 shards, got the copy that it gathers for a forward pass; "
            "make the optimizer before the first pass, or call reshard() of each FSDPModule in model.modules()"
        )


def refuse_unseen_gradients(named: Iterable[tuple[str, Any]]) -> None:
    """Raise InputError for gradients whose infinities ``torch.amp.GradScaler`` would find in some processes only.

    torch combines what the processes find along those mesh dimensions alone along which the first gradient is split
    (``found_inf_reduce_handler``, torch 2.10 to 2.14). Then some processes would skip a step that others take.
    """
    firsts: dict[torch.dtype, tuple[str, Any]] = {}
    for name, parameter in named:
        if not is_dtensor(gradient := parameter.grad):
            continue
        first, leading = firsts.setdefault(gradient.dtype, (name, gradient))
        if not _split_over(gradient) <= _split_over(leading):
            raise InputError(
                f"expected a GradScaler to find the infinities of all processes, got '{name}' split along a mesh "
                f"dimension along which the first gradient, of '{first}', is not; give the optimizer a parameter "
                "that is split along all dimensions first, or train in bfloat16 without a scaler"
            )


def _split_over(tensor: Any) -> set[tuple[int, ...]]:
    """Return the ranks of each group of more than one process over which a DTensor is not replicated."""
    mesh = tensor.device_mesh
    return {
        tuple(torch.distributed.get_process_group_ranks(mesh.get_group(dim)))
        for dim, placement in enumerate(tensor.placements)
        if mesh.size(dim) > 1 and not placement.is_replicate()
    }


def refuse_partial(name: str, parameter: Any) -> None:
    """Raise InputError for a DTensor whose processes each hold a summand of it."""
    if is_dtensor(parameter) and any(p.is_partial() for p in parameter.placements):
        raise InputError(
            f"expected '{name}' split or replicated, got a DTensor with pending sums (Partial); redistribute it first"
        )


def dtensor_like(part: Tensor, parameter: Any) -> Any:
    """Return the DTensor, laid out like ``parameter``, whose part here is ``part``; ``part`` for a plain parameter."""
    if not is_dtensor(parameter):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def indices_of(parameter: Any) -> tuple[Tensor, ...]:
    """Return for each dimension the indices, in the whole parameter, of the slices that this process holds.

    They are shaped to index the whole parameter at once: ``whole[indices_of(parameter)]`` is this process's part.
    """
    device = parameter.device
    found = []
    for dim, size in enumerate(parameter.shape):
        held = rows_of(torch.arange(size, device=device), parameter, dim)
        found.append(held.view([-1 if d == dim else 1 for d in range(parameter.ndim)]))
    return tuple(found)
