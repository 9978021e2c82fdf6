"""The constants of a job file: batch size, training, thresholds of acceptance, and settings of unlearning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from delfast.arguments import check_count, check_number, describe
from delfast.errors import InputError
from delfast.jobs.source import ADVICE, Source
from delfast.localization import BUDGET, STRATEGIES, check_selection
from delfast.unlearning import METHODS, make_method

BATCH_SIZE = 128
OWN_SETTINGS = ("method", "budget", "strategy", "batch_size")  # the keys of a setting beside hyperparameters


@dataclass(frozen=True)
class Training:
    """Settings of a job's training: SGD with momentum 0.9, the rate falls by a cosine to 1 % of the first.

    Parameters
    ----------
    epochs : int, default 30
        Passes over the training examples. The default and that of ``lr`` are the DEL paper's for CIFAR-10, ResNet-18.
    lr : float, default 0.1
        Learning rate of the first step.
    weight_decay : float, default 0.0
        Weight decay.

    Examples
    --------
    >>> from delfast.jobs import Training
    >>> Training(epochs=5).lr
    0.1
    """

    epochs: int = 30
    lr: float = 0.1
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Accept:
    """The thresholds under which an unlearned network is accepted; None: the figure has no threshold.

    The defaults are the project's choice: no publication states them. Oracles, networks that were retrained without
    the forget set, hold them in at least 9 of 10 cases: measured for 20 and 50 random examples of 1,400 digits with
    the job of `delfast init-job` (`python -m benchmarks.thresholds`; the table is in docs/ledger.md). Other data have
    other figures: measure an oracle of your own.

    Parameters
    ----------
    test_drop : float, optional
        Maximum loss of test accuracy against the ledger's first network, in percentage points, so that losses of
        several runs count together. Default 2.
    attack_advantage : float, optional
        Maximum advantage of the confidence attack, 2 (balanced accuracy - 0.5), from 0 to 1. Default 0.25. It limits
        the largest advantage of all forget sets so far. Of 100 sets of 20 examples that a network never saw, 21 were
        above 0.1, 3 above 0.2 and 1 above 0.25, so that about 9 in 10 ledgers of ten such sets hold 0.25.
    relearn_ratio : float, optional
        Maximum ratio of the odds of a correct answer during relearning to those of networks that never saw the
        examples, above 0. Default 1.5.

    Examples
    --------
    >>> from delfast.jobs import Accept
    >>> Accept().test_drop
    2.0
    """

    test_drop: float | None = 2.0
    attack_advantage: float | None = 0.25
    relearn_ratio: float | None = 1.5


RANGES = {"test_drop": (0.0, 100.0), "attack_advantage": (0.0, 1.0), "relearn_ratio": (0.0, math.inf)}


def read_batch_size(source: Source) -> int:
    """Return the job's ``batch_size``. InputError, with file and line, for another kind of value."""
    with source.at("batch_size"):
        return check_count("batch_size", source.get("batch_size", BATCH_SIZE))


def read_training(source: Source) -> Training:
    """Return the job's ``training``. InputError, with file and line, for an unknown key or an unfit value."""
    given = _table(source, "training", tuple(field.name for field in fields(Training)))
    values = {**asdict(Training()), **given}
    with source.at("training"):
        epochs = check_count("epochs of training", values["epochs"])
        lr, decay = (check_number(f"{name} of training", values[name]) for name in ("lr", "weight_decay"))
        if not 0 < lr < math.inf:
            raise InputError(f"expected lr of training above 0, got {lr}; {ADVICE}")
        if not 0 <= decay < math.inf:
            raise InputError(f"expected weight_decay of training of 0 or more, got {decay}; {ADVICE}")
    return Training(epochs, lr, decay)


def read_accept(source: Source) -> Accept:
    """Return the job's ``accept``: the default thresholds without one, else the given thresholds alone."""
    if source.get("accept", None) is None:
        return Accept()
    given = _table(source, "accept", tuple(RANGES))
    found: dict[str, float | None] = dict.fromkeys(RANGES)
    with source.at("accept"):
        for name, value in given.items():
            if value is None:
                continue
            low, high = RANGES[name]
            found[name] = number = check_number(f"{name} of accept", value)
            if not low <= number <= high or math.isinf(number):
                raise InputError(f"expected {name} of accept from {low:g} to {high:g}, got {number}; {ADVICE}")
        if all(value is None for value in found.values()):
            raise InputError(f"expected accept to have at least one of {', '.join(RANGES)}, got none; {ADVICE}")
    return Accept(**found)


def read_settings(source: Source) -> tuple[Mapping[str, Any], ...]:
    """Return the job's ``settings``, each a method with its hyperparameters, budget, strategy and batch size."""
    given = source.get("settings", [{"method": "del", "budget": BUDGET}])
    with source.at("settings"):
        if not isinstance(given, (list, tuple)) or not given or not all(isinstance(each, Mapping) for each in given):
            raise InputError(f"expected settings to be a list of dicts, at least one, got {describe(given)}; {ADVICE}")
        for setting in given:
            _check_setting(setting)
    return tuple(dict(setting) for setting in given)


def _check_setting(setting: Mapping[str, Any]) -> None:
    method = setting.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(f"expected a setting to have 'method', one of {', '.join(METHODS)}; got {describe(method)}")
    make_method(method, hyperparameters(setting))
    check_selection(setting.get("budget", BUDGET))
    check_count("batch_size of a setting", setting.get("batch_size", BATCH_SIZE))
    strategy = setting.get("strategy", "del")
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise InputError(f"expected strategy of a setting among {', '.join(STRATEGIES)}; got {describe(strategy)}")


def hyperparameters(setting: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a setting's method."""
    return {name: value for name, value in setting.items() if name not in OWN_SETTINGS}


def _table(source: Source, name: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    """Return a constant that is a dict with these keys at most; an empty dict without one."""
    value = source.get(name, {})
    with source.at(name):
        if not isinstance(value, Mapping):
            raise InputError(f"expected {name} to be a dict, got {describe(value)}; {ADVICE}")
        unknown = [key for key in value if key not in keys]
        if unknown:
            raise InputError(f"{name} has the unknown key {unknown[0]!r}; expected {', '.join(keys)}")
    return value
