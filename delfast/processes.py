"""Processes that work on one job together: their groups, what they exchange, and the error that all of them raise.

The data group is the one over which the data differ. The mesh groups are those over which the parameters' meshes lay
parameters out: one group for each dimension of a mesh.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import local
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from delfast.bits import checksum
from delfast.errors import InputError, one_line, printable
from delfast.groups import (
    Group,
    all_reduce,
    check_group,
    exchanged_device,
    listed,
    mesh_groups,
    meshes_of,
    ranks_of,
    reduced_over,
)
from delfast.sharding import forget_forward, fsdp_groups, fsdp_modules, is_dtensor, is_laid_out, local_part

TEXT_BYTES = 4096  # of an error's text that reach the other processes
NO_BATCH: Any = object()  # in place of a batch for a process that has none left; None may be a loader's batch

Failure = TypeVar("Failure", bound=Exception)


class Processes:
    """The processes of a job, as seen from this process.

    data: the data group, or None if the data are the same everywhere.
    rank: this process's rank in the data group.
    size: the number of processes in the data group.
    meshes: the mesh groups of more than one process, each once.

    Every exchange begins with ``raise_first``. A process that has failed, in whatever context ``together``, takes part
    in the next one, and all of them raise its error in place of the exchange.
    """

    def __init__(self, group: Any, parameters: Mapping[str, Tensor]) -> None:
        self.data = group
        self.rank: int = 0 if group is None else dist.get_rank(group)
        self.size: int = 1 if group is None else dist.get_world_size(group)
        by_ranks = {ranks_of(each): each for p in parameters.values() for each in mesh_groups(p)}
        self.meshes = list(by_ranks.values())
        # the groups of every exchange are the same in all calls inside a job, also where some have no data group
        reached = {rank for mesh in meshes_of(parameters.values()) for rank in mesh.mesh.flatten().tolist()}
        beyond = [] if group is None or reached.issuperset(ranks_of(group)) else [group]
        self._all = [*self.meshes, *beyond]
        self._is_alone = all(dist.get_world_size(each) == 1 for each in self._all)
        groups = self._all if group is None else [*self._all, group]
        on_cpu = all(torch.device("cpu") in each._device_types for each in groups)
        # a network without parameters is on no device
        devices = {p.device for p in parameters.values()} or {d for each in groups for d in each._device_types}
        # small messages: the host does not wait for the device where the groups can exchange without it
        self.device = torch.device("cpu") if on_cpu else exchanged_device(devices, groups)
        self._check_product()

    # What all processes of the job do together

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise the error of any process, raised inside the context, on all of them: the one of the lowest rank."""
        error: Exception | None = None
        is_outermost = not getattr(_contexts, "inside", False)
        _contexts.inside = True
        try:
            try:
                yield
            except Exception as raised:
                error = raised
            self.raise_first(error)
        except Exception as leaving:
            if is_outermost:  # a caller may raise the same exception again, in a later call
                vars(leaving).pop(_RAISED_BY_ALL, None)
            raise
        finally:
            if is_outermost:
                _contexts.inside = False

    def raise_first(self, error: Exception | None, *, more: bool = False) -> bool:
        """Raise the error of the process of the lowest rank that has one, on every process; None: this one has none.

        An InputError stays one. Any other exception is raised as it is by the process that failed, and as a
        RuntimeError by the others. The texts name the rank. Without an error, return whether any process has ``more``
        to do. Every wait for the others is this one exchange, so that a process that fails where it is not expected to
        still takes part.
        """
        if error is not None and (self._is_alone or hasattr(error, _RAISED_BY_ALL)):
            raise error
        rank, last = dist.get_rank(), dist.get_world_size()
        own = b"" if error is None else encoded(error, rank)  # between the exchanges nothing may fail
        mine = int(more) if error is None else 1 + last - rank  # the lowest rank has the highest number
        highest = int(self._over_all(torch.tensor([mine], dtype=torch.int64)))
        if highest < 2:
            return highest == 1
        text = torch.zeros(1 + TEXT_BYTES, dtype=torch.uint8)
        if error is not None and mine == highest:
            text[0] = isinstance(error, InputError)
            text[1 : 1 + len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        raw = self._over_all(text).numpy().tobytes()
        # a generator would make another error of StopIteration
        if error is not None and mine == highest and not isinstance(error, (InputError, StopIteration)):
            if hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(f"on rank {rank}; the other processes raise a RuntimeError that names it")
            raise raised_by_all(error) if getattr(_contexts, "inside", False) else error
        _refuse(raw[1:].rstrip(b"\0").decode(errors="replace"), is_input=bool(raw[0]), cause=error)

    def in_step(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield the values, and then NO_BATCH until the last process of the job is done.

        An error of one process's iterable is raised by all.
        """
        source = iter(values)
        while True:
            value, error = NO_BATCH, None
            try:
                value = next(source, NO_BATCH)
            except Exception as raised:
                error = raised
            if not self.raise_first(error, more=value is not NO_BATCH):
                return
            yield value

    @contextmanager
    def in_one_pass(self, *networks: torch.nn.Module) -> Iterator[None]:
        """Exchange errors when the forward pass of each network begins; all processes run the networks in this order.

        Inside a pass they exchange parameters or activations, and none may be missing. So an error that a process
        raises before is raised by all where the pass would begin: in the network, or in the first of its modules under
        ``fully_shard`` where a function calls these by themselves. FSDP2's record of a pass that failed is dropped.
        """
        waiting = set(networks)

        def begin(network: torch.nn.Module, *_: Any) -> None:
            if network in waiting:
                waiting.discard(network)
                self.raise_first(None)

        handles = [
            module.register_forward_pre_hook(partial(begin, network), prepend=True)
            for network in networks
            for module in dict.fromkeys([network, *fsdp_modules(network)])
        ]
        try:
            yield
            while waiting:  # the function did not call the network, or not as a module
                waiting.pop()
                self.raise_first(None)
        except Exception as error:
            for network in networks:
                forget_forward(network)
            if waiting:
                self.raise_first(error)
            raise
        finally:
            for handle in handles:
                handle.remove()

    def is_same(self, value: str | bytes) -> bool:
        """Return, on every process alike, whether all have the same value. 64 bytes are exchanged."""
        return self._is_same(value, self._all)

    def _is_same(self, value: str | bytes, groups: list[Any]) -> bool:
        self.raise_first(None)
        digest = hashlib.sha256(value.encode() if isinstance(value, str) else value).digest()
        mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        both = self._maximum(torch.cat([mine, 255 - mine]), groups)  # the maximum, and 255 minus the minimum
        return torch.equal(both[:32], 255 - both[32:])

    def check_places(self) -> None:
        """Raise InputError on every process unless the data group joins processes that hold the same parts.

        Along the meshes over which the data do not differ, all processes of the data group have one coordinate.
        """
        if self.data is None:
            return
        data = set(ranks_of(self.data))
        place = [dist.get_rank(group) for group in self.meshes if not data.issuperset(ranks_of(group))]
        with self.together():
            if not self._is_same(repr(place), [self.data]):
                raise InputError(
                    f"expected group to be processes that hold the same parts of the parameters, got ranks "
                    f"{listed(data)}, which hold others; pass the dimension of the mesh over which the data differ"
                )

    def check_same(self, value: str | bytes, error: str) -> None:
        """Raise InputError with ``error`` on every process unless all have the same value."""
        if not self.is_same(value):
            _refuse(error, is_input=True)

    def check_same_mask(self, digest: str) -> None:
        """Raise InputError on every process unless all have masks of one digest."""
        self.check_same(
            digest,
            "expected the same mask on every process, got different ones; localize the whole forget set with group=, "
            "or load one file everywhere",
        )

    def first_of_all(self, value: Any) -> Any:
        """Return the value of the first process, an object that can be pickled."""
        self.raise_first(None)
        box = [value]
        for group in self._all:
            dist.broadcast_object_list(box, dist.get_global_rank(group, 0), group=group, device=self.device)
        return box[0]

    def _over_all(self, values: Tensor) -> Tensor:
        """Return the maximum over all processes of the job, on the CPU."""
        return self._maximum(values, self._all)

    def _maximum(self, values: Tensor, groups: list[Any]) -> Tensor:
        values = values.to(self.device)
        for group in groups:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
        return values.cpu()

    # Over the data group

    def add_data(self, tensors: Iterable[Tensor]) -> None:
        """Add the tensors of all processes of the data group, in place."""
        if self.data is not None:
            self.raise_first(None)
            all_reduce(tensors, dist.ReduceOp.SUM, [self.data])

    def count_data(self, count: int) -> int:
        """Return the sum of a count over the data group."""
        value = torch.tensor([count], dtype=torch.int64, device=self.device)
        self.add_data([value])
        return int(value)

    def gather_data(self, value: Any) -> list[Any]:
        """Return the value, an object that can be pickled, of each process of the data group, by its rank there."""
        if self.data is None:
            return [value]
        self.raise_first(None)
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.data)
        return values

    # Over all groups

    def copy_from_first(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of the first process to all others of the job, in place.

        DTensors that are laid out over a group are left as they are in it. A tensor is written only where it differs.
        Raises InputError, on every process, for tensors of other names, dtypes or shapes.
        """
        forms = "; ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in tensors.items())
        self.check_same(
            forms,
            "expected the same buffers on every process, got other names, dtypes or shapes on some; build the same "
            "model everywhere",
        )
        for group in self._all:
            parts = [local_part(each) for each in tensors.values() if _is_same_over(each, group) and each.numel()]
            if parts:
                _copy_from_first(parts, group, self.device)

    def check_same_values(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise InputError on every process if processes that hold the same part of a parameter have other values.

        Checksums are compared, whose sums are exact in any order.
        """
        with self.together():
            sums = {name: checksum(local_part(p)).to(self.device) for name, p in parameters.items()}
            for group in self._all:
                self.raise_first(None)
                compared = [name for name, p in parameters.items() if _is_same_over(p, group)]
                if not compared:
                    continue
                own = torch.stack([sums[name] for name in compared])
                both = torch.cat([own, ~own])  # the maximum, and the complement of the minimum
                dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
                different = (both[: len(own)] != ~both[len(own) :]).tolist()
                if any(different):
                    raise InputError(
                        f"expected the same values of '{compared[different.index(True)]}' on every process, got others "
                        "on some; load the same state everywhere, or train inside DistributedDataParallel"
                    )

    # Over the mesh groups

    def maximum(self, values: Tensor) -> Tensor:
        """Return the maximum, in place, over the processes that hold the parameters between them."""
        self.raise_first(None)
        all_reduce([values], dist.ReduceOp.MAX, self.meshes)
        return values

    def total(self, *values: Tensor) -> None:
        """Add the values of the processes that hold the parameters between them, in place, each process once."""
        self.raise_first(None)
        all_reduce(values, dist.ReduceOp.SUM, self.meshes)

    def is_first(self, parameter: Any) -> bool:
        """Return whether this is the first of the processes that hold the same part of a parameter.

        It is the process of coordinate 0 in every mesh group over which the parameter is not split.
        """
        split: set[tuple[int, ...]] = set()
        if is_dtensor(parameter):
            mesh = parameter.device_mesh
            split = {
                ranks_of(mesh.get_group(dim))
                for dim, placement in enumerate(parameter.placements)
                if mesh.size(dim) > 1 and not placement.is_replicate()
            }
        return all(ranks_of(group) in split or dist.get_rank(group) == 0 for group in self.meshes)

    def _check_product(self) -> None:
        """Raise InputError unless the mesh groups are the dimensions of one mesh.

        A sum over one group after the other counts each process once only then.
        """
        if len(self.meshes) < 2:
            return
        self.raise_first(None)
        reached = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=self.device)
        reached[dist.get_rank()] = 1
        for group in self.meshes:
            dist.all_reduce(reached, dist.ReduceOp.SUM, group=group)
        if int(reached.max()) > 1 or int(reached.count_nonzero()) != math.prod(map(dist.get_world_size, self.meshes)):
            sizes = " x ".join(str(dist.get_world_size(group)) for group in self.meshes)
            raise InputError(
                f"expected all parameters on dimensions of one mesh, got groups of {sizes} processes that overlap; "
                "build every mesh from one init_device_mesh()"
            )


def holders(parameters: Mapping[str, Tensor]) -> Processes | None:
    """Return the processes that hold DTensors among the parameters together; None if all are plain tensors."""
    return Processes(None, parameters) if any(map(is_dtensor, parameters.values())) else None


def joined(
    network: torch.nn.Module, group: Group, parameters: Mapping[str, Tensor], settings: str, *, reads_data: bool = True
) -> Processes | None:
    """Return the processes of a job on these parameters; None if this process works alone.

    settings: the arguments that must be the same on all processes, as text. reads_data: whether the job computes
    gradients. Raises InputError for a group that then does not fit how the parameters are laid out, and for other
    settings or parameters on some processes.
    """
    group = check_group(group)
    if group is None and not is_laid_out(network):
        return None
    data = {dist.get_rank()} if group is None else set(dist.get_process_group_ranks(group))
    reduced: set[int] = set()
    for each in fsdp_groups(network) if reads_data else ():
        ranks = reduced_over(each)
        if ranks != data:
            raise InputError(
                f"expected group to be the {len(ranks)} processes over which fully_shard adds gradients, ranks "
                f"{listed(ranks)}, got {'none' if group is None else f'ranks {listed(data)}'}; pass the mesh that "
                "fully_shard got, flattened if it has two dimensions, and the loader of the whole set"
            )
        reduced |= ranks
    for name, parameter in parameters.items() if reads_data else ():
        for each in mesh_groups(parameter):
            ranks = set(ranks_of(each))
            if not ranks <= reduced and len(ranks & data) > 1:
                raise InputError(
                    f"expected group to be processes over which '{name}' is not laid out, got ranks {listed(data)}, "
                    f"which share ranks {listed(ranks & data)} with its mesh; processes that hold one network between "
                    "them compute the same batches, so pass the other dimension of the mesh"
                )
    # of all parameters: also processes that hold only frozen ones together compute the same passes
    processes = Processes(group, dict(network.named_parameters()))
    processes.check_places()
    forms = "; ".join(f"{name} {p.dtype} {tuple(p.shape)} {p.stride()}" for name, p in parameters.items())
    processes.check_same(
        f"{settings}; {forms}",
        "expected the same call on every process, on a model of the same trainable parameters, got other arguments, "
        "names, dtypes, shapes or memory formats on some; build the same model everywhere",
    )
    return processes


def _is_same_over(tensor: Any, group: Any) -> bool:
    """Return whether the processes of a group hold the same part of a tensor."""
    ranks = ranks_of(group)
    if is_dtensor(tensor):
        mesh = tensor.device_mesh
        for dim, placement in enumerate(tensor.placements):
            if ranks_of(mesh.get_group(dim)) == ranks:
                is_replicated: bool = placement.is_replicate()
                return is_replicated
    return all(len(set(ranks_of(each)).intersection(ranks)) < 2 for each in mesh_groups(tensor))


def _copy_from_first(parts: list[Tensor], group: Any, device: torch.device) -> None:
    """Copy tensors with elements from a group's first process."""
    raw = [part.to(device).contiguous().reshape(-1).view(torch.uint8) for part in parts]
    joined_values = torch.cat(raw)  # a copy
    dist.broadcast(joined_values, dist.get_global_rank(group, 0), group=group)
    for part, own, values in zip(parts, raw, torch.split(joined_values, list(map(len, raw))), strict=True):
        if not torch.equal(own, values):  # views such as expanded tensors cannot be written to
            part.copy_(values.clone().view(part.dtype).view(part.shape))


# Errors that all processes raise

_RAISED_BY_ALL = "_delfast_raised_by_all"  # marks an error, so that a context around does not exchange it again
_contexts = local()  # .inside: whether this thread is inside a context ``together``


def raised_by_all(error: Failure) -> Failure:
    """Return an error that every process of a job raises by itself, marked, so that they do not exchange it."""
    vars(error)[_RAISED_BY_ALL] = True  # past a __setattr__ of its own, such as a frozen dataclass's
    return error


def encoded(error: Exception, rank: int) -> bytes:
    """Return the text of any error, with its rank, in at most TEXT_BYTES bytes of UTF-8."""
    name = type(error).__name__
    try:
        words = str(error) if isinstance(error, InputError) else f"{name}: {one_line(error)}"
    except Exception:  # of its own __str__: only the name can be reported
        words = name
    place = f" (on rank {rank})".encode()
    return printable(words).encode()[: TEXT_BYTES - len(place)].decode(errors="ignore").encode() + place


def _refuse(text: str, *, is_input: bool, cause: Exception | None = None) -> NoReturn:
    error = raised_by_all((InputError if is_input else RuntimeError)(text))
    # a context manager would take an error whose cause is StopIteration for its own generator's
    raise error from (None if isinstance(cause, StopIteration) else cause)
