"""The unlearning methods that train: on what, and by which loss. All go through one loop, within any mask.

A method is a frozen dataclass. Its fields are its hyperparameters, with the published values as defaults. Methods that
change the network in one step are in ``one_shot``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from delfast.batches import LossFn, check_targets, device_of, inputs_and_targets, per_example_losses
from delfast.errors import InputError
from delfast.mask import Mask
from delfast.naming import trainable_parameters
from delfast.reset import Init, fresh_state, reset_
from delfast.unlearning.loop import Schedule
from delfast.unlearning.steps import Step, StepPlan


@dataclass
class UnlearningTask:
    """What a method works on: ``model``, and the ``network`` inside its wrappers. ``mask``: what may change.

    ``teacher``: the network as it was, in eval mode, for methods that need it.
    """

    model: nn.Module
    network: nn.Module
    retain: Iterable[Any]
    forget: Iterable[Any]
    mask: Mask
    init: Init | None
    seed: int
    loss_fn: LossFn | None = None
    teacher: nn.Module | None = None

    def loss(self, batch: Any) -> Tensor:
        """Mean loss of a batch."""
        return per_example_losses(self.model, batch, self.loss_fn).mean()

    def logits(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, logits (N, classes) and int64 targets (N,) of a batch."""
        inputs, targets = inputs_and_targets(batch, device_of(self.network))
        logits = self.model(inputs)
        return inputs, logits, check_targets(targets, logits)


@dataclass(frozen=True, kw_only=True)
class Method:
    """``prepare`` once, then SGD on ``loss`` where there are epochs: ``lr`` falls by ``schedule``.

    ``needs``: of "forget", "init", "teacher" (the network as it was), "logits" (no ``loss_fn``), "everything" (no
    mask). ``trains_head``: the head is trained in full, whatever the mask. ``localizes``: where no mask is given,
    ``localize`` makes one; elsewhere that means that everything may change.
    """

    name: ClassVar[str]
    step_plan: ClassVar[StepPlan] = "retain"  # of an epoch's steps
    needs: ClassVar[frozenset[str]] = frozenset()
    trains_head: ClassVar[bool] = False
    localizes: ClassVar[bool] = False

    epochs: int = 10
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"

    def check(self) -> None:
        """InputError for hyperparameters out of range."""
        require(self, "epochs", self.epochs >= 1, ">= 1")
        require(self, "lr", 0 < self.lr < float("inf"), "> 0")
        require(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        require(self, "weight_decay", 0 <= self.weight_decay < float("inf"), ">= 0")

    @property
    def forget_epochs(self) -> int | None:
        """In how many epochs, the first, the forget set has its step; None: in all."""
        return None

    def prepare(self, task: UnlearningTask) -> None:
        """Change the network before it is trained. Not called where a run is resumed."""

    def loss(self, task: UnlearningTask, step: Step) -> Tensor:
        """The loss of one step, a scalar: by default that of the retain set's batch.

        Also called before ``prepare``, in eval mode, for each set's first batch: an error there changes nothing.
        """
        return task.loss(step["retain"])


def require(method: Method, name: str, good: bool, range_: str) -> None:
    """InputError unless the value of this hyperparameter is in its range."""
    if not good:
        raise InputError(
            f"expected {name} {range_} for '{method.name}', got {getattr(method, name)}; pass such a value, or leave "
            "it to the default"
        )


@dataclass(frozen=True, kw_only=True)
class Finetune(Method):
    """Train on the retain set and nothing else. Defaults: SalUn (Fan et al., ICLR 2024, appendix C), 10 epochs, a rate
    in [1e-3, 1e-1].
    """

    name: ClassVar[str] = "finetune"


@dataclass(frozen=True, kw_only=True)
class Del(Method):
    """DEL (Torkzadehmahani et al., TMLR 2025, section 3): reset the masked entries, finetune them and the head on the
    retain set. Defaults: CIFAR-10 / ResNet-18 there, 30 epochs at 0.015 falling to 1 %.
    """

    name: ClassVar[str] = "del"
    needs: ClassVar[frozenset[str]] = frozenset({"init"})
    trains_head: ClassVar[bool] = True
    localizes: ClassVar[bool] = True
    epochs: int = 30
    lr: float = 0.015

    def prepare(self, task: UnlearningTask) -> None:
        reset_(task.network, task.mask, required(task.init), task.seed)


@dataclass(frozen=True, kw_only=True)
class Retrain(Method):
    """The oracle: a fresh network, buffers included, trained on the retain set. Defaults: CIFAR-10 / ResNet-18 in the
    DEL paper, 30 epochs at 0.1.
    """

    name: ClassVar[str] = "retrain"
    needs: ClassVar[frozenset[str]] = frozenset({"init", "everything"})
    epochs: int = 30
    lr: float = 0.1

    def prepare(self, task: UnlearningTask) -> None:
        task.network.load_state_dict(fresh_state(required(task.init), task.seed))


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Method):
    """Raise the loss of the forget set: -L(S) (Graves et al., AAAI 2021; Thudi et al., EuroS&P 2022). Defaults: SalUn,
    appendix C, 5 epochs, a rate in [1e-5, 1e-3].
    """

    name: ClassVar[str] = "gradient-ascent"
    step_plan: ClassVar[StepPlan] = "forget"
    needs: ClassVar[frozenset[str]] = frozenset({"forget"})
    epochs: int = 5
    lr: float = 1e-4

    def loss(self, task: UnlearningTask, step: Step) -> Tensor:
        return -task.loss(step["forget"])


