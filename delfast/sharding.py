"""Parameters that several processes hold together: DTensors of FSDP2, HSDP and tensor parallelism.

DTensor itself slices and exchanges; the functions here say which part of a parameter, or of a tensor of the same shape,
this process holds.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from delfast.errors import InputError


def is_dtensor(tensor: object) -> bool:
    """Return whether several processes hold the tensor together."""
    return type(tensor).__name__ == "DTensor"  # by name: importing torch.distributed.tensor takes a second


def local_part(tensor: Any) -> Tensor:
    """Return the part of a tensor that this process holds, detached; a plain tensor is held as a whole."""
    part: Tensor = tensor.detach()
    return part.to_local() if is_dtensor(tensor) else part  # type: ignore[operator]


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
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise InputError(
                "expected parameters as whole tensors or DTensors, got FSDP1 (FullyShardedDataParallel), which "
                "flattens them; use FSDP2 (torch.distributed.fsdp.fully_shard), or unwrap the model first"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise InputError(
                f"expected parameters as whole tensors or DTensors, got '{name}' partitioned by DeepSpeed ZeRO-3; use "
                "FSDP2 (torch.distributed.fsdp.fully_shard), or gather the model first"
            )
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a sharded model has imported it
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()


def refuse_partial(name: str, parameter: Any) -> None:
    """Raise InputError for a DTensor whose processes each hold a summand of it."""
    if is_dtensor(parameter) and any(p.is_partial() for p in parameter.placements):
        raise InputError(
            f"expected '{name}' split or replicated, got a DTensor with pending sums (Partial); redistribute it first"
        )
