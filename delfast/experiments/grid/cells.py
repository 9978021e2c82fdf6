"""Run a grid: the networks and then the cells of each setting and seed, each with a file of its own.

A result that has a record is not computed again. It is refused where its networks have changed since. A file is written
whole or not at all, so a run that is killed loses only what was in progress.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from delfast.errors import InputError, one_line
from delfast.evaluation import (
    Metrics,
    changed_fraction,
    kl_divergence,
    logit_confidences,
    svc_attacks,
    u_lira_leave_one_out,
)
from delfast.execution import CudaGraphs
from delfast.experiments import localizing, pipeline
from delfast.experiments.config import JOB, Config
from delfast.experiments.data import JobData, RunData
from delfast.experiments.grid.definition import ORIGINAL, STOP, Cell, Grid, NetworkSpec
from delfast.experiments.grid.records import (
    CELLS,
    MEMBERSHIP,
    NETWORKS,
    cell_path,
    has_record,
    network_path,
    place,
    read_network,
    read_record,
)
from delfast.experiments.grid.workers import Stage, Watch, run_stages
from delfast.experiments.losses import gaps_between
from delfast.experiments.run import (
    ACCURACIES,
    GAPS,
    LOSSES,
    MODEL,
    ORIGIN,
    PERCENT,
    SECONDS,
    SETS,
    SHARE,
    SUMMARY,
    Run,
    check_summary,
    choose_device,
    commit,
    load_data,
    load_model,
    start,
)
from delfast.experiments.schema import Each, Number, check_record, shown
from delfast.files import write_json
from delfast.jobs import read_job
from delfast.localization import STRATEGIES
from delfast.mask import Mask
from delfast.provenance import provenance
from delfast.unlearning import Diverged, UnlearnResult

ATTACKS = ("correctness", "confidence", "entropy", "m_entropy", "prob")  # of SalUn
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
    "anytime?": {"examples": Number(1), "of": Number(1), "overlap": (SHARE, None), "overlap_of_all": SHARE},
}
MIN_SHADOWS = 64  # for a variance of each example in LiRA; below it all share one (Carlini et al., IEEE S&P 2022, VI-A)


def run_grid(
    grid: Grid,
    directory: Path,
    workers: int,
    threads: int,
    device: str,
    watch: Watch,
    cuda_graphs: CudaGraphs = "auto",
) -> list[dict[str, Any]]:
    """Run the cells that have no result yet; return the results of all, in the grid's order: see ``measure_cell``.

    ``device``: as for ``choose_device``, which each worker calls. ``cuda_graphs``: see ``Run``. All settings of the
    first seed come first; a setting and seed is finished before the next begins, so that a run that is stopped has
    whole tables. On the CPU a worker that would wait for it goes ahead.
    """
    (directory / NETWORKS).mkdir(exist_ok=True)
    (directory / CELLS).mkdir(exist_ok=True)
    finished(directory, grid)  # raises before anything is trained
    check_data(directory, grid)
    stages = [_stage(directory, part, device, cuda_graphs) for part in _parts(grid)]
    run_stages(stages, workers, threads, ahead=choose_device(device).type == "cpu", watch=watch)
    return finished(directory, grid)


def _parts(grid: Grid) -> list[Grid]:
    """Return the grid's parts of one seed and setting each, by their order in the file, the seeds first."""
    seeds = list(dict.fromkeys(cell.config.seed for cell in grid.cells))
    settings = list(dict.fromkeys(cell.setting for cell in grid.cells))
    parts = [
        [cell for cell in grid.cells if (cell.config.seed, cell.setting) == (seed, setting)]
        for seed in seeds
        for setting in settings
    ]
    return [replace(grid, cells=cells) for cells in parts if cells]


def _stage(directory: Path, part: Grid, device: str, cuda_graphs: CudaGraphs) -> Stage:
    """Return the tasks of what the part lacks: first networks, after which its finished cells are checked again."""
    cells = [cell for cell in part.cells if not has_record(cell_path(directory, cell))]
    in_use = {network.key for cell in cells for network in cell.networks()}
    networks = [n for n in part.trained if not _is_trained(directory, n, whole=n.key in in_use)]
    return Stage(
        deque(partial(_train, directory, network, device, cuda_graphs) for network in networks),
        deque(partial(run_cell, directory, cell, device, cuda_graphs) for cell in cells),
        partial(finished, directory, part),  # raises before hours of cells
    )


