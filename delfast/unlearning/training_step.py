"""One step of training: forward pass, loss, backward pass, clipping, optimizer; captured where that can be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from delfast.batches import LossFn, check_differentiable, device_of, per_example_losses
from delfast.compaction.layers import CompactLayer, record_versions
from delfast.device_checks import DeviceChecks
from delfast.execution import CudaGraphs, Execution
from delfast.graphs import Graphed, make_backend
from delfast.loaders import is_frequent
from delfast.processes import Processes
from delfast.snapshots import plain_attributes
from delfast.unlearning.data_parallel import add_up
from delfast.unlearning.shared_steps import SharedSteps
from delfast.unlearning.steps import Steps

log = logging.getLogger("delfast")


class TrainingStep:
    """One step of training, captured in a CUDA graph where that can be: see ``delfast.graphs``."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFn | None,
        max_norm: float | None,
        execution: Execution,
        is_frequent: Callable[[Any], bool],
        processes: Processes | None = None,
        *,
        in_step: bool = False,
    ) -> None:
        """Take steps. processes: over which gradients are averaged; in_step: whether the steps are ``SharedSteps``."""
        self.model, self.optimizer, self.loss_fn, self.max_norm = model, optimizer, loss_fn, max_norm
        self.processes, self.in_step = processes, in_step
        self.execution = execution
        device = device_of(model)
        self.total = torch.zeros((), dtype=torch.float64, device=device)  # of the losses in an epoch
        self.checks = DeviceChecks(device)
        backend = make_backend(execution.cuda_graphs, device, loss_fn)
        if backend is not None and not all(map(_reads_rate_on_device, optimizer.param_groups)):
            log.warning(
                "no CUDA graph is used, each step is launched by the host: %s reads its learning rate on the host; "
                "pass fused=True to torch.optim.SGD, Adam or AdamW",
                type(optimizer).__name__,
            )
            backend = None
        self.rates = [] if backend is None else [_device_rate(group, device) for group in optimizer.param_groups]
        self._modules: list[nn.Module] = []
        self._network: dict[Hashable, Tensor] = {}  # the network's parameters and buffers
        self._compact: list[CompactLayer] = []
        self._attributes: Hashable = None
        self._graphed = Graphed(
            self._run_on_device,
            backend,
            eager=self._run,
            state=self._state,
            is_frequent=is_frequent,
            settings=self._settings,
            vary=self._vary,
            release=lambda: model.zero_grad(set_to_none=True),
            after_replay=self._after_replay,
            watched=(model, optimizer),
        )

    def run_epoch(self, batches: Iterable[Any], scheduler: LambdaLR) -> float:
        """Train for one pass; return the mean loss over its examples, those of all processes that train together."""
        self.total.zero_()
        self._graphed.check_hooks()
        # once an epoch: to walk through the modules in every step would take longer than to launch a graph
        self._modules = list(self.model.modules())
        self._network = dict((*self.model.named_parameters(), *self.model.named_buffers()))
        self._attributes = tuple(tuple(plain_attributes(module).items()) for module in self._modules)
        self._compact = [module for module in self._modules if isinstance(module, CompactLayer)]
        for layer in self._compact:
            layer.notice_changes()  # a captured step does not check for writes by other code
        examples = 0
        with self.checks:
            for batch in batches:
                for rate, group in zip(self.rates, self.optimizer.param_groups, strict=False):
                    rate.fill_(group["lr"])
                losses = self._graphed(batch)
                examples += 0 if self._is_repeat(batch) else len(losses)
                scheduler.step()
        self.checks.read()
        total, count = add_up(self.processes, float(self.total), examples)
        return total / max(1, count)

    def _run(self, batch: Any) -> Tensor:
        """Take one step; return the losses (N,)."""
        self.model.zero_grad(set_to_none=True)
        losses = self._losses(batch)
        mean = losses.mean()
        if self.in_step:
            mean = mean * batch["weight"]
        mean.backward()  # type: ignore[no-untyped-call]
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        if not self._is_repeat(batch):
            self.total += losses.detach().double().sum().to(self.total.device)
        return losses.detach()

    def _losses(self, batch: Any) -> Tensor:
        """Return the losses (N,) of a batch. In step, all processes raise the error of one before the backward pass."""
        error: Exception | None = None
        losses = self.total
        try:
            losses = per_example_losses(self.model, batch, self.loss_fn, self.execution)
            check_differentiable(losses)
        except Exception as raised:
            if self.processes is None or not self.in_step:
                raise
            error = raised
        if self.processes is not None and self.in_step:
            self.processes.raise_first(error)
        return losses

    def _is_repeat(self, batch: Any) -> bool:
        """Return whether the batch replaces one that this process does not have."""
        return self.in_step and not batch["weight"]

    def _run_on_device(self, batch: Any) -> Tensor:
        """Take one step with learning rates that the optimizer reads on the device: a replay repeats a number."""
        numbers = [group["lr"] for group in self.optimizer.param_groups]
        try:
            for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
                group["lr"] = rate
            return self._run(batch)
        finally:
            for number, group in zip(numbers, self.optimizer.param_groups, strict=True):
                group["lr"] = number

    def _after_replay(self) -> None:
        record_versions(self._compact)

    def _vary(self) -> None:
        for rate in self.rates:
            rate.data.mul_(0.5)

    def _state(self) -> dict[Hashable, Tensor]:
        """Return the tensors that a step may write."""
        held: dict[Hashable, Any] = {
            (id(parameter), name): value
            for parameter, state in self.optimizer.state.items()
            for name, value in state.items()
        }
        held = {name: value for name, value in held.items() if isinstance(value, Tensor)}
        return {**self._network, **held, **dict(enumerate(self.rates)), None: self.total, **self.checks.tensors()}

    def _settings(self) -> Hashable:
        """Return the values that a captured step fixes."""
        plain = (bool, int, float, str, tuple, type(None))
        groups = tuple(
            tuple((name, value) for name, value in group.items() if name != "lr" and isinstance(value, plain))
            for group in self.optimizer.param_groups
        )
        flags = tuple(tensor.requires_grad for tensor in self._network.values())
        return groups, flags, self._attributes, tuple(module.training for module in self._modules)


def _reads_rate_on_device(group: dict[str, Any]) -> bool:
    """Return whether an optimizer accepts a tensor for a group's learning rate, and reads it on its device."""
    return bool("mask_digest" in group or group.get("fused") or group.get("capturable"))


def _device_rate(group: dict[str, Any], device: torch.device) -> Tensor:
    """Return a tensor for the learning rate: float64, as the number that it stands for, or float32 for torch's own."""
    dtype = torch.float64 if "mask_digest" in group else torch.float32  # torch's fused kernels read float32
    return torch.zeros((), dtype=dtype, device=device)


def frequency(loader: Iterable[Any], epochs: int, cuda_graphs: CudaGraphs) -> Callable[[Any], bool]:
    """Return the function of a batch, or of a step, that decides whether its shape is captured."""
    if isinstance(loader, SharedSteps):
        return lambda step: False  # its processes exchange more than gradients in each step
    if not isinstance(loader, Steps):
        return is_frequent(loader, epochs, cuda_graphs)
    by_set = {name: is_frequent(each, loader.passes(name, epochs), cuda_graphs) for name, each in loader.sets.items()}
    return lambda step: all(frequent(step[name]) for name, frequent in by_set.items() if name in step)
