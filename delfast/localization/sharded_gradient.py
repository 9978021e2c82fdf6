"""The mean gradient of a network whose parameters several processes hold together: FSDP2, HSDP, tensor parallelism.

The processes compute in step, since each forward and backward pass gathers parameters from all of them. Tensor hooks
and ``torch.autograd.grad`` do not get FSDP2's gradients, which its own collectives compute. They are therefore
taken from ``.grad`` by post-accumulate hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

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
from delfast.execution import Execution
from delfast.feeding import feed
from delfast.localization.gradient import check_examples, mean_of, zeros_like
from delfast.naming import trainable_parameters
from delfast.processes import NO_BATCH, Processes
from delfast.sharding import (
    adding_gradients,
    forget_forward,
    fsdp_groups,
    is_dtensor,
    local_part,
    reshard,
)
from delfast.shares import Share


class ShardedGradient:
    """The sum Σ ∇ℓ(x) over the examples of all processes, of each parameter the part that this process holds."""

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, Tensor],
        loss_fn: LossFn | None,
        execution: Execution,
        processes: Processes,
        sum_dtype: torch.dtype | None,
    ) -> None:
        self.network = network
        self.parameters = dict(parameters)
        self.loss_fn = loss_fn
        self.execution = execution
        self.processes = processes
        self.sums = zeros_like({name: local_part(p) for name, p in parameters.items()}, sum_dtype)
        self.checks = DeviceChecks(device_of(network))

    def mean_over(self, share: Share, what: str) -> tuple[dict[str, Tensor], int]:
        """Add this process's batches, and return the mean of this process's parts over the set, and |S|."""
        examples = 0
        with self.processes.together():
            with (
                adding_gradients(self.network),
                evaluating(self.network, gradients=True),
                _taken(trainable_parameters(self.network, sharded=True), self._take),
                self.checks,
            ):
                self.processes.copy_from_first(dict(self.network.named_buffers()))  # restored by ``evaluating``
                for batch in self.processes.in_step(feed(share.batches, device_of(self.network))):
                    examples += self._add(batch, share)
            reshard(self.network)
            self.checks.read()
        share.finish()
        examples = self.processes.count_data(examples)
        by_fsdp = {id(p.sharded_param) for group in fsdp_groups(self.network) for p in group.fsdp_params}
        self.processes.add_data(total for name, total in self.sums.items() if id(self.parameters[name]) not in by_fsdp)
        check_examples(examples, what)
        return mean_of(self.sums, examples, self.parameters, last=True), examples

    def _add(self, batch: Any, share: Share) -> int:
        """Add the batch's gradients, in step with the other processes, and return its number of examples.

        For NO_BATCH one that does not count is computed, so that the others can gather the parameters.
        """
        with torch.inference_mode(False), torch.enable_grad():
            with self._forward():
                counts = batch is not NO_BATCH
                batch = batch if counts else share.stand_in()
                if not isinstance(batch, Indexed):
                    batch = detached(split_batch(batch)[1:] if self.loss_fn is None else batch)
                losses = per_example_losses(self.network, batch, self.loss_fn, self.execution)
                check_differentiable(losses)
            (losses if counts else losses[:0]).sum().backward()  # type: ignore[no-untyped-call]
        return len(losses) if counts else 0

    @contextmanager
    def _forward(self) -> Iterator[None]:
        """Raise the error of a forward pass on all processes, which must not begin the backward pass alone."""
        error: Exception | None = None
        try:
            with self.processes.in_one_pass(self.network):
                yield
        except Exception as raised:
            error = raised
        try:
            self.processes.raise_first(error)
        except Exception:
            forget_forward(self.network)
            raise

    def _take(self, name: str, parameter: Any) -> None:
        gradient, parameter.grad = parameter.grad, None
        if name not in self.sums:  # it does not compete
            return
        if is_dtensor(gradient) and gradient.placements != parameter.placements:
            gradient = gradient.redistribute(placements=parameter.placements)  # summands of tensor parallelism
        if gradient.is_sparse:
            raise InputError(
                f"expected a dense gradient of '{name}', got a sparse one; set sparse=False of its embedding"
            )
        # at once: FSDP2 computes on a stream of its own, on which the memory of the gradient is used again
        self.sums[name] += local_part(gradient)


@contextmanager
def _taken(parameters: Mapping[str, Tensor], take: Any) -> Iterator[None]:
    """Call ``take`` with each name and parameter whose gradient a backward pass has computed, in place of other hooks.

    ``.grad`` and the hooks that were registered before are put back at the end.
    """
    kept = [(p, p.grad, dict(p._post_accumulate_grad_hooks or {})) for p in parameters.values()]
    handles = []
    try:
        for name, parameter in parameters.items():
            parameter.grad = None
            if parameter._post_accumulate_grad_hooks:
                parameter._post_accumulate_grad_hooks.clear()
            hook = partial(take, name)
            handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient, hooks in kept:
            parameter.grad = gradient
            if hooks:
                parameter._post_accumulate_grad_hooks.update(hooks)
