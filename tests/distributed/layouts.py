"""Sharded layouts of one network, with masks and gradients, for the tests of reset and masked steps."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from delfast import Mask
from delfast.naming import model_parameters
from delfast.optim import MaskedAdamW, MaskedSGD
from delfast.sharding import is_dtensor, local_part, part_of

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda named, mask: MaskedSGD(named, mask, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda named, mask: MaskedAdamW(named, mask, lr=torch.tensor(0.05), weight_decay=0.1),
}


class Turned(nn.Module):
    """A layer whose weight is (in, out), as transformers' Conv1D has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Net(nn.Module):
    """A network of odd sizes, with parameters of fewer rows than there are processes, and with a zero below 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.turned = nn.Linear(6, 7), nn.Linear(7, 5), Turned()
        self.conv, self.last = nn.Conv2d(1, 5, (1, 3)), nn.Linear(20, 2)
        with torch.no_grad():
            self.first.weight[0, 0] = -0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.turned(self.second(self.first(x).relu()).relu())
        return self.last(self.conv(x[:, None, None]).flatten(1))


def network(seed: int = 1) -> Net:
    torch.manual_seed(seed)
    return Net()


def masks() -> dict[str, Mask]:
    """Return a mask of rows and one of elements: all of the last layer, and no element of one weight and one bias."""
    torch.manual_seed(3)
    dense: dict[str, dict[str, Tensor]] = {"rows": {}, "elements": {}}
    for name, p in Net().named_parameters():
        dim = 1 if name == "turned.weight" else 0
        rows = torch.arange(p.shape[dim]) % 2 == 0
        rows = (rows if dim == 1 else rows.reshape(-1, *[1] * (p.ndim - 1))).expand(p.shape)
        for kind, flags in (("rows", rows), ("elements", torch.rand(p.shape) < 0.4)):
            all_or_none = {"second.weight": flags & False, "second.bias": flags & False, "last.weight": flags | True}
            dense[kind][name] = all_or_none.get(name, flags)
    return {kind: Mask.from_dense(flags, dims={"turned.weight": 1}) for kind, flags in dense.items()}


def sharded(layout: str, model: nn.Module) -> nn.Module:
    """Shard a model that every process has a copy of."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    processes = torch.distributed.get_world_size()

    def split(columns: Callable[[str], bool]) -> Any:
        def along(name: str, module: nn.Module, mesh: Any) -> None:
            for key, p in list(module.named_parameters(recurse=False)):
                place = [Shard(0)] if p.ndim < 2 or not columns(name) else [Shard(1)]
                if p.ndim < 2 and columns(name):
                    place = [Replicate()]  # type: ignore[list-item]
                module.register_parameter(key, nn.Parameter(distribute_tensor(p, mesh, place)))

        return along

    if layout in ("rows", "columns"):
        mesh = init_device_mesh("cpu", (processes,))
        return distribute_module(model, mesh, split(lambda _: layout == "columns"))
    if layout == "mixed":  # plain parameters beside DTensors
        return fully_shard(model, ignored_params={*model.first.parameters(), *model.turned.parameters()})  # type: ignore[union-attr]
    if layout == "fsdp":
        for module in (model.first, model.last):
            fully_shard(module)  # type: ignore[arg-type]
        return fully_shard(model)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    if layout == "hsdp":
        return fully_shard(model, mesh=mesh)
    distribute_module(model, mesh["inner"], split(lambda name: name in ("second", "last")))
    return fully_shard(model, mesh=mesh["outer"])


Named = nn.Module | list[tuple[str, Any]]


def give_gradients(named: Named, step: int, *, replicated: bool = False, edge: float | None = None) -> None:
    """Give every parameter its gradient of this step; ``edge``: the last value of the first weight's."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    for name, p in named.named_parameters() if isinstance(named, nn.Module) else named:
        torch.manual_seed(zlib.crc32(name.encode()) + step)
        gradient = torch.randn(p.shape)
        if edge is not None and name == "first.weight":
            gradient[-1, -1] = edge
        if is_dtensor(p):
            place = [Replicate()] * p.device_mesh.ndim if replicated else p.placements
            gradient = distribute_tensor(gradient, p.device_mesh, place, src_data_rank=None)
        p.grad = gradient


def assert_equal_parts(model: nn.Module, expected: nn.Module) -> None:
    """The part of every parameter that this process holds, to the bit: the sign of a zero counts."""
    whole = dict(expected.named_parameters())
    for name, p in model_parameters(model, sharded=True).items():
        part, held = part_of(whole[name], p), local_part(p)
        assert part.shape == held.shape, name
        assert torch.equal(part.contiguous().view(torch.int32), held.contiguous().view(torch.int32)), name


def take_steps(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()
