"""Checks that δ is where it is taken to be, by backward passes in which every example's loss has its own weight.

δ is linear in the losses. With weights ω, an entry of example n's δ is multiplied by ω_n; an entry that belongs to
another example, or to several, is multiplied by something else. The weights are powers of 2, which round nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

import torch
from torch import Tensor

from delfast.localization.per_example.layers import BatchAxis

EXPONENTS = 128  # the weights are 2^-64 to 2^64, and 2^-4 to 2^4 where float16, of small range, is computed with
EXPONENTS_FLOAT16 = 8
MAX_STEP = 8  # exponents between two weights, where there is room


class Comparison:
    """``keep`` what arrives in the pass of Σ ω_n ℓ_n, for each of ``weights``; then ``compare`` what arrives at the
    same taps in that of Σ ℓ_n.

    ``weights``: one vector (N,), or more if there are more examples than powers of 2: no two examples have the same in
    all of them. It keeps Σ |δ| along the longest dim that has no examples: a small part of the activations' memory.
    dtypes: those that the layers compute in; they decide how much rounding may do. number: of the batch, which the
    order of the weights depends on.
    """

    def __init__(self, losses: Tensor, dtypes: Iterable[torch.dtype], number: int) -> None:
        dtypes = {losses.dtype, *dtypes}
        exponents = EXPONENTS_FLOAT16 if torch.float16 in dtypes else EXPONENTS
        self.weights = [w.to(losses.device) for w in spread(losses.numel(), exponents, number)]
        self.tolerance = tolerance(dtypes, losses.device)
        # below the least exponent rounding is not relative; layers in front may enlarge what it does
        self._least = max(_least(dtype) for dtype in dtypes) * 2**16
        self._kept: dict[Hashable, tuple[int | None, list[Tensor]]] = {}  # by tap: the dim of the sums, and they
        self._wrong: dict[str, Tensor] = {}

    def keep(self, key: Hashable, deltas: Tensor, axes: Mapping[str, BatchAxis]) -> None:
        """A weighted pass has come by the tap ``key``. ``places``: of each parameter whose δ this is."""
        if not axes:
            return
        if key not in self._kept:
            taken = {axis.along.dim for axis in axes.values()}
            free = (dim for dim in range(deltas.ndim) if dim not in taken)
            self._kept[key] = (max(free, key=lambda dim: deltas.shape[dim], default=None), [])
        dim, kept = self._kept[key]
        kept.append(_sums(deltas, dim))

    def compare(self, key: Hashable, deltas: Tensor, axes: Mapping[str, BatchAxis]) -> None:
        """The last pass has come by the tap ``key``."""
        if not axes:
            return
        dim, kept = self._kept.pop(key)
        sums = _sums(deltas, dim)
        least = self._least * deltas.numel() / sums.numel()
        found: dict[BatchAxis, Tensor] = {}
        for name, axis in axes.items():
            if axis not in found:
                found[axis] = torch.stack([self._differs(sums, *pair, axis, least) for pair in self._pairs(kept)]).any()
            wrong = self._wrong.get(name)
            self._wrong[name] = found[axis] if wrong is None else wrong | found[axis].to(wrong.device)

    def _pairs(self, kept: list[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        return zip(self.weights, kept, strict=True)

    def _differs(self, sums: Tensor, weights: Tensor, weighted: Tensor, axis: BatchAxis, least: float) -> Tensor:
        own = axis.split(sums).flatten(1)
        expected = own * weights.to(own.device, own.dtype).unsqueeze(1)
        most = self.tolerance * expected.amax(dim=1, keepdim=True) + least
        return ~((axis.split(weighted).flatten(1) - expected).abs() <= most).all()  # NaN is nowhere right

    def wrong(self) -> list[str]:
        """Return the parameters with some δ that was assigned to the wrong example."""
        if not self._wrong:
            return []
        device = self.weights[0].device
        flags = torch.stack([flag.to(device) for flag in self._wrong.values()]).tolist()
        return [name for name, flag in zip(self._wrong, flags, strict=True) if flag]


def spread(count: int, exponents: int, seed: int) -> list[Tensor]:
    """Vectors (count,) of weights, float64: the digits of 0 to count - 1, in an order that depends on the seed, as
    exponents of 2, within 2^±exponents/2."""
    digits = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    base, vectors = exponents + 1, []
    while True:
        digit = digits % base
        most = max(1, min(count, base) - 1)
        step = min(MAX_STEP, exponents // most)
        vectors.append(torch.exp2((digit * step - most * step // 2).double()))
        digits = digits // base
        if not bool(digits.any()):
            return vectors


def tolerance(dtypes: Iterable[torch.dtype], device: torch.device) -> float:
    """By how much of the largest of an example's entries may differ: for kernels that add in any order."""
    epsilon = max(_epsilon(dtype, device) for dtype in dtypes)
    return epsilon * (16 if epsilon > 2**-12 else 1024)


def _epsilon(dtype: torch.dtype, device: torch.device) -> float:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
        return 2**-7  # multiplies in bfloat16
    if dtype == torch.float32 and (device.type != "cpu" or torch.get_float32_matmul_precision() == "high"):
        return 2**-10  # in TF32, which cuDNN does unasked
    return torch.finfo(dtype).eps


def _least(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny


def _sums(deltas: Tensor, dim: int | None) -> Tensor:
    """Σ |δ| along ``dim``, which stays as one of size 1; |δ| itself without."""
    wide = torch.promote_types(deltas.dtype, torch.float32)
    # many times faster than torch.linalg.vector_norm on a CPU
    return deltas.abs().to(wide) if dim is None else deltas.abs().sum(dim=dim, keepdim=True, dtype=wide)
