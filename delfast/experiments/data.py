"""The data of a run, and the networks that fit them: of a built-in data set, or of a user's job file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from delfast.batches import LossFn
from delfast.errors import InputError
from delfast.experiments.config import JOB
from delfast.experiments.datasets import Batches, Examples, ForgetSet, ImageData, choose
from delfast.experiments.datasets.forget import needs_labels, read_indices
from delfast.experiments.datasets.pictures import IN_MEMORY
from delfast.experiments.networks import check_model, factory
from delfast.files import read_json
from delfast.jobs import Job

EVALUATION_BATCH = 512


class RunData(Protocol):
    """Training and test examples, and newly initialized networks for them.

    loss_fn: the loss of a batch's examples; None for cross-entropy, with which accuracies are measured.
    evaluation_batch: the number of examples in a batch of measurements.
    """

    @property
    def count(self) -> int:
        """Number of training examples."""

    @property
    def loss_fn(self) -> LossFn | None: ...

    @property
    def evaluation_batch(self) -> int: ...

    def digests(self) -> dict[str, str]:
        """Digests (hex) of all that networks depend on beside the configuration; "data" is one of them."""

    def check_model(self, model: str) -> None:
        """Raise InputError if the data do not fit the ``model`` of a configuration."""

    def factory(self, model: str) -> Callable[[], nn.Module]:
        """Return a function that makes a newly initialized network on the CPU."""

    def choose(self, spec: str, ratio: float, seed: int) -> ForgetSet:
        """Choose a forget set: see ``delfast.experiments.datasets.choose``."""

    def load_forget(self, path: Path) -> ForgetSet:
        """Read a forget set that ``ForgetSet.save`` wrote."""

    def training(
        self, forget: ForgetSet, indices: Tensor, device: torch.device, batch_size: int, *, shuffle: bool, seed: int
    ) -> Any:
        """Return batches of training examples, with the labels of ``forget``."""

    def testing(self, device: torch.device, batch_size: int) -> Any:
        """Return batches of the test examples, in order."""

    def examples(self, batches: Any) -> Any:
        """Return the examples of batches for ``localize(stop_when_stable=...)``, which batches them itself."""

    def naming_errors(self) -> AbstractContextManager[None]:
        """Turn exceptions of the user's code into InputErrors that name file and line."""


@dataclass(frozen=True)
class Pictures:
    """The images of a built-in data set or a folder, with the networks of ``delfast.experiments.networks``."""

    images: ImageData
    loss_fn: LossFn | None = None
    evaluation_batch: int = EVALUATION_BATCH

    @property
    def count(self) -> int:
        return len(self.images.train_targets)

    def digests(self) -> dict[str, str]:
        return {"data": self.images.digest}

    def check_model(self, model: str) -> None:
        check_model(model, self.images.image_size)

    def factory(self, model: str) -> Callable[[], nn.Module]:
        return factory(model, self.images.num_classes, self.images.channels, self.images.image_size)

    def choose(self, spec: str, ratio: float, seed: int) -> ForgetSet:
        return choose(spec, ratio, self.images.train_targets, self.images.num_classes, seed)

    def load_forget(self, path: Path) -> ForgetSet:
        forget = ForgetSet.load(path, self.images.train_targets)
        check_labels(forget, self.images.num_classes, path)
        return forget

    def training(
        self, forget: ForgetSet, indices: Tensor, device: torch.device, batch_size: int, *, shuffle: bool, seed: int
    ) -> Batches:
        assert forget.targets is not None
        options: dict[str, Any] = {"batch_size": batch_size, "indices": indices, "shuffle": shuffle, "seed": seed}
        return self._batches(self.images.images("train", device), forget.targets, device, **options)

    def testing(self, device: torch.device, batch_size: int) -> Batches:
        return self._batches(
            self.images.images("test", device), self.images.test_targets, device, batch_size=batch_size
        )

    def _batches(self, images: Tensor, targets: Tensor, device: torch.device, **options: Any) -> Batches:
        """Batches of images, read one ahead where the images are in a file, or in memory of the CPU for another device.

        Images on the device are read by index: see ``delfast.feeding.feed``.
        """
        ahead = images.device.type == "cpu" and (device.type != "cpu" or images.nbytes > IN_MEMORY)
        return Batches(images, targets, self.images.mean, self.images.std, ahead=ahead, **options)

    def examples(self, batches: Batches) -> Examples:
        return Examples(batches)

    def naming_errors(self) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True)
class JobData:
    """The examples and the network of a job file; their classes are 0 to the largest of a training example."""

    job: Job

    @property
    def count(self) -> int:
        return self.job.count

    @property
    def loss_fn(self) -> LossFn | None:
        return self.job.loss_fn

    @property
    def evaluation_batch(self) -> int:
        return self.job.batch_size  # the job's own: a larger one may not fit into memory

    def digests(self) -> dict[str, str]:
        return {"data": self.job.data_digest(), "job": self.job.digest}

    def check_model(self, model: str) -> None:
        if model != f"{JOB}{self.job.digest}":
            raise InputError(
                f"the job file '{self.job.path}' is not the one that was used before: its content differs; restore it, "
                "or train again"
            )

    def factory(self, model: str) -> Callable[[], nn.Module]:
        return self.job.model

    def choose(self, spec: str, ratio: float, seed: int) -> ForgetSet:
        targets = self._targets(spec) if needs_labels(spec) else None
        classes = 0 if targets is None else int(targets.max()) + 1
        return choose(spec, ratio, targets, classes, seed, count=self.count, read_list=self._positions)

    def _targets(self, spec: str) -> Tensor:
        targets = self.job.targets()
        if targets is None:
            raise InputError(
                f"expected integer class targets in the job's training set for the forget set '{spec}', got others; "
                "use iid or file:PATH"
            )
        return targets

    def _positions(self, text: str, path: Path) -> list[int]:
        """Return the positions of the examples that a file lists: identifiers, one a line, if the job has its own."""
        if not self.job.has_ids:
            return read_indices(text, path, self.count)
        try:
            return self.job.positions(line.strip() for line in text.splitlines() if line.strip()).tolist()
        except InputError as error:
            raise InputError(f"'{path}': {error}") from None

    def load_forget(self, path: Path) -> ForgetSet:
        content = read_json(path)
        spec = content.get("spec") if isinstance(content, dict) else None
        if not isinstance(spec, str) or not needs_labels(spec):
            return ForgetSet.load(path, None, self.count)
        forget = ForgetSet.load(path, self._targets(spec), self.count)
        check_labels(forget, int(self._targets(spec).max()) + 1, path)
        return forget

    def training(
        self, forget: ForgetSet, indices: Tensor, device: torch.device, batch_size: int, *, shuffle: bool, seed: int
    ) -> Any:
        targets = forget.targets if forget.changes_labels else None
        return self.job.batches(indices, batch_size=batch_size, shuffle=shuffle, seed=seed, targets=targets)

    def testing(self, device: torch.device, batch_size: int) -> Any:
        return self.job.test_batches(batch_size=batch_size)

    def examples(self, batches: Any) -> Any:
        return batches  # a DataLoader, whose examples and collate function ``localize`` uses

    def naming_errors(self) -> AbstractContextManager[None]:
        return self.job.naming_errors()


def check_labels(forget: ForgetSet, num_classes: int, path: Path) -> None:
    """Raise InputError for labels of classes that the data do not have."""
    if forget.targets is not None and not 0 <= forget.targets.min() <= forget.targets.max() < num_classes:
        raise InputError(f"'{path}' has labels of classes that the data do not have; train again")
