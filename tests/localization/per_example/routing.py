"""Networks whose example axis depends on the data, and similar networks whose axis does not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Case = tuple[nn.Module, list[Any]]  # with batches (inputs, targets) or (inputs, mask, targets), cut along dim 0


def losses_of(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(*batch[:-1]), batch[-1], reduction="none")


class Experts(nn.Module):
    """Every token goes through the ``top`` of its experts; ``by``: how its rows get there and back."""

    def __init__(self, experts: int, top: int, by: str, wide: int = 6) -> None:
        super().__init__()
        self.first, self.router, self.head = nn.Linear(wide, wide), nn.Linear(wide, experts), nn.Linear(wide, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(wide, 5), nn.GELU(), nn.Linear(5, wide)) for _ in range(experts)
        )
        self.top, self.by = top, by

    def forward(self, x: Tensor) -> Tensor:  # (N, T, wide)
        tokens = self.first(x).tanh().flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(dim=-1).topk(self.top, dim=-1)
        if self.by == "checkpoint":
            mixed = checkpoint(self.looped, tokens, weights, chosen, use_reentrant=False)
        else:
            mixed = getattr(self, self.by)(tokens, weights, chosen)
        return self.head((tokens + mixed).view(x.shape).mean(dim=1))

    def looped(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, rank = torch.where(chosen == number)
            if len(rows):
                output = output.index_add(0, rows, expert(tokens[rows]) * weights[rows, rank, None])
        return output

    def sorted(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        rows = order // self.top
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        parts = tokens[rows].split(counts)
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(tokens).index_add_(0, rows, outputs * weights.flatten()[order].unsqueeze(1))

    def masked(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            taken = (chosen == number).any(dim=1)
            share = (weights * (chosen == number)).sum(dim=1)
            if taken.any():
                output = output.masked_scatter(taken.unsqueeze(1), expert(tokens[taken])) * share.unsqueeze(1) + output
        return output


def experts(experts: int = 4, top: int = 1, by: str = "looped", n: int = 8, t: int = 3) -> Case:
    batches = [(torch.randn(size, t, 6), torch.randint(0, 3, (size,))) for size in (n, n, n // 2, 1, n)]
    return Experts(experts, top, by), batches


class Packed(nn.Module):
    """Tokens without their padding, in a row; ``by``: how they get there and back."""

    def __init__(self, by: str = "mask") -> None:
        super().__init__()
        self.by = by
        self.embedding, self.layer, self.norm = nn.Embedding(9, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.scale, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        if self.by == "lists":
            lengths = mask.sum(dim=1).tolist()
            packed = torch.cat([row[:length] for row, length in zip(tokens, lengths, strict=True)])
            rows = self.norm(self.layer(self.embedding(packed)).tanh()) * self.scale
            return torch.stack([self.head(part).tanh().sum(dim=0) for part in rows.split(lengths)])
        if self.by == "where":
            where = mask.flatten().nonzero().squeeze(1)
            rows = self.rows(tokens.flatten()[where])
            full = rows.new_zeros(mask.numel(), 3).index_copy(0, where, rows)
            return full.view(*mask.shape, 3).sum(dim=1)
        full = torch.zeros(*mask.shape, 3, dtype=self.scale.dtype)
        full[mask] = self.rows(tokens[mask])
        return full.sum(dim=1)

    def rows(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(self.embedding(tokens)).tanh()) * self.scale).tanh()


def packed(by: str = "mask", n: int = 4, t: int = 5) -> Case:
    batches = []
    for size in (n, n, n, n - 1, 1, n):
        lengths = torch.full((size,), t - 2)
        if batches:  # the first batch has as many tokens of each; the second as many in all
            for _ in range(2):
                i, j = random.sample(range(size), 2) if size > 1 else (0, 0)
                lengths[i] += 1
                lengths[j] -= 1
        mask = torch.arange(t) < lengths.clamp(1, t).unsqueeze(1)
        batches.append((torch.randint(0, 9, (size, t)), mask, torch.randint(0, 3, (size,))))
    return Packed(by), batches


class Shuffled(nn.Module):
    """A layer on reordered examples or tokens; ``by``: the order, and the operation that makes it."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, 4)
        n = len(x)
        if self.by == "tokens":
            return self.head(self.layer(x[:, torch.randperm(x.shape[1])]).tanh().sum(dim=1))
        if self.by == "branch":
            return self.last(self.layer(x.flip(0) if float(x.sum()) > 0 else x), x)
        if self.by == "function":
            order = x.sum(dim=(1, 2)).argsort()
            return self.last(Permute.apply(self.layer(Permute.apply(x, order)), order.argsort()), x)
        if self.by == "parts":  # with the trial's four examples, no other order at all
            inside = (
                self.layer(x.view(4, n // 4, *x.shape[1:]).transpose(0, 1).reshape(x.shape)) if n % 4 == 0 else None
            )
            if inside is None:
                return self.last(self.layer(x), x)
            return self.last(inside.view(n // 4, 4, *x.shape[1:]).transpose(0, 1).reshape(x.shape), x)
        if self.by == "swap":  # in Python alone
            parts = list(x.unbind())
            if float(parts[0].sum()) > float(parts[-1].sum()):
                parts[0], parts[-1] = parts[-1], parts[0]
                inside = list(self.layer(torch.stack(parts)).unbind())
                inside[0], inside[-1] = inside[-1], inside[0]
                return self.last(torch.stack(inside), x)
            return self.last(self.layer(torch.stack(parts)), x)
        order = torch.randperm(n) if self.by == "random" else x.sum(dim=(1, 2)).argsort()
        if self.by == "numpy":
            inside = self.layer(torch.from_numpy(x.numpy()[order.numpy()]))
        elif self.by == "gather":
            index = order.view(-1, 1, 1).expand_as(x)
            return self.last(torch.zeros_like(x).scatter(0, index, self.layer(x.gather(0, index))), x)
        elif self.by == "product":
            matrix = functional.one_hot(order, n).to(x.dtype)
            inside = self.layer(torch.einsum("ij,jtf->itf", matrix, x))
        else:
            inside = self.layer(x[order])
        return self.last(inside[order.argsort()], x)

    def last(self, inside: Tensor, x: Tensor) -> Tensor:
        if self.by == "branch" and float(x.sum()) > 0:
            inside = inside.flip(0)
        return self.head(inside.tanh().mean(dim=1))


class Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.order = order
        return x[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0][ctx.order.argsort()], None


SHUFFLES = ("tokens", "branch", "function", "parts", "swap", "random", "values", "numpy", "gather", "product")


def shuffled(by: str, n: int = 8) -> Case:
    return Shuffled(by), [(torch.randn(size, 3, 4), torch.randint(0, 3, (size,))) for size in (n, n, n // 2, 1, n)]


class Unique(nn.Module):
    """Every token that occurs is computed once, for all examples that have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(40, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        unique, inverse = torch.unique(tokens, return_inverse=True)
        return self.head(self.layer(self.embedding(unique)).tanh()[inverse].mean(dim=1))


def unique(n: int = 8) -> Case:
    first = (torch.arange(n * 2).view(n, 2), torch.randint(0, 3, (n,)))  # two tokens each, in order, none twice
    return Unique(), [first, *((torch.randint(0, 40, (n, 2)), torch.randint(0, 3, (n,))) for _ in range(4))]


def routed(name: str, seed: int) -> Case:
    """Return a case of ROUTED in float64, in eval mode."""
    torch.manual_seed(seed)
    random.seed(seed)
    model, batches = ROUTED[name]()
    return model.double().eval(), [
        tuple(t.double() if t.is_floating_point() else t for t in batch) for batch in batches
    ]


ROUTED: dict[str, Callable[[], Case]] = {
    **{f"experts {by}": lambda by=by: experts(by=by) for by in ("looped", "sorted", "masked", "checkpoint")},
    "experts top 2": lambda: experts(3, 2),
    **{f"packed {by}": lambda by=by: packed(by) for by in ("mask", "lists", "where")},
    **{f"shuffled {by}": lambda by=by: shuffled(by) for by in SHUFFLES},
    "unique": unique,
}


# The examples stay where they are


class Pooled(nn.Module):
    """A transformer that ends with one token of each example: the last one (GPT-2), or that of the highest number
    (CLIP's end of text); ``first`` has the sequence before the examples, as CLIP's own code."""

    def __init__(self, by: str, wide: int = 8) -> None:
        super().__init__()
        self.by = by
        self.embedding, self.positions = nn.Embedding(12, wide), nn.Parameter(torch.randn(16, wide))
        layer = nn.TransformerEncoderLayer(wide, 2, 2 * wide, batch_first=by != "first")
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(wide), nn.Linear(wide, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        n, t = tokens.shape
        x = self.embedding(tokens) + self.positions[:t]
        mask = nn.Transformer.generate_square_subsequent_mask(t, dtype=x.dtype)
        x = self.blocks(x.transpose(0, 1), mask).transpose(0, 1) if self.by == "first" else self.blocks(x, mask)
        if self.by == "last":
            picked = (torch.arange(t) * (tokens != 0)).argmax(dim=-1)
            return self.head(self.norm(x))[torch.arange(n), picked]
        return self.head(self.norm(x)[torch.arange(n), tokens.argmax(dim=-1)])


def pooled(by: str, n: int = 8, t: int = 8) -> Case:
    batches = []
    for size, length in ((n, t), (n, t), (n // 2, t), (1, t), (n, t - 2), (n, t)):
        tokens = torch.randint(1, 11, (size, length))
        end = torch.randint(1, length, (size, 1))
        tokens = torch.where(torch.arange(length) > end, 0, tokens).scatter(1, end, 11)
        batches.append((tokens, torch.randint(0, 3, (size,))))
    return Pooled(by), batches
