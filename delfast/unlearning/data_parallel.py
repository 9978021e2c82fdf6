"""Training by several processes, under DistributedDataParallel or FSDP2: what they check, and what they exchange."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from delfast.errors import InputError
from delfast.groups import Group, check_group, mesh_groups, ranks_of
from delfast.joint_calls import averaging, averaging_processes
from delfast.naming import trainable_parameters, unwrap
from delfast.processes import Processes, joined
from delfast.sharding import adding_gradients, fsdp_groups, is_laid_out, reshard


def training_processes(model: nn.Module, group: Group) -> Processes | None:
    """Return the processes that unlearn a network together; None if this process does it alone.

    Raises InputError for a group over which nothing averages the gradients, and for DTensors that FSDP2 does not shard.
    """
    group = check_group(group)
    network, wrapper = unwrap(model), averaging(model)
    reshard(network)
    if is_laid_out(network):
        return _sharding_processes(network, group)
    if group is not None:
        if wrapper is None:
            raise InputError(
                f"expected model within DistributedDataParallel for group=, got {type(model).__name__}, whose "
                "gradients no process exchanges; wrap it, with the group as process_group"
            )
        ranks = ranks_of(wrapper.process_group)
        if ranks_of(group) != ranks:
            raise InputError(
                f"expected group to be the {len(ranks)} processes over which DistributedDataParallel averages "
                f"gradients, got {dist.get_world_size(group)}; pass its process_group"
            )
    if wrapper is not None and not wrapper.require_backward_grad_sync:
        raise InputError("expected gradients averaged in every backward pass, got no_sync(); call unlearn outside it")
    return averaging_processes(model)


def _sharding_processes(network: nn.Module, group: Any) -> Processes | None:
    """Return the processes among which FSDP2 splits a network and averages its gradients."""
    parameters = trainable_parameters(network, sharded=True)
    groups = fsdp_groups(network)
    exchanged = {id(each.sharded_param) for fsdp_group in groups for each in fsdp_group.fsdp_params}
    for name, parameter in parameters.items():
        if id(parameter) not in exchanged:
            raise InputError(
                f"expected FSDP2 to exchange the gradients of all parameters for unlearn, got '{name}', which it does "
                "not shard (tensor parallelism, or ignored_params); freeze it, or train in a loop of your own"
            )
        meshes = mesh_groups(parameter) if group is not None else []
        if not all(set(ranks_of(each)) <= set(ranks_of(group)) for each in meshes):
            raise InputError(
                f"expected '{name}' split by FSDP2 alone for unlearn, got a mesh with another dimension (tensor "
                "parallelism); train in a loop of your own"
            )
    for fsdp_group in groups:
        if fsdp_group.gradient_divide_factor is not None:
            raise InputError(
                f"expected FSDP2 to average gradients, got a divide factor of {fsdp_group.gradient_divide_factor}; "
                "leave out set_gradient_divide_factor()"
            )
        if not (fsdp_group.reduce_grads and fsdp_group.all_reduce_grads):
            raise InputError(
                "expected FSDP2 to reduce gradients in every backward pass, got set_requires_gradient_sync(False) or "
                "set_requires_all_reduce(False); set it to True"
            )
    with adding_gradients(network):
        pass  # it refuses gradients that wait for their reduction, and hooks of it
    return joined(network, group, parameters, "unlearn")


def together(processes: Processes | None) -> Any:
    """Return a context whose error, on any process, all processes raise; without processes one that does nothing."""
    return nullcontext() if processes is None else processes.together()


def add_up(processes: Processes | None, *values: float) -> list[float]:
    """Return each value's sum over the processes, in float64.

    Without a data group it is the sum over all that hold a network together: processes of the same data count alike.
    """
    if processes is None:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=processes.device)
    if processes.data is None:
        processes.total(sums)
    else:
        processes.add_data([sums])
    found: list[float] = sums.tolist()
    return found


def send_buffers(model: nn.Module, processes: Processes | None) -> None:
    """Give every process the buffers of the first, as DistributedDataParallel does at its next forward pass.

    The running statistics of BatchNorm are those of each process's own batches until then.
    """
    wrapper = averaging(model)
    if processes is None or (wrapper is not None and not wrapper.broadcast_buffers):
        return
    ignored = () if wrapper is None else wrapper.parameters_to_ignore
    named = (model if wrapper is None else wrapper.module).named_buffers()
    processes.copy_from_first({name: buffer for name, buffer in named if name not in ignored})


@contextmanager
def met_in_forward(model: nn.Module, processes: Processes | None) -> Iterator[None]:
    """Exchange the processes' errors before every forward pass, in which DDP and FSDP2 exchange tensors.

    A process that fails outside of a forward pass takes part in that exchange, or in the one at the end of the step.
    """
    if processes is None:
        yield
        return

    def meet(*_: Any) -> None:
        processes.raise_first(None)

    handle = (averaging(model) or unwrap(model)).register_forward_pre_hook(meet, prepend=True)
    try:
        yield
    finally:
        handle.remove()
