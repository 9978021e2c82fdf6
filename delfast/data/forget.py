"""Forget sets: which training examples are to be forgotten, and what labels the training set has."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from delfast.errors import InputError
from delfast.files import one_line, read_json, write_json
from delfast.provenance import digest_indices

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForgetSet:
    """The examples to forget.

    ``indices``: (n,) int64, sorted positions in the training set. ``targets``: (N,) int64, the labels the
    whole training set is trained with: the given ones, except that ``mislabelled`` flips those at
    ``indices``.
    """

    spec: str
    ratio: float
    seed: int
    indices: Tensor
    targets: Tensor

    @property
    def retain(self) -> Tensor:
        """(N - n,) int64: the sorted positions of the retain set."""
        keep = torch.ones(len(self.targets), dtype=torch.bool)
        keep[self.indices] = False
        return keep.nonzero().flatten()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the indices and of their labels."""
        return digest_indices(torch.stack([self.indices, self.targets[self.indices]]))

    def save(self, path: Path) -> None:
        """Write spec, ratio, seed, indices, their labels and the digest as JSON."""
        write_json(
            path,
            {
                "spec": self.spec,
                "ratio": self.ratio,
                "seed": self.seed,
                "examples": len(self.targets),
                "digest": self.digest,
                "indices": self.indices.tolist(),
                "labels": self.targets[self.indices].tolist(),
            },
        )

    @classmethod
    def load(cls, path: Path, targets: Tensor) -> ForgetSet:
        """Read what ``save`` wrote; ``targets``: (N,) int64, the data set's own training labels."""
        content = read_json(path)
        try:
            spec, ratio, seed = str(content["spec"]), float(content["ratio"]), int(content["seed"])
            indices = torch.tensor(content["indices"], dtype=torch.int64)
            labels = torch.tensor(content["labels"], dtype=torch.int64)
            examples, digest = content["examples"], content["digest"]
        except (KeyError, TypeError, ValueError):
            raise InputError(f"'{path}' is no forget set; expected the file that `delfast train` writes") from None
        if examples != len(targets):
            raise InputError(
                f"'{path}' is of a training set of {examples} examples, this one has {len(targets)}; "
                "use the data set it was made for"
            )
        if len(indices) != len(labels) or len(indices) == 0 or not 0 <= indices.min() <= indices.max() < examples:
            raise InputError(f"'{path}' lists examples that do not exist; train anew")
        trained = targets.clone()
        trained[indices] = labels
        loaded = cls(spec, ratio, seed, indices, trained)
        if loaded.digest != digest:
            raise InputError(f"'{path}' was changed after it was written (its digest differs); train anew")
        return loaded


def parse_forget(spec: str) -> tuple[str, tuple[int, ...]]:
    """Split a forget spec into its kind and, for ``non-iid:2,5``, its classes. InputError if it is none."""
    if spec in ("iid", "mislabelled") or spec.startswith("file:"):
        return spec.partition(":")[0], ()
    kind, _, classes = spec.partition(":")
    if kind == "non-iid" and classes and all(part.strip().isdecimal() for part in classes.split(",")):
        return kind, tuple(sorted({int(part) for part in classes.split(",")}))
    raise InputError(
        "expected a forget set 'iid', 'mislabelled', 'non-iid:2,5' (the classes) or 'file:PATH' (indices), got "
        f"'{spec}'"
    )


def choose(spec: str, ratio: float, targets: Tensor, num_classes: int, seed: int) -> ForgetSet:
    """Choose the forget set: ``ratio`` of the training examples, by a generator of its own.

    ``iid``: at random. ``non-iid:2,5``: at random among those classes, all of them (said in the log) if
    ``ratio`` asks for more than they hold. ``mislabelled``: at random, and each label replaced by another
    class, uniformly. ``file:PATH``: the indices listed in a text file, separated by white space; no ``ratio``.

    targets: (N,) int64 in [0, num_classes). Raises InputError for a ratio outside (0, 1], a class that does
    not exist, an empty forget set, and one that leaves no retain set.
    """
    kind, classes = parse_forget(spec)
    check_ratio(ratio)
    generator = torch.Generator().manual_seed(seed)
    wanted = round(ratio * len(targets))
    pool = torch.arange(len(targets))
    if kind == "non-iid":
        missing = [label for label in classes if label >= num_classes]
        if missing:
            raise InputError(f"expected classes 0 to {num_classes - 1} in '{spec}', got {missing[0]}")
        pool = pool[torch.isin(targets, torch.tensor(classes))]
        if wanted > len(pool):
            log.info("%s holds %d examples, not %d: the forget set is all of them", spec, len(pool), wanted)
    indices = pool[torch.randperm(len(pool), generator=generator)[:wanted]].sort().values
    if kind == "file":
        indices = _listed(Path(spec.removeprefix("file:")).expanduser(), len(targets))
    if len(indices) == 0:
        raise InputError(f"the forget set '{spec}' at ratio {ratio} is empty; raise --forget-ratio, or list more")
    if len(indices) == len(targets):
        raise InputError(
            f"the forget set '{spec}' at ratio {ratio} is the whole training set; lower --forget-ratio, or list fewer"
        )
    trained = targets
    if kind == "mislabelled":
        if num_classes < 2:
            raise InputError("'mislabelled' needs at least 2 classes to flip labels between, the data has 1")
        offset = torch.randint(1, num_classes, (len(indices),), generator=generator)
        trained = targets.clone()
        trained[indices] = (targets[indices] + offset) % num_classes
    return ForgetSet(spec, ratio, seed, indices, trained)


def _listed(path: Path, examples: int) -> Tensor:
    """The indices that a text file lists, sorted. InputError for what is none, out of range, or there twice."""
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the forget set's indices in '{path}': {one_line(error)}") from None
    for word in words:
        if not word.isdecimal() or int(word) >= examples:
            raise InputError(f"expected '{path}' to list indices from 0 to {examples - 1}, got '{word}'; mend it")
    indices = torch.tensor(sorted(int(word) for word in words), dtype=torch.int64)
    if len(torch.unique(indices)) < len(indices):
        raise InputError(f"expected '{path}' to list each index once, one is there twice; mend it")
    return indices


def check_ratio(ratio: float) -> None:
    """InputError unless ``ratio`` lies in (0, 1]."""
    if not 0 < ratio <= 1:
        raise InputError(f"expected a forget ratio in (0, 1], got {ratio}")
