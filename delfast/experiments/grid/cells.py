"""Runs a grid: first the networks, then the cells, each in a worker process, each kept in a file of its own.

What is in a file is never computed again, and is refused where the networks it was measured with are others now. A file
is written whole or not at all, so that a run that is killed loses what was in progress and no more.
"""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from delfast.errors import InputError
from delfast.evaluation import (
    Metrics,
    changed_fraction,
    gaps,
    kl_divergence,
    logit_confidences,
    predictions,
    svc_attacks,
    u_lira_leave_one_out,
)
from delfast.experiments import pipeline
from delfast.experiments.grid.definition import ORIGINAL, Cell, Grid, Trained
from delfast.experiments.interrupts import exit_after, interrupts_held
from delfast.experiments.run import (
    ACCURACIES,
    GAPS,
    LOSSES,
    MODEL,
    ORIGIN,
    PERCENT,
    SECONDS,
    SHARE,
    SUMMARY,
    Config,
    Run,
    choose_device,
    load_data,
    load_model,
    read_summary,
    start,
)
from delfast.experiments.schema import Each, check_record, shown
from delfast.files import one_line, read_json, write_json
from delfast.localization import WHOLE_TRAINING_SET, localize
from delfast.provenance import provenance
from delfast.unlearning import TrainingOptions, UnlearnResult, unlearn
from delfast.unlearning.loop import Diverged, Precision

ATTACKS = ("correctness", "confidence", "entropy", "m_entropy", "prob")  # of SalUn
MEMBERSHIP = "membership.json"  # beside a network's summary: the membership inference on it
CELL: dict[str, Any] = {
    "cell": {"setting": str, "seed": int, "strategy": str, "budget": (float, None)},
    "networks": Each(str),
}
FAILED = {"failed": str}
RESULT: dict[str, Any] = {
    "metrics": {**ACCURACIES, **LOSSES, **GAPS, "kl_forget": float, "kl_test": float},
    "attacks": dict.fromkeys(ATTACKS, PERCENT),
    "mask": {"fraction": SHARE},
    "changed": SHARE,
    "seconds": SECONDS,
    "provenance": {**ORIGIN, "threads": int},
    "u_lira?": PERCENT,
}
FEW_SHADOWS = 64  # below that LiRA takes one variance for all examples (Carlini et al., IEEE S&P 2022, section VI-A)
Watch = Callable[[str, int, int], None]
"""``watch(what, done, of)``: called after every network and every cell."""


def run_grid(
    grid: Grid, directory: Path, workers: int, threads: int, device: str, watch: Watch
) -> list[dict[str, Any]]:
    """Run what is not there yet; the results of all cells, in the grid's order: see ``measure_cell``.
    ``device``: as for ``choose_device``, which each worker calls for itself.
    """
    (directory / "networks").mkdir(exist_ok=True)
    (directory / "cells").mkdir(exist_ok=True)
    _finished(directory, grid)  # raises before anything is trained, and again before hours of cells
    cells = [cell for cell in grid.cells if not cell_path(directory, cell).is_file()]
    in_use = {network.key for cell in cells for network in cell.networks()}
    networks = [n for n in grid.trained if not _is_trained(directory, n, whole=n.key in in_use)]
    tasks = max(len(networks), len(cells), 1)
    with _workers(min(workers, tasks), threads) as pool:
        _all(pool, _train, [(directory, network, device) for network in networks], "networks", watch)
        _finished(directory, grid)
        _all(pool, run_cell, [(directory, cell, device) for cell in cells], "cells", watch)
    return _finished(directory, grid)


def _finished(directory: Path, grid: Grid) -> list[dict[str, Any]]:
    """The results that are there, in the grid's order. InputError for one measured with other networks than are there:
    its gaps are to another oracle, trained elsewhere or on other data.
    """
    results = []
    for cell in grid.cells:
        path = cell_path(directory, cell)
        if path.is_file():
            results.append(_read_cell(path, cell))
            for which, digest in _digests(directory, cell).items():
                if results[-1]["networks"].get(which) != digest:
                    raise InputError(
                        f"'{path}' was not measured with the {which} that is there; delete it to run it anew"
                    )
    return results


def _read_cell(path: Path, cell: Cell) -> dict[str, Any]:
    """A cell's file. InputError if it is damaged, or of another cell than its name says."""
    content, advice = read_json(path), "; delete the file to run the cell again"
    check_record(content, CELL, f"'{path}'", advice)
    check_record(content, FAILED if "failed" in content else RESULT, f"'{path}'", advice)
    for name, value in _described(cell).items():
        if name in CELL["cell"] and content["cell"][name] != value:
            raise InputError(
                f"expected '{path}' to be of {name} {shown(value)}, got {shown(content['cell'][name])}{advice}"
            )
    content["cell"]["method"] = cell.label  # a grid that has changed since may call it otherwise
    return cast(dict[str, Any], content)


def _digests(directory: Path, cell: Cell) -> dict[str, str]:
    """Of those networks that a cell needs that are there."""
    found = {network: _digest(network_path(directory, network)) for network in cell.networks()}
    return {f"{network.which}{network.shadow or ''}": digest for network, digest in found.items() if digest}


