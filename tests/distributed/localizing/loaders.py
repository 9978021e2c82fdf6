"""Loaders of 101 examples that count once each, and loaders that are refused."""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset

from tests.distributed.localizing.networks import ddp, examples, fsdp, network, salun
from tests.distributed.spawning import error_of


class Recorded(TensorDataset):
    """A data set that remembers which examples were read."""

    def __init__(self, count):
        super().__init__(*examples(count).tensors)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(examples(101))


class OneShare:
    """A sampler of one process's share that no attribute shows."""

    def __init__(self, rank, count):
        self.indices = range(rank, 101, count)

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


@functools.cache
def of_101():
    return salun(network(), DataLoader(examples(101), batch_size=7)).digest


def counted(loader_of, layout, rank):
    """Return digest, number of examples, and examples read by this process."""
    model, group = layout()
    loader = loader_of(rank, dist.get_world_size())
    mask = salun(model, loader, group=group)
    assert mask.metadata["processes"] == dist.get_world_size()
    return mask.digest, mask.metadata["examples"], getattr(getattr(loader, "dataset", None), "read", None)


def plain_loader(rank, count):
    return DataLoader(Recorded(101), batch_size=7)


def shuffled(rank, count):
    return DataLoader(examples(101), batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(rank))


def unbatched(rank, count):
    return DataLoader([tuple(t[i : i + 9] for t in examples(101).tensors) for i in range(0, 101, 9)], batch_size=None)


def listed(rank, count):
    return list(DataLoader(examples(101), batch_size=7))


def streamed(rank, count):
    return DataLoader(Stream(), batch_size=7)


def sampled(rank, count, **options):
    data = Recorded(101)
    return DataLoader(data, batch_size=7, sampler=DistributedSampler(data, count, rank, **options))


def shuffled_sampled(rank, count):
    return sampled(rank, count, shuffle=True, seed=4)


def accelerate_uneven(rank, count):
    return of_accelerate(rank, count, even_batches=False)


HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None
LOADERS = (plain_loader, shuffled, unbatched, listed, streamed, sampled, shuffled_sampled)
LOADERS += (accelerate_uneven,) if HAS_ACCELERATE else ()


def of_accelerate(rank, count, even_batches=True):
    from accelerate.data_loader import BatchSamplerShard as shard

    plain = DataLoader(examples(101), batch_size=8)
    batch_sampler = shard(plain.batch_sampler, count, rank, even_batches=even_batches)
    return DataLoader(examples(101), batch_sampler=batch_sampler)


def own_subset(rank, count):
    return DataLoader(Subset(examples(100), range(rank, 100, count)), batch_size=7)


def own_part(rank, count):
    tensors = examples(100).tensors
    return DataLoader(TensorDataset(*(t[rank : rank + 50] for t in tensors)), batch_size=7)


def own_sampler(rank, count):
    return DataLoader(examples(101), batch_size=7, sampler=OneShare(rank, count))


def own_list(rank, count):
    return listed(rank, count)[rank::count]


def other_rank(rank, count):
    return sampled((rank + 1) % count, count)


def dropping(rank, count):
    return sampled(rank, count, drop_last=True)


REFUSED = {
    **({of_accelerate: "examples of the data set, each once, got"} if HAS_ACCELERATE else {}),
    own_subset: "the same data set on every process",
    own_part: "the same data set on every process",
    own_sampler: "examples of the data set, each once, got",
    own_list: "the same batches on every process",
    other_rank: "expected a DistributedSampler for rank 0 of the group's",
    dropping: "examples of the data set, each once, got",
}


def refused(loader_of, rank):
    model, group = ddp()
    return error_of(lambda: salun(model, loader_of(rank, dist.get_world_size()), group=group))


def refused_without_a_group(rank):
    count = dist.get_world_size()
    loaders = {"sampler": sampled} | ({"accelerate": of_accelerate} if HAS_ACCELERATE else {})
    return {name: error_of(lambda f=f: salun(ddp()[0], f(rank, count))) for name, f in loaders.items()}


# Scenarios and their checks


PADDED = ((of_accelerate,) if HAS_ACCELERATE else ()) + (dropping,)


def scenarios(count):
    found = {f.__name__: functools.partial(counted, f, ddp) for f in LOADERS}
    found |= {f"fsdp {f.__name__}": functools.partial(counted, f, fsdp) for f in (plain_loader, listed, sampled)}
    found |= {f"refused {f.__name__}": functools.partial(refused, f) for f in (REFUSED if count == 2 else PADDED)}
    return found | {"no group": refused_without_a_group}


def check(count, all_ranks):
    for name in [f.__name__ for f in LOADERS] + ["fsdp plain_loader", "fsdp listed", "fsdp sampled"]:
        assert [found[:2] for found in all_ranks(name)] == [(of_101(), 101)] * count, name
    for name in ("plain_loader", "sampled"):
        assert sorted(i for found in all_ranks(name) for i in found[2]) == list(range(101)), name
    for loader_of in REFUSED if count == 2 else PADDED:
        first, *others = all_ranks(f"refused {loader_of.__name__}")
        assert first is not None and first[0] == "InputError" and REFUSED[loader_of] in first[1], (loader_of, first)
        assert others == [first] * (count - 1)
    for found in all_ranks("no group"):
        assert all(kind == "InputError" and "pass group=" in text for kind, text in found.values())