def finished(directory: Path, grid: Grid) -> list[dict[str, Any]]:
    """The results of the finished cells, in the grid's order.

    InputError for a result that was measured with other networks than ``directory`` holds: its gaps are to another
    oracle.
    """
    results = []
    for cell in grid.cells:
        path = cell_path(directory, cell)
        if has_record(path):
            results.append(_read_cell(path, cell))
            for which, digest in _digests(directory, cell).items():
                if results[-1]["networks"].get(which) != digest:
                    raise InputError(
                        f"{place(path)} was not measured with the {which} that is there; delete it to run it again"
                    )
    return results


def _read_cell(path: Path, cell: Cell) -> dict[str, Any]:
    """Read a cell's result. InputError if it is damaged, or of another cell."""
    content, source, advice = read_record(path), place(path), "; delete it to run the cell again"
    check_record(content, CELL, source, advice)
    check_record(content, FAILED if "failed" in content else RESULT, source, advice)
    for name, value in _described(cell).items():
        if name in CELL["cell"] and content["cell"][name] != value:
            raise InputError(
                f"expected {source} to be of {name} {shown(value)}, got {shown(content['cell'][name])}{advice}"
            )
    # the grid may have renamed the method since
    return cast(dict[str, Any], {**content, "cell": {**content["cell"], "method": cell.label}})


def _digests(directory: Path, cell: Cell) -> dict[str, str]:
    """Digests of the cell's networks that have a summary."""
    found = {network: _digest(network_path(directory, network)) for network in cell.networks()}
    return {f"{network.which}{network.shadow or ''}": digest for network, digest in found.items() if digest}


def _digest(path: Path) -> str | None:
    """The digest of the network of this run directory; None without a summary."""
    if not has_record(path / SUMMARY):
        return None
    return str(check_summary(read_record(path / SUMMARY), path)["digests"]["model"])


def _is_trained(directory: Path, network: NetworkSpec, whole: bool) -> bool:
    """Return whether the network's results exist and, if ``whole``, its weights. Shadows are not attacked."""
    path, names = network_path(directory, network), [SUMMARY, *([] if network.shadow else [MEMBERSHIP])]
    return all(has_record(path / name) for name in names) and (not whole or (path / MODEL).is_file())


def check_networks(directory: Path, grid: Grid) -> None:
    """Raise InputError unless ``directory`` holds the results of all the grid's networks, which a report needs."""
    for network in grid.trained:
        if not _is_trained(directory, network, whole=False):
            path = network_path(directory, network)
            raise InputError(f"expected '{path}' to hold {SUMMARY} and {MEMBERSHIP}, it does not; run the grid first")


def check_data(directory: Path, grid: Grid, *, report_only: bool = False) -> None:
    """Raise InputError for a network that was trained on other data than those of the grid.

    A folder or a job is read and its digest compared, since its files may have changed. Data that have a name are read
    only if they were recorded with another ``data_dir``. With ``report_only`` only a path that exists is read.
    """
    try:
        for network in grid.trained:
            path = network_path(directory, network)
            if has_record(path / SUMMARY):
                _check_data_of(network.config, read_network(directory, network), place(path / SUMMARY), report_only)
    finally:
        _load_data.cache_clear()  # each worker loads its own


def _check_data_of(config: Config, summary: Mapping[str, Any], source: str, report_only: bool) -> None:
    if config.data_path is not None:
        is_read = config.data_path.exists() or not report_only
    else:
        is_read = summary["config"].get("data_dir") != config.data_dir and not report_only
    if not is_read:
        return
    data = _load_data(config.data, config.data_dir, config.image_size, config.train_examples, config.test_examples)
    if data.digests()["data"] != summary["digests"]["data"]:
        raise InputError(
            f"expected '{config.data_name}' to hold the data that {source} was made with, it holds "
            "others; pass the same data, or choose another --output-dir"
        )


