"""A job file for delfast: your network, your data, your training. Replace the functions by your own.

`--job` executes this file as Python code. Modules in its folder can be imported. These names are read:

model(), train_set(), test_set()   required
example_ids()                      an identifier for each training example; without it, the index
load(path), save(model, path)      both or neither; without them, the state dict as safetensors
loss_fn(model, batch)              losses (N,) of a batch; without it, cross-entropy of (input, target)
preprocess(batch)                  applied to each collated batch; without it, nothing is
batch_size, training, accept, settings: below
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

batch_size = 64

# SGD with momentum 0.9; the rate falls by a cosine to 1 % of lr
training = {"epochs": 15, "lr": 0.05, "weight_decay": 0.0}

# `delfast ledger run` accepts an unlearned network if all of these hold; a line that is left out is not required
accept = {
    "test_drop": 2.0,  # percentage points of test accuracy lost since the ledger's first network, at most
    "attack_advantage": 0.25,  # 2 (balanced accuracy - 0.5) of the confidence attack, from 0 to 1, at most
    "relearn_ratio": 1.5,  # odds of a correct answer while learning again, over those of never-seen examples, at most
}

# how `delfast ledger run` unlearns: the first; `--escalate` tries the others in this order
settings = [
    {"method": "del", "budget": 0.3, "epochs": 20, "lr": 0.05},
    {"method": "del", "budget": 0.5, "epochs": 20, "lr": 0.05},
]


def model() -> nn.Module:
    """Return a newly initialized network. It is called often, and must not return the same object twice."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10),
    )


def _digits() -> tuple[Tensor, Tensor]:
    """Return 1,797 images (N, 1, 8, 8) in [0, 1] and their digits (N,), in an order of their own."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    return images[order], torch.from_numpy(digits.target).long()[order]


def train_set() -> TensorDataset:
    """Return a map-style data set of (input, target), the same each time: no random transform."""
    images, targets = _digits()
    return TensorDataset(images[:1400], targets[:1400])


def test_set() -> TensorDataset:
    """Return examples that no network is trained on."""
    images, targets = _digits()
    return TensorDataset(images[1400:], targets[1400:])


def example_ids() -> list[str]:
    """Return identifiers, one for each training example. Requests name examples by them, so they must stay the same."""
    return [f"image-{number:04}" for number in range(1400)]
