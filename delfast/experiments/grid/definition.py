"""A grid: settings x seeds x methods x strategies x budgets, read from a TOML file."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from delfast.errors import InputError, one_line
from delfast.experiments.config import Config, check_batch_size, job_config
from delfast.experiments.recipes import recipe
from delfast.experiments.schema import OF_64_BITS, check_table, kinds_of, shown
from delfast.files import read_text, reason
from delfast.jobs import read_job
from delfast.localization import BUDGET, STRATEGIES, check_selection, preset_settings
from delfast.localization.anytime import check_stop
from delfast.localization.criteria import check_criterion
from delfast.unlearning import METHODS, Method, make_method

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EVERYTHING = "everything"  # the strategy of a method without a mask
ORIGINAL, ORACLE = "original", "oracle"
# the keys of a grid and of its [[compare]], with the kind of each; brackets mean a list
GRID = {"title": str, "job": str, "seeds": [int], "budget": float, "shadows": int, "compare": [dict]} | dict.fromkeys(
    ("train", "settings", "unlearn", "methods", "strategies"), dict
)
BLOCK = {"methods": [str], "strategies": [str], "budgets": [float], "settings": [str]}
STOP = "stop_when_stable"  # the argument of ``localize`` that makes a localization anytime
STRATEGY = {  # top_h, an int or a float, is checked by itself
    **dict.fromkeys(("criterion", "granularity", "aggregate", "policy", "preset"), str),
    "per_example": bool,
    STOP: float,
}
MAX_CELLS = 10_000  # including shadows; at a minute each they take a week
MAX_NAME = 64  # bytes; a file's name, of at most 255, holds two names and a digest
# The names of files hold a digest of these arguments: "weighted-grad-all" once had a criterion of its own, and files of
# that time must be found again.
KEY_ARGUMENTS = {"weighted-grad-all": {"criterion": "weighted_grad_all"}}


@dataclass(frozen=True)
class NetworkSpec:
    """A network to train before any cell: the original of a setting and a seed, or its oracle.

    ``shadow`` > 0: a network that differs from it only in its seeds, for U-LiRA.
    """

    setting: str
    which: str
    config: Config
    shadow: int = 0

    @property
    def key(self) -> str:
        """The name of the network's directory. It differs for every configuration, except in the paths of the data."""
        shadow = f"-shadow{self.shadow}" if self.shadow else ""
        return f"{self.setting}-{self.config.seed}-{self.which}{shadow}-{_digest(asdict(self.config.without_paths()))}"


@dataclass(frozen=True)
class Cell:
    """One unlearning run.

    label: the method's name in the report.
    budget, localize: the mask's budget, and the arguments of its localization; None for the strategy "everything".
    shadows: the number of repetitions with other seeds, for U-LiRA.
    """

    setting: str
    config: Config
    label: str
    method: Method
    strategy: str
    budget: float | None
    localize: Mapping[str, Any] | None
    batch_size: int
    shadows: int

    @property
    def key(self) -> str:
        """The name of the cell's file. It differs for every configuration, except in the paths of the data."""
        determined = {
            "config": asdict(self.config.without_paths()),
            "method": {"name": self.method.name, **asdict(self.method)},
            "localize": None if self.localize is None else {**self.localize, **KEY_ARGUMENTS.get(self.strategy, {})},
            "budget": self.budget,
            "batch_size": self.batch_size,
        } | ({"shadows": self.shadows} if self.shadows else {})
        parts = [self.setting, str(self.config.seed), self.method.name, self.strategy]
        parts += [] if self.budget is None else [f"{self.budget:g}"]
        return "-".join([*parts, _digest(determined)])

    def original(self, shadow: int = 0) -> NetworkSpec:
        """The network that the cell, or its shadow, starts from."""
        return NetworkSpec(self.setting, ORIGINAL, self.config, shadow)

    def oracle(self, shadow: int = 0) -> NetworkSpec:
        """The network that the cell, or its shadow, is compared with."""
        return NetworkSpec(self.setting, ORACLE, self.config, shadow)

    def networks(self) -> list[NetworkSpec]:
        """All networks that the cell needs."""
        return [of(shadow) for shadow in range(self.shadows + 1) for of in (self.original, self.oracle)]


@dataclass(frozen=True)
class Grid:
    """A grid to run.

    cells: in the order of the file, each once.
    budget: the budget of tables that show only one.
    """

    title: str
    cells: list[Cell]
    budget: float

    @property
    def trained(self) -> list[NetworkSpec]:
        """The networks that the cells start from or are compared with, each once."""
        found = {}
        for cell in self.cells:
            for network in cell.networks():
                found[network.key] = network
        return list(found.values())


