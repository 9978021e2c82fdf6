"""Parameters that several processes hold together: DTensors of FSDP2, HSDP and tensor parallelism.

DTensor itself slices and exchanges; the functions here say which part of a parameter, or of a tensor of the same shape,
this process holds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from delfast.errors import InputError


def is_dtensor(tensor: object) -> bool:
    """Return whether several processes hold the tensor together."""
    return type(tensor).__name__ == "DTensor"  # by name: importing torch.distributed.tensor takes a second


def is_flat(tensor: object) -> bool:
    """Return whether FSDP1 has flattened several parameters into this one."""
    return type(tensor).__name__ == "FlatParameter"


def local_part(tensor: Any) -> Tensor:
    """Return the part of a tensor that this process holds, detached; a plain tensor is held as a whole."""
    detached = tensor.detach()
    part: Tensor = detached.to_local() if is_dtensor(tensor) else detached
    return part


def part_of(whole: Tensor, parameter: Any) -> Tensor:
    """Return the part of ``whole`` that this process holds of ``parameter``, a tensor of the same shape.

    Nothing is exchanged. The part of a DTensor is on the device of its mesh.
    """
    return _part(whole, parameter, parameter.placements) if is_dtensor(parameter) else whole.detach()


def rows_of(values: Tensor, parameter: Any, dim: int = 0) -> Tensor:
    """Return the values (rows,) of those rows, slices along ``dim``, of which this process holds a part.

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


def is_same_everywhere(number: int, parameters: Iterable[Any]) -> bool:
    """Return whether all processes that hold parts of these parameters pass the same number.

    One exchange of 16 bytes for each dimension of each device mesh; none for plain tensors.
    """
    meshes = dict.fromkeys(p.device_mesh for p in parameters if is_dtensor(p))
    if not meshes:
        return True
    from torch.distributed import ReduceOp, all_reduce

    number, is_same = number % 2**62, True
    for mesh in meshes:  # all of them, since other processes wait there
        highest = torch.tensor([number, -number], device=mesh.device_type)
        for dim in range(mesh.ndim):
            all_reduce(highest, ReduceOp.MAX, group=mesh.get_group(dim))
        is_same &= int(highest[0]) == -int(highest[1])
    return is_same


def refuse_different_masks(digest: str, parameters: Iterable[Any]) -> None:
    """Raise InputError, in all processes, if those that hold parts of these parameters have masks of other digests."""
    if not is_same_everywhere(int(digest[:15], 16), parameters):
        raise InputError(
            "expected the same mask in all processes that hold a sharded model, got different ones; localize with the "
            "whole forget set, or load one file everywhere"
        )


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
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a sharded model has imported it
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()


def refuse_flattened(name: str, parameter: Any) -> None:
    """Raise InputError for a parameter of FSDP1 or DeepSpeed's ZeRO-3, which is no tensor of the parameter's shape."""
    if is_flat(parameter) or "_fsdp_wrapped_module" in name.split("."):
        raise InputError(
            f"expected parameters as whole tensors or DTensors, got '{name}' flattened by FSDP1 "
            "(FullyShardedDataParallel); use FSDP2 (torch.distributed.fsdp.fully_shard), or unwrap the model first"
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
            "make the optimizer before the first pass, or call model.reshard() before"
        )


def refuse_unseen_gradients(named: Iterable[tuple[str, Any]]) -> None:
    """Raise InputError for gradients whose infinities ``torch.amp.GradScaler`` would see in some processes only.

    torch combines what the processes find along those mesh dimensions alone along which the first gradient is split
    (``found_inf_reduce_handler``, torch 2.10 to 2.14). Then some processes would skip a step that others take.
    """
    firsts: dict[torch.dtype, tuple[str, Any]] = {}
    for name, parameter in named:
        if not is_dtensor(gradient := parameter.grad):
            continue
        first, leading = firsts.setdefault(gradient.dtype, (name, gradient))
        for of_first, of_this in zip(leading.placements, gradient.placements, strict=False):
            if of_first.is_replicate() and not of_this.is_replicate():
                raise InputError(
                    f"expected a GradScaler to see the infinities of all processes, got '{name}' split along a mesh "
                    f"dimension along which the first gradient, of '{first}', is not; give the optimizer a parameter "
                    "that is split along all dimensions first, or train in bfloat16 without a scaler"
                )


def refuse_partial(name: str, parameter: Any) -> None:
    """Raise InputError for a DTensor whose processes each hold a summand of it."""
    if is_dtensor(parameter) and any(p.is_partial() for p in parameter.placements):
        raise InputError(
            f"expected '{name}' split or replicated, got a DTensor with pending sums (Partial); redistribute it first"
        )
