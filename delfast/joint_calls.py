"""The processes that make a call together, and the one error that all of them raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from delfast.errors import InputError
from delfast.groups import Group, check_group
from delfast.naming import unwrap, wrappers
from delfast.processes import Processes, holders
from delfast.sharding import is_laid_out, reshard

DDP = nn.parallel.DistributedDataParallel


def averaging(model: nn.Module) -> DDP | None:
    """Return the DistributedDataParallel around a network, which averages its gradients; None if there is none."""
    return next((wrapper for wrapper in wrappers(model) if isinstance(wrapper, DDP)), None)


def averaging_processes(model: nn.Module) -> Processes | None:
    """Return the processes that train a network together; None if this process trains it alone.

    They are those of DistributedDataParallel, or those that hold a network of DTensors together.
    """
    if (wrapper := averaging(model)) is not None:
        if not dist.is_initialized():
            raise InputError(
                "expected the process group of DistributedDataParallel, got one that was destroyed; pass model.module, "
                "or call before destroy_process_group()"
            )
        return Processes(wrapper.process_group, dict(wrapper.named_parameters()))
    network = unwrap(model)
    reshard(network)
    return holders(dict(network.named_parameters()))


@contextmanager
def one_error(group: Group, *models: nn.Module) -> Iterator[Processes | None]:
    """Raise the error of any process, raised inside the context, on all processes of ``group`` and of the models.

    They raise it at their next exchange of anything. Return these processes; without a group and DTensors this process
    is alone, and None is returned. An error of the group or the models themselves is raised on the process where it
    occurs.
    """
    group = check_group(group)
    networks = [unwrap(model) for model in models]
    for network in networks:
        reshard(network)
    has_dtensors = any(map(is_laid_out, networks))
    if group is None and not has_dtensors:
        yield None
        return
    parameters = {f"{place}.{name}": p for place, each in enumerate(networks) for name, p in each.named_parameters()}
    processes = Processes(group, parameters)
    # in inference mode torch cannot detach a DTensor
    with processes.together(), torch.inference_mode(False) if has_dtensors else nullcontext():
        yield processes
