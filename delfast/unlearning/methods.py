"""The unlearning methods that train: their steps, and their loss. All run in one loop, within any mask.

A method is a frozen dataclass. Its fields are its hyperparameters, with the published values as defaults. Methods that
change the network once and train nothing are in ``one_shot``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from delfast.batches import IGNORED, device_of, examples_in
from delfast.errors import InputError
from delfast.naming import trainable_parameters
from delfast.reset import fresh_state, reset_
from delfast.unlearning.loop import Schedule
from delfast.unlearning.method import Method, UnlearningTask, require, required
from delfast.unlearning.steps import Step, StepPlan


@dataclass(frozen=True, kw_only=True)
class Finetune(Method):
    """Finetuning on the retain set alone: the loss of a step is L(R).

    Parameters
    ----------
    epochs : int, default 10
        Number of passes over the retain set; SalUn, appendix C.
    lr : float, default 0.01
        Learning rate of the first step, in SalUn's range [1e-3, 1e-1].
    momentum : float, default 0.9
        Momentum of SGD.
    weight_decay : float, default 0.0
        L2 penalty of SGD.
    schedule : {"cosine", "constant"}, default "cosine"
        Learning rate over the steps.

    References
    ----------
    Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency", ICLR 2024, appendix C.

    Examples
    --------
    >>> from delfast.unlearning import Finetune
    >>> Finetune(lr=0.05).lr
    0.05
    """

    name: ClassVar[str] = "finetune"


@dataclass(frozen=True, kw_only=True)
class Del(Method):
    """DEL: reset the masked elements, then finetune the mask and the head on the retain set.

    The masked elements get newly initialized values; the loss of a step is L(R).

    Parameters
    ----------
    epochs : int, default 30
        Number of passes over the retain set; the paper's for CIFAR-10 / ResNet-18.
    lr : float, default 0.015
        Learning rate of the first step; the paper's for CIFAR-10 / ResNet-18, falling to 1 %.
    momentum : float, default 0.9
        Momentum of SGD.
    weight_decay : float, default 0.0
        L2 penalty of SGD.
    schedule : {"cosine", "constant"}, default "cosine"
        Learning rate over the steps.

    References
    ----------
    Torkzadehmahani et al., "Improved Localized Machine Unlearning Through the Lens of Memorization", TMLR 2025,
    section 3.

    Examples
    --------
    >>> from delfast.unlearning import Del
    >>> Del.trains_head, Del.localizes, Del().epochs
    (True, True, 30)
    """

    name: ClassVar[str] = "del"
    needs: ClassVar[frozenset[str]] = frozenset({"init"})
    trains_head: ClassVar[bool] = True
    localizes: ClassVar[bool] = True
    epochs: int = 30
    lr: float = 0.015

    def prepare(self, task: UnlearningTask) -> None:
        """Reset the masked elements to newly initialized values."""
        reset_(task.network, task.mask, required(task.init), task.seed)


@dataclass(frozen=True, kw_only=True)
class Retrain(Method):
    """The oracle: a newly initialized network, buffers included, trained on the retain set.

    Parameters
    ----------
    epochs : int, default 30
        Number of passes over the retain set; the DEL paper's for CIFAR-10 / ResNet-18.
    lr : float, default 0.1
        Learning rate of the first step; the DEL paper's for CIFAR-10 / ResNet-18.
    momentum : float, default 0.9
        Momentum of SGD.
    weight_decay : float, default 0.0
        L2 penalty of SGD.
    schedule : {"cosine", "constant"}, default "cosine"
        Learning rate over the steps.

    References
    ----------
    Torkzadehmahani et al., "Improved Localized Machine Unlearning Through the Lens of Memorization", TMLR 2025.

    Examples
    --------
    >>> from delfast.unlearning import Retrain
    >>> sorted(Retrain.needs)
    ['everything', 'init']
    """

    name: ClassVar[str] = "retrain"
    needs: ClassVar[frozenset[str]] = frozenset({"init", "everything"})
    epochs: int = 30
    lr: float = 0.1

    def prepare(self, task: UnlearningTask) -> None:
        """Load the state of a newly initialized network."""
        task.network.load_state_dict(fresh_state(task.network, required(task.init), task.seed))


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Method):
    """Gradient ascent on the forget set: the loss of a step is -L(S).

    Parameters
    ----------
    epochs : int, default 5
        Number of passes over the forget set; SalUn, appendix C.
    lr : float, default 1e-4
        Learning rate of the first step, in SalUn's range [1e-5, 1e-3].
    momentum : float, default 0.9
        Momentum of SGD.
    weight_decay : float, default 0.0
        L2 penalty of SGD.
    schedule : {"cosine", "constant"}, default "cosine"
        Learning rate over the steps.

    References
    ----------
    Graves et al., "Amnesiac Machine Learning", AAAI 2021. Thudi et al., "Unrolling SGD: Understanding Factors
    Influencing Machine Unlearning", EuroS&P 2022. Defaults: Fan et al., SalUn, ICLR 2024, appendix C.

    Examples
    --------
    >>> from delfast.unlearning import GradientAscent
    >>> GradientAscent().lr
    0.0001
    """

    name: ClassVar[str] = "gradient-ascent"
    step_plan: ClassVar[StepPlan] = "forget"
    needs: ClassVar[frozenset[str]] = frozenset({"forget"})
    epochs: int = 5
    lr: float = 1e-4

    def loss(self, task: UnlearningTask, step: Step) -> Tensor:
        """Return the negative loss of the forget set's batch."""
        return -task.loss(step["forget"])


