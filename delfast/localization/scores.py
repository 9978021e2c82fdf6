"""Scores: how critical every parameter is to the forget set; many masks can be selected from one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy
import torch
from torch import Tensor, nn

from delfast._version import __version__
from delfast.arguments import (
    check_count,
    check_flag,
    check_function,
    check_loader,
    check_number,
    check_seed,
    describe,
)
from delfast.batches import LossFn, warn_about_loader
from delfast.errors import InputError, check_choice
from delfast.layer_types import output_dims
from delfast.localization.critical_channels import MOST_CHANNELS, critmem
from delfast.localization.gradient import GradientSums, MeanGradient, add_all
from delfast.localization.per_example import PerExampleGradients
from delfast.localization.selection import Selection, positive_count, positive_left_out
from delfast.mask import Mask, ParameterMask
from delfast.naming import trainable_parameters, unwrap
from delfast.ops.layout import pack, packed_bytes, row_length, unit_count, unpack
from delfast.plain import unboxed

Criterion = Literal["weighted_grad", "grad", "squared_grad", "weight", "random", "critmem", "shallowest", "deepest"]
BY_DEPTH = ("shallowest", "deepest")
WITHOUT_SET = ("weight", "random", *BY_DEPTH)
WITHOUT_MEAN = (*WITHOUT_SET, "critmem")  # no mean over the examples of a gradient, or of what is made of it
CHANNELS_ONLY = ("critmem", *BY_DEPTH)
Granularity = Literal["param", "channel"]
Aggregate = Literal["topk_mean", "mean", "sum", "max"]
Policy = Literal["whole", "exact"]


def score(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    criterion: Criterion = "weighted_grad",
    *,
    per_example: bool = False,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    max_channels: int = MOST_CHANNELS,
) -> Scores:
    """Score every trainable parameter of ``model``.

    criterion: element score c_j (DEL paper, section 3 and table 4), with G the mean gradient over ``loader``:
        "weighted_grad" |θ_j G_j|, DEL's; "grad" |G_j|, SalLoc, the localization of SalUn (Fan et al., ICLR 2024);
        "weight" |θ_j|;
        "random" one uniform per competing unit, keyed by (seed, parameter name, index);
        "shallowest", "deepest" by the parameter's place in the model, the first or the last highest: one parameter
        after the other until the budget is full, the last of them from its first channel on. Channels only;
        "critmem" by how many examples need a channel, at most ``max_channels`` each: see ``critmem``, which also takes
        what has no ``loss_fn`` here. Never aggregated; equal counts by the mean positive first-order score. Whatever is
        no channel of a convolution or linear layer, or is the head's, scores 0. Channels only.
    per_example: every example scores by itself, g(x) its own gradient, and c_j is the mean over ``loader`` of
        |θ_j g_j(x)| or |g_j(x)|; or of g_j(x)², "squared_grad", which is the diagonal of the Fisher information that
        SSD divides by (Foster et al., AAAI 2024). Exact, in one backward pass per batch: what that asks
        of a model, and what is slow, is in docs/per_example.md.
    loader: re-iterable of (input, target), (index, input, target), or of anything with ``loss_fn``; not needed for
        "weight", "random", "shallowest" and "deepest", which look at no example.
    loss_fn: ``loss_fn(model, batch) -> per-example losses (N,)``; cross-entropy by default.

    The model runs in eval mode, without its DDP and compile wrappers, and is left as it was. Batches are summed and
    divided once, so the last short one counts as what it is. Under DDP nothing is exchanged: give every process the
    whole set, and all get the same G. Raises InputError for an unknown criterion, a missing or empty set, labels out of
    range, a DTensor; with per_example, for layers that mix the examples (BatchNorm without running statistics).
    """
    check_criterion(criterion, per_example, loss_fn)
    per_example = bool(per_example)  # numpy's too
    max_channels = check_count("max_channels", max_channels)
    seed = check_seed(seed)
    if loader is not None:
        check_loader(loader, "loader")
    parameters = trainable_parameters(unwrap(model))
    if not parameters:
        raise InputError("expected a model with trainable parameters, got none; set requires_grad on those to score")
    dims = output_dims(unwrap(model))
    if criterion in WITHOUT_SET:
        units = _by_depth(parameters, dims, criterion == "deepest") if criterion in BY_DEPTH else None
        return Scores(parameters, None, criterion, 0, seed, units=units, dims=dims)
    if loader is None:
        raise InputError(f"expected a loader for criterion '{criterion}', got none; pass the forget set's")
    if criterion == "critmem":
        found = critmem(model, loader, max_channels=max_channels)
        return Scores(parameters, None, criterion, len(found.examples), seed, units=found.unit_scores(), dims=dims)
    warn_about_loader(loader, "forget set")
    sums = gradient_sums(unwrap(model), parameters, criterion, per_example, loss_fn)
    examples = add_all(sums, unwrap(model), loader, "forget set")
    return Scores(parameters, sums.mean(examples), criterion, examples, seed, per_example, dims=dims)


def _by_depth(parameters: Mapping[str, Tensor], dims: Mapping[str, int], deepest: bool) -> dict[str, Tensor]:
    """A score for each unit, above 0: the place of its parameter in the model, counted from the other end."""
    places = range(1, len(parameters) + 1) if deepest else range(len(parameters), 0, -1)
    return {
        name: torch.full((unit_count(parameter.shape, dims.get(name, 0)),), float(place), dtype=torch.float32)
        for (name, parameter), place in zip(parameters.items(), places, strict=True)
    }


def gradient_sums(
    network: nn.Module,
    parameters: Mapping[str, Tensor],
    criterion: Criterion,
    per_example: bool,
    loss_fn: LossFn | None,
) -> GradientSums:
    """What batches are added up into for a criterion with a gradient."""
    if not per_example:
        return MeanGradient(network, parameters, loss_fn)
    return PerExampleGradients(network, parameters, loss_fn, "square" if criterion == "squared_grad" else "abs")


class Scores:
    """What ``score`` returns: the live parameters θ, the mean gradient G, and how to rank them.

    ``parameters``: plain name -> the model's own tensor. ``gradients``: the same names -> G, float32 (of
    float64 models float64), or None;
    with ``per_example`` the mean of |g(x)|, or of g(x)² for "squared_grad", in its place. ``units``: the same names ->
    float32 (rows,), the scores of units as a criterion gives them; zero for names that are not there. ``dims``: the
    same names -> the dimension along which a parameter's channels lie, where it is not 0 (``register_layer``).
    ``examples``: |S|. Refuses to select once θ has changed in place since (by autograd's version counters, which
    assignments through ``.data`` go past). A copy, by ``copy.deepcopy`` or ``pickle``, has its own θ.
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
    ) -> None:
        self.parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        self.gradients = None if gradients is None else dict(gradients)
        self.criterion = criterion
        self.examples = examples
        self.seed = unboxed(seed)
        self.per_example = unboxed(per_example)
        self.units = units
        self.dims = dict(dims or {})
        self.total = sum(parameter.numel() for parameter in parameters.values())
        self._versions = [parameter._version for parameter in self.parameters.values()]

    def __getstate__(self) -> dict[str, Any]:
        # a copied tensor counts its versions from the start: keep only whether θ has changed
        changed = [-1 if t._version != v else 0 for t, v in zip(self.parameters.values(), self._versions, strict=True)]
        return {**self.__dict__, "_versions": changed}

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
        """The most critical parameters within ``budget``, a fraction of all P that compete, in (0, 1].

        granularity: "channel": slices along dim 0 of parameters with ndim > 1 compete as one, elements of the
            others one by one; "param": every scalar competes alone (aggregate, top_h and policy do not matter).
        aggregate: a channel's score from its elements': "topk_mean", the mean of the h largest (DEL paper, section
            3), "mean", "sum" or "max". ``top_h``: h as a count (int), as a fraction of the row (float in (0, 1],
            rounded down), or "published", int(0.1 C_out) as in the authors' code; clipped to [1, row].
        policy: "whole": the longest prefix of the channels, in falling score, of at most budget × P parameters, so
            that masks of smaller budgets lie inside larger ones'. "exact": int(budget × P) scalars, the last channel
            cut, as in the authors' code. Ties fall to the lower (parameter, index).

        Raises InputError for arguments out of range, a budget below the first channel (naming the least that works),
        non-finite scores (naming the parameter), parameters that changed since they were scored, and scores that are
        all 0 (every gradient of the set is zero). Warns, with their number, if some of the selected score 0: the budget
        then exceeds what the scores rank.
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
    ) -> Selection:
        """Select as ``select`` does, scores of 0 included, and leave it to ``Selection.check`` to refuse them."""
        budget, top_h = unboxed(budget), unboxed(top_h)
        check_selection(budget, granularity, aggregate, top_h, policy, criterion=self.criterion)
        for (name, parameter), version in zip(self.parameters.items(), self._versions, strict=True):
            if parameter._version != version:
                raise InputError(f"'{name}' has changed since it was scored; call score() again")
        if not self.total:
            raise InputError("expected a model with entries in its parameters, got empty ones; nothing can be selected")
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
        metadata |= {"delfast": __version__, "torch": torch.__version__}
        return Selection(Mask(parts, metadata), selected, positive)

    def channel_scores(
        self, aggregate: Aggregate = "topk_mean", top_h: int | float | Literal["published"] = 0.1
    ) -> Tensor:
        """(units,): the score of every competing unit, in the order of ``parameters``, rows in order; float32, or
        float64 for models with float64 parameters."""
        check_choice("aggregate", aggregate, Aggregate)
        top_h = unboxed(top_h)
        resolve_top_h(top_h, (1, 1))
        if self.criterion == "random" or self.units is not None:  # scored as units, never aggregated
            return self._join([self._unit_scores(name, unit_count(shape)) for name, shape in self._row_shapes.items()])
        values = self._by_row(self.parameters)
        gradients = [] if self.gradients is None else self._by_row(self.gradients)
        counts = [resolve_top_h(top_h, value.shape) for value in values]
        result: Tensor = torch.ops.delfast.criticality(values, gradients, self._op_criterion, aggregate, counts)
        return result

    def _by_row(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """One tensor per parameter, its channels along dim 0: views."""
        dims = self.dims
        return [tensors[n].movedim(dims[n], 0) if n in dims else tensors[n] for n in self.parameters]

    @property
    def _row_shapes(self) -> dict[str, torch.Size]:
        """Name -> shape, with the channels along dim 0."""
        return {name: t.shape for name, t in zip(self.parameters, self._by_row(self.parameters), strict=True)}

    def _select_elements(self, k: int) -> tuple[dict[str, ParameterMask], int, int]:
        """The masks, how many elements they select, and how many of these score above 0."""
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
        bits, nonfinite = torch.ops.delfast.select_elements(values, gradients, criterion, k)
        sizes = [packed_bytes(t.numel()) for t in self.parameters.values()]
        pieces = torch.split(bits, sizes)
        left_out = positive_left_out(values, gradients, criterion, pieces)
        nonfinite, left_out = torch.stack([nonfinite, left_out.to(nonfinite.dtype)]).tolist()
        if nonfinite >= 0:
            self._refuse_nonfinite(list(self.parameters)[nonfinite])
        positive = k
        if not left_out and self.criterion != "random":
            positive = min(k, int(positive_count(values, gradients, criterion)))
        parts = {
            name: ParameterMask(tuple(t.shape), "row" if t.ndim <= 1 else "element", part, self.dims.get(name, 0))
            for (name, t), part in zip(self.parameters.items(), pieces, strict=True)
        }
        return parts, k, positive

    def _select_units(
        self, budgeted: int, aggregate: Aggregate, top_h: int | float | Literal["published"], cut_last: bool
    ) -> tuple[dict[str, ParameterMask], int, int]:
        """The masks, how many units they select, a cut one included, and how many of these score above 0."""
        scores = self.channel_scores(aggregate, top_h)
        shapes = self._row_shapes
        counts = [unit_count(shape) for shape in shapes.values()]
        lengths = [row_length(shape) for shape in shapes.values()]
        bits, info = torch.ops.delfast.select_units(scores, counts, lengths, budgeted, cut_last)
        counted = torch.stack([unpack(bits, 8 * bits.numel()).sum(), (scores > 0).sum()])
        cut_unit, cut_size, nonfinite, selected, positive = torch.cat([info, counted.to(info.dtype)]).tolist()
        if nonfinite >= 0:
            self._refuse_nonfinite(self._owner(nonfinite, counts)[0])
        selected += cut_unit >= 0
        if positive and not selected:
            name, _ = self._owner(int(scores.argmax()), counts)
            raise self._too_small(1 if cut_last else row_length(shapes[name]), "channel")
        parts = {
            name: ParameterMask(tuple(t.shape), "row", part, self.dims.get(name, 0))
            for (name, t), part in zip(
                self.parameters.items(), torch.split(bits, [packed_bytes(count) for count in counts]), strict=True
            )
        }
        if cut_unit >= 0:  # the last channel in part: its parameter alone needs a bit per element
            name, row = self._owner(cut_unit, counts)
            flags = parts[name].dense()
            cut = flags.movedim(self.dims.get(name, 0), 0)[row]
            cut.copy_((torch.arange(cut.numel(), device=cut.device) < cut_size).view(cut.shape))
            parts[name] = replace(parts[name], unit="element", bits=pack(flags))
        return parts, selected, selected if self.criterion == "random" else min(selected, positive)

    @property
    def _op_criterion(self) -> str:
        return "grad" if self.criterion == "squared_grad" else self.criterion

    def _gradient_list(self) -> list[Tensor]:
        return [] if self.gradients is None else [self.gradients[name] for name in self.parameters]

    def _join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32)

    def _unit_scores(self, name: str, count: int) -> Tensor:
        """float32 (count,): the units' own scores, of a criterion that scores no elements."""
        if self.units is None:
            return self._uniform(name, count)
        device = self.parameters[name].device
        if name in self.units:
            return self.units[name].to(device)
        return torch.zeros(count, dtype=torch.float32, device=device)

    def _uniform(self, name: str, count: int) -> Tensor:
        """float32 (count,) in [0, 1): numpy's Philox, a counter-based generator, keyed by (seed, parameter name)."""
        key = numpy.array([self.seed, zlib.crc32(name.encode())], dtype=numpy.uint64)  # a list of such ints is float64
        generator = numpy.random.Generator(numpy.random.Philox(key=key))
        return torch.from_numpy(generator.random(count, dtype=numpy.float32)).to(self.parameters[name].device)

    def _owner(self, unit: int, counts: list[int]) -> tuple[str, int]:
        """(parameter name, row) of a unit."""
        for name, count in zip(self.parameters, counts, strict=True):
            if unit < count:
                return name, unit
            unit -= count
        raise IndexError(unit)

    def _too_small(self, least: int, what: str) -> InputError:
        """The error for a budget that holds nothing; names the least that does, rounded up."""
        digits = 6
        while int(float(f"{least / self.total:.{digits}g}") * self.total) < least and digits < 17:
            digits += 1
        return InputError(
            f"expected a budget that holds the first {what}, at least {least / self.total:.{digits}g} "
            f"({least} of {self.total} parameters), got less; raise the budget"
        )

    def _refuse_nonfinite(self, name: str) -> None:
        raise InputError(
            f"expected finite scores, got NaN or infinity for '{name}'; check the loss, the gradients and the weights "
            "of this parameter"
        )