def read_grid(path: Path, data: str | None = None, *, data_is_read: bool = True, job_path: Path | None = None) -> Grid:
    """Read a grid; ``data`` replaces the data of [train], ``data_is_read`` is that of ``Config.check``.

    ``job_path``: the job file to use, in place of the grid's ``job``, a path from the grid's folder. It is executed.

    InputError for a missing file, an unknown table, key or name, and values out of range.

    ``title``. ``job``: a job file. ``seeds``: a list. ``budget``: of tables that show one, and of blocks without
    budgets (default 0.3). ``shadows``: 0 or at least 2; the number of repetitions of every network and every cell, for
    U-LiRA. ``[train]``: a run's configuration, as the options of ``delfast train``. ``[settings.NAME]``: a setting's
    changes to it. ``[unlearn]``: epochs, batch_size and other hyperparameters, for every method that has them.
    ``[methods.NAME]``: those of one method; with ``of = "del"`` NAME is a variant of "del". ``[strategies.NAME]``:
    arguments of ``localize``, under a new name. ``[[compare]]``: lists of ``methods``, ``strategies`` ("everything": no
    mask) and ``budgets``; every combination is a cell, in the listed ``settings`` or in all.
    """
    content = read_toml(path)
    check_table(content, GRID, f"'{path}'")
    for table in ("settings", "methods", "strategies"):
        check_table(content.get(table, {}), dict.fromkeys(content.get(table, {}), dict), f"[{table}]")
        for name in content.get(table, {}):
            if not re.fullmatch(r"[\w.+-]+", name) or len(name.encode()) > MAX_NAME:
                raise InputError(
                    f"expected names of [{table}] of letters, digits and . + - _, got {shown(name)}; rename it "
                    f"(at most {MAX_NAME} bytes)"
                )
    for name in content.get("strategies", {}):
        if name in (*STRATEGIES, EVERYTHING):
            raise InputError(f"[strategies.{name}] has the name of something else; choose another")
    check_table(content.get("unlearn", {}), kinds_of(*METHODS.values()) | {"batch_size": int}, "[unlearn]")
    strategies = {**STRATEGIES, **content.get("strategies", {})}
    own = _job_fields(path, content, data, job_path)
    settings = content.get("settings", {})
    if not settings or not content.get("compare"):
        raise InputError(f"expected '{path}' to have [settings.NAME] and [[compare]], one is missing; add it")
    shadows = content.get("shadows", 0)
    if shadows < 0 or shadows == 1:
        raise InputError(f"expected shadows of at least 2, or 0 for no U-LiRA, got {shadows}")
    seeds = content.get("seeds", [0])
    for block in content["compare"]:
        check_table(block, BLOCK, "[[compare]]")
    count = sum(_size({"settings": settings, **block}) for block in content["compare"]) * len(seeds) * (1 + shadows)
    if count > MAX_CELLS:
        raise InputError(f"expected a grid of at most {MAX_CELLS} cells, shadows included, got {count}; split it")
    budget = float(content.get("budget", BUDGET))
    check_selection(budget)
    cells: dict[str, Cell] = {}
    for block in content["compare"]:
        for setting in block.get("settings", settings):
            if setting not in settings:
                raise InputError(f"[[compare]] names the setting '{setting}', there is {', '.join(settings)}")
            for seed in seeds:
                values = {**content.get("train", {}), **settings[setting]}
                config = make_config(values, seed, data, data_is_read, own)
                for cell in _block(block, setting, config, content, strategies):
                    if cells.setdefault(cell.key, cell).label != cell.label:
                        raise InputError(f"'{cells[cell.key].label}' and '{cell.label}' are the same; drop one")
    return Grid(content.get("title", path.stem), list(cells.values()), budget)


def _size(block: Mapping[str, Any]) -> int:
    """The maximum number of cells of a block for one seed."""
    return math.prod(len(block.get(name, [0])) for name in BLOCK)


def _block(
    block: Mapping[str, Any], setting: str, config: Config, content: Mapping[str, Any], strategies: Mapping[str, Any]
) -> list[Cell]:
    cells, shadows = [], content.get("shadows", 0)
    for name in block.get("methods", ["del"]):
        method, batch_size = choose_method(name, config, content.get("unlearn", {}), content.get("methods", {}))
        for strategy in block.get("strategies", ["del"]):
            if strategy == EVERYTHING:
                if method.localizes:
                    raise InputError(f"[[compare]] lists '{name}' without a mask, which it needs; name strategies")
                cells.append(Cell(setting, config, name, method, strategy, None, None, batch_size, shadows))
                continue
            if strategy not in strategies:
                raise InputError(f"expected strategies among {', '.join(strategies)}, {EVERYTHING}; got '{strategy}'")
            if "everything" in method.needs:
                raise InputError(f"[[compare]] pairs '{name}' with '{strategy}', which works with '{EVERYTHING}' only")
            arguments = strategies[strategy]
            for budget in block.get("budgets", [content.get("budget", BUDGET)]):
                check_strategy(strategy, budget, arguments)
                share = float(budget)
                cells.append(Cell(setting, config, name, method, strategy, share, arguments, batch_size, shadows))
    return cells