@dataclass(frozen=True, kw_only=True)
class NegGradPlus(Method):
    """NegGrad+: descent on the retain set and ascent on the forget set, a batch of each in every step.

    The loss of a step is alpha L(R) - (1 - alpha) L(S).

    Parameters
    ----------
    epochs : int, default 10
        Number of passes over the retain set; the forget set is repeated.
    lr : float, default 0.01
        Learning rate of the first step.
    momentum : float, default 0.9
        Momentum of SGD.
    weight_decay : float, default 0.0
        L2 penalty of SGD.
    schedule : {"cosine", "constant"}, default "cosine"
        Learning rate over the steps.
    alpha : float, default 0.99
        Weight of the retain set, in [0, 1].

    References
    ----------
    Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023, section 5.

    Examples
    --------
    >>> from delfast.unlearning import NegGradPlus
    >>> NegGradPlus(alpha=0.95).alpha
    0.95
    """

    name: ClassVar[str] = "neggrad+"
    step_plan: ClassVar[StepPlan] = "pairs"
    needs: ClassVar[frozenset[str]] = frozenset({"forget"})
    alpha: float = 0.99

    def check(self) -> None:
        """Raise InputError for hyperparameters out of range."""
        super().check()
        require(self, "alpha", 0 <= self.alpha <= 1, "in [0, 1]")

    def loss(self, task: UnlearningTask, step: Step) -> Tensor:
        """Return alpha L(R) - (1 - alpha) L(S)."""
        return self.alpha * task.loss(step["retain"]) - (1 - self.alpha) * task.loss(step["forget"])


@dataclass(frozen=True, kw_only=True)
class Relabel(Method):
    """Random labels: train the forget set on wrong labels, and the retain set on its own.

    Each step uses a batch of one of the sets. The wrong labels are drawn uniformly from the other classes, again in
    every step. Within a SalLoc mask of half of the parameters this is SalUn, equation 5.

    Parameters
    ----------
    epochs : int, default 10
        Number of passes over both sets; SalUn, appendix C.
    lr : float, default 0.01
        Learning rate of the first step, in SalUn's range [5e-4, 5e-2].
    momentum : float, default 0.9
        Momentum of SGD.
    weight_decay : float, default 0.0
        L2 penalty of SGD.
    schedule : {"cosine", "constant"}, default "cosine"
        Learning rate over the steps.

    References
    ----------
    Golatkar et al., "Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks", CVPR 2020.
    Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency", ICLR 2024.

    Examples
    --------
    >>> from delfast.unlearning import Relabel
    >>> Relabel().epochs
    10
    """

    name: ClassVar[str] = "relabel"
    step_plan: ClassVar[StepPlan] = "mixed"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "logits"})

    def loss(self, task: UnlearningTask, step: Step) -> Tensor:
        """Return the loss of a retain batch, or the cross-entropy of a forget batch on wrong labels."""
        if "retain" in step:
            return task.loss(step["retain"])
        _, logits, targets = task.logits(step["forget"])
        return functional.cross_entropy(logits, self.labels(task, step, targets, logits.shape[1]))

    def labels(self, task: UnlearningTask, step: Step, targets: Tensor, classes: int) -> Tensor:
        """Return (N,) classes other than the targets (N,): a function of the seed, the epoch and the step."""
        shift = step["shift"] if "shift" in step else self._shift(task, step, classes, len(targets)).to(targets.device)
        return torch.where(targets == IGNORED, targets, (targets + shift) % classes)

    def values(self, task: UnlearningTask, step: Step) -> dict[str, Tensor]:
        """Return the "shift" from the labels of a forget batch to other classes: int64 (N,)."""
        if "forget" not in step or task.classes is None:
            return {}
        examples = examples_in(step["forget"], None) or 0
        shift = self._shift(task, step, task.classes, examples)
        return {"shift": shift.to(device_of(task.network), non_blocking=True)}

    def _shift(self, task: UnlearningTask, step: Step, classes: int, examples: int) -> Tensor:
        """Draw (N,) numbers in [1, classes)."""
        if classes < 2:
            raise InputError(
                f"expected at least 2 classes for '{self.name}', which draws wrong labels, got {classes}; choose "
                "another method"
            )
        mixed = (task.seed * 1_000_003 + step["epoch"]) * 1_000_003 + step["step"]
        return torch.randint(1, classes, (examples,), generator=torch.Generator().manual_seed(mixed % 2**63))


