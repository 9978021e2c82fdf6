"""Forget sets: the training examples to forget, and the labels of the training set."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from delfast.errors import InputError
from delfast.files import read_json, read_text, reason, write_json
from delfast.provenance import digest_indices

log = logging.getLogger(__name__)

MAX_DIGITS = 18  # of an index or a class; a longer number may not fit into 64 bits


@dataclass(frozen=True)
class ForgetSet:
    """The examples to forget.

    ``indices``: (n,) int64, sorted positions in the training set. ``targets``: (N,) int64, the labels that the network
    is trained with: the given labels, except that ``mislabelled`` changes the labels at ``indices``.
    """

    spec: str
    ratio: float
    seed: int
    indices: Tensor
    targets: Tensor

    @property
    def retain(self) -> Tensor:
        """The sorted positions of the retain set, (N - n,) int64."""
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
        """Read the file of ``save``; ``targets``: (N,) int64, the data set's own training labels."""
        content = read_json(path)
        expected = {"spec": str, "ratio": float, "seed": int, "examples": int, "digest": str}
        try:
            spec, ratio, seed, examples, digest = (kind(content[name]) for name, kind in expected.items())
            indices = _positions(content["indices"])
            labels = _positions(content["labels"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise InputError(f"'{path}' is no forget set; expected the file that `delfast train` writes") from None
        if examples != len(targets):
            raise InputError(
                f"'{path}' is of a training set of {examples} examples, this one has {len(targets)}; "
                "use the data set it was made for"
            )
        ascending = len(indices) > 0 and bool((indices.diff() > 0).all())
        if len(indices) != len(labels) or not ascending or not 0 <= indices[0] <= indices[-1] < examples:
            raise InputError(f"'{path}' lists examples that do not exist, or none, or one twice; train again")
        trained = targets.clone()
        trained[indices] = labels
        loaded = cls(spec, ratio, seed, indices, trained)
        if loaded.digest != digest:
            raise InputError(f"'{path}' was changed after it was written (its digest differs); train again")
        return loaded


def _positions(values: object) -> Tensor:
    """A list of integers as (n,) int64. TypeError for anything else."""
    if not isinstance(values, list) or not all(type(value) is int and abs(value) < 2**63 for value in values):
        raise TypeError("no list of integers")
    return torch.tensor(values, dtype=torch.int64)


def parse_forget(spec: str) -> tuple[str, tuple[int, ...]]:
    """Split a forget spec into its kind and, for ``non-iid:2,5``, its classes. InputError for any other text."""
    if spec in ("iid", "mislabelled") or spec.startswith("file:"):
        return spec.partition(":")[0], ()
    kind, _, classes = spec.partition(":")
    if kind == "non-iid" and classes and all(_is_class(part.strip()) for part in classes.split(",")):
        return kind, tuple(sorted({int(part) for part in classes.split(",")}))
    raise InputError(
        "expected a forget set 'iid', 'mislabelled', 'non-iid:2,5' (the classes) or 'file:PATH' (indices), got "
        f"'{spec}'"
    )


def _is_class(text: str) -> bool:
    return text.isdecimal() and len(text) <= MAX_DIGITS


def choose(spec: str, ratio: float, targets: Tensor, num_classes: int, seed: int) -> ForgetSet:
    """Choose the forget set: ``ratio`` of the training examples, by a generator of its own.

    ``iid``: at random. ``non-iid:2,5``: at random among these classes; all their examples, with a line in the log, if
    ``ratio`` exceeds their number. ``mislabelled``: at random, with each label replaced by another class, uniformly.
    ``file:PATH``: the indices in a text file (UTF-8, with or without a byte order mark), separated by white space;
    ``ratio`` has no effect.

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
        indices = _listed(Path(os.path.expanduser(spec.removeprefix("file:"))), len(targets))
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
    """The sorted indices of a text file. InputError for a word that is no index, out of range, or repeated."""
    try:
        words = read_text(path).split()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the forget set's indices in '{path}': {reason(error)}") from None
    for word in words:
        if not word.isdecimal() or len(word) > MAX_DIGITS or int(word) >= examples:
            shown = word if len(word) <= MAX_DIGITS else f"{word[:MAX_DIGITS]}..."
            raise InputError(f"expected '{path}' to list indices from 0 to {examples - 1}, got '{shown}'; correct it")
    indices = torch.tensor(sorted(int(word) for word in words), dtype=torch.int64)
    if len(torch.unique(indices)) < len(indices):
        raise InputError(f"expected '{path}' to list each index once, one is there twice; correct it")
    return indices


def check_ratio(ratio: float) -> None:
    """Raise InputError unless ``ratio`` lies in (0, 1]."""
    if not 0 < ratio <= 1:
        raise InputError(f"expected a forget ratio in (0, 1], got {ratio}")
