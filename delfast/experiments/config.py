"""The configuration of a run: its data, network, forget set and training."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from delfast.arguments import check_choice
from delfast.errors import InputError
from delfast.execution import Precision
from delfast.experiments.datasets import check_source, parse_forget
from delfast.experiments.datasets.forget import check_ratio
from delfast.experiments.networks import check_model
from delfast.experiments.recipes import method_recipe
from delfast.jobs import Job

JOB = "job:"  # begins the data of a configuration, before the path of the job file, and the model, before its digest
FOLDER = "folder:"  # begins the data of a configuration, before the path of a folder of images
MAX_RUN_SEED = 2**31 - 1  # a step's seed is this plus a constant, and must fit into 64 bits


@dataclass(frozen=True)
class Config:
    """The data and settings of a run's training: SGD with momentum 0.9, the rate falling by a cosine to 1 %.

    ``precision`` and ``channels_last`` apply to training and unlearning; ``localize`` and ``evaluate`` have their own.
    With a job file ``data`` is "job:" and its path, and ``model`` "job:" and its digest.
    """

    data: str
    model: str
    forget: str
    forget_ratio: float
    epochs: int
    lr: float
    batch_size: int
    weight_decay: float = 0.0
    seed: int = 0
    data_dir: str | None = None
    image_size: int | None = None
    train_examples: int | None = None
    test_examples: int | None = None
    precision: str = "fp32"
    channels_last: bool = False

    def check(self, *, data_is_read: bool = True) -> None:
        """Raise InputError for a value that no run can have; nothing is loaded or computed.

        ``data_is_read``: False where the images need not be there, as for a report of finished runs.
        """
        if not 0 <= self.seed <= MAX_RUN_SEED:
            raise InputError(f"expected a seed from 0 to {MAX_RUN_SEED}, got {self.seed}")
        if not self.has_job:
            check_source(self.data, self.image_size, data_is_read)
            check_model(self.model, self.image_size)
        for name in ("train_examples", "test_examples"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise InputError(f"expected {name} of at least 1, got {count}")
        check_choice("precision", self.precision, Precision)
        parse_forget(self.forget)
        check_ratio(self.forget_ratio)
        check_training(self.epochs, self.lr, self.batch_size, self.weight_decay)

    def without_paths(self) -> Config:
        """Return the configuration with the kind of data alone in place of a path, and no ``data_dir``.

        It is the same on every machine. Whether two paths hold the same data is decided by the data's digest.
        """
        data = self.data if self.data_path is None else f"{self.data.partition(':')[0]}:"
        return replace(self, data=data, data_dir=None)

    @property
    def data_path(self) -> Path | None:
        """The path of a folder of images or of a job file; None for data that have a name."""
        kind, colon, path = self.data.partition(":")
        return Path(os.path.expanduser(path)) if f"{kind}{colon}" in (FOLDER, JOB) else None

    @property
    def has_job(self) -> bool:
        """Whether data and network are those of a job file."""
        return self.data.startswith(JOB)

    @property
    def job_path(self) -> str:
        """The path of the job file."""
        return self.data.removeprefix(JOB)

    def recipe(self, method: str) -> dict[str, float]:
        """Return hyperparameters of a method that are known for this data and network: for "retrain"."""
        if not self.has_job:
            return method_recipe(self.data, self.model, method)
        own = {"epochs": self.epochs, "lr": self.lr, "weight_decay": self.weight_decay}
        return own if method == "retrain" else {}

    @property
    def data_name(self) -> str:
        """The data for a message."""
        return Path(self.job_path).name if self.has_job else self.data

    @property
    def model_name(self) -> str:
        """The network for a message."""
        return "model()" if self.has_job else self.model


def job_config(job: Job) -> dict[str, Any]:
    """Return the fields of a configuration that a job file determines."""
    return {
        "data": f"{JOB}{job.path}",
        "model": f"{JOB}{job.digest}",
        "batch_size": job.batch_size,
        **asdict(job.training),
    }


def check_training(epochs: int, lr: float, batch_size: int, weight_decay: float) -> None:
    """Raise InputError for a value with which nothing can be trained."""
    if epochs < 1:
        raise InputError(f"expected at least 1 epoch, got {epochs}")
    if not 0 < lr < float("inf"):
        raise InputError(f"expected a learning rate above 0, got {lr}")
    check_batch_size(batch_size)
    if not 0 <= weight_decay < float("inf"):
        raise InputError(f"expected a weight decay of 0 or more, got {weight_decay}")


def check_batch_size(batch_size: int) -> None:
    """Raise InputError unless a batch holds examples."""
    if batch_size < 1:
        raise InputError(f"expected a batch size of at least 1, got {batch_size}")
