"""Whether δ is where it is taken to be: a second backward pass, in which every example's loss has a weight of its own.

δ is linear in the losses. With weights ω, an entry of example n's δ is multiplied by ω_n; an entry that belongs to
another example, or to several, is multiplied by something else.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

import torch
from torch import Tensor

from delfast.localize.per_example.contributions import widened
from delfast.localize.per_example.layers import Place

EXPONENTS = 16  # the weights are spread over 2^16; 2^8 where float16, of small range, is computed with
EXPONENTS_FLOAT16 = 8


class Comparison:
    """``keep`` what arrives in the pass of Σ ω_n ℓ_n, then ``compare`` what arrives at the same taps in that of Σ ℓ_n.

    Kept is Σ |δ| along the longest dim that has no examples, so that memory is a small part of the activations'.
    losses: (N,). dtypes: those that the layers compute in; they decide how much rounding may do. number: of the batch,
    which the order of the weights depends on.
    """

    def __init__(self, losses: Tensor, dtypes: Iterable[torch.dtype], number: int) -> None:
        dtypes = {losses.dtype, *dtypes}
        exponents = EXPONENTS_FLOAT16 if torch.float16 in dtypes else EXPONENTS
        self.weights = spread(losses.numel(), exponents, number).to(losses.device, losses.dtype)
        self.tolerance = tolerance(dtypes, losses.device)
        # where dtypes run out of exponents, rounding is no longer relative
        self._least = max(_least(dtype) for dtype in dtypes) * 2**EXPONENTS
        self._kept: dict[Hashable, tuple[int | None, Tensor]] = {}  # by tap: the dim of the sum, and it
        self._wrong: dict[str, Tensor] = {}

    def keep(self, key: Hashable, deltas: Tensor, places: Mapping[str, Place]) -> None:
        """The first pass has come by the tap ``key``; ``places``: of each parameter whose δ this is."""
        if places:
            taken = {place.order.dim for place in places.values()}
            free = (dim for dim in range(deltas.ndim) if dim not in taken)
            longest = max(free, key=lambda dim: deltas.shape[dim], default=None)
            self._kept[key] = (longest, _sums(deltas, longest))

    def compare(self, key: Hashable, deltas: Tensor, places: Mapping[str, Place]) -> None:
        """The second pass has come by the tap ``key``."""
        if not places:
            return
        dim, weighted = self._kept.pop(key)
        sums = _sums(deltas, dim)
        found: dict[Place, Tensor] = {}
        for name, place in places.items():
            if place not in found:
                own = place.split(sums).flatten(1)
                expected = own * self.weights.to(own.dtype).unsqueeze(1)
                most = self.tolerance * expected.amax(dim=1, keepdim=True) + self._least * deltas.numel() / sums.numel()
                # NaN fits nowhere
                found[place] = ~((place.split(weighted).flatten(1) - expected).abs() <= most).all()
            wrong = self._wrong.get(name)
            self._wrong[name] = found[place] if wrong is None else wrong | found[place].to(wrong.device)

    def wrong(self) -> list[str]:
        """The parameters of which some δ belongs to another example than it was taken for."""
        if not self._wrong:
            return []
        device = self.weights.device
        flags = torch.stack([flag.to(device) for flag in self._wrong.values()]).tolist()
        return [name for name, flag in zip(self._wrong, flags, strict=True) if flag]


def spread(count: int, exponents: int, seed: int) -> Tensor:
    """(count,) weights, float64: evenly over 2^±exponents/2 in their logarithm, in an order that depends on the seed.

    Up to exponents + 1 of them are powers of 2, by which multiplying rounds nothing.
    """
    steps = [i * exponents / max(1, count - 1) for i in range(count)]
    if count <= exponents + 1:
        steps = [i * exponents // max(1, count - 1) for i in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return torch.tensor([2.0 ** (step - exponents / 2) for step in steps], dtype=torch.float64)[order]


def tolerance(dtypes: Iterable[torch.dtype], device: torch.device) -> float:
    """By how much of the largest one of the example's entries may differ by rounding."""
    epsilon = max(_epsilon(dtype, device) for dtype in dtypes)
    return epsilon * (16 if epsilon > 2**-12 else 1024)


def _epsilon(dtype: torch.dtype, device: torch.device) -> float:
    epsilon = torch.finfo(dtype).eps
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
        return 2**-7  # multiplies in bfloat16
    if dtype == torch.float32 and (device.type != "cpu" or torch.get_float32_matmul_precision() == "high"):
        return 2**-10  # in TF32, which cuDNN does unasked
    return epsilon


def _least(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny


def _sums(deltas: Tensor, dim: int | None) -> Tensor:
    """Σ |δ| along ``dim``, which stays as one of size 1; |δ| itself without."""
    deltas = widened(deltas)
    return deltas.abs() if dim is None else torch.linalg.vector_norm(deltas, 1, dim=dim, keepdim=True)
