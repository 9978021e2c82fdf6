"""Process groups of torch.distributed: those of a caller and of DTensors' meshes, and sums and maxima over them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from delfast.errors import InputError
from delfast.sharding import is_dtensor

MAX_BUCKET_BYTES = 2**24  # of small tensors that are reduced in one collective; larger tensors are reduced in pieces

Group = Any
"""A ``torch.distributed.ProcessGroup``, a one-dimensional DeviceMesh, or None for this process alone."""


def check_group(group: Group) -> Any:
    """Return the process group of ``group``, a ProcessGroup or a one-dimensional DeviceMesh; None for None."""
    if group is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise InputError(
            "expected torch.distributed to be initialized for group, it is not; call init_process_group() first"
        )
    if type(group).__name__ == "DeviceMesh":  # by name: importing it takes time
        if group.ndim != 1:
            raise InputError(
                f"expected group to be a DeviceMesh of one dimension, got one of {group.ndim}; pass the dimension over "
                "which the data differ, mesh['dp'] for example, or mesh._flatten() for several"
            )
        return group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise InputError("expected a group that this process is a member of, got another; call it on members alone")
    if not isinstance(group, dist.ProcessGroup):
        raise InputError(
            "expected group to be a ProcessGroup or a DeviceMesh of one dimension, got "
            f"{type(group).__name__}; pass torch.distributed.group.WORLD for all processes"
        )
    return group


def meshes_of(tensors: Iterable[Any]) -> list[Any]:
    """Return the device meshes of the DTensors among tensors, each once."""
    return list(dict.fromkeys(tensor.device_mesh for tensor in tensors if is_dtensor(tensor)))


def mesh_groups(parameter: Any) -> list[Any]:
    """Return the groups of more than one process of a DTensor's mesh."""
    if not is_dtensor(parameter):
        return []
    mesh = parameter.device_mesh
    return [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]


def ranks_of(group: Any) -> tuple[int, ...]:
    """Return the ranks, in the whole job, of a group's processes."""
    return tuple(dist.get_process_group_ranks(group))


def listed(ranks: set[int]) -> str:
    """Return the first ranks as text, for an error."""
    first = ", ".join(map(str, sorted(ranks)[:8]))
    return first if len(ranks) <= 8 else f"{first}, ..."


def reduced_over(fsdp_group: Any) -> set[int]:
    """Return the ranks over which an FSDP2 parameter group adds gradients."""
    info = fsdp_group.mesh_info
    added = {dim for dim in (info.shard_mesh_dim, info.replicate_mesh_dim) if dim is not None}
    place = info.mesh.get_coordinate()
    ranks = info.mesh.mesh[tuple(slice(None) if dim in added else at for dim, at in enumerate(place))]
    return set(ranks.flatten().tolist())


def exchanged_device(devices: Iterable[torch.device], groups: Iterable[Any]) -> torch.device:
    """Return the first of the devices whose tensors all groups exchange."""
    for device in devices:
        if all(torch.device(device.type) in each._device_types for each in groups):
            return device
    raise InputError(
        "expected groups that exchange tensors of the model's devices, got other backends; call "
        'init_process_group("cpu:gloo,cuda:nccl")'
    )


# Sums and maxima


def all_reduce(tensors: Iterable[Tensor], op: Any, groups: list[Any]) -> None:
    """Reduce dense tensors in place over one group after the other: small ones in buckets, large ones in pieces."""
    bucket: list[Tensor] = []
    for flat in map(_flat_view, tensors):
        if flat.nbytes > MAX_BUCKET_BYTES:
            for piece in torch.split(flat, MAX_BUCKET_BYTES // flat.element_size()):
                _reduce(piece, op, groups)
            continue
        full = sum(each.nbytes for each in bucket) + flat.nbytes > MAX_BUCKET_BYTES
        if bucket and (full or bucket[0].dtype != flat.dtype or bucket[0].device != flat.device):
            _reduce_bucket(bucket, op, groups)
            bucket = []
        bucket.append(flat)
    _reduce_bucket(bucket, op, groups)


def _reduce_bucket(bucket: list[Tensor], op: Any, groups: list[Any]) -> None:
    if len(bucket) == 1:
        _reduce(bucket[0], op, groups)
    elif bucket:
        joined_values = torch.cat(bucket)
        _reduce(joined_values, op, groups)
        torch._foreach_copy_(bucket, torch.split(joined_values, [len(each) for each in bucket]))


def _reduce(values: Tensor, op: Any, groups: list[Any]) -> None:
    if values.numel():
        for group in groups:
            dist.all_reduce(values, op, group=group)


def _flat_view(tensor: Tensor) -> Tensor:
    """Return a dense tensor's elements (n,) in the order of memory, for any order of its dimensions."""
    return tensor.as_strided((tensor.numel(),), (1,))
