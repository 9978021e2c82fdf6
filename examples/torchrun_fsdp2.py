"""Unlearn in a job of several processes with FSDP2: torchrun --nproc-per-node 2 examples/torchrun_fsdp2.py"""

import torch
import torch.distributed as dist
from common import WRONG, digits, report
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset

import delfast


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Dataset, epochs: int) -> None:
    """Run the existing training job, which contains nothing about masks."""
    loader = DataLoader(data, batch_size=32, sampler=DistributedSampler(data))
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for images, targets in loader:
            cross_entropy(model(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()


def gathered(model: nn.Module) -> nn.Module:
    """Return a copy of the model with whole parameters, on every process."""
    copied = network()
    copied.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    return copied


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    everything = TensorDataset(*digits())
    forget, retain = (Subset(everything, part) for part in (range(WRONG), range(WRONG, len(everything))))
    model = fully_shard(network(), mesh=mesh)
    train(model, torch.optim.AdamW(model.parameters(), lr=5e-3), everything, epochs=40)
    before = gathered(model)
    mask = delfast.localize(model, DataLoader(forget, batch_size=25), budget=0.3, group=mesh)  # the whole model's
    delfast.reset_(model, mask, init=network)
    mask = mask.widen(["3.weight", "3.bias"], {"3.weight": (10, 256), "3.bias": (10,)})  # the head is trained in full
    train(model, delfast.optim.MaskedAdamW(model.named_parameters(), mask, lr=2e-3), retain, epochs=8)

    after = gathered(model)
    if dist.get_rank() == 0:
        report(before, after, mask)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
