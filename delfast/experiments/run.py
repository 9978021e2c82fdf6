"""A run: its configuration, data and forget set, and the directory that keeps them with the network.

A *run directory* holds ``model.safetensors``, ``forget.json`` and ``summary.json`` (written last). A later step needs
this directory and the data set. ``train``, ``oracle`` and ``unlearn`` each write a run directory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from delfast.errors import InputError
from delfast.evaluation import Metrics, predictions
from delfast.evaluation import evaluate as evaluate_model
from delfast.execution import CudaGraphs, Precision
from delfast.experiments.config import JOB, Config
from delfast.experiments.data import JobData, Pictures, RunData
from delfast.experiments.datasets import ForgetSet, load
from delfast.experiments.losses import Losses, mean_losses
from delfast.experiments.schema import Each, Number, check_record, check_table, kinds_of
from delfast.files import load_state, make_output_dir, read_json
from delfast.graphs import check_cuda_graphs
from delfast.jobs import Job
from delfast.provenance import digest_state

SETS = ("forget", "retain", "test")
MODEL, FORGET, MASK, SUMMARY, CHECKPOINT = (
    "model.safetensors",
    "forget.json",
    "mask.safetensors",
    "summary.json",
    "checkpoint.pt",
)

PERCENT, GAP, SHARE = Number(0, 100 + 1e-9), Number(-100 - 1e-9, 100 + 1e-9), Number(0, 1 + 1e-9)  # sums round
ACCURACIES = dict.fromkeys(("forget_acc", "retain_acc", "test_acc", "mia"), PERCENT)
LOSSES = dict.fromkeys(("forget_loss", "retain_loss", "test_loss"), float)
GAPS = dict.fromkeys(("delta_forget", "delta_mia", "delta_test"), GAP)
SECONDS = Each(Number(0))
ORIGIN: dict[str, Any] = {
    **dict.fromkeys(("delfast", "torch", "platform", "device"), str),
    "backend": {"isa": (str, None), "cuda": str, "threads": int},
    "commit?": (str, None),
}
NETWORK: dict[str, Any] = {  # the part of a network's summary that is read
    "config": dict,
    "digests": dict.fromkeys(("model", "data", "forget"), str),
    "forget": {"spec": str, "examples": Number(0), "of": Number(1)},
    "metrics": dict,
    "seconds": SECONDS,
    "provenance": ORIGIN,
}


@dataclass(frozen=True)
class Run:
    """A configuration with its loaded data and forget set, and the device to compute on.

    ``cuda_graphs``: whether passes are captured; see ``delfast.graphs``. No result depends on it, up to rounding.
    """

    config: Config
    data: RunData
    forget: ForgetSet
    device: torch.device
    cuda_graphs: CudaGraphs = "auto"

    @property
    def factory(self) -> Callable[[], nn.Module]:
        """A function that returns a newly initialized network on the CPU."""
        return self.data.factory(self.config.model)

    def with_config(self, **changes: Any) -> Run:
        """The run with a changed configuration and the same data. InputError for values that no run can have."""
        config = replace(self.config, **changes)
        config.check()
        return replace(self, config=config)

    def placed(self, model: nn.Module) -> nn.Module:
        """The network on the run's device, in its memory format."""
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return model.to(self.device).to(memory_format=layout)

    def batches(self, indices: Tensor, batch_size: int, *, shuffle: bool = False, seed: int = 0) -> Any:
        """Batches of training examples, with the labels that the run trains with."""
        return self.data.training(self.forget, indices, self.device, batch_size, shuffle=shuffle, seed=seed)

    def measure(self, model: nn.Module, seed: int | None = None, precision: Precision = "fp32") -> Metrics | Losses:
        """The network's metrics on the run's forget, retain and test sets; ``seed``, ``precision``: of ``evaluate``.

        With a ``loss_fn`` of the job's, the mean losses alone: what is a correct output is not known.
        """
        sets = self.sets()
        if self.data.loss_fn is not None:
            return mean_losses(model, sets, self.data.loss_fn, precision)
        return evaluate_model(
            model,
            sets["forget"],
            sets["retain"],
            sets["test"],
            seed=self.config.seed if seed is None else seed,
            precision=precision,
            cuda_graphs=self.cuda_graphs,
        )

    def predictions(self, model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
        """The network's log-probabilities and the targets of one of ``sets``, as ``delfast.evaluation.predictions``."""
        return predictions(model, self.sets()[name], cuda_graphs=self.cuda_graphs)

    def sets(self) -> dict[str, Any]:
        """The batches of the forget, retain and test sets, in order, for measurements."""
        batch_size = self.data.evaluation_batch
        return {
            "forget": self.batches(self.forget.indices, batch_size),
            "retain": self.batches(self.forget.retain, batch_size),
            "test": self.data.testing(self.device, batch_size),
        }

    def digests(self) -> dict[str, str]:
        """Digests of the data, of a job file, and of the forget set."""
        return {**self.data.digests(), "forget": self.forget.digest}

    def describe_forget(self) -> dict[str, Any]:
        """The forget set in plain values."""
        forget = self.forget
        return {
            "spec": forget.spec,
            "ratio": forget.ratio,
            "seed": forget.seed,
            "examples": len(forget.indices),
            "of": forget.count,
            "digest": forget.digest,
        }


@contextmanager
def output_directory(path: Path) -> Iterator[None]:
    """Make the directory before the work inside the context, and remove it if the work is refused (InputError).

    So a directory that cannot be written is refused before hours of work, and a step leaves its own checks to the
    library. A directory that was there before, or is not empty, stays.
    """
    missing = [each for each in (path, *path.parents) if not os.path.exists(each)]
    make_output_dir(path)
    try:
        yield
    except InputError:
        for made in missing:  # the innermost first
            if not any(made.iterdir()):
                made.rmdir()
        raise


@cache
def commit() -> str | None:
    """Return the commit of the clone that delfast runs from, "-dirty" if files differ; None outside a clone.

    It is read once. A process calls this before its work, so that a commit that is made meanwhile is not recorded.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


LoadData = Callable[[str, str | None, int | None, int | None, int | None], RunData]


def check_own_directory(output_dir: Path, *inputs: Path, option: str = "--output-dir") -> None:
    """Raise InputError if writing to ``output_dir``, the value of ``option``, would overwrite one of the inputs."""
    if os.path.realpath(output_dir) in map(os.path.realpath, inputs):
        raise InputError(f"the output directory '{output_dir}' holds the input itself; choose another {option}")


def choose_device(name: str) -> torch.device:
    """Return the device ``auto`` (CUDA if available, else the CPU) or one by name. InputError if it cannot be used."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()  # fails on "meta", which holds no values
    except (RuntimeError, AssertionError):  # torch without CUDA asserts
        raise InputError(f"expected a device auto, cpu or cuda that this machine has, got '{name}'") from None
    torch.backends.cudnn.deterministic = True  # so that a seed gives the same weights on CUDA too
    return device


def load_data(
    source: str, data_dir: str | None, image_size: int | None, train: int | None, test: int | None
) -> RunData:
    """Load the images of ``--data source``, at most ``train`` and ``test`` of them.

    InputError for a job file: it is executed only where the user passes it.
    """
    if source.startswith(JOB):
        raise InputError(
            f"expected the job file '{source.removeprefix(JOB)}' as --job, it was not passed; pass it if it is your "
            "own: it is executed"
        )
    return Pictures(load(source, Path(data_dir) if data_dir else None, image_size, train, test))


def data_of(job: Job | None) -> LoadData:
    """Return the function that loads the data of a configuration: those of the job, or else images."""
    if job is None:
        return load_data
    data = JobData(job)
    return lambda *_: data


def _data(config: Config, load_data: LoadData) -> RunData:
    return load_data(config.data, config.data_dir, config.image_size, config.train_examples, config.test_examples)


def start(
    config: Config, device: torch.device, load_data: LoadData = load_data, cuda_graphs: CudaGraphs = "auto"
) -> Run:
    """Check a configuration, load its data and choose its forget set; write nothing."""
    commit()
    config.check()
    check_cuda_graphs(cuda_graphs, device)
    data = _data(config, load_data)
    data.check_model(config.model)
    forget = data.choose(config.forget, config.forget_ratio, config.seed)
    return Run(config, data, forget, device, cuda_graphs)


def open_run(
    path: Path,
    device: torch.device,
    data_dir: Path | None = None,
    cuda_graphs: CudaGraphs = "auto",
    job: Job | None = None,
) -> Run:
    """Read a run directory and load its data; check both against the digests of its summary.

    ``job``: the job file, which a run of a job needs. The path that the directory records is not followed.
    """
    commit()
    check_cuda_graphs(cuda_graphs, device)
    summary = read_summary(path)
    kinds = kinds_of(Config)
    stored = {name: value for name, value in summary["config"].items() if name in kinds}
    check_table(stored, kinds, f"config of '{path / SUMMARY}'")
    missing = [f.name for f in fields(Config) if f.default is MISSING and f.name not in stored]
    if missing:
        raise InputError(f"'{path / SUMMARY}' has no whole configuration: '{missing[0]}' is missing; train again")
    config = Config(**stored)
    if job is not None:
        if not config.has_job:
            raise InputError(f"'{path}' was made with --data {config.data}, not with a job; leave --job out")
        if data_dir is not None:
            raise InputError("expected --job without --data-dir, got both; leave --data-dir out")
        config = replace(config, data=f"{JOB}{job.path}")
    if data_dir is not None:
        config = replace(config, data_dir=str(data_dir))
    config.check()
    data = _data(config, data_of(job))
    data.check_model(config.model)
    if data.digests()["data"] != summary["digests"]["data"]:
        raise InputError(f"the data '{config.data_name}' are not those that '{path}' was made with; restore them")
    forget = data.load_forget(path / FORGET)
    if forget.digest != summary["digests"]["forget"]:
        raise InputError(f"'{path / FORGET}' is not the forget set of the '{SUMMARY}' beside it; restore it")
    return Run(config, data, forget, device, cuda_graphs)


def load_model(run: Run, path: Path) -> nn.Module:
    """Load the network of the run directory ``path`` to the run's device.

    InputError if it is damaged, of another architecture, or of other data or another forget set than the run's.
    """
    state, digests = load_state(path / MODEL), read_summary(path)["digests"]
    if digest_state(state) != digests["model"]:
        raise InputError(f"'{path / MODEL}' is not the network of the '{SUMMARY}' beside it; make it again")
    model = run.factory()
    try:
        model.load_state_dict(state)
    except RuntimeError:
        names = f"{run.config.model_name} for {run.config.data_name}"
        raise InputError(f"'{path / MODEL}' is no {names}; use its own run") from None
    if digests["data"] != run.data.digests()["data"]:
        raise InputError(f"'{path}' was made with other data than '{run.config.data_name}' holds now; restore them")
    if digests["forget"] != run.forget.digest:
        raise InputError(f"'{path}' is of another forget set than the run; use networks of one `delfast train`")
    return run.placed(model)


def read_summary(path: Path) -> dict[str, Any]:
    """Read the summary of a run directory; InputError if ``path`` is no run directory."""
    if not (path / SUMMARY).is_file():
        raise InputError(f"expected a run directory at '{path}', it holds no {SUMMARY}; make one with `delfast train`")
    return check_summary(read_json(path / SUMMARY), path)


def check_summary(summary: Any, path: Path) -> dict[str, Any]:
    """Return the summary of the run directory ``path``; InputError if it is not of a network, or damaged."""
    if not isinstance(summary, dict) or not {"config", "digests", "metrics"} <= summary.keys():
        raise InputError(
            f"'{path}' is no run directory: its {SUMMARY} describes no network; pass one of `delfast train`"
        )
    advice = "; restore the file, or train again"
    check_record(summary, NETWORK, f"'{path / SUMMARY}'", advice)
    # a job with a loss of its own has no accuracies
    is_job = str(summary["config"].get("data")).startswith(JOB)
    measured = LOSSES if is_job and not summary["metrics"].keys() & ACCURACIES.keys() else {**ACCURACIES, **LOSSES}
    check_record(summary["metrics"], measured, f"metrics of '{path / SUMMARY}'", advice)
    return summary
