"""The mean gradient G over a set of examples, accumulated batch by batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from delfast.batches import (
    Indexed,
    LossFn,
    check_differentiable,
    detached,
    device_of,
    per_example_losses,
    split_batch,
)
from delfast.device_checks import DeviceChecks
from delfast.errors import InputError
from delfast.eval_mode import evaluating
from delfast.execution import DEFAULT_EXECUTION, Execution
from delfast.feeding import feed
from delfast.graphs import Graphed, make_backend
from delfast.groups import MAX_BUCKET_BYTES
from delfast.loaders import is_frequent
from delfast.processes import Processes


class GradientSums(Protocol):
    """An accumulator of gradients over batches."""

    checks: DeviceChecks
    sums: dict[str, Tensor]

    def add(self, batch: Any) -> int:
        """Add a batch and return its number of examples."""

    def mean(self, examples: int, *, last: bool = False) -> dict[str, Tensor]:
        """Return plain name -> sum / examples, in the parameter's shape; float32, or float64 for float64 parameters.

        last: whether nothing is added afterwards, so that the mean may take the place of the sums.
        """


class MeanGradient:
    """The sum Σ ∇ℓ(x) over the examples. It is zero for a parameter that the loss does not depend on.

    loader: the batches to be added, whose sizes decide which shapes are captured; None: no shape.
    sum_dtype: at least this dtype for the sums.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, Tensor],
        loss_fn: LossFn | None,
        execution: Execution = DEFAULT_EXECUTION,
        loader: object = None,
        sum_dtype: torch.dtype | None = None,
    ) -> None:
        self.network = network
        self.parameters = dict(parameters)
        self.loss_fn = loss_fn
        self.execution = execution
        self.sums = zeros_like(parameters, sum_dtype)
        self.checks = DeviceChecks(device_of(network))
        self._gradients = GradientHooks(self.parameters, self._add)
        self._pass = Graphed(
            self._run,
            make_backend(execution.cuda_graphs, device_of(network), loss_fn),
            state=lambda: {**self.sums, **self.checks.tensors()},
            is_frequent=is_frequent(loader, 1, execution.cuda_graphs),
            watched=(network,),
        )

    def add(self, batch: Any) -> int:
        if not isinstance(batch, Indexed):  # which a graph reads itself
            batch = detached(split_batch(batch)[1:] if self.loss_fn is None else batch)
        return len(self._pass(batch))

    def mean(self, examples: int, *, last: bool = False) -> dict[str, Tensor]:
        return mean_of(self.sums, examples, self.parameters, last=last)

    def _add(self, names: list[str], gradients: list[Tensor]) -> None:
        torch._foreach_add_([self.sums[name] for name in names], gradients)

    def _run(self, batch: Any) -> Tensor:
        """Add the batch's gradients to the sums; return its losses (N,)."""
        with torch.inference_mode(False), torch.enable_grad():
            losses = per_example_losses(self.network, batch, self.loss_fn, self.execution)
            check_differentiable(losses)
            self._gradients.add(losses.sum())
        return losses.detach()


class GradientHooks:
    """Hooks that pass each gradient on during a backward pass, and free it.

    take: called with names and gradients, which it may not change. Gradients wait for it in a bucket of at most
    ``MAX_BUCKET_BYTES``, so that one launch adds many; on the CPU, which launches nothing, no gradient waits. The hooks
    run before a gradient is accumulated into ``.grad``, which belongs to the user's training, as do its own hooks.
    """

    def __init__(self, parameters: Mapping[str, Tensor], take: Callable[[list[str], list[Tensor]], None]) -> None:
        self._parameters = dict(parameters)
        self._take = take
        with torch.inference_mode(False):  # returned in the place of gradients: of their shape, without their memory
            self._empty = {
                name: torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape) for name, p in parameters.items()
            }
        self._limit = 0 if all(p.device.type == "cpu" for p in parameters.values()) else MAX_BUCKET_BYTES
        self._bucket: list[tuple[str, Tensor]] = []
        self._bytes = 0
        self._lock = Lock()  # autograd has a thread for each device

    def add(self, loss: Tensor) -> None:
        """Pass on the gradients of ``loss``, a scalar tensor."""
        handles = []
        try:
            for name, parameter in self._parameters.items():
                hook = functools.partial(self._wait, name)
                handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]
            torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
            self._pass_on()
        finally:
            self._bucket, self._bytes = [], 0
            for handle in handles:
                handle.remove()

    def _wait(self, name: str, gradient: Tensor) -> Tensor:
        with self._lock:
            self._bucket.append((name, gradient))
            self._bytes += 0 if gradient.is_sparse else gradient.nbytes
            if self._bytes > self._limit:
                self._pass_on()
        return gradient if gradient.is_sparse else self._empty[name]

    def _pass_on(self) -> None:
        if self._bucket:
            names, gradients = zip(*self._bucket, strict=True)
            self._take(list(names), list(gradients))
        self._bucket, self._bytes = [], 0


def add_all(
    sums: GradientSums,
    network: nn.Module,
    loader: Iterable[Any],
    what: str,
    processes: Processes | None = None,
    finish: Callable[[], None] | None = None,
) -> int:
    """Add every batch of ``loader`` once, in eval mode, and return |S|. InputError for a set without examples.

    processes: those whose sums are added to this process's at the end. The loader is then this process's share, and
    ``finish`` checks the shares after the last batch. An error of one process is raised by all.
    """
    examples = 0
    together = nullcontext() if processes is None else processes.together()
    with together, evaluating(network, gradients=True), sums.checks:
        if processes is not None:
            processes.copy_from_first(dict(network.named_buffers()))  # restored by ``evaluating``
        for batch in feed(loader, device_of(network)):
            examples += sums.add(batch)
        sums.checks.read()
    if processes is not None:
        if finish is not None:
            finish()
        examples = processes.count_data(examples)
        processes.add_data(sums.sums.values())
    return check_examples(examples, what)


def check_examples(examples: int, what: str) -> int:
    """Return |S|. InputError for a set without examples."""
    if not examples:
        raise InputError(f"expected a {what} of at least one example, got none; check its loader")
    return examples


def zeros_like(parameters: Mapping[str, Tensor], sum_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return zeros with each parameter's shape and strides, in float32 or wider, and in at least ``sum_dtype``."""
    with torch.inference_mode(False):  # the sums are changed outside inference mode
        return {
            name: torch.zeros_like(
                parameter,
                dtype=torch.promote_types(parameter.dtype, sum_dtype or torch.float32),
                requires_grad=False,
            )
            for name, parameter in parameters.items()
        }


def mean_of(
    sums: dict[str, Tensor], examples: int, parameters: Mapping[str, Tensor], *, last: bool
) -> dict[str, Tensor]:
    """Return each sum / examples, in the dtype of ``GradientSums.mean``. With ``last`` the sums are used up."""
    if not last:
        sums = {name: total.clone() for name, total in sums.items()}
    torch._foreach_div_(list(sums.values()), examples)
    mean = {}
    for name, parameter in parameters.items():  # one sum after the other is freed if the mean is narrower
        mean[name] = sums.pop(name).to(torch.promote_types(parameter.dtype, torch.float32))
    return mean