def choose_method(
    name: str, config: Config, shared: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]
) -> tuple[Method, int]:
    """A method or variant, and its batch size.

    Its own hyperparameters replace those of all methods, which replace the published ones.
    """
    for table, values in own.items():
        base = values.get("of", table)
        if not isinstance(base, str) or base not in METHODS:
            raise InputError(f"expected [methods.NAME] to name one of {', '.join(METHODS)}, or of = one; got '{table}'")
        if "of" in values and table in (*METHODS, ORIGINAL, ORACLE):
            raise InputError(
                f"[methods.{table}] has the name of something else, with of = '{values['of']}'; choose another"
            )
    changes_of_own, where = dict(own.get(name, {})), f"[methods.{name}]"
    name = changes_of_own.pop("of", name)
    plain = make_method(name, {})
    check_table(changes_of_own, kinds_of(type(plain)) | {"batch_size": int}, where)
    shared = {key: value for key, value in shared.items() if hasattr(plain, key) or key == "batch_size"}
    if not plain.epochs:
        shared.pop("epochs", None)
    if name == "retrain":  # as the original was trained
        shared |= {key: getattr(config, key) for key in ("epochs", "lr", "weight_decay", "batch_size")}
    changes = {**config.recipe(name), **shared, **changes_of_own}
    batch_size = int(changes.pop("batch_size", config.batch_size))
    check_batch_size(batch_size)
    return make_method(name, changes), batch_size


def check_strategy(name: str, budget: float, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that ``localize`` would refuse, before hours of cells."""
    check_table({key: value for key, value in arguments.items() if key in STRATEGY}, STRATEGY, f"strategy '{name}'")
    for key, value in arguments.items():
        if not isinstance(value, str | float | int) or (isinstance(value, int) and value not in OF_64_BITS):
            raise InputError(f"expected {key} of strategy '{name}' to be a text or a number, got {shown(value)}")
    options = dict(arguments)
    criterion, per_example = options.pop("criterion", "weighted_grad"), options.pop("per_example", False)
    stop = options.pop(STOP, None)
    try:
        check_criterion(criterion, per_example)
        if stop is not None:
            check_stop(stop, criterion)
        check_selection(budget, criterion=criterion, **preset_settings(options.pop("preset", "paper"), **options))
    except TypeError as error:
        raise InputError(f"strategy '{name}': {one_line(error)}; see delfast.localize") from None


def _job_fields(
    path: Path, content: Mapping[str, Any], data: str | None, job_path: Path | None
) -> Mapping[str, Any] | None:
    """Return the configuration's fields of the grid's job file; None without one. The file is executed."""
    if job_path is None and "job" not in content:
        return None
    if data is not None:
        raise InputError("expected --data or a job, got both; leave one out")
    job = read_job(path.parent / content["job"] if job_path is None else job_path)
    if job.loss_fn is not None:
        raise InputError(
            f"expected a job without loss_fn, whose accuracies can be compared, got '{job.path}'; use "
            "`delfast unlearn --job` and `delfast evaluate --job`"
        )
    return job_config(job)


def make_config(
    values: Mapping[str, Any], seed: int, data: str | None, data_is_read: bool, own: Mapping[str, Any] | None = None
) -> Config:
    """Return the configuration of one seed; ``own``: the fields of a job file."""
    kinds = kinds_of(Config)
    del kinds["seed"]
    check_table(values, kinds, "[train] and [settings.NAME]")
    if own is not None:
        refused = sorted(values.keys() & {"data", "model", "data_dir", "image_size", "train_examples", "test_examples"})
        if refused:
            raise InputError(
                f"expected a grid with a job to have no {refused[0]} in [train] or [settings.NAME]; drop it"
            )
    defaults: dict[str, Any] = {"data": "digits", "model": "resnet18-thin", "forget_ratio": 0.1, "batch_size": 128}
    defaults |= own or {}
    values = {**defaults, **values}
    if "forget" not in values:
        raise InputError(
            "expected [settings.NAME] to have forget = 'iid', 'mislabelled', 'non-iid:2,5' or 'file:PATH'; add it"
        )
    if own is None:
        published = recipe(values["data"], values["model"])
        values = {"epochs": published.epochs, "lr": published.lr, **values}
    config = Config(**(values if data is None else {**values, "data": data}), seed=int(seed))
    if own is None and config.has_job:
        raise InputError(f"expected a job file as job = '{config.job_path}' above [train], got it as data; move it")
    config.check(data_is_read=data_is_read)
    return config


def read_toml(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = tomllib.loads(read_text(path))
        return content
    except FileNotFoundError:
        raise InputError(f"expected a TOML file at '{path}', there is none; check the path") from None
    except RecursionError:
        raise InputError(f"cannot read '{path}' as TOML: it is nested too deeply") from None
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"cannot read '{path}' as TOML: {reason(error)}") from None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
