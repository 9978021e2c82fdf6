"""Layers, masks, and the gradients of dense-then-masked training that compact training must have."""

import copy

import torch
from torch import nn
from torch.nn import functional

from delfast.mask import Mask

LAYERS = {
    "linear": (lambda: nn.Linear(6, 40), (5, 6)),
    "linear, tokens": (lambda: nn.Linear(6, 40), (5, 3, 6)),
    "linear, tokens, no bias": (lambda: nn.Linear(6, 40, bias=False), (5, 3, 2, 6)),
    "linear, one example": (lambda: nn.Linear(6, 40), (6,)),
    "conv1d": (lambda: nn.Conv1d(4, 40, 3, padding=1), (3, 4, 9)),
    "conv1d, same": (lambda: nn.Conv1d(4, 40, 4, padding="same", dilation=2), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 40, 3, padding=1), (4, 3, 8, 8)),
    "conv2d, unbatched": (lambda: nn.Conv2d(3, 40, 3), (3, 8, 8)),
    "conv2d, strided": (lambda: nn.Conv2d(3, 40, (3, 5), stride=(2, 3), padding=(1, 2), dilation=2), (4, 3, 12, 15)),
    "conv2d, reflect": (lambda: nn.Conv2d(3, 40, 3, padding=2, padding_mode="reflect"), (4, 3, 8, 8)),
    "conv2d, circular": (lambda: nn.Conv2d(3, 40, 3, padding=1, padding_mode="circular", bias=False), (4, 3, 8, 8)),
    "conv2d, valid": (lambda: nn.Conv2d(3, 40, 3, padding="valid"), (4, 3, 8, 8)),
    "grouped": (lambda: nn.Conv2d(12, 24, 3, groups=4), (4, 12, 6, 6)),
    "grouped, strided": (lambda: nn.Conv2d(12, 24, 3, groups=3, stride=2, padding=1), (4, 12, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(24, 24, 3, groups=24, padding=1), (4, 24, 6, 6)),
    "depthwise, multiplied": (lambda: nn.Conv2d(12, 24, 3, groups=12, stride=2), (4, 12, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 40, (2, 3, 3), stride=(1, 2, 1)), (2, 2, 4, 6, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(40, 3, 4, stride=2), (3, 40, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(40, 6, 3, stride=2, padding=1, output_padding=1), (2, 40, 5, 5)),
    "transposed2d, grouped": (lambda: nn.ConvTranspose2d(24, 12, 3, stride=2, groups=4, dilation=2), (2, 24, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(40, 2, 2, stride=(1, 2, 1)), (2, 40, 3, 3, 3)),
}


def row_mask(model, fraction, seed=0):
    """Return a mask of some rows of every weight, and some elements of every vector."""
    generator = torch.Generator().manual_seed(seed)
    dense = {}
    for name, parameter in model.named_parameters():
        units = parameter.shape[0]
        chosen = torch.randperm(units, generator=generator)[: max(1, int(fraction * units))]
        flags = torch.zeros(units, dtype=torch.bool).index_fill_(0, chosen, True)
        dense[name] = flags.reshape(-1, *[1] * (parameter.ndim - 1)).expand(parameter.shape)
    return Mask.from_dense(dense)


def dense_then_masked(model, mask, loss):
    """Return name -> gradient of the selected rows or elements, from a plain model."""
    reference = copy.deepcopy(model)
    loss(reference).backward()
    return {
        name: selected_part(parameter.grad, mask.parameters[name])
        for name, parameter in reference.named_parameters()
        if parameter.grad is not None and mask.parameters[name].selected
    }


def compact_gradients(handle):
    """Return the same gradients from a compact model."""
    parameters = dict(handle.model.named_parameters())
    found = {}
    for name, mode in handle.modes.items():
        gradient = parameters[name.replace("weight", "weight_rows") if mode == "rows" else name].grad
        if gradient is not None and mode != "frozen":
            found[name] = gradient if mode == "rows" else selected_part(gradient, handle.original_mask.parameters[name])
    return {name: gradient.clone() for name, gradient in found.items()}


def selected_part(gradient, part):
    return gradient[part.flags] if part.by_row else gradient[part.dense()]


def assert_close(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm(), name


def expected_gradients(model, mask, loss):
    """Return dense gradients, masked, by the names of the compact model."""
    reference = copy.deepcopy(model)
    loss(reference).backward()
    found = {}
    for name, parameter in reference.named_parameters():
        part = mask.parameters.get(name)
        if parameter.grad is None or part is None or not part.selected:
            continue
        if part.by_row and part.selected < part.numel and name != "head.weight":  # the head's weight is tied
            found[name.replace("weight", "weight_rows")] = parameter.grad[part.flags]
        else:
            found[name] = torch.where(part.dense(), parameter.grad, 0)
    return found


def close(gradients, expected, tolerance=1e-12):
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm().clamp_min(1e-300), name


def gradients_of(handle):
    return {name: parameter.grad for name, parameter in handle.named_parameters()}


class Net(nn.Module):
    """Norms, in-place activations straight after a convolution, groups, a layer called twice, a tied head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(inplace=True))
        self.depthwise = nn.Conv2d(20, 20, 3, padding=1, groups=20, bias=False)
        self.norm = nn.BatchNorm2d(20)
        self.twice = nn.Conv2d(20, 20, 1)
        self.mix = nn.Linear(20, 24)
        self.head = nn.Linear(24, 5)
        self.tied = nn.Linear(24, 5)
        self.tied.weight = self.head.weight

    def forward(self, x):
        x = functional.relu(self.norm(self.depthwise(self.stem(x))))
        x = self.twice(functional.relu(self.twice(x)))
        x = functional.gelu(self.mix(x.mean((2, 3))))
        return self.head(x) + self.tied(x)


def cross_entropy(data, dtype=torch.float32):
    return lambda model: functional.cross_entropy(model(data[0].to(dtype)), data[1])


def all_but(mask, before, model):
    """Return the number of state elements that changed outside the mask, and whether any changed inside."""
    outside, inside, state = 0, False, model.state_dict()
    for name, value in before.items():
        changed = state[name].view(torch.int32) != value.view(torch.int32)
        part = mask.parameters.get(name)
        chosen = part.dense() if part is not None else torch.zeros_like(changed)
        outside += int(changed[~chosen].sum())
        inside = inside or bool(changed[chosen].any())
    return outside, inside


def step(net, data, optimizer):
    optimizer.zero_grad()
    cross_entropy(data)(net).backward()
    optimizer.step()