@dataclass(frozen=True, kw_only=True)
class L1Sparse(Method):
    """Finetuning with an L1 penalty on the parameters that may change.

    The loss of a step in epoch e is ``L(R) + gamma_e |θ|₁``. gamma_e falls linearly, epoch by epoch, from ``gamma`` to
    ``gamma / epochs``.

    Parameters
    ----------
    epochs : int, default 10
        Number of passes over the retain set.
    lr : float, default 0.01
        Learning rate of the first step.
    momentum : float, default 0.9
        Momentum of SGD.
    weight_decay : float, default 0.0
        L2 penalty of SGD.
    schedule : {"cosine", "constant"}, default "cosine"
        Learning rate over the steps.
    gamma : float, default 7e-5
        Weight of the penalty in the first epoch, in the paper's range [1e-6, 1e-4].

    References
    ----------
    Jia et al., "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023, equation 5.

    Examples
    --------
    >>> from delfast.unlearning import L1Sparse
    >>> L1Sparse(gamma=1e-5).gamma
    1e-05
    """

    name: ClassVar[str] = "l1-sparse"
    gamma: float = 7e-5

    def check(self) -> None:
        """Raise InputError for hyperparameters out of range."""
        super().check()
        require(self, "gamma", 0 <= self.gamma < float("inf"), ">= 0")

    def loss(self, task: UnlearningTask, step: Step) -> Tensor:
        """Return ``L(R) + gamma_e |θ|₁`` over the elements that may change."""
        masked = task.mask.match(trainable_parameters(task.network))
        norm = torch.stack([parameter.abs().sum() for _, parameter, _ in masked]).sum()
        loss: Tensor = task.loss(step["retain"]) + self._gamma(task, step).to(norm.dtype) * norm
        return loss

    def values(self, task: UnlearningTask, step: Step) -> dict[str, Tensor]:
        """Return "gamma", the weight of the penalty in this epoch: a float64 scalar."""
        gamma = self.gamma * (1 - step["epoch"] / self.epochs)
        # filled on the device: a copy there would make the host wait for it
        return {"gamma": torch.full((), gamma, dtype=torch.float64, device=device_of(task.network))}

    def _gamma(self, task: UnlearningTask, step: Step) -> Tensor:
        found: Tensor = (step if "gamma" in step else self.values(task, step))["gamma"]
        return found


@dataclass(frozen=True, kw_only=True)
class Scrub(Method):
    """SCRUB: move away from the teacher on the forget set, and stay near it on the retain set.

    The teacher is the network before unlearning. Steps on the forget set come first in each of the first ``max_epochs``
    epochs; their loss is -KL. Steps on the retain set, in every epoch, have the loss alpha KL + gamma L(R). KL is
    temperature² KL(teacher ‖ student) of logits divided by ``temperature``. The authors' notebooks use Adam, and lower
    the learning rate in steps; here it is SGD, as for the other methods.

    Parameters
    ----------
    epochs : int, default 10
        Number of passes over the retain set; the authors' notebooks.
    lr : float, default 5e-4
        Learning rate; the authors' notebooks.
    momentum : float, default 0.9
        Momentum of SGD.
    weight_decay : float, default 0.0
        L2 penalty of SGD.
    schedule : {"cosine", "constant"}, default "constant"
        Learning rate over the steps.
    alpha : float, default 0.001
        Weight of the divergence on the retain set; the authors' notebooks.
    gamma : float, default 0.99
        Weight of the cross-entropy on the retain set; the authors' notebooks.
    temperature : float, default 4.0
        Divisor of the logits; the authors' notebooks.
    max_epochs : int, default 2
        Number of leading epochs that use the forget set; the authors' notebooks.

    References
    ----------
    Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023, equation 4.

    Examples
    --------
    >>> from delfast.unlearning import Scrub
    >>> Scrub(max_epochs=3).forget_epochs
    3
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
        """Raise InputError for hyperparameters out of range."""
        super().check()
        require(self, "alpha", self.alpha >= 0, ">= 0")
        require(self, "gamma", self.gamma >= 0, ">= 0")
        require(self, "temperature", self.temperature > 0, "> 0")
        require(self, "max_epochs", self.max_epochs >= 0, ">= 0")

    @property
    def forget_epochs(self) -> int:
        """Number of leading epochs that use the forget set."""
        return self.max_epochs

    def loss(self, task: UnlearningTask, step: Step) -> Tensor:
        """Return -KL of a forget batch, or alpha KL + gamma L of a retain batch."""
        logits, targets, divergence = self._divergence(task, step["forget" if "forget" in step else "retain"])
        if "forget" in step:
            return -divergence
        loss: Tensor = self.alpha * divergence + self.gamma * functional.cross_entropy(logits, targets)
        return loss

    def _divergence(self, task: UnlearningTask, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (N, classes), targets (N,) and temperature² KL(teacher ‖ student)."""
        inputs, logits, targets = task.logits(batch)
        with torch.no_grad():
            teacher = functional.log_softmax(required(task.teacher)(inputs) / self.temperature, dim=1)
        student = functional.log_softmax(logits / self.temperature, dim=1)
        divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return logits, targets, divergence * self.temperature**2
