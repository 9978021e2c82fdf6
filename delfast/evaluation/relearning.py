"""Relearning: how fast a network regains the forget set when it is finetuned, beside networks that never saw it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from delfast.arguments import check_count, check_number, check_type, describe
from delfast.batches import LossFn, check_differentiable, device_of, move, per_example_losses
from delfast.copies import copy_of
from delfast.errors import InputError
from delfast.evaluation.intervals import Figure
from delfast.evaluation.measuring import Measured, measure
from delfast.evaluation.relearn_ratio import MIN_EXAMPLES, compare, general_advantage
from delfast.evaluation.samples import Examples, UncutBatches, joined
from delfast.language import causal_lm_loss, is_token_batch
from delfast.naming import unwrap

MOMENTUM = 0.9
MEASURING_BATCH = 256

Network = nn.Module | Callable[[], nn.Module]
"""A network, or a function without arguments that returns one, so that one at a time is in memory."""


@dataclass(frozen=True)
class Relearning:
    """Settings of relearning: SGD with momentum 0.9 and a constant learning rate, in training mode, without decay.

    Parameters
    ----------
    steps : int, default 50
        Number of steps.
    lr : float, default 0.01
        Learning rate: a tenth of the training's in the DEL paper. It is high enough to move a network of that training,
        and low enough not to erase it.
    batch_size : int, default 64
        Examples of a step, at least 2, since BatchNorm needs two.
    fractions : tuple of float, default (0.01, 0.1)
        Parts of the forget set that are trained on, each in (0, 1); beside them, the retained examples alone.
    every : int, default 10
        Steps between two measurements.
    max_examples : int, default 500
        Maximum number of forget examples, and of control examples, that are measured: chosen by the seed.

    Examples
    --------
    >>> from delfast.evaluation import Relearning
    >>> Relearning(steps=40, every=20).measured_at
    [0, 20, 40]
    """

    steps: int = 50
    lr: float = 0.01
    batch_size: int = 64
    fractions: tuple[float, ...] = (0.01, 0.1)
    every: int = 10
    max_examples: int = 500

    def __post_init__(self) -> None:
        for name, minimum in (("steps", 1), ("batch_size", 2), ("every", 1), ("max_examples", 2)):
            check_count(name, getattr(self, name), minimum)
        lr = check_number("lr", self.lr)
        if not (math.isfinite(lr) and lr > 0):
            raise InputError(f"expected lr to be finite and above 0, got {describe(self.lr)}; pass a learning rate")
        if not isinstance(self.fractions, (tuple, list)):
            raise InputError(f"expected fractions to be a tuple, got {describe(self.fractions)}; pass (0.01, 0.1)")
        for fraction in self.fractions:
            if not 0 < check_number("fractions", fraction) < 1:
                raise InputError(f"expected fractions of the forget set between 0 and 1, got {describe(fraction)}")

    @property
    def measured_at(self) -> list[int]:
        """Return the steps after which the networks are measured: 0, every ``every``-th, and the last.

        Returns
        -------
        list of int
            Increasing, from 0 to ``steps``.
        """
        return sorted({*range(0, self.steps, self.every), self.steps})


@dataclass(frozen=True)
class RelearningCurve:
    """Course of one finetuning, of the audited network and of those that never saw the forget set.

    Parameters
    ----------
    steps : list of int
        The steps after which networks were measured, from 0.
    accuracy : list of float, optional
        The network's accuracy on the measured forget examples, in percent, after each of ``steps``. None with a
        ``loss_fn``.
    loss : list of float
        Its mean loss there, in nats.
    control : list of list of float
        The accuracies of each never-seen network; with a ``loss_fn`` their losses.
    trained_on : int
        Number of forget examples that were trained on; they are not measured.
    measured : int
        Number of forget examples that were measured.
    ratio : Figure, optional
        How much more the network regains than never-seen ones, see ``audit``.
    advantage : Figure, optional
        The network's odds of a right answer over those of never-seen networks, on control examples, which no network
        has seen, before the finetuning; with a ``loss_fn`` their mean loss over the network's. Above 1 if the network
        has learned more in general, below 1 if it has learned less. ``ratio`` counts a value below 1 as 1.
    compared_on : list of int
        For each never-seen network the number of measured forget examples that it was not trained on; 0 if these
        are fewer than two, and the network is left out.
    ratio_left_out : str, optional
        The reason why there is no ratio.

    Examples
    --------
    >>> from delfast.evaluation import RelearningCurve
    >>> RelearningCurve([0, 10], [50.0, 90.0], [0.7, 0.2], [[50.0, 60.0]], 0, 20).accuracy[-1]
    90.0
    """

    steps: list[int]
    accuracy: list[float] | None
    loss: list[float]
    control: list[list[float]]
    trained_on: int
    measured: int
    ratio: Figure | None = None
    advantage: Figure | None = None
    compared_on: list[int] = field(default_factory=list)
    ratio_left_out: str | None = None


@dataclass(frozen=True, eq=False)
class NeverSeen:
    """A network that relearning is compared with; knew: bool (forget examples,), those it was trained on, or None."""

    network: Network
    knew: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Sets:
    """The loaders of "forget", "retain" and "control", their numbers of examples, and how to read and draw them."""

    loaders: Mapping[str, Iterable[Any]]
    counts: Mapping[str, int]
    loss_fn: LossFn | None
    seed: int


def _counted(count: int) -> str:
    """Return a number of forget examples with its verb."""
    return "1 forget example is" if count == 1 else f"{count} forget examples are"


def run_relearning(
    model: nn.Module, never_seen: Sequence[NeverSeen], sets: Sets, settings: Relearning
) -> dict[str, RelearningCurve | str]:
    """Return the curves of finetuning on the retain set alone, and with each fraction of the forget set, by name.

    A text in place of a curve is the reason why it was left out.
    """
    count = sets.counts["forget"]
    # 10 % of 30 are 3 despite rounding
    trained = {"retain": 0} | {
        f"forget {100 * fraction:g} %": math.floor(fraction * count * (1 + 1e-12)) for fraction in settings.fractions
    }
    few = {
        name: f"{name.removeprefix('forget ')} of {_counted(count)} less than one example"
        for name, examples in trained.items()
        if name != "retain" and not examples
    }
    try:
        data = Data(sets, settings, max(trained.values()))
    except UncutBatches as error:  # other errors are of the data, and no figure is without them
        return dict.fromkeys(trained, str(error))
    courses: dict[str, list[Course | str]] = {name: [] for name in trained if name not in few}
    for number, each in enumerate([NeverSeen(model), *never_seen]):
        who = "the model" if number == 0 else f"never-seen network {number}"
        network = unwrap(loaded(each.network, who))
        for name, kept in courses.items():
            kept.append(finetuned(network, who, data, trained[name], each.knew))
    return {name: few[name] if name in few else curve_of(courses[name], trained[name], settings) for name in trained}


def loaded(network: Network, name: str) -> nn.Module:
    """Return the network, or the result of the function. InputError, with the name, if it is no network."""
    if isinstance(network, nn.Module):
        return network
    result = network()
    check_type(name, result, nn.Module, "a function that returns a torch.nn.Module")
    return result


# The finetuning


class Data:
    """The examples of every finetuning, the same for each network, in memory on the CPU."""

    def __init__(self, sets: Sets, settings: Relearning, most: int) -> None:
        """Read each set once; ``most``: the maximum number of forget examples that are trained on."""
        self.settings, self.loss_fn, self.seed = settings, sets.loss_fn, sets.seed
        self._generator = torch.Generator().manual_seed(sets.seed)
        self.order, control = (self._shuffled(torch.arange(sets.counts[name])) for name in ("forget", "control"))
        self.order, control = self.order[: most + settings.max_examples], control[: settings.max_examples]
        self.retained = self._draws(torch.arange(sets.counts["retain"]), settings.batch_size)
        # each fraction trains on the first of these, so that its draws do not depend on the other fractions
        self._forget_seed = int(torch.randint(2**62, (1,), generator=self._generator))
        self.retain, self.forget, held = (
            Examples(sets.loaders[name], positions.flatten(), sets.loss_fn, name)
            for name, positions in (("retain", self.retained), ("forget", self.order), ("control", control))
        )
        self.control_batches = self.measuring_batches(held, control)

    def batches(self, trained: int) -> Iterator[Any]:
        """Yield the batch of each step: retained examples, and at most half from the trained forget examples."""
        size = min(trained, self.settings.batch_size // 2)
        self._generator.manual_seed(self._forget_seed)
        forgotten = self._draws(self.order[:trained], size)
        for retained, positions in zip(self.retained, forgotten, strict=True):
            batch = self.retain.batch(retained[: len(retained) - size].tolist())
            yield joined(batch, self.forget.batch(positions.tolist())) if size else batch

    def measuring_batches(self, examples: Examples, positions: Tensor) -> list[Any]:
        """Return batches of these positions of a set."""
        return [examples.batch(part.tolist()) for part in torch.split(positions, MEASURING_BATCH)]

    def _draws(self, positions: Tensor, size: int) -> Tensor:
        """Return positions int64 (steps, size), each once before any occurs again."""
        steps = self.settings.steps
        if not size:
            return positions.new_empty(steps, 0)
        rounds = -(-steps * size // len(positions))
        return torch.cat([self._shuffled(positions) for _ in range(rounds)])[: steps * size].view(steps, size)

    def _shuffled(self, positions: Tensor) -> Tensor:
        return positions[torch.randperm(len(positions), generator=self._generator)]


@dataclass(frozen=True, eq=False)
class Course:
    """One network's measurements on forget examples (times, N): parts that are right, or losses.

    control: the same on control examples (M,), before the finetuning, which can harm a network.
    unknown: bool (N,), the forget examples that the network was not trained on before.
    """

    right: Tensor | None
    losses: Tensor
    control: Tensor
    unknown: Tensor


def finetuned(network: nn.Module, who: str, data: Data, trained: int, knew: Tensor | None) -> Course | str:
    """Finetune a copy of a network and return its measurements; the reason if it diverges."""
    settings = data.settings
    copied = copy_of(network)
    device = device_of(copied)
    for parameter in copied.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(copied.parameters(), lr=settings.lr, momentum=MOMENTUM)
    copied.train()
    positions = data.order[trained : trained + settings.max_examples]
    forgotten = data.measuring_batches(data.forget, positions)
    times = set(settings.measured_at)
    (general,), _ = measure([copied], data.control_batches, "control", data.loss_fn)
    measured = [_measured(copied, forgotten, data)]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(data.seed)  # of dropout, whose kernels accept no generator
        for step, batch in enumerate(data.batches(trained), 1):
            loss = _losses(copied, move(batch, device), data.loss_fn).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if not math.isfinite(loss.item()) or not all(bool(p.isfinite().all()) for p in copied.parameters()):
                return f"finetuning {who} with lr {settings.lr:g} diverged in step {step}; pass a lower lr"
            if step in times:
                measured.append(_measured(copied, forgotten, data))
    right, losses = zip(*measured, strict=True)
    unknown = torch.ones(len(positions), dtype=torch.bool) if knew is None else ~knew[positions]
    rights = None if right[0] is None else torch.stack(right)
    parts = _right(general)
    return Course(rights, torch.stack(losses), general.losses if parts is None else parts, unknown)


def _losses(network: nn.Module, batch: Any, loss_fn: LossFn | None) -> Tensor:
    if loss_fn is None and is_token_batch(batch):
        loss_fn = causal_lm_loss
    losses = per_example_losses(network, batch, loss_fn)
    check_differentiable(losses)
    return losses


def _measured(network: nn.Module, forgotten: list[Any], data: Data) -> tuple[Tensor | None, Tensor]:
    """Return for each forget example the part of its units that is right, and its loss."""
    (found,), _ = measure([network], forgotten, "forget", data.loss_fn)
    return _right(found), found.losses


def _right(measured: Measured) -> Tensor | None:
    return None if measured.right is None else measured.right / measured.units


def curve_of(courses: Sequence[Course | str], trained: int, settings: Relearning) -> RelearningCurve | str:
    """Return the curve of the model's and the never-seen networks' courses, or the first one's reason."""
    whole = []
    for course in courses:
        if isinstance(course, str):
            return course
        whole.append(course)
    own = whole[0]
    is_loss = own.right is None
    values = [course.losses if course.right is None else course.right for course in whole]
    scale = 1 if is_loss else 100
    others = [course.unknown for course in whole[1:]]
    unknown_counts = [int(unknown.sum()) for unknown in others]
    usable = [other.control for other, count in zip(whole[1:], unknown_counts, strict=True) if count >= MIN_EXAMPLES]
    advantage = general_advantage(own.control, usable, is_loss)
    ratio = compare(values[0], values[1:], others, is_loss, advantage) if advantage else None
    return RelearningCurve(
        steps=settings.measured_at,
        accuracy=None if is_loss else (scale * values[0].mean(1)).tolist(),
        loss=own.losses.mean(1).tolist(),
        control=[
            (scale * value[:, unknown].mean(1)).tolist() if unknown.any() else []
            for value, unknown in zip(values[1:], others, strict=True)
        ],
        trained_on=trained,
        measured=own.losses.shape[1],
        ratio=ratio.figure() if ratio else None,
        advantage=advantage.figure() if advantage else None,
        compared_on=[count if count >= MIN_EXAMPLES else 0 for count in unknown_counts],
        ratio_left_out=None if ratio else _reason(len(others), bool(usable), own.losses.shape[1]),
    )


def _reason(networks: int, usable: bool, measured: int) -> str:
    """Return why there is no ratio."""
    if not networks:
        return "there is no never-seen network to compare with"
    if measured < MIN_EXAMPLES:
        return f"{measured} measured forget example{'' if measured == 1 else 's'}: a variance needs {MIN_EXAMPLES}"
    if not usable:
        least = f"{MIN_EXAMPLES} measured forget examples that it was not trained on"
        return f"none of {networks} never-seen networks has {least}"
    return "a mean loss is not above 0"
