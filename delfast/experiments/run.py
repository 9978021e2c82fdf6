"""A run: its configuration, data and forget set, and the directory that keeps them with the network.

A *run directory* holds ``model.safetensors``, ``forget.json`` and ``summary.json`` (written last), and is all
that a later step needs, the data set apart. ``train``, ``oracle`` and ``unlearn`` each write one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from delfast.arguments import check_choice
from delfast.errors import InputError
from delfast.evaluation import Metrics, evaluate
from delfast.experiments.datasets import (
    Batches,
    ForgetSet,
    ImageData,
    check_source,
    choose,
    load,
    parse_forget,
    resident,
)
from delfast.experiments.datasets.forget import check_ratio
from delfast.experiments.datasets.pictures import IN_MEMORY
from delfast.experiments.networks import check_model, factory
from delfast.experiments.schema import Each, Number, check_record, check_table, kinds_of
from delfast.files import load_state, read_json
from delfast.provenance import digest_state
from delfast.unlearning.loop import Precision

EVALUATION_BATCH = 512
MAX_RUN_SEED = 2**31 - 1  # what is added to it for other steps still fits into 64 bits
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
}
NETWORK: dict[str, Any] = {  # what others read of a network's summary
    "config": dict,
    "digests": dict.fromkeys(("model", "data", "forget"), str),
    "forget": {"spec": str, "examples": Number(0), "of": Number(1)},
    "metrics": {**ACCURACIES, **LOSSES},
    "seconds": SECONDS,
    "provenance": ORIGIN,
}


@dataclass(frozen=True)
class Config:
    """What a run is trained on and how: SGD with momentum 0.9, the rate falling by a cosine to 1 %.

    ``precision``, ``channels_last``: of training and unlearning; what is measured is measured in float32.
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

    def check(self) -> None:
        """InputError for a value that no run can have; nothing is loaded or computed."""
        if not 0 <= self.seed <= MAX_RUN_SEED:
            raise InputError(f"expected a seed from 0 to {MAX_RUN_SEED}, got {self.seed}")
        check_source(self.data, self.image_size)
        check_model(self.model, self.image_size)
        for name in ("train_examples", "test_examples"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise InputError(f"expected {name} of at least 1, got {count}")
        check_choice("precision", self.precision, Precision)
        parse_forget(self.forget)
        check_ratio(self.forget_ratio)
        check_training(self.epochs, self.lr, self.batch_size, self.weight_decay)


def check_training(epochs: int, lr: float, batch_size: int, weight_decay: float) -> None:
    """InputError for a value with which nothing can be trained."""
    if epochs < 1:
        raise InputError(f"expected at least 1 epoch, got {epochs}")
    if not 0 < lr < float("inf"):
        raise InputError(f"expected a learning rate above 0, got {lr}")
    check_batch_size(batch_size)
    if not 0 <= weight_decay < float("inf"):
        raise InputError(f"expected a weight decay of 0 or more, got {weight_decay}")


def check_batch_size(batch_size: int) -> None:
    """InputError unless there are examples in a batch."""
    if batch_size < 1:
        raise InputError(f"expected a batch size of at least 1, got {batch_size}")


@dataclass(frozen=True)
class Run:
    """A configuration with its data and forget set at hand, and the device to compute on."""

    config: Config
    data: ImageData
    forget: ForgetSet
    device: torch.device

    @property
    def factory(self) -> Callable[[], nn.Module]:
        """Builds the run's network anew, on the CPU."""
        return factory(self.config.model, self.data.num_classes, self.data.channels, self.data.image_size)

    def with_config(self, **changes: Any) -> Run:
        """The run with a changed configuration, on the same data. InputError for values that no run can have."""
        config = replace(self.config, **changes)
        config.check()
        return replace(self, config=config)

    def placed(self, model: nn.Module) -> nn.Module:
        """The network on the run's device, in its memory format."""
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return model.to(self.device).to(memory_format=layout)

    def batches(self, indices: Tensor, batch_size: int, *, shuffle: bool = False, seed: int = 0) -> Batches:
        """Batches of training examples, with the labels the run trains with."""
        options: dict[str, Any] = {"batch_size": batch_size, "indices": indices, "shuffle": shuffle, "seed": seed}
        return self._batches(self._train_images, self.forget.targets, **options)

    @cached_property
    def _train_images(self) -> Tensor:
        return resident(self.data.train_images, self.device)

    @cached_property
    def _test_images(self) -> Tensor:
        return resident(self.data.test_images, self.device)

    def _batches(self, images: Tensor, targets: Tensor, **options: Any) -> Batches:
        """Batches of images, taken one ahead where they come from a file or are not on the device."""
        ahead = images.device.type != self.device.type or images.nbytes > IN_MEMORY
        return Batches(images, targets, self.data.mean, self.data.std, ahead=ahead, **options)

    def measure(self, model: nn.Module, seed: int | None = None) -> Metrics:
        """The network's metrics on the run's forget, retain and test sets; ``seed`` as for ``evaluate``."""
        sets = self.sets()
        chosen = self.config.seed if seed is None else seed
        return evaluate(model, sets["forget"], sets["retain"], sets["test"], seed=chosen)

    def sets(self) -> dict[str, Batches]:
        """The batches of the forget, retain and test sets, in order, to be measured on."""
        return {
            "forget": self.batches(self.forget.indices, EVALUATION_BATCH),
            "retain": self.batches(self.forget.retain, EVALUATION_BATCH),
            "test": self._batches(self._test_images, self.data.test_targets, batch_size=EVALUATION_BATCH),
        }

    def digests(self) -> dict[str, str]:
        """Digests of the data and of the forget set."""
        return {"data": self.data.digest, "forget": self.forget.digest}

    def describe_forget(self) -> dict[str, Any]:
        """The forget set in plain values."""
        forget = self.forget
        return {
            "spec": forget.spec,
            "ratio": forget.ratio,
            "seed": forget.seed,
            "examples": len(forget.indices),
            "of": len(forget.targets),
            "digest": forget.digest,
        }


LoadData = Callable[[str, str | None, int | None, int | None, int | None], ImageData]


def check_own_directory(output_dir: Path, *inputs: Path) -> None:
    """InputError if writing to ``output_dir`` would overwrite one of the inputs."""
    if os.path.realpath(output_dir) in map(os.path.realpath, inputs):
        raise InputError(f"the output directory '{output_dir}' holds the input itself; choose another --output-dir")


def choose_device(name: str) -> torch.device:
    """``auto`` (CUDA if there is one, else the CPU), or a device by name. InputError if it cannot be used."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()  # "meta" holds no values
    except (RuntimeError, AssertionError):  # torch without CUDA asserts
        raise InputError(f"expected a device auto, cpu or cuda that this machine has, got '{name}'") from None
    torch.backends.cudnn.deterministic = True  # the same seed is to give the same weights on CUDA too
    return device


def load_data(
    source: str, data_dir: str | None, image_size: int | None, train: int | None, test: int | None
) -> ImageData:
    """The images of ``--data source``, no more of them than ``train`` and ``test``."""
    return load(source, Path(data_dir) if data_dir else None, image_size, train, test)


def _data(config: Config, load_data: LoadData = load_data) -> ImageData:
    return load_data(config.data, config.data_dir, config.image_size, config.train_examples, config.test_examples)


def start(config: Config, device: torch.device, load_data: LoadData = load_data) -> Run:
    """Check a configuration, load its data and choose its forget set. Nothing is written."""
    config.check()
    data = _data(config, load_data)
    check_model(config.model, data.image_size)
    forget = choose(config.forget, config.forget_ratio, data.train_targets, data.num_classes, config.seed)
    return Run(config, data, forget, device)


def open_run(path: Path, device: torch.device, data_dir: Path | None = None) -> Run:
    """Open a run directory: its configuration, data and forget set, checked against the digests of its summary."""
    summary = read_summary(path)
    kinds = kinds_of(Config)
    stored = {name: value for name, value in summary["config"].items() if name in kinds}
    check_table(stored, kinds, f"config of '{path / SUMMARY}'")
    missing = [f.name for f in fields(Config) if f.default is MISSING and f.name not in stored]
    if missing:
        raise InputError(f"'{path / SUMMARY}' has no whole configuration: '{missing[0]}' is missing; train again")
    config = Config(**stored)
    if data_dir is not None:
        config = replace(config, data_dir=str(data_dir))
    config.check()
    data = _data(config)
    if data.digest != summary["digests"]["data"]:
        raise InputError(f"the data '{config.data}' are not those that '{path}' was made with; restore them")
    forget = ForgetSet.load(path / FORGET, data.train_targets)
    if forget.digest != summary["digests"]["forget"]:
        raise InputError(f"'{path / FORGET}' is not the forget set that '{SUMMARY}' beside it tells of; restore it")
    if not 0 <= forget.targets.min() <= forget.targets.max() < data.num_classes:
        raise InputError(f"'{path / FORGET}' has labels of classes that '{config.data}' does not have; train again")
    return Run(config, data, forget, device)


def load_model(run: Run, path: Path) -> nn.Module:
    """The network that ``path`` keeps, on the run's device.

    InputError if it is damaged, of another architecture, or of other data or another forget set than the run's.
    """
    state, digests = load_state(path / MODEL), read_summary(path)["digests"]
    if digest_state(state) != digests["model"]:
        raise InputError(f"'{path / MODEL}' is not the network that '{SUMMARY}' beside it tells of; make it anew")
    model = run.factory()
    try:
        model.load_state_dict(state)
    except RuntimeError:
        raise InputError(f"'{path / MODEL}' is no {run.config.model} for {run.config.data}; use its own run") from None
    if digests["data"] != run.data.digest:
        raise InputError(f"'{path}' was made with other data than '{run.config.data}' holds now; restore them")
    if digests["forget"] != run.forget.digest:
        raise InputError(f"'{path}' is of another forget set than the run; use networks of one `delfast train`")
    return run.placed(model)


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of a run directory; InputError if ``path`` is none."""
    if not (path / SUMMARY).is_file():
        raise InputError(f"expected a run directory at '{path}', it holds no {SUMMARY}; make one with `delfast train`")
    summary = read_json(path / SUMMARY)
    if not isinstance(summary, dict) or not {"config", "digests", "metrics"} <= summary.keys():
        raise InputError(
            f"'{path}' is no run directory: its {SUMMARY} tells of no network; give one of `delfast train`"
        )
    check_record(summary, NETWORK, f"'{path / SUMMARY}'", "; restore the file, or train again")
    return summary
