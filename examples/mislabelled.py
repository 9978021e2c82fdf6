"""Find the mislabelled images of a training set, and unlearn them: nobody has to know which labels are wrong."""

import copy

import torch
from common import WRONG, digits, report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

import delfast


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip


def trained(data: TensorDataset, rows: Tensor, epochs: int = 20) -> nn.Module:
    """Run the existing training job on some rows of the data."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for images, targets in DataLoader(Subset(data, rows.tolist()), batch_size=64, shuffle=True):
            optimizer.zero_grad()
            cross_entropy(model(images), targets).backward()
            optimizer.step()
    return model.eval()


def suspects(data: TensorDataset, parts: int = 4) -> Tensor:
    """Return the rows whose label a network that never saw them does not predict."""
    images, labels = data.tensors
    everything, found = torch.arange(len(labels)), []
    for part in torch.randperm(len(labels)).chunk(parts):
        model = trained(data, everything[~torch.isin(everything, part)], epochs=5)  # few, so that none is memorised
        found.append(part[model(images[part]).argmax(1) != labels[part]])
    return torch.cat(found)


def main() -> None:
    torch.manual_seed(0)
    data, everything = TensorDataset(*digits()), torch.arange(len(digits()[1]))
    model = trained(data, everything)
    before = copy.deepcopy(model)
    found = suspects(data)
    print(f"found: {len(found)} suspects, {int((found < WRONG).sum())} of the {WRONG} wrong labels among them")
    forget = DataLoader(Subset(data, found.tolist()), batch_size=64)
    others = everything[~torch.isin(everything, found)].tolist()
    retain = DataLoader(Subset(data, others), batch_size=64, shuffle=True)
    result = delfast.unlearn(model, forget=forget, retain=retain, init=network, seed=1, epochs=10, lr=0.05)

    report(before, model, result.mask)


if __name__ == "__main__":
    main()
