"""Scores of how critical every parameter is to the forget set. Many masks can be selected from the same scores."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import numpy
import torch
from torch import Tensor

from delfast._version import __version__
from delfast.arguments import check_choice
from delfast.errors import InputError
from delfast.localization.criteria import (
    Aggregate,
    Criterion,
    Granularity,
    Policy,
    check_selection,
    resolve_top_h,
)
from delfast.localization.selection import Selection
from delfast.mask import Mask
from delfast.ops.layout import channels_first, pack, packed_bytes, row_length, unit_count
from delfast.parameter_mask import ParameterMask
from delfast.plain import unboxed
from delfast.processes import Processes
from delfast.sharding import version_of

DIFFERENT_MASKS = (
    "expected the same mask on every process, got different ones; call with the same arguments everywhere, on models "
    "with the same parameters (DistributedDataParallel broadcasts them from rank 0)"
)


class Scores:
    """The live parameters θ and their mean gradient G, which ``score`` returns.

    A scored parameter must not change in place before ``select``. Changes are found by autograd's version counters,
    which do not count assignments through ``.data``. A copy by ``copy.deepcopy`` or ``pickle`` has its own θ.

    Parameters
    ----------
    parameters : mapping of str to Tensor
        Parameter name -> the model's own tensor.
    gradients : mapping of str to Tensor, or None
        The same names -> G in the parameter's shape, float32 (float64 for float64 parameters). With ``per_example`` the
        mean of ``|g(x)|``, or of g(x)² for the criterion "squared_grad". None for criteria without a gradient.
    criterion : str
        The criterion; see ``score``.
    examples : int
        The number of examples, ``|S|``.
    seed : int, default 0
        The seed of the criterion "random".
    per_example : bool, default False
        Whether ``gradients`` are means over the examples' own gradients.
    units : mapping of str to Tensor, or None, default None
        The scores of units for a criterion that scores no elements: float32 (units,). Missing parameters score 0.
    dims : mapping of str to int, or None, default None
        The dimension of a parameter's channels where it is not 0; see ``register_layer``.
    precision : str, default "fp32"
        The precision of the forward passes: "fp32", "bf16", or "fp16" under a caller's autocast.
    patterns : mapping of str to list of str, or None, default None
        The patterns "include" and "exclude" of names by which ``parameters`` were chosen, for the mask's metadata.
    processes : Processes or None, default None
        The processes that computed G together. None: this process alone.

    Examples
    --------
    >>> import torch, delfast
    >>> scores = delfast.score(torch.nn.Linear(8, 3), criterion="weight")
    >>> list(scores.parameters)
    ['weight', 'bias']
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        criterion: Criterion,
        examples: int,
        seed: int = 0,
        per_example: bool = False,
        units: Mapping[str, Tensor] | None = None,
        dims: Mapping[str, int] | None = None,
        precision: str = "fp32",
        patterns: Mapping[str, list[str]] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        self.gradients = None if gradients is None else dict(gradients)
        self.criterion = criterion
        self.examples = examples
        self.seed = unboxed(seed)
        self.per_example = unboxed(per_example)
        self.units = units
        self.dims = dict(dims or {})
        self.precision = precision
        self.patterns = dict(patterns or {})
        self.total = sum(parameter.numel() for parameter in parameters.values())
        self._processes = processes
        self._versions = [version_of(parameter) for parameter in self.parameters.values()]

    def __getstate__(self) -> dict[str, Any]:
        # the version counter of a copied tensor starts at 0: keep only whether θ has changed
        changed = [-1 if t._version != v else 0 for t, v in zip(self.parameters.values(), self._versions, strict=True)]
        return {**self.__dict__, "_versions": changed, "_processes": None}  # a copy selects on its process alone

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        kept = zip(self.parameters.values(), self._versions, strict=True)
        self._versions = [t._version if changed == 0 else changed for t, changed in kept]

    def select(
        self,
        budget: float,
        granularity: Granularity = "channel",
        aggregate: Aggregate = "topk_mean",
        top_h: int | float | Literal["published"] = 0.1,
        policy: Policy = "whole",
    ) -> Mask:
        """Select the most critical channels or elements within a budget.

        Parameters
        ----------
        budget : float
            The fraction of the competing parameters' P elements, in (0, 1].
        granularity : {"channel", "param"}, default "channel"
            "channel": the slices along dim 0 of a parameter with ndim > 1 are one unit each; elements of other
            parameters are units of their own. "param": every element is a unit; ``aggregate``, ``top_h`` and ``policy``
            have no effect.
        aggregate : {"topk_mean", "mean", "sum", "max"}, default "topk_mean"
            A channel's score from its elements' scores. "topk_mean" is the mean of the h largest [1]_.
        top_h : int, float or "published", default 0.1
            The number h of elements: a count, a fraction of the channel's in (0, 1] (rounded down), or "published"
            for int(0.1 C_out), as in the authors' code. Clipped to [1, elements of a channel].
        policy : {"whole", "exact"}, default "whole"
            "whole": the longest prefix of the channels, in falling score, of at most budget × P parameters. A smaller
            budget's mask lies inside a larger budget's. "exact": int(budget × P) elements, the last channel cut, as in
            the authors' code.

        Returns
        -------
        Mask
            The selected elements. Ties fall to the lower (parameter, index). Of scores that several processes
            computed, those of plain parameters may be selected on one process, those of DTensors on all together.

        Raises
        ------
        InputError
            For arguments out of range, a budget below the first channel (naming the minimum budget), scores that are
            not finite (naming the parameter), parameters that changed since they were scored, and scores that are all
            0, which happens if every gradient of the set is zero.

        Warns
        -----
        UserWarning
            If some selected units score 0. The budget then exceeds what the scores rank.

        References
        ----------
        .. [1] Torkzadehmahani et al., TMLR 2025, arXiv 2412.02432, section 3.

        Examples
        --------
        >>> import torch, delfast
        >>> scores = delfast.score(torch.nn.Linear(8, 4), criterion="weight")
        >>> scores.select(0.5).channels, scores.select(0.5, granularity="param").selected
        (2, 18)
        """
        selection = self.choose(budget, granularity, aggregate, top_h, policy)
        selection.check()
        return selection.mask

    @torch.no_grad()
    def choose(
        self,
        budget: float,
        granularity: Granularity = "channel",
        aggregate: Aggregate = "topk_mean",
        top_h: int | float | Literal["published"] = 0.1,
        policy: Policy = "whole",
        *,
        processes: Processes | None = None,
    ) -> Selection:
        """Select as ``select`` does, without the check that the selected units score above 0.

        processes: those that all select with the same arguments, and compare their masks.
        """
        budget, top_h = unboxed(budget), unboxed(top_h)
        with nullcontext() if processes is None else processes.together():
            check_selection(budget, granularity, aggregate, top_h, policy, criterion=self.criterion)
            if processes is not None:
                arguments = repr((budget, granularity, aggregate, top_h, policy))
                processes.check_same(
                    arguments, "expected the same arguments on every process, got others; pass the same"
                )
            for (name, parameter), version in zip(self.parameters.items(), self._versions, strict=True):
                if version_of(parameter) != version:
                    raise InputError(f"'{name}' has changed since it was scored; call score() again")
            if not self.total:
                raise InputError(
                    "expected a model with parameters that have elements, got empty ones; nothing can be selected"
                )
            budgeted = int(budget * self.total)
            parts, selected, positive = (
                self._select_elements(budgeted)
                if granularity == "param"
                else self._select_units(budgeted, aggregate, top_h, policy == "exact")
            )
        metadata: dict[str, Any] = {"criterion": self.criterion, "per_example": self.per_example}
        metadata["granularity"] = granularity
        if granularity == "channel":
            metadata |= {"aggregate": aggregate, "top_h": top_h, "policy": policy}
        metadata |= {"budget": budget, "examples": self.examples, "seed": self.seed}
        if self.examples:
            metadata["precision"] = self.precision
        if self._processes is not None and self._processes.data is not None:
            metadata["processes"] = self._processes.size
        metadata |= {**self.patterns, "delfast": __version__, "torch": torch.__version__}
        if processes is not None:
            processes.check_same(_fingerprint(parts), DIFFERENT_MASKS)
        return Selection(Mask(parts, metadata), selected, positive)

    def channel_scores(
        self, aggregate: Aggregate = "topk_mean", top_h: int | float | Literal["published"] = 0.1
    ) -> Tensor:
        """Return the score of every competing unit.

        Parameters
        ----------
        aggregate : {"topk_mean", "mean", "sum", "max"}, default "topk_mean"
            A channel's score from its elements' scores; see ``select``.
        top_h : int, float or "published", default 0.1
            The number of elements for "topk_mean"; see ``select``.

        Returns
        -------
        Tensor
            Shape (units,), in the order of ``parameters`` and of their units. float32, or float64 for models with
            float64 parameters.

        Raises
        ------
        InputError
            For an unknown aggregate, or a ``top_h`` that is neither a count nor a fraction.

        Examples
        --------
        >>> import torch, delfast
        >>> delfast.score(torch.nn.Linear(8, 4), criterion="weight").channel_scores("max").shape
        torch.Size([8])
        """
        check_choice("aggregate", aggregate, Aggregate)
        top_h = unboxed(top_h)
        resolve_top_h(top_h, (1, 1))
        if self.criterion == "random" or self.units is not None:  # scored as units, never aggregated
            return self._join([self._unit_scores(name, count) for name, count in self._counts.items()])
        dims = {name: self.dims.get(name, 0) for name in self.parameters}
        values, gradients = (
            [channels_first(tensors[name], dim) for name, dim in dims.items()] if tensors is not None else []
            for tensors in (self.parameters, self.gradients)
        )
        counts = [resolve_top_h(top_h, self.parameters[name].shape, dim) for name, dim in dims.items()]
        result: Tensor = torch.ops.delfast.criticality(values, gradients, self._op_criterion, aggregate, counts)
        return result

    @property
    def _counts(self) -> dict[str, int]:
        """Parameter name -> number of units."""
        return {name: unit_count(p.shape, self.dims.get(name, 0)) for name, p in self.parameters.items()}

    def _select_elements(self, k: int) -> tuple[dict[str, ParameterMask], int, int]:
        """Return the masks, the number of selected elements, and how many of these score above 0."""
        if k == 0:
            raise self._too_small(1, "parameter")
        values, gradients, criterion = (
            list(self.parameters.values()),
            self._gradient_list(),
            self._op_criterion,
        )
        if self.criterion == "random":
            values = [self._uniform(name, t.numel()).view(t.shape) for name, t in self.parameters.items()]
            gradients, criterion = [], "weight"
        bits, info = torch.ops.delfast.select_elements(values, gradients, criterion, k)
        pieces = torch.split(bits, [packed_bytes(t.numel()) for t in self.parameters.values()])
        nonfinite, positive = info.tolist()
        if nonfinite >= 0:
            self._refuse_nonfinite(list(self.parameters)[nonfinite])
        parts = {
            name: ParameterMask(tuple(t.shape), "row" if t.ndim <= 1 else "element", part, self.dims.get(name, 0))
            for (name, t), part in zip(self.parameters.items(), pieces, strict=True)
        }
        return parts, k, k if self.criterion == "random" else positive

    def _select_units(
        self, budgeted: int, aggregate: Aggregate, top_h: int | float | Literal["published"], cut_last: bool
    ) -> tuple[dict[str, ParameterMask], int, int]:
        """Return the masks, the number of selected units including a cut one, and how many of these score above 0."""
        scores = self.channel_scores(aggregate, top_h)
        counts = list(self._counts.values())
        lengths = [row_length(p.shape, self.dims.get(name, 0)) for name, p in self.parameters.items()]
        bits, info = torch.ops.delfast.select_units(scores, counts, lengths, budgeted, cut_last)
        cut_unit, cut_size, nonfinite, selected, positive = info.tolist()
        if nonfinite >= 0:
            self._refuse_nonfinite(self._owner(nonfinite, counts)[0])
        selected += cut_unit >= 0
        if not selected and bool((scores > 0).any()):
            name, _ = self._owner(int(scores.argmax()), counts)
            raise self._too_small(
                1 if cut_last else row_length(self.parameters[name].shape, self.dims.get(name, 0)), "channel"
            )
        parts = {
            name: ParameterMask(tuple(t.shape), "row", part, self.dims.get(name, 0))
            for (name, t), part in zip(
                self.parameters.items(), torch.split(bits, [packed_bytes(count) for count in counts]), strict=True
            )
        }
        if cut_unit >= 0:  # a part of the last channel: only its parameter needs a bit per element
            name, row = self._owner(cut_unit, counts)
            flags = parts[name].dense()
            cut = channels_first(flags, self.dims.get(name, 0))[row]
            cut.copy_((torch.arange(cut.numel(), device=cut.device) < cut_size).view(cut.shape))
            parts[name] = replace(parts[name], unit="element", bits=pack(flags))
        return parts, selected, selected if self.criterion == "random" else positive

    @property
    def _op_criterion(self) -> str:
        return "grad" if self.criterion == "squared_grad" else self.criterion

    def _gradient_list(self) -> list[Tensor]:
        return [] if self.gradients is None else [self.gradients[name] for name in self.parameters]

    def _join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32)

    def _unit_scores(self, name: str, count: int) -> Tensor:
        """Return the scores of units, float32 (count,), for a criterion that scores no elements."""
        if self.units is None:
            return self._uniform(name, count)
        device = self.parameters[name].device
        if name in self.units:
            return self.units[name].to(device)
        return torch.zeros(count, dtype=torch.float32, device=device)

    def _uniform(self, name: str, count: int) -> Tensor:
        """Draw float32 (count,) in [0, 1) by numpy's counter-based Philox, keyed by (seed, parameter name)."""
        # with a dtype: numpy makes a list of ints above 2**63 a float64 array
        key = numpy.array([self.seed, zlib.crc32(name.encode())], dtype=numpy.uint64)
        generator = numpy.random.Generator(numpy.random.Philox(key=key))
        return torch.from_numpy(generator.random(count, dtype=numpy.float32)).to(self.parameters[name].device)

    def _owner(self, unit: int, counts: list[int]) -> tuple[str, int]:
        """Return the name of a unit's parameter, and its number there."""
        for name, count in zip(self.parameters, counts, strict=True):
            if unit < count:
                return name, unit
            unit -= count
        raise IndexError(unit)

    def _too_small(self, minimum: int, what: str) -> InputError:
        """Return the error for a budget that holds no unit. It names the minimum budget, rounded up."""
        digits = 6
        while int(float(f"{minimum / self.total:.{digits}g}") * self.total) < minimum and digits < 17:
            digits += 1
        return InputError(
            f"expected a budget that holds the first {what}, at least {minimum / self.total:.{digits}g} "
            f"({minimum} of {self.total} elements), got less; raise the budget"
        )

    def _refuse_nonfinite(self, name: str) -> None:
        raise InputError(
            f"expected finite scores, got NaN or infinity for '{name}'; check the loss, the gradients and the weights "
            "of this parameter"
        )


def _fingerprint(parts: Mapping[str, ParameterMask]) -> bytes:
    """Return a digest of a mask's packed bits, without the dense bits of ``Mask.digest``."""
    total = hashlib.sha256()
    for name, part in parts.items():
        total.update(f"{name} {part.shape} {part.unit} {part.dim}".encode() + b"\0")
        total.update(part.bits.cpu().numpy().tobytes())
    return total.digest()
