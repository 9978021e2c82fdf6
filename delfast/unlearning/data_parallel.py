"""Training by several processes under DistributedDataParallel: what they check, and what they do at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from delfast.errors import InputError
from delfast.naming import model_parameters, plain_name, unwrap, wrappers
from delfast.processes import Group, Processes, check_group
from delfast.sharding import is_dtensor, reshard

DDP = nn.parallel.DistributedDataParallel


def averaging(model: nn.Module) -> DDP | None:
    """Return the DistributedDataParallel around a network, which averages its gradients; None if there is none."""
    return next((wrapper for wrapper in wrappers(model) if isinstance(wrapper, DDP)), None)


def averaging_processes(model: nn.Module) -> Processes | None:
    """Return the processes over which DistributedDataParallel averages the gradients; None without it."""
    wrapper = averaging(model)
    return None if wrapper is None else Processes(wrapper.process_group, dict(wrapper.named_parameters()))


def training_processes(model: nn.Module, group: Group) -> Processes | None:
    """Return the processes that unlearn a network together; None if this process does it alone.

    Raises InputError for a group over which nothing averages the gradients, and for DTensors.
    """
    group = check_group(group)
    network, wrapper = unwrap(model), averaging(model)
    reshard(network)
    for name, parameter in network.named_parameters():
        if is_dtensor(parameter):
            raise InputError(
                f"expected whole parameters for unlearn, got '{plain_name(name)}' as a DTensor (FSDP2 or tensor "
                "parallelism); localize it with group=, and train it in a loop of your own, or use "
                "DistributedDataParallel"
            )
    if group is not None:
        if wrapper is None:
            raise InputError(
                f"expected model within DistributedDataParallel for group=, got {type(model).__name__}, whose "
                "gradients no process exchanges; wrap it, with the group as process_group"
            )
        ranks = dist.get_process_group_ranks(wrapper.process_group)
        if dist.get_process_group_ranks(group) != ranks:
            raise InputError(
                f"expected group to be the {len(ranks)} processes over which DistributedDataParallel averages "
                f"gradients, got {dist.get_world_size(group)}; pass its process_group"
            )
    return averaging_processes(model)


def together(processes: Processes | None) -> Any:
    """Return a context whose error, on any process, all processes raise; without processes one that does nothing."""
    return nullcontext() if processes is None else processes.together()


def add_up(processes: Processes | None, *values: float) -> list[float]:
    """Return each value's sum over the processes, in float64."""
    if processes is None:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=processes.device)
    processes.add_data([sums])
    found: list[float] = sums.tolist()
    return found


def check_same_network(network: nn.Module, processes: Processes) -> None:
    """Raise InputError, on every process, unless the parameters are the same everywhere, to the bit."""
    sums = [_bits(parameter) for parameter in model_parameters(network).values()]
    processes.check_same(
        repr(torch.stack(sums).tolist() if sums else []),
        "expected the method to change the network alike on every process, got other parameters on some, and the "
        "network is of no use; pass the same init and the same sets everywhere",
    )


def _bits(parameter: Tensor) -> Tensor:
    """Return a checksum of a tensor's bits, in which each word has a weight for its place: int64, on its device."""
    flat = parameter.detach().contiguous().reshape(-1)
    words = flat.view(torch.int32 if flat.nbytes % 4 == 0 else torch.uint8)
    places = torch.arange(1, 1 + words.numel(), dtype=torch.int32, device=words.device)
    return (words * places).sum(dtype=torch.int64)


def send_buffers(model: nn.Module) -> None:
    """Give every process the buffers of the first, as DistributedDataParallel does at its next forward pass.

    The running statistics of BatchNorm are those of each process's own batches until then.
    """
    wrapper = averaging(model)
    if wrapper is None or not wrapper.broadcast_buffers:
        return
    first = dist.get_global_rank(wrapper.process_group, 0)
    for name, buffer in wrapper.module.named_buffers():
        if name not in wrapper.parameters_to_ignore:
            dist.broadcast(buffer, first, group=wrapper.process_group)


@contextmanager
def met_in_forward(model: nn.Module, processes: Processes | None) -> Iterator[None]:
    """Let the processes exchange their errors before every forward pass, in which DistributedDataParallel exchanges.

    A process that fails outside of a forward pass meets the others there, or where they end the step.
    """
    wrapper = averaging(model)
    if processes is None or wrapper is None:
        yield
        return

    def meet(*_: Any) -> None:
        processes.raise_first(None)

    handle = wrapper.register_forward_pre_hook(meet, prepend=True)
    try:
        yield
    finally:
        handle.remove()