def check_selection(
    budget: float,
    granularity: str = "channel",
    aggregate: str = "topk_mean",
    top_h: object = 0.1,
    policy: str = "whole",
    *,
    criterion: str = "weighted_grad",
) -> None:
    """InputError for arguments that ``Scores.select`` would refuse whatever the scores."""
    if not 0 < check_number("budget", budget) <= 1:
        raise InputError(f"expected a budget in (0, 1], got {budget}; pass the fraction of parameters to select")
    check_choice("granularity", granularity, Granularity)
    check_choice("aggregate", aggregate, Aggregate)
    check_choice("policy", policy, Policy)
    resolve_top_h(unboxed(top_h), (1, 1))
    if criterion in CHANNELS_ONLY and granularity == "param":
        raise InputError(f"criterion '{criterion}' scores channels, not their elements; use granularity='channel'")


def resolve_top_h(top_h: object, shape: tuple[int, ...] | torch.Size) -> int:
    """h of a row of a parameter of this shape, in [1, row]; InputError if ``top_h`` is no count and no fraction."""
    length = max(1, row_length(shape))
    if isinstance(top_h, str) and top_h == "published":
        h = int(0.1 * shape[0]) if len(shape) > 1 else 1
    elif isinstance(top_h, int) and not isinstance(top_h, bool) and top_h >= 1:
        h = top_h
    elif isinstance(top_h, float) and 0 < top_h <= 1:
        h = math.floor(top_h * length)
    else:
        raise InputError(
            f"expected top_h to be a count (int >= 1), a fraction in (0, 1] or 'published', got {describe(top_h)}"
        )
    return min(max(h, 1), length)


def check_criterion(criterion: str, per_example: bool, loss_fn: LossFn | None = None) -> None:
    """InputError unless there is such a criterion, with or without a gradient per example, and with that loss."""
    check_choice("criterion", criterion, Criterion)
    check_flag("per_example", per_example)
    check_function("loss_fn", loss_fn)
    if criterion == "squared_grad" and not per_example:
        raise InputError("criterion 'squared_grad' is a mean over the examples' own gradients; pass per_example=True")
    if criterion == "critmem" and loss_fn is not None:
        raise InputError("criterion 'critmem' asks for predictions, not losses; call critmem(logits_fn=...) instead")
    if criterion in WITHOUT_MEAN and per_example:
        raise InputError(f"expected a criterion with a gradient for per_example=True, got '{criterion}'; leave one out")