def _train(directory: Path, network: NetworkSpec, device: str, cuda_graphs: CudaGraphs = "auto") -> None:
    """Train a network into a run directory, whole or not at all, and run the attacks on it.

    InputError if the directory held the network's results without ``model.safetensors``, and the new network differs:
    finished cells were measured with the old network, so its results stay.
    """
    path = network_path(directory, network)
    partial = path.with_name(f".{path.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    run = _run(network.config, device, cuda_graphs)
    train = pipeline.train if network.which == ORIGINAL else pipeline.oracle
    remedy = "another batch_size in [train]"
    with run.data.naming_errors():
        model = train(run, partial, shadow=network.shadow, progress=False, remedy=remedy).model
        if not network.shadow:
            found = {name: run.predictions(model, name) for name in SETS}
            write_json(partial / MEMBERSHIP, _attacks(run, found))
    if _digest(path) not in (None, _digest(partial)):
        raise InputError(
            f"expected '{path}', trained again, to be the network it was, it is not (other threads, torch or machine); "
            f"restore its {MODEL}, or delete it and the cells measured with it"
        )
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def run_cell(directory: Path, cell: Cell, device: str, cuda_graphs: CudaGraphs = "auto") -> None:
    """Measure a cell and write its result.

    A cell that diverges, or that its method refuses, is written as ``failed`` with the reason, and the report lists it.
    Errors of the data, the networks and the device end the run.
    """
    run = _run(cell.config, device, cuda_graphs)
    for network in cell.networks():
        load_model(run, network_path(directory, network))
    content: dict[str, Any] = {"cell": _described(cell), "networks": _digests(directory, cell)}
    try:
        with run.data.naming_errors():
            content |= measure_cell(directory, cell, device, cuda_graphs)
    except (InputError, Diverged) as error:
        content |= {"failed": one_line(error)}
    write_json(cell_path(directory, cell), content)


def measure_cell(directory: Path, cell: Cell, device: str, cuda_graphs: CudaGraphs = "auto") -> dict[str, Any]:
    """Unlearn and measure.

    ``metrics``: percentages, the gaps to the oracle, and, in nats, losses and divergences from the oracle on the forget
    and test sets. ``attacks``: SalUn's five, percent of the forget set called non-member. ``mask``: the fraction of
    the parameters that may change; ``changed``: the fraction that did. ``seconds``: by stage. ``u_lira``: with shadows,
    its accuracy in percent. ``anytime``: see ``_anytime``.
    """
    run = _run(cell.config, device, cuda_graphs)
    model = load_model(run, network_path(directory, cell.original()))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result, mask, seconds = _unlearn(run, cell, model, shadow=0)
    metrics = run.measure(model)
    found = {name: run.predictions(model, name) for name in SETS}
    reference = _oracle_predictions(directory, cell.oracle(), device, cuda_graphs)
    kl = {f"kl_{name}": kl_divergence(found[name][0], reference[name][0]) for name in ("forget", "test")}
    changeable = result.mask.selected / sum(parameter.numel() for parameter in model.parameters())
    content: dict[str, Any] = {
        "metrics": {**metrics.as_dict(), **gaps_between(metrics, metrics_of(directory, cell.oracle())), **kl},
        "attacks": _attacks(run, found),
        "mask": {"fraction": changeable, "channels": result.mask.channels, "digest": result.mask.digest},
        "changed": changed_fraction(before, dict(model.named_parameters()), list(before)),
        "losses": result.losses,
        "seconds": seconds,
        "provenance": provenance(device=str(run.device), threads=torch.get_num_threads(), commit=commit()),
    }
    if mask is not None and STOP in (cell.localize or {}):
        content["anytime"] = _anytime(run, cell, load_model(run, network_path(directory, cell.original())), mask)
    if cell.shadows:
        content["u_lira"] = _u_lira(directory, cell, device, cuda_graphs, logit_confidences(*found["forget"]))
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


def _unlearn(
    run: Run, cell: Cell, model: nn.Module, shadow: int
) -> tuple[UnlearnResult, Mask | None, dict[str, float]]:
    """Run the cell's localization and method on ``model``, in place; return the mask and the seconds of stages too."""
    mask, seconds = None, {}
    if cell.localize is not None:
        mask, seconds["localize"] = _find_mask(run, cell, cell.localize, model, shadow)
    result = pipeline.run_method(
        run,
        model,
        mask,
        method=cell.method,
        batch_size=cell.batch_size,
        seed=_seed(cell, shadow) + pipeline.UNLEARN_OFFSET,
        progress=False,
        remedy="another batch_size in [unlearn]",
    )
    return result, mask, {**seconds, **result.seconds}


def _find_mask(run: Run, cell: Cell, arguments: Mapping[str, Any], model: nn.Module, shadow: int) -> tuple[Mask, float]:
    return localizing.find_mask(
        run,
        model,
        budget=cast(float, cell.budget),
        batch_size=cell.batch_size,
        seed=_seed(cell, shadow),
        strategy=cell.strategy if cell.strategy in STRATEGIES else None,  # else a name of the grid's own
        **arguments,
    )


def _anytime(run: Run, cell: Cell, model: nn.Module, mask: Mask) -> dict[str, Any]:
    """Describe the localization of ``model`` that stopped when its mask was stable.

    ``examples`` of the ``of`` in the forget set were used. ``overlap``: Jaccard index of the last two masks, None if
    there was one; ``overlap_of_all``: of the mask with the mask of all examples.
    """
    arguments = {name: value for name, value in (cell.localize or {}).items() if name != STOP}
    of_all, _ = _find_mask(run, cell, arguments, model, shadow=0)
    found = {"examples": mask.metadata["examples"], "of": mask.metadata["examples_available"]}
    return {**found, "overlap": mask.metadata["overlap"], "overlap_of_all": mask.jaccard(of_all)}


def _seed(cell: Cell, shadow: int) -> int:
    return cell.config.seed + pipeline.SHADOW_SEED * shadow


def _u_lira(directory: Path, cell: Cell, device: str, cuda_graphs: CudaGraphs, own: Tensor) -> float:
    """Accuracy of U-LiRA in telling unlearned networks from retrained ones, each left out of its own shadows.

    ``own``: (examples,) logit-scaled confidences of the cell's network.
    """
    run = _run(cell.config, device, cuda_graphs)
    unlearned, retrained = [own], []
    for shadow in range(cell.shadows + 1):
        if shadow:
            model = load_model(run, network_path(directory, cell.original(shadow)))
            _unlearn(run, cell, model, shadow)
            unlearned.append(logit_confidences(*run.predictions(model, "forget")))
        reference = _oracle_predictions(directory, cell.oracle(shadow), device, cuda_graphs)
        retrained.append(logit_confidences(*reference["forget"]))
    few = cell.shadows < MIN_SHADOWS
    return u_lira_leave_one_out(torch.stack(unlearned), torch.stack(retrained), fixed_variance=few).accuracy


def metrics_of(directory: Path, network: NetworkSpec) -> Metrics:
    """The metrics of a trained network on its own run's sets."""
    metrics = read_network(directory, network)["metrics"]
    place_of = place(network_path(directory, network) / SUMMARY)
    check_record(metrics, {**ACCURACIES, **LOSSES}, f"metrics of {place_of}", "; restore the file, or train again")
    return Metrics(**{name: metrics[name] for name in (*ACCURACIES, *LOSSES)})


def attacks_on(directory: Path, network: NetworkSpec) -> dict[str, float]:
    """Percent of its forget set called non-member, by attack, of a trained network."""
    path = network_path(directory, network) / MEMBERSHIP
    found = read_record(path)
    check_record(found, dict.fromkeys(ATTACKS, PERCENT), place(path), "; restore the file, or train again")
    return {name: found[name] for name in ATTACKS}


@lru_cache(maxsize=32)
def _oracle_predictions(
    directory: Path, network: NetworkSpec, device: str, cuda_graphs: CudaGraphs
) -> dict[str, tuple[Tensor, Tensor]]:
    """The oracle's predictions on the forget and test sets: cells of one setting and seed share them."""
    run = _run(network.config, device, cuda_graphs)
    oracle = load_model(run, network_path(directory, network))
    return {name: run.predictions(oracle, name) for name in ("forget", "test")}


@lru_cache(maxsize=1)
def _load_data(
    source: str, data_dir: str | None, image_size: int | None, train: int | None, test: int | None
) -> RunData:
    """The data that all settings and seeds share: decoding a folder of images again is slower than some cells.

    A job file is executed: the user's own grid or command line names it.
    """
    if source.startswith(JOB):
        return JobData(read_job(source.removeprefix(JOB)))
    return load_data(source, data_dir, image_size, train, test)


@lru_cache(maxsize=2)
def _run(config: Config, device: str, cuda_graphs: CudaGraphs = "auto") -> Run:
    """A configuration with its data and forget set: cells of one setting and seed share them."""
    return start(config, choose_device(device), _load_data, cuda_graphs)