@dataclass(frozen=True, kw_only=True)
class NegGradPlus(Method):
    """alpha L(R) - (1 - alpha) L(S), a batch of each in every step (NegGrad+ of Kurmanji et al., NeurIPS 2023, section
    5). Default: alpha 0.99.
    """

    name: ClassVar[str] = "neggrad+"
    step_plan: ClassVar[StepPlan] = "pairs"
    needs: ClassVar[frozenset[str]] = frozenset({"forget"})
    alpha: float = 0.99

    def check(self) -> None:
        super().check()
        require(self, "alpha", 0 <= self.alpha <= 1, "in [0, 1]")

    def loss(self, task: UnlearningTask, step: Step) -> Tensor:
        return self.alpha * task.loss(step["retain"]) - (1 - self.alpha) * task.loss(step["forget"])


@dataclass(frozen=True, kw_only=True)
class Relabel(Method):
    """Train the forget set on wrong labels, drawn uniformly anew at each step, and the retain set on its own, in steps
    of either (random labels: Golatkar et al., CVPR 2020; within a SalLoc mask of half of the parameters this is SalUn,
    Fan et al., ICLR 2024, equation 5). Defaults: SalUn, appendix C, 10 epochs, a rate in [5e-4, 5e-2].
    """

    name: ClassVar[str] = "relabel"
    step_plan: ClassVar[StepPlan] = "mixed"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "logits"})

    def loss(self, task: UnlearningTask, step: Step) -> Tensor:
        if "retain" in step:
            return task.loss(step["retain"])
        _, logits, targets = task.logits(step["forget"])
        return functional.cross_entropy(logits, self.labels(task, step, targets, logits.shape[1]))

    def labels(self, task: UnlearningTask, step: Step, targets: Tensor, classes: int) -> Tensor:
        """(N,): any class but the target, a function of the seed, the epoch and the step."""
        if classes < 2:
            raise InputError(
                f"'{self.name}' needs at least 2 classes to draw wrong labels from, the model has {classes}"
            )
        mixed = (task.seed * 1_000_003 + step["epoch"]) * 1_000_003 + step["step"]
        generator = torch.Generator().manual_seed(mixed % 2**63)
        return (targets + torch.randint(1, classes, targets.shape, generator=generator).to(targets.device)) % classes


@dataclass(frozen=True, kw_only=True)
class L1Sparse(Method):
    """L(R) + gamma_e |θ|₁ over the parameters that may change (Jia et al., NeurIPS 2023, equation 5); gamma_e falls
    linearly, epoch by epoch, from ``gamma`` to gamma / epochs. Defaults: 10 epochs; gamma 7e-5, in their range
    [1e-6, 1e-4].
    """

    name: ClassVar[str] = "l1-sparse"
    gamma: float = 7e-5

    def check(self) -> None:
        super().check()
        require(self, "gamma", 0 <= self.gamma < float("inf"), ">= 0")

    def loss(self, task: UnlearningTask, step: Step) -> Tensor:
        gamma = self.gamma * (1 - step["epoch"] / self.epochs)
        masked = task.mask.match(trainable_parameters(task.network))
        norm = torch.stack([parameter.abs().sum() for _, parameter, _ in masked]).sum()
        loss: Tensor = task.loss(step["retain"]) + gamma * norm
        return loss


@dataclass(frozen=True, kw_only=True)
class Scrub(Method):
    """SCRUB (Kurmanji et al., NeurIPS 2023, equation 4): away from the teacher, the network as it was, on the forget
    set; near it, and to the labels, on the retain set. Divergences KL(teacher ‖ student) are of logits divided by
    ``temperature``, times its square.

    Steps on the forget set, -KL, come first in each of the first ``max_epochs`` epochs; steps on the retain set,
    alpha KL + gamma L, in all. Defaults: the authors' notebooks, alpha 0.001, gamma 0.99, temperature 4, a rate of
    5e-4, 2 max-epochs of 10; there by Adam and in steps of the rate, here by SGD as the other methods.
    """

    name: ClassVar[str] = "scrub"
    step_plan: ClassVar[StepPlan] = "forget first"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "teacher", "logits"})
    lr: float = 5e-4
    schedule: Schedule = "constant"
    alpha: float = 0.001
    gamma: float = 0.99
    temperature: float = 4.0
    max_epochs: int = 2

    def check(self) -> None:
        super().check()
        require(self, "alpha", self.alpha >= 0, ">= 0")
        require(self, "gamma", self.gamma >= 0, ">= 0")
        require(self, "temperature", self.temperature > 0, "> 0")
        require(self, "max_epochs", self.max_epochs >= 0, ">= 0")

    @property
    def forget_epochs(self) -> int:
        return self.max_epochs

    def loss(self, task: UnlearningTask, step: Step) -> Tensor:
        logits, targets, divergence = self._divergence(task, step["forget" if "forget" in step else "retain"])
        if "forget" in step:
            return -divergence
        loss: Tensor = self.alpha * divergence + self.gamma * functional.cross_entropy(logits, targets)
        return loss

    def _divergence(self, task: UnlearningTask, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs, logits, targets = task.logits(batch)
        with torch.no_grad():
            taught = functional.log_softmax(required(task.teacher)(inputs) / self.temperature, dim=1)
        learnt = functional.log_softmax(logits / self.temperature, dim=1)
        divergence = functional.kl_div(learnt, taught, reduction="batchmean", log_target=True)
        return logits, targets, divergence * self.temperature**2


def required(value: Any) -> Any:
    """One of a method's ``needs``, which ``unlearn`` has checked."""
    assert value is not None
    return value
