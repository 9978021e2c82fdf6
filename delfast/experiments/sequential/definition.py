"""The definition of a measurement of sequential requests, read from a TOML file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from delfast.arguments import check_choice
from delfast.errors import InputError
from delfast.evaluation import Relearning
from delfast.experiments.config import Config
from delfast.experiments.grid.definition import check_strategy, choose_method, make_config, read_toml
from delfast.experiments.schema import Number, check_table, kinds_of, shown
from delfast.localization import BUDGET, STRATEGIES
from delfast.unlearning import METHODS, Method

LocalizeOn = Literal["new", "all"]
ORIGINAL = "original"  # the record of the network before the first request
KINDS = {"title": str, "seeds": [int], "controls": int, "requests": [dict]} | dict.fromkeys(
    ("train", "unlearn", "methods", "relearning", "sequences"), dict
)
REQUEST = {"forget": str, "share": Number(0, 1)}
SEQUENCE = {"method": str, "strategy": str, "budget": float, "localize_on": str}
RELEARNING = {
    **dict.fromkeys(("steps", "batch_size", "every", "max_examples"), int),
    "lr": float,
    "fractions": [float],
}
MIN_REQUESTS = 2


@dataclass(frozen=True)
class Request:
    """The examples of a request: a forget spec other than ``file:``, and a fraction of the training set."""

    forget: str
    share: float


@dataclass(frozen=True)
class Sequence:
    """One method that serves all requests.

    strategy, budget: None without a mask.
    localize_on: the examples that a mask is localized on: the new request's, or those of all requests so far.
    """

    name: str
    method: Method
    batch_size: int
    strategy: str | None
    budget: float | None
    localize_on: LocalizeOn

    def described(self) -> dict[str, Any]:
        """Return the sequence in plain values."""
        values = {"method": self.method.name, "hyperparameters": asdict(self.method), "batch_size": self.batch_size}
        if self.strategy is None:
            return values
        return {**values, "strategy": self.strategy, "budget": self.budget, "localize_on": self.localize_on}


@dataclass(frozen=True)
class Definition:
    """A measurement: every sequence serves the requests of every seed.

    configs: the configuration of each seed.
    controls: number of networks, for each seed, that never saw an example of any request; relearning is compared with
        them.
    """

    title: str
    configs: tuple[Config, ...]
    requests: tuple[Request, ...]
    sequences: tuple[Sequence, ...]
    controls: int
    relearning: Relearning

    def digest(self, config: Config, sequence: Sequence | None, *, relearning: bool = False) -> str:
        """Return a digest of everything that determines the records of a sequence, or its record of relearning.

        ``sequence``: None for the original.
        """
        determined: list[Any] = [asdict(config), [asdict(request) for request in self.requests]]
        determined += [] if sequence is None else [sequence.described()]
        determined += [asdict(self.relearning), self.controls] if relearning else []
        return hashlib.sha256(json.dumps(determined, sort_keys=True).encode()).hexdigest()[:16]


def read_definition(path: Path, data: str | None = None, *, data_is_read: bool = True) -> Definition:
    """Read a definition; ``data`` replaces the data of [train]. InputError for anything that cannot be run.

    ``title``. ``seeds``: a list. ``controls``: see ``Definition``. ``[train]``, ``[unlearn]``, ``[methods.NAME]``: as
    in a grid of `delfast compare`. ``[[requests]]``: ``forget`` (iid, non-iid:CLASSES or mislabelled) and ``share``, in
    their order. ``[sequences.NAME]``: ``method`` (default: NAME), and for a mask ``strategy``, ``budget`` and
    ``localize_on`` ("new" or "all"). ``[relearning]``: the fields of ``delfast.evaluation.Relearning``.
    """
    content = read_toml(path)
    check_table(content, KINDS, f"'{path}'")
    requests = tuple(_request(values, number) for number, values in enumerate(content.get("requests", []), 1))
    if len(requests) < MIN_REQUESTS:
        raise InputError(f"expected '{path}' to have at least {MIN_REQUESTS} [[requests]], got {len(requests)}")
    train = content.get("train", {}) | {"forget": requests[0].forget, "forget_ratio": requests[0].share}
    configs = tuple(make_config(train, seed, data, data_is_read) for seed in content.get("seeds", [0]))
    check_table(content.get("unlearn", {}), kinds_of(*METHODS.values()) | {"batch_size": int}, "[unlearn]")
    sequences = tuple(_sequence(name, configs[0], content) for name in content.get("sequences", {}))
    if not sequences:
        raise InputError(f"expected '{path}' to have [sequences.NAME], there is none; add one")
    controls = content.get("controls", 1)
    if controls < 1:
        raise InputError(f"expected at least 1 control, got {controls}")
    check_table(content.get("relearning", {}), RELEARNING, "[relearning]")
    relearning = Relearning(**content.get("relearning", {}))
    return Definition(content.get("title", path.stem), configs, requests, sequences, controls, relearning)


def _request(values: Mapping[str, Any], number: int) -> Request:
    where = f"request {number}"
    check_table(values, REQUEST, where)
    for name in REQUEST:
        if name not in values:
            raise InputError(f"expected {where} to have '{name}'; add it")
    if values["forget"].startswith("file:"):
        raise InputError(f"expected {where} to be iid, non-iid:CLASSES or mislabelled, got {shown(values['forget'])}")
    return Request(values["forget"], float(values["share"]))


def _sequence(name: str, config: Config, content: Mapping[str, Any]) -> Sequence:
    if not re.fullmatch(r"[\w.+]+(-[\w.+]+)*", name) or name == ORIGINAL:
        raise InputError(f"expected names of [sequences] of letters, digits and . + - _, got {shown(name)}; rename it")
    values = content["sequences"][name]
    check_table({name: values}, {name: dict}, "[sequences]")
    check_table(values, SEQUENCE, f"[sequences.{name}]")
    method, batch_size = choose_method(
        values.get("method", name), config, content.get("unlearn", {}), content.get("methods", {})
    )
    localize_on = values.get("localize_on", "new")
    check_choice("localize_on", localize_on, LocalizeOn)
    strategy = values.get("strategy", "del" if method.localizes else None)
    if strategy is None:
        if values.keys() & {"budget", "localize_on"}:
            raise InputError(f'[sequences.{name}] has a budget or localize_on without a mask; add strategy = "del"')
        return Sequence(name, method, batch_size, None, None, "new")
    if strategy not in STRATEGIES:
        raise InputError(
            f"expected the strategy of [sequences.{name}] to be {', '.join(STRATEGIES)}; got {shown(strategy)}"
        )
    if "everything" in method.needs:
        raise InputError(f"[sequences.{name}] pairs '{method.name}' with a mask; drop its strategy")
    budget = float(values.get("budget", BUDGET))
    check_strategy(strategy, budget, STRATEGIES[strategy])
    return Sequence(name, method, batch_size, strategy, budget, localize_on)
