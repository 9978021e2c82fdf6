"""Gradients: dtypes, buffers, hooks, networks that compute in parts, and what a user's training finds afterwards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils.data import DataLoader, TensorDataset

import delfast
from delfast.sharding import is_dtensor
from tests.distributed.localizing.masks import few_alone, of_one_process
from tests.distributed.localizing.networks import (
    FEATURES,
    Network,
    batches,
    examples,
    fsdp,
    loss_fn,
    network,
    salun,
    tensor_parallel,
)
from tests.distributed.spawning import error_of


def untouched(rank):
    """Localize between a forward pass, hooks and gradients of the user's, and return the gradients of a later step."""
    found = []
    for localizes in (False, True):
        model, mesh = fsdp()
        called = []
        model.scale.register_post_accumulate_grad_hook(lambda p, called=called: called.append(1))
        inputs, weights = examples(4, seed=rank).tensors
        loss_fn(model, (inputs, weights)).sum().backward()
        before = {name: p.grad.to_local().clone() for name, p in model.named_parameters()}
        model.up.set_gradient_divide_factor(3.0)
        model.up.set_force_sum_reduction_for_comms(True)  # or gloo refuses the factor
        model.train()
        with torch.no_grad():
            model(inputs)  # the root's parameters are gathered and stay so
        if localizes:
            assert salun(model, batches(5), group=mesh).digest == few_alone(2)["param"]
            assert all(torch.equal(before[name], p.grad.to_local()) for name, p in model.named_parameters())
            assert model.training and len(called) == 1
        loss_fn(model, (inputs, weights)).sum().backward()
        assert len(called) == 2
        found.append({name: p.grad.to_local().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    waiting, mesh = fsdp()
    waiting.set_requires_gradient_sync(False)
    loss_fn(waiting, (inputs, weights)).sum().backward()
    return error_of(lambda: salun(waiting, batches(), group=mesh))


READ = {"weighted_grad": {"loader": batches(), "loss_fn": loss_fn}, "weight": {}}


def gathered(rank):
    """Return digests after a forward pass without a backward one, whose result still waits for its own."""
    found = []
    for criterion, arguments in READ.items():
        model, mesh = fsdp()
        result = model(examples(4).tensors[0])
        assert not all(map(is_dtensor, model.parameters()))  # FSDP2's copies, whose storage it frees
        scores = delfast.score(model, criterion=criterion, group=mesh, **arguments)
        assert all(map(is_dtensor, model.parameters())) and result.requires_grad
        found.append(scores.select(0.5).digest)
    return found


# Real numbers


def real_gradients(rank=0, sum_dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    data = TensorDataset(torch.randn(300, 20), torch.randint(0, 4, (300,)))
    return delfast.score(model, DataLoader(data, batch_size=8), sum_dtype=sum_dtype, **options).gradients


def real_gradients_of_group(rank):
    return real_gradients(group=dist.group.WORLD)


class Normalized(Network):
    """A network whose result depends on buffers, which each process of DDP has of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(FEATURES))

    def forward(self, inputs):
        return super().forward(inputs + self.shift)


def normalized(rank=0):
    model = Normalized()
    model.load_state_dict(network().state_dict(), strict=False)
    model.shift += 1 + rank
    return model


def of_peers(rank):
    """Return digests under tensor parallelism whose layers do not compete, of a loader that each process shuffles."""
    found = []
    for kind in ("excluded", "frozen"):
        model, _ = tensor_parallel()
        if kind == "frozen":
            model.up.requires_grad_(False), model.down.requires_grad_(False)
        loader = DataLoader(examples(23), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(rank))
        found.append(salun(model, loader, **({"exclude": PEERS} if kind == "excluded" else {})).digest)
    return found


PEERS = ["up.*", "down.*"]


def own_buffers(rank):
    """Return digests by buffers that differ between the processes, which keep them."""
    model, sharded = normalized(rank), normalized(rank)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(sharded, mesh=mesh)
    found = [salun(each, batches(), group=mesh).digest for each in (model, sharded)]
    assert all(torch.equal(each.shift, torch.full((FEATURES,), 1.0 + rank)) for each in (model, sharded))
    return found


def other_dtypes(rank):
    """Return digests of float64 under FSDP2, and of bfloat16 under DDP, whose sums are in float32."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wide = fully_shard(network().double(), mesh=mesh)
    return {**in_dtype(wide, torch.float64, group=mesh), **in_dtype(network().bfloat16(), torch.bfloat16, group=mesh)}


def in_dtype(model, dtype, **options):
    tensors = (tensor.to(dtype) for tensor in examples(23).tensors)
    loader = DataLoader(TensorDataset(*tensors), batch_size=3)
    scores = delfast.score(model, loader, loss_fn=loss_fn, **options)
    return {f"{dtype} {name}": scores.select(0.4, name).digest for name in ("channel", "param")}


class Weighted(nn.Module):
    """Weights of features; with a mesh, each process computes a part of the examples, as in sequence parallelism."""

    def __init__(self, mesh=None):
        super().__init__()
        self.mesh = mesh
        weight = torch.arange(1.0, 1 + FEATURES)
        self.weight = nn.Parameter(weight if mesh is None else distribute_tensor(weight, mesh, [Replicate()]))

    def forward(self, inputs):
        if self.mesh is None:
            return inputs * self.weight
        return (distribute_tensor(inputs, self.mesh, [Shard(0)]) * self.weight).full_tensor()


def weighted(rank=None):
    """Return the gradient of a parameter that is whole on every process, while each computes a summand."""
    model = Weighted(None if rank is None else init_device_mesh("cpu", (2,)))
    scores = delfast.score(model, batches(), "grad", loss_fn=lambda model, batch: model(batch[0]).square().sum(1))
    return scores.gradients["weight"], scores.select(0.5).digest


# Mixed precision of FSDP2


def policies(rank):
    """Return gradients and metadata under policies that differ in the dtype of the reduction, which is put back."""
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for reduced in (None, torch.bfloat16, torch.float32):
        for passes in (0, 1):  # before localize, which sets the reduction up
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
            fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduced))
            group = model._get_fsdp_state()._fsdp_param_group
            inputs, targets = torch.randn(16, 20), torch.randint(0, 4, (16,))
            loader = [(inputs[:8], targets[:8]), (inputs[8:], targets[8:])]
            for _ in range(passes):
                model(inputs).sum().backward()
            scores = delfast.score(model, loader, group=mesh)
            model(inputs).sum().backward()
            expected = None if reduced is torch.bfloat16 else reduced  # torch's own form of "as computed"
            assert group.mp_policy.reduce_dtype is reduced and group._reduce_dtype is expected
            gradients = {name: value.clone() for name, value in scores.gradients.items()}
            found[reduced, passes] = gradients, scores.select(0.4).metadata["precision"]
    return found


# Models as training recipes leave them


def prepared(rank):
    """Return digests of a model with checkpointed and with compiled blocks, and of one that accumulates gradients."""
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for kind in ("checkpointed", "compiled", "accumulating"):
        model = network()
        if kind == "checkpointed":
            model.up = checkpoint_wrapper(model.up)
        if kind == "compiled":
            model.up.compile(backend="eager")
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.set_requires_gradient_sync(kind != "accumulating")
        found[kind] = salun(model, batches(5), group=mesh).digest
        assert model._get_fsdp_state()._fsdp_param_group.reduce_grads == (kind != "accumulating")
    return found


# Scenarios and their checks


def scenarios(count):
    found = {"real": real_gradients_of_group, "buffers": own_buffers, "dtypes": other_dtypes}
    return found | (
        {
            "untouched": untouched,
            "weighted": weighted,
            "peers": of_peers,
            "gathered": gathered,
            "policies": policies,
            "prepared": prepared,
        }
        if count == 2
        else {}
    )


def check(count, all_ranks):
    for found in all_ranks("real"):
        assert all(torch.equal(found[name], value) for name, value in real_gradients().items())
    assert all_ranks("buffers") == [[salun(normalized(), batches()).digest] * 2] * count
    wide = in_dtype(network().double(), torch.float64) | in_dtype(network().bfloat16(), torch.bfloat16)
    assert all_ranks("dtypes") == [wide] * count
    if count != 2:
        return
    assert all("expected no gradients that wait for their reduction" in found[1] for found in all_ranks("untouched"))
    assert all_ranks("peers") == [[salun(network(), batches(), exclude=PEERS).digest] * 2] * count
    alone = of_one_process()
    expected = [alone[f"{criterion} channel topk_mean whole 0.5"] for criterion in READ]
    assert all_ranks("gathered") == [expected] * count
    for found in all_ranks("prepared"):
        assert set(found.values()) == {few_alone(2)["param"]}, found
    for found in all_ranks("policies"):
        wide = found[torch.float32, 0][0]
        assert all(precision == "bf16" for _, precision in found.values())
        assert all(torch.equal(value, wide[name]) for each, _ in found.values() for name, value in each.items())
    for gradient, digest in all_ranks("weighted"):
        assert torch.equal(gradient, weighted()[0]) and digest == weighted()[1]
