"""Networks that several tests share; each lays out, shares or changes its tensors in its own way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class InPlace(nn.Module):
    """In-place operations on what layers wrote, the first layer's included, views among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.tokens, self.head = nn.BatchNorm2d(4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x), inplace=True)
        out = self.norm(self.second(x))
        out += x
        out += self.shift
        out = functional.relu(out, inplace=True)
        out = self.tokens(out.flatten(2).transpose(1, 2))  # what Linear returns here is a view
        out[:, ::2].mul_(2.0)
        out = out.view(len(out), -1, 2, 4).add_(1).relu_()
        return self.head(out.flatten(1, 2)).mean(dim=1)


class Shared(nn.Module):
    """A layer called twice, a layer on different shapes, weights tied across kinds of layers and to a free use."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.twice = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.twice(self.embedding(tokens))).tanh() * self.scale
        x = self.norm(self.twice(x.mean(dim=1)) + x[:, 0]) * self.scale.exp() + self.bias
        return self.head(functional.linear(x, self.twice.weight.detach(), self.bias))


class Windows(nn.Module):
    """k rows per example, as windowed attention and video have them; and a sequence-first part."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Conv2d(2, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.windows = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.randn(3, 4))
        self.sequence = nn.Linear(4, 5)
        self.sequence_norm = nn.LayerNorm(5)

    def forward(self, video: Tensor) -> Tensor:  # (N, T, 2, 4, 4)
        n, t = video.shape[:2]
        x = self.norm(self.frames(video.flatten(0, 1)))  # (N * T, 4, 2, 2)
        x = self.windows(x.flatten(2).transpose(1, 2).flatten(0, 1)).view(n * t, 4, 4)
        x = x + self.bias.sum(dim=0)
        x = x.view(n, t, 4, 4).mean(dim=2).transpose(0, 1)  # (T, N, 4)
        return self.sequence_norm(self.sequence(x).tanh()).mean(dim=0)


class Attention(nn.Module):
    """``nn.TransformerEncoder``, first in the network and in eval mode, where torch would take a fused path."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[:, 0])


class Checkpointed(nn.Module):
    """Blocks recomputed in the backward pass: a shared layer, one in place, a free parameter, one nested."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.shared = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(6, 4)

    def inner(self, x: Tensor) -> Tensor:
        return self.shared(x).tanh() * self.scale.exp()

    def tail(self, x: Tensor) -> Tensor:
        return self.shared(checkpoint(self.inner, x, use_reentrant=self.reentrant)).relu()

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant)
        x = checkpoint(self.tail, x.mean(dim=(2, 3)), use_reentrant=self.reentrant)
        return self.head(x)


class Odd(nn.Module):
    """Uses that no rule covers: an LSTM, a weight that is computed, a parameter inside an autograd.Function."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 5, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
        self.inside = nn.Parameter(torch.randn(5))
        self.unused = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Scale.apply(self.normed(self.rnn(x)[0][:, -1]).tanh(), self.inside))


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grads[0] * w, (grads[0] * x).sum(0) if ctx.needs_input_grad[1] else None


class Interleaved(nn.Module):
    """Examples without an axis that a trial can find: a permutation of all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, 4)
        order = torch.arange(len(x) * x.shape[1]).view(2, -1).t().flatten()
        y = self.mixed(x.flatten(0, 1)[order])
        return self.head(y[order.argsort()].view(x.shape).tanh().mean(dim=1))


class DeadAtFirst(nn.Module):
    """A layer whose δ is zero for the examples of the trial, and not for later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.layer(x)[:, :3] * (x[:, :1] > 0)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(6, 5, num_layers=2, dropout=0.5, bidirectional=True, batch_first=True)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(0.5)
        self.hidden = nn.Linear(10, 10)
        self.head = nn.Linear(10, 3)
        self.modes: list[tuple[bool, bool, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append((self.rnn.training, self.dropout.training, self.rnn.dropout))
        return self.head(self.hidden(self.dropout(self.rnn(x)[0][:, -1])).relu())


class Tokens(nn.Module):
    """Classifies tokens (N, T), whose mask has the same shape and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).mean(1))
