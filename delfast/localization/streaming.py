"""Scores of channels for a set of one batch: each gradient is scored and freed as soon as it is computed.

The results are those of ``score``, to the bit: with one batch a gradient is complete when its hook is called, and a
channel's score depends on its own gradient alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from delfast.arguments import check_loader
from delfast.batches import (
    LossFn,
    check_differentiable,
    detached,
    device_of,
    per_example_losses,
    split_batch,
    warn_about_loader,
)
from delfast.device_checks import DeviceChecks
from delfast.eval_mode import evaluating
from delfast.execution import Execution
from delfast.feeding import feed
from delfast.groups import MAX_BUCKET_BYTES
from delfast.layer_types import output_dims
from delfast.localization.competing import competing_parameters
from delfast.localization.criteria import Aggregate, Criterion, resolve_top_h
from delfast.localization.gradient import GradientHooks, mean_of
from delfast.localization.scores import Scores
from delfast.naming import trainable_parameters, unwrap
from delfast.ops.layout import channels_first, unit_count
from delfast.sharding import is_laid_out
from delfast.shares import refuse_sharded

CPU_PIECE_BYTES = 2**20  # of a gradient's mean at a time; a GPU, which launches each piece, takes MAX_BUCKET_BYTES

Units = tuple[Aggregate, int | float | Literal["published"]]
"""How a channel's score is computed: aggregate and ``top_h``."""


def streamed_scores(
    model: nn.Module,
    loader: Any,
    criterion: Criterion,
    units: Units,
    loss_fn: LossFn | None,
    seed: int,
    execution: Execution,
    patterns: Mapping[str, list[str]],
) -> Scores | None:
    """Return the scores of all channels, without their gradients; None for what only ``score`` can compute.

    It must be a set of one batch, a criterion of the mean gradient, and plain parameters without float64 that each get
    their gradient at once.
    """
    if criterion not in ("weighted_grad", "grad") or execution.cuda_graphs is True or not _has_one_batch(loader):
        return None
    check_loader(loader, "loader")
    network = unwrap(model)
    parameters = trainable_parameters(network, sharded=True)
    if not parameters or is_laid_out(network) or any(p.dtype == torch.float64 for p in parameters.values()):
        return None
    parameters = competing_parameters(network, parameters, patterns)
    refuse_sharded(loader)
    streamed = _Streamed(network, parameters, criterion, units, loss_fn, execution)
    examples = 0
    with evaluating(network, gradients=True), streamed.checks:
        batches = iter(feed(loader, device_of(network)))
        for batch in batches:
            examples = streamed.add(batch)
            break
        if not examples or streamed.is_repeated or any(True for _ in batches):
            return None
        streamed.finish()
        streamed.checks.read()
    warn_about_loader(loader, "forget set")
    return Scores(
        parameters,
        None,
        criterion,
        examples,
        seed,
        units=streamed.scores,
        dims=streamed.dims,
        precision=execution.computed_in(device_of(network)),
        patterns=patterns,
    )


def _has_one_batch(loader: Any) -> bool:
    try:
        return len(loader) == 1
    except (TypeError, NotImplementedError):
        return False


class _Streamed:
    """The scores of channels, float32 (rows,) by name.

    is_repeated: whether a parameter got more than one gradient, so that the scores are not those of their sum.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, Tensor],
        criterion: Criterion,
        units: Units,
        loss_fn: LossFn | None,
        execution: Execution,
    ) -> None:
        self.network = network
        self.parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        self.criterion = criterion
        self.aggregate, self.top_h = units
        self.loss_fn = loss_fn
        self.execution = execution
        self.dims = output_dims(network)
        self.scores: dict[str, Tensor] = {}
        self.is_repeated = False
        self.checks = DeviceChecks(device_of(network))
        self._hooks = GradientHooks(parameters, self._score)
        self._examples = 0

    def add(self, batch: Any) -> int:
        """Score the batch's gradients; return its number of examples."""
        batch = detached(split_batch(batch)[1:] if self.loss_fn is None else batch)
        with torch.inference_mode(False), torch.enable_grad():
            losses = per_example_losses(self.network, batch, self.loss_fn, self.execution)
            check_differentiable(losses)
            self._examples = len(losses)
            if self._examples:
                self._hooks.add(losses.sum())
        return self._examples

    def finish(self) -> None:
        """Score the parameters that the loss does not depend on by a gradient of zero."""
        for name, value in self.parameters.items():
            if name not in self.scores:
                self._score([name], [torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape)])

    @torch.no_grad()
    def _score(self, names: list[str], gradients: list[Tensor]) -> None:
        """Score gradients, in groups of pieces of rows."""
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        group: list[tuple[str, Tensor, Tensor]] = []
        size, limit = 0, MAX_BUCKET_BYTES if gradients[0].is_cuda else CPU_PIECE_BYTES
        for name, gradient in zip(names, gradients, strict=True):
            self.is_repeated |= name in self.scores
            for value, piece in self._pieces(name, gradient, limit):
                if group and size + 4 * value.numel() > limit:
                    self._score_group(group, found)
                    group, size = [], 0
                group.append((name, value, piece))
                size += 4 * value.numel()
        self._score_group(group, found)
        self.scores |= {name: torch.cat(parts) for name, parts in found.items()}

    def _pieces(self, name: str, gradient: Tensor, limit: int) -> list[tuple[Tensor, Tensor]]:
        """Return rows of a parameter and of its gradient, at most ``limit`` bytes at a time or one row."""
        dim = self.dims.get(name, 0)
        value = channels_first(self.parameters[name], dim)
        dense = channels_first(gradient.to_dense() if gradient.is_sparse else gradient, dim)
        if not value.ndim or not value.numel():
            return [(value, dense)]
        rows = max(1, limit // (4 * value[:1].numel()))
        return list(zip(torch.split(value, rows), torch.split(dense, rows), strict=True))

    def _score_group(self, group: list[tuple[str, Tensor, Tensor]], found: dict[str, list[Tensor]]) -> None:
        means = {}
        for number, (_, value, piece) in enumerate(group):  # laid out like the parameter, as the sums of ``score`` are
            means[str(number)] = torch.empty_like(value, dtype=torch.float32).copy_(piece)
        values = {str(number): value for number, (_, value, _) in enumerate(group)}
        means = mean_of(means, self._examples, values, last=True)
        counts = [
            resolve_top_h(self.top_h, self.parameters[name].shape, self.dims.get(name, 0)) for name, _, _ in group
        ]
        scores = torch.ops.delfast.criticality(
            list(values.values()), list(means.values()), self.criterion, self.aggregate, counts
        )
        sizes = [unit_count(value.shape) for value in values.values()]
        for (name, _, _), part in zip(group, torch.split(scores, sizes), strict=True):
            found[name].append(part)
