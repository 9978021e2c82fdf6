"""Scores of parameters that several processes hold together. Every process selects the mask of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from delfast.arguments import check_choice
from delfast.errors import InputError
from delfast.localization.criteria import Aggregate, resolve_top_h
from delfast.localization.scores import Scores
from delfast.localization.selection import Selection
from delfast.ops.layout import channels_first, pack
from delfast.ops.reference.criticality import element_scores
from delfast.parameter_mask import ParameterMask
from delfast.plain import unboxed
from delfast.processes import Processes
from delfast.sharding import dtensor_like, indices_of, local_part, part_of, rows_of, with_whole_rows

DIGIT_BITS = 11  # of a key, that are ranked in one exchange of a histogram


class ShardedScores(Scores):
    """``Scores`` of DTensors. ``gradients`` are the parts of G that this process holds.

    ``channel_scores``, ``select`` and ``choose`` are called by all processes together.
    """

    _processes: Processes

    def __getstate__(self) -> dict[str, Any]:
        raise InputError(
            "expected scores of whole parameters to copy, got those of DTensors, whose parts several processes hold; "
            "copy the masks that they select"
        )

    def channel_scores(
        self, aggregate: Aggregate = "topk_mean", top_h: int | float | Literal["published"] = 0.1
    ) -> Tensor:
        """Return the score of every competing unit, of the whole model, on every process; see ``Scores``."""
        with self._processes.together():
            check_choice("aggregate", aggregate, Aggregate)
            top_h = unboxed(top_h)
            resolve_top_h(top_h, (1, 1))
        if self.criterion == "random" or self.units is not None:
            return super().channel_scores(aggregate, top_h)
        rows, values, gradients, counts = [], [], [], []
        start = 0
        for name, parameter in self.parameters.items():
            dim, units = self.dims.get(name, 0), self._counts[name]
            whole = with_whole_rows(parameter, dim)
            values.append(channels_first(local_part(whole), dim))
            if self.gradients is not None:
                gradient = dtensor_like(self.gradients[name], parameter)
                gradients.append(channels_first(local_part(with_whole_rows(gradient, dim)), dim))
            counts.append(resolve_top_h(top_h, parameter.shape, dim))
            numbers = torch.arange(start, start + units, device=values[-1].device)
            rows.append(rows_of(numbers, whole, dim) if parameter.ndim and units else numbers)
            start += units
        scores = torch.ops.delfast.criticality(values, gradients, self._op_criterion, aggregate, counts)
        result = torch.zeros(start, dtype=scores.dtype, device=scores.device)
        result[torch.cat(rows)] = scores
        # scores are at least 0: their maximum is exact, whoever holds a row, and however many hold it
        return self._processes.maximum(result.nan_to_num_(nan=torch.inf, posinf=torch.inf))

    def choose(self, *arguments: Any, processes: Processes | None = None, **settings: Any) -> Selection:
        """Select on all processes together; see ``Scores``."""
        return super().choose(*arguments, **settings, processes=self._processes)

    def _select_elements(self, k: int) -> tuple[dict[str, ParameterMask], int, int]:
        if k == 0:
            raise self._too_small(1, "parameter")
        names = list(self.parameters)
        device = next(iter(self.parameters.values())).device
        bad = torch.tensor([not bool(self._elements(n).isfinite().all()) for n in names], dtype=torch.uint8)
        bad = self._processes.maximum(bad.to(device))
        if bool(bad.any()):
            self._refuse_nonfinite(names[int(bad.nonzero()[0])])
        held = [name for name in names if self._processes.is_first(self.parameters[name])]  # counted here, once in all
        key_bits = 63 if self._dtype == torch.float64 else 31
        lowest, ties = self._kth_largest(lambda: (self._keys(name) for name in held), key_bits, k, device)
        # of the elements that score lowest among the selected, the first ones are selected
        counts = [int((self._keys(name) == lowest).sum()) if name in held else 0 for name in names]
        tied_in = torch.tensor(counts, dtype=torch.int64, device=device)
        self._processes.total(tied_in)
        bits, left = [], ties
        for name, tied in zip(names, tied_in.tolist(), strict=True):
            parameter = self.parameters[name]
            limit = parameter.numel() if left >= tied else 0
            if 0 < left < tied:
                limit = self._past_the_ties(name, lowest, left, name in held)
            left -= min(left, tied)
            whole = torch.zeros(parameter.shape, dtype=torch.bool, device=device)
            if name in held:
                keys = self._keys(name)
                chosen = (keys > lowest) | ((keys == lowest) & (_flat_indices(parameter) < limit))
                whole[indices_of(parameter)] = chosen.view(local_part(parameter).shape)
            bits.append(pack(whole))
        self._processes.total(*bits)  # a bit is set by one process at most, so no sum of bytes carries
        parts = {
            name: ParameterMask(tuple(p.shape), "row" if p.ndim <= 1 else "element", part, self.dims.get(name, 0))
            for (name, p), part in zip(self.parameters.items(), bits, strict=True)
        }
        return parts, k, k if lowest or self.criterion == "random" else k - ties

    def _past_the_ties(self, name: str, lowest: int, count: int, is_held: bool) -> int:
        """Return the row-major index after the first ``count`` elements of a parameter whose keys are ``lowest``."""
        parameter = self.parameters[name]
        last = parameter.numel() - 1
        tied = last - _flat_indices(parameter)[self._keys(name) == lowest] if is_held else torch.empty(0)
        tied = tied.to(parameter.device, torch.int64)
        largest, _ = self._kth_largest(lambda: iter([tied]), max(1, last.bit_length()), count, parameter.device)
        return last - largest + 1

    def _kth_largest(
        self, keys: Callable[[], Iterator[Tensor]], key_bits: int, k: int, device: torch.device
    ) -> tuple[int, int]:
        """Return the k-th largest key of all processes, and how many of its equals are among the k largest.

        Keys are integers in [0, 2**key_bits). The digits of the result are found from the highest down, each by a
        histogram of the keys that have its higher digits.
        """
        found = 0
        while key_bits:
            width = min(DIGIT_BITS, key_bits)
            key_bits -= width
            histogram = torch.zeros(1 << width, dtype=torch.int64, device=device)
            for part in keys():
                inside = part[part >> width >> key_bits == found]
                histogram += torch.bincount(inside >> key_bits & (1 << width) - 1, minlength=1 << width)
            self._processes.total(histogram)
            above = histogram.flip(0).cumsum(0).flip(0) - histogram  # keys with a higher digit
            digit = int((above < k).nonzero()[0])
            k -= int(above[digit])
            found = found << width | digit
        return found, k

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype in which elements compete."""
        wide = any(parameter.dtype == torch.float64 for parameter in self.parameters.values())
        return torch.float64 if wide and self.criterion != "random" else torch.float32

    def _elements(self, name: str) -> Tensor:
        """Return the scores of the elements of this process's part of a parameter."""
        parameter = self.parameters[name]
        if self.criterion == "random":
            return part_of(self._uniform(name, parameter.numel()).view(parameter.shape), parameter)
        gradient = None if self.gradients is None else self.gradients[name]
        return element_scores(local_part(parameter), gradient, self._op_criterion).to(self._dtype)

    def _keys(self, name: str) -> Tensor:
        """Return integers (n,) that are ordered as the scores of this process's part: the bits of floats >= 0."""
        scores = self._elements(name).reshape(-1)
        return scores.view(torch.int64 if self._dtype == torch.float64 else torch.int32)


def _flat_indices(parameter: Any) -> Tensor:
    """Return the row-major indices, in the whole parameter, of the elements of this process's part: int64 (n,)."""
    flat = torch.zeros((), dtype=torch.int64, device=parameter.device)
    for size, indices in zip(parameter.shape, indices_of(parameter), strict=True):
        flat = flat * size + indices
    return flat.reshape(-1)
