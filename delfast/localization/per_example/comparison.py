"""Check that each element of δ belongs to the example it is assigned to, by backward passes of weighted losses.

δ is linear in the losses. If example n's loss has the weight ω_n, an element of its δ is multiplied by ω_n. An element
that belongs to another example, or to several examples, is multiplied by another factor. The weights are powers of 2,
which cause no rounding.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

import torch
from torch import Tensor

from delfast.localization.per_example.layers import BatchAxis

EXPONENTS = 128  # weights of 2^-64 to 2^64; 2^-4 to 2^4 for float16, whose range is small
EXPONENTS_FLOAT16 = 8
MAX_STEP = 8  # exponents between two weights, with few examples


class Comparison:
    """The comparison of δ in weighted passes with δ in the pass of Σ ℓ_n.

    Run the pass of Σ ω_n ℓ_n for each of ``weights`` and ``keep`` the δ of every tap. Then run the pass of Σ ℓ_n and
    ``compare`` the δ of the same taps. ``weights`` are vectors (N,), several if there are more examples than powers of
    2, so that no two examples have equal weights in all of them. To save memory, Σ |δ| along the longest dim without
    examples is kept.

    dtypes: the dtypes that the layers compute in; the tolerance depends on them.
    number: the number of the batch, which decides the order of the weights.
    """

    def __init__(self, losses: Tensor, dtypes: Iterable[torch.dtype], number: int) -> None:
        dtypes = {losses.dtype, *dtypes}
        exponents = EXPONENTS_FLOAT16 if torch.float16 in dtypes else EXPONENTS
        self.weights = [w.to(losses.device) for w in spread(losses.numel(), exponents, number)]
        self.tolerance = tolerance(dtypes, losses.device)
        # rounding below the minimum exponent is not relative; layers in front may amplify it
        self._smallest = max(_smallest(dtype) for dtype in dtypes) * 2**16
        self._kept: dict[
            Hashable, tuple[int | None, list[Tensor]]
        ] = {}  # tap -> the summed dim, and the sums of each pass
        self._wrong: dict[str, Tensor] = {}

    def keep(self, key: Hashable, output_grad: Tensor, axes: Mapping[str, BatchAxis]) -> None:
        """Keep the δ of the tap ``key`` in a weighted pass. ``axes``: the example axis of each of its parameters."""
        if not axes:
            return
        if key not in self._kept:
            taken = {axis.along.dim for axis in axes.values()}
            free = (dim for dim in range(output_grad.ndim) if dim not in taken)
            self._kept[key] = (max(free, key=lambda dim: output_grad.shape[dim], default=None), [])
        dim, kept = self._kept[key]
        kept.append(_sums(output_grad, dim))

    def compare(self, key: Hashable, output_grad: Tensor, axes: Mapping[str, BatchAxis]) -> None:
        """Compare the δ of the tap ``key`` in the last pass with those kept."""
        if not axes:
            return
        dim, kept = self._kept.pop(key)
        sums = _sums(output_grad, dim)
        minimum = self._smallest * output_grad.numel() / sums.numel()
        found: dict[BatchAxis, Tensor] = {}
        for name, axis in axes.items():
            if axis not in found:
                found[axis] = torch.stack(
                    [self._differs(sums, *pair, axis, minimum) for pair in self._pairs(kept)]
                ).any()
            wrong = self._wrong.get(name)
            self._wrong[name] = found[axis] if wrong is None else wrong | found[axis].to(wrong.device)

    def _pairs(self, kept: list[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        return zip(self.weights, kept, strict=True)

    def _differs(self, sums: Tensor, weights: Tensor, weighted: Tensor, axis: BatchAxis, minimum: float) -> Tensor:
        own = axis.split(sums).flatten(1)
        expected = own * weights.to(own.device, own.dtype).unsqueeze(1)
        limit = self.tolerance * expected.amax(dim=1, keepdim=True) + minimum
        return ~((axis.split(weighted).flatten(1) - expected).abs() <= limit).all()  # NaN counts as different

    def wrong(self) -> list[str]:
        """Return the parameters with some δ that was assigned to the wrong example."""
        if not self._wrong:
            return []
        device = self.weights[0].device
        flags = torch.stack([flag.to(device) for flag in self._wrong.values()]).tolist()
        return [name for name, flag in zip(self._wrong, flags, strict=True) if flag]


def spread(count: int, exponents: int, seed: int) -> list[Tensor]:
    """Return float64 vectors (count,) of weights, within 2^±exponents/2.

    The exponents of 2 are the digits of 0 to count - 1, in an order that depends on the seed.
    """
    digits = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    base, vectors = exponents + 1, []
    while True:
        digit = digits % base
        max_digit = max(1, min(count, base) - 1)
        step = min(MAX_STEP, exponents // max_digit)
        vectors.append(torch.exp2((digit * step - max_digit * step // 2).double()))
        digits = digits // base
        if not bool(digits.any()):
            return vectors


def tolerance(dtypes: Iterable[torch.dtype], device: torch.device) -> float:
    """Return the tolerance relative to the largest element of an example, for kernels that add in any order."""
    epsilon = max(_epsilon(dtype, device) for dtype in dtypes)
    return epsilon * (16 if epsilon > 2**-12 else 1024)


def _epsilon(dtype: torch.dtype, device: torch.device) -> float:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
        return 2**-7  # multiplication in bfloat16
    if dtype == torch.float32 and (device.type != "cpu" or torch.get_float32_matmul_precision() == "high"):
        return 2**-10  # TF32, which is cuDNN's default
    return torch.finfo(dtype).eps


def _smallest(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny


def _sums(output_grad: Tensor, dim: int | None) -> Tensor:
    """Return Σ |δ| along ``dim``, which keeps size 1, or |δ| if ``dim`` is None."""
    wide = torch.promote_types(output_grad.dtype, torch.float32)
    # not torch.linalg.vector_norm, which is many times slower on a CPU
    return output_grad.abs().to(wide) if dim is None else output_grad.abs().sum(dim=dim, keepdim=True, dtype=wide)