def _digest(path: Path) -> str | None:
    """Of the network that the summary there tells of; None if there is none."""
    return str(read_summary(path)["digests"]["model"]) if (path / SUMMARY).is_file() else None


@contextmanager
def _workers(count: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes of so many threads each. They end with this process, however it ends, and at once if it is
    stopped. After an error they finish what they have begun, and it is kept.
    """
    context = multiprocessing.get_context("spawn")  # forked processes would share OpenMP's threads
    theirs, ours = context.Pipe(duplex=False)  # nothing is sent; that our end closes is the message
    with ours, ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(threads, theirs)) as pool:
        try:
            yield pool
        except BaseException as error:
            if not isinstance(error, Exception):
                ours.close()
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker(threads: int, parent: Connection) -> None:
    exit_after(lambda: parent.poll(None))
    torch.set_num_threads(threads)


def _all(pool: ProcessPoolExecutor, task: Any, arguments: Sequence[Any], what: str, watch: Watch) -> None:
    """Run the task for all arguments; the first failure stops the rest and is raised."""
    with interrupts_held():  # a terminal sends Ctrl-C to the workers too, which have nothing to say to it
        waiting: set[Future[Any]] = {pool.submit(task, *each) for each in arguments}
    watch(what, 0, len(arguments))
    done = 0
    while waiting:
        finished, waiting = wait(waiting, timeout=1, return_when=FIRST_EXCEPTION)
        for future in finished:
            future.result()
            done += 1
        watch(what, done, len(arguments))


def cell_path(directory: Path, cell: Cell) -> Path:
    return directory / "cells" / f"{cell.key}.json"


def network_path(directory: Path, network: Trained) -> Path:
    return directory / "networks" / network.key


def _is_trained(directory: Path, network: Trained, whole: bool) -> bool:
    """Are its results there and, if it is still to be used, the network itself? Nobody asks for attacks on shadows."""
    names = [SUMMARY, *([] if network.shadow else [MEMBERSHIP]), *([MODEL] if whole else [])]
    return all((network_path(directory, network) / name).is_file() for name in names)


def check_networks(directory: Path, grid: Grid) -> None:
    """InputError unless the results of all the grid's networks are there, which a report needs."""
    for network in grid.trained:
        if not _is_trained(directory, network, whole=False):
            path = network_path(directory, network)
            raise InputError(f"expected '{path}' to hold {SUMMARY} and {MEMBERSHIP}, it does not; run the grid first")


def _train(directory: Path, network: Trained, device: str) -> None:
    """Train a network into a run directory, whole or not at all, and attack it as cells are.

    InputError if it was there before, without ``model.safetensors``, and is another now: cells that are finished were
    measured with the old one, and it stays.
    """
    path = network_path(directory, network)
    partial = path.with_name(f".{path.name}")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run has left
    run = _run(network.config, device)
    train = pipeline.train if network.which == ORIGINAL else pipeline.oracle
    model = train(run, partial, shadow=network.shadow).model
    if not network.shadow:
        found = {name: predictions(model, loader) for name, loader in run.sets().items()}
        write_json(partial / MEMBERSHIP, _attacks(run, found))
    if _digest(path) not in (None, _digest(partial)):
        raise InputError(
            f"expected '{path}', trained anew, to be the network it was, it is not (other threads, torch or machine); "
            f"restore its {MODEL}, or delete it and the cells measured with it"
        )
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def run_cell(directory: Path, cell: Cell, device: str) -> None:
    """Measure a cell and write it down. One that diverges, or that its method refuses, is written down as ``failed``,
    with the reason: the others go on, and the report names it. Errors of the data, the networks and the device are not
    the cell's, and end the run.
    """
    run = _run(cell.config, device)
    for network in cell.networks():
        load_model(run, network_path(directory, network))
    content: dict[str, Any] = {"cell": _described(cell), "networks": _digests(directory, cell)}
    try:
        content |= measure_cell(directory, cell, device)
    except (InputError, Diverged) as error:
        content |= {"failed": one_line(error)}
    write_json(cell_path(directory, cell), content)


def measure_cell(directory: Path, cell: Cell, device: str) -> dict[str, Any]:
    """Unlearn and measure: ``metrics`` (percentages, with the gaps to the oracle; nats for losses and for the
    divergences from the oracle on the forget and test sets), ``attacks`` (SalUn's five, percent of the forget set
    called non-member), ``mask`` and ``changed`` (fractions of the parameters that might change, and did), ``seconds``
    by stage; with shadows ``u_lira``, its accuracy (percent).
    """
    run = _run(cell.config, device)
    model = load_model(run, network_path(directory, cell.original()))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result, seconds = _unlearn(run, cell, model, shadow=0)
    metrics = run.measure(model)
    found = {name: predictions(model, loader) for name, loader in run.sets().items()}
    reference = _oracle_predictions(directory, cell.oracle(), device)
    kl = {f"kl_{name}": kl_divergence(found[name][0], reference[name][0]) for name in ("forget", "test")}
    changeable = result.mask.selected / sum(parameter.numel() for parameter in model.parameters())
    content: dict[str, Any] = {
        "metrics": {**metrics.as_dict(), **gaps(metrics, metrics_of(directory, cell.oracle())), **kl},
        "attacks": _attacks(run, found),
        "mask": {"fraction": changeable, "channels": result.mask.channels, "digest": result.mask.digest},
        "changed": changed_fraction(before, dict(model.named_parameters()), list(before)),
        "losses": result.losses,
        "seconds": seconds,
        "provenance": provenance(device=str(run.device), threads=torch.get_num_threads()),
    }
    if cell.shadows:
        content["u_lira"] = _u_lira(directory, cell, device, logit_confidences(*found["forget"]))
    return content


def _attacks(run: Run, found: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Percent of the forget set called non-member, by attack, from a network's predictions."""
    return svc_attacks(found["retain"], found["test"], found["forget"], seed=run.config.seed)


def _described(cell: Cell) -> dict[str, Any]:
    """The cell in plain values."""
    return {
        "setting": cell.setting,
        "forget": cell.config.forget,
        "forget_ratio": cell.config.forget_ratio,
        "seed": cell.config.seed,
        "method": cell.label,
        "hyperparameters": asdict(cell.method),
        "strategy": cell.strategy,
        "localize": None if cell.localize is None else dict(cell.localize),
        "budget": cell.budget,
        "batch_size": cell.batch_size,
        "shadows": cell.shadows,
    }


def _unlearn(run: Run, cell: Cell, model: nn.Module, shadow: int) -> tuple[UnlearnResult, dict[str, float]]:
    """The cell's localization and method on ``model``, in place; the seconds of each stage."""
    own = cell.config.seed + pipeline.SHADOW_SEED * shadow
    seed = own + pipeline.RESET_SEED
    seconds: dict[str, float] = {}
    mask = None
    if cell.localize is not None and cell.budget is not None:
        started = time.perf_counter()
        everything = cell.strategy in WHOLE_TRAINING_SET
        indices = torch.arange(len(run.forget.targets)) if everything else run.forget.indices
        batches = run.batches(indices, cell.batch_size)
        mask = localize(model, batches, cell.budget, seed=own, **cell.localize)
        seconds["localize"] = time.perf_counter() - started
    result = unlearn(
        model,
        retain=run.batches(run.forget.retain, cell.batch_size, shuffle=True, seed=seed),
        forget=run.batches(run.forget.indices, cell.batch_size, shuffle=True, seed=seed),
        mask=mask,
        method=cell.method,
        init=run.factory,
        seed=seed,
        training=TrainingOptions(precision=cast(Precision, cell.config.precision)),
    )
    return result, {**seconds, **result.seconds}


def _u_lira(directory: Path, cell: Cell, device: str, own: Tensor) -> float:
    """Accuracy of telling unlearned networks from retrained ones by the forget set, each left out of its own shadows.

    ``own``: (examples,) logit-scaled confidences of the cell's network.
    """
    run = _run(cell.config, device)
    unlearned, retrained = [own], []
    for shadow in range(cell.shadows + 1):
        if shadow:
            model = load_model(run, network_path(directory, cell.original(shadow)))
            _unlearn(run, cell, model, shadow)
            unlearned.append(logit_confidences(*predictions(model, run.sets()["forget"])))
        retrained.append(logit_confidences(*_oracle_predictions(directory, cell.oracle(shadow), device)["forget"]))
    few = cell.shadows < FEW_SHADOWS
    return u_lira_leave_one_out(torch.stack(unlearned), torch.stack(retrained), fixed_variance=few).accuracy


def metrics_of(directory: Path, network: Trained) -> Metrics:
    """The metrics of a network that was trained, on its own run's sets."""
    metrics = read_summary(network_path(directory, network))["metrics"]
    return Metrics(**{name: metrics[name] for name in (*ACCURACIES, *LOSSES)})


def attacks_on(directory: Path, network: Trained) -> dict[str, float]:
    """Percent of its forget set called non-member, by attack, of a network that was trained."""
    path = network_path(directory, network) / MEMBERSHIP
    found = read_json(path)
    check_record(found, dict.fromkeys(ATTACKS, PERCENT), f"'{path}'", "; restore the file, or train again")
    return {name: found[name] for name in ATTACKS}


@lru_cache(maxsize=32)
def _oracle_predictions(directory: Path, network: Trained, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The oracle's predictions on the forget and test sets: cells of one setting and seed share them."""
    run = _run(network.config, device)
    oracle = load_model(run, network_path(directory, network))
    sets = run.sets()
    return {name: predictions(oracle, sets[name]) for name in ("forget", "test")}


# all settings and seeds share the data, and decoding a folder of images anew takes longer than some cells
_load_data = lru_cache(maxsize=1)(load_data)


@lru_cache(maxsize=2)
def _run(config: Config, device: str) -> Run:
    """A configuration with its data and forget set: cells of one setting and seed share them."""
    return start(config, choose_device(device), _load_data)
