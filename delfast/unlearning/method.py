"""The base of every unlearning method: hyperparameters, the steps of its epochs, and its loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from delfast.batches import LOSS_FN_ADVICE, LossFn, class_indices, device_of, move, per_example_losses, split_batch
from delfast.errors import InputError
from delfast.execution import DEFAULT_EXECUTION, Execution
from delfast.mask import Mask
from delfast.reset import Init
from delfast.unlearning.loop import Schedule
from delfast.unlearning.steps import Step, StepPlan

LOGITS_ADVICE = f"{LOSS_FN_ADVICE}, to a method that needs no logits"  # the others refuse a loss_fn


@dataclass
class UnlearningTask:
    """The network and the data that a method works on.

    model: the network as the caller passed it.
    network: the module inside its wrappers.
    mask: the elements that may change.
    teacher: a copy of the network before unlearning, in eval mode, for methods that need it.
    classes: the number of the network's outputs, if the method needs logits.
    execution: the memory format of the inputs.
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
    classes: int | None = None
    execution: Execution = DEFAULT_EXECUTION

    def loss(self, batch: Any) -> Tensor:
        """Return the mean loss of a batch."""
        return per_example_losses(self.model, batch, self.loss_fn, self.execution).mean()

    def logits(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, logits (N, classes) and int64 targets (N,) of a batch."""
        _, inputs, targets = split_batch(batch, LOGITS_ADVICE)
        inputs = self.execution.laid_out(move(inputs, device_of(self.network)), self.network)
        logits = self.model(inputs)
        return inputs, logits, class_indices(targets, logits, advice=LOGITS_ADVICE)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of the unlearning methods: ``prepare`` once, then SGD on ``loss`` for ``epochs``.

    A subclass sets the class attributes:

    - name: its name in ``METHODS``.
    - step_plan: the batches of each step.
    - needs: a subset of {"forget", "init", "teacher", "logits", "everything"}; "teacher" is a copy of the network
      before unlearning, "logits" excludes a ``loss_fn``, "everything" excludes a mask.
    - trains_head: whether the head is trained in full, whatever the mask.
    - localizes: whether ``localize`` makes a mask where none is passed; otherwise everything may change without a mask.

    Parameters
    ----------
    epochs : int, default 10
        Number of passes over the retain set, or over the sets that the method uses.
    lr : float, default 0.01
        Learning rate of the first step.
    momentum : float, default 0.9
        Momentum of SGD, in [0, 1).
    weight_decay : float, default 0.0
        L2 penalty of SGD.
    schedule : {"cosine", "constant"}, default "cosine"
        "cosine" lowers the learning rate step by step to 1 % of ``lr``.

    Raises
    ------
    TypeError
        For a subclass with the attribute ``layout``, the name of ``step_plan`` before version 0.2.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> from typing import ClassVar
    >>> from delfast.unlearning import Method
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Halved(Method):
    ...     name: ClassVar[str] = "halved"
    ...     def loss(self, task, step):
    ...         return 0.5 * task.loss(step["retain"])
    >>> Halved(epochs=3)
    Halved(epochs=3, lr=0.01, momentum=0.9, weight_decay=0.0, schedule='cosine')
    """

    name: ClassVar[str]
    step_plan: ClassVar[StepPlan] = "retain"
    needs: ClassVar[frozenset[str]] = frozenset()
    trains_head: ClassVar[bool] = False
    localizes: ClassVar[bool] = False

    epochs: int = 10
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"

    def __init_subclass__(cls) -> None:
        if "layout" in cls.__dict__:  # it would be ignored, and the retain set trained on
            raise TypeError(f"{cls.__name__}: 'layout' is now 'step_plan'; rename the attribute")

    def check(self) -> None:
        """Raise InputError for hyperparameters out of range."""
        require(self, "epochs", self.epochs >= 1, ">= 1")
        require(self, "lr", 0 < self.lr < float("inf"), "> 0")
        require(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        require(self, "weight_decay", 0 <= self.weight_decay < float("inf"), ">= 0")

    @property
    def forget_epochs(self) -> int | None:
        """Number of leading epochs that use the forget set; None for all."""
        return None

    def prepare(self, task: UnlearningTask) -> None:
        """Change the network before training; not called when a run is resumed.

        Parameters
        ----------
        task : UnlearningTask
            The network, changed in place; the data and the mask.
        """

    def values(self, task: UnlearningTask, step: Step) -> dict[str, Tensor]:
        """Return the tensors that ``loss`` reads from a step besides its batches. By default none.

        A step that is captured in a CUDA graph repeats every Python value that it was captured with. So a value that
        changes from step to step, or from epoch to epoch, must be returned here as a tensor.

        Parameters
        ----------
        task : UnlearningTask
            The network, the data and the mask.
        step : dict of str to Any
            The batches under "retain" and "forget", as the step plan has them; the numbers "epoch" and "step".

        Returns
        -------
        dict of str to Tensor
            Names, which are added to the step, and tensors on the network's device.
        """
        return {}

    def loss(self, task: UnlearningTask, step: Step) -> Tensor:
        """Return the loss of one step: by default the loss of the retain set's batch.

        Also called before ``prepare``, in eval mode, for the first batch of each set: an error there changes nothing.

        Parameters
        ----------
        task : UnlearningTask
            The network, the data and the mask.
        step : dict of str to Any
            The batches under "retain" and "forget", as the step plan has them; the numbers "epoch" and "step"; the
            tensors of ``values``.

        Returns
        -------
        Tensor
            The loss, a scalar.
        """
        return task.loss(step["retain"])


def require(method: Method, name: str, good: bool, range_: str) -> None:
    """Raise InputError unless the value of this hyperparameter is in its range."""
    if not good:
        raise InputError(
            f"expected {name} {range_} for '{method.name}', got {getattr(method, name)}; pass such a value, or leave "
            "it to the default"
        )


def required(value: Any) -> Any:
    """Return a value that the method needs, and that ``unlearn`` has checked to be there."""
    assert value is not None
    return value
