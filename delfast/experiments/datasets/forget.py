"""Forget sets: the training examples to forget, and the labels of the training set."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from delfast.errors import InputError
from delfast.files import read_json, read_text, reason, write_json
from delfast.provenance import digest_indices

log = logging.getLogger(__name__)

NON_IID, MISLABELLED = "non-iid", "mislabelled"
MAX_DIGITS = 18  # of an index or a class; a longer number may not fit into 64 bits


@dataclass(frozen=True)
class ForgetSet:
    """The examples to forget.

    indices: (n,) int64, sorted positions in the training set of ``count`` examples.
    targets: (N,) int64, the labels that the network is trained with: the given labels, except that ``mislabelled``
        changes the labels at ``indices``. None for a job's training set, unless the choice depends on its labels.
    """

    spec: str
    ratio: float
    seed: int
    indices: Tensor
    targets: Tensor | None
    count: int

    @property
    def changes_labels(self) -> bool:
        """Whether the network is trained with other labels than the data set's own."""
        return parse_forget(self.spec)[0] == MISLABELLED

    @property
    def retain(self) -> Tensor:
        """The sorted positions of the retain set, (N - n,) int64."""
        keep = torch.ones(self.count, dtype=torch.bool)
        keep[self.indices] = False
        return keep.nonzero().flatten()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the indices and of their labels; of the indices alone without labels."""
        parts = [self.indices] if self.targets is None else [self.indices, self.targets[self.indices]]
        return digest_indices(torch.stack(parts))

    def save(self, path: Path) -> None:
        """Write spec, ratio, seed, indices, their labels (null without) and the digest as JSON."""
        write_json(
            path,
            {
                "spec": self.spec,
                "ratio": self.ratio,
                "seed": self.seed,
                "examples": self.count,
                "digest": self.digest,
                "indices": self.indices.tolist(),
                "labels": None if self.targets is None else self.targets[self.indices].tolist(),
            },
        )

    @classmethod
    def load(cls, path: Path, targets: Tensor | None, count: int | None = None) -> ForgetSet:
        """Read the file of ``save``.

        ``targets``: (N,) int64, the data set's own training labels; None for a choice of a job that has none.
        ``count``: the number of training examples, without ``targets``.
        """
        count = _count(targets, count)
        content = read_json(path)
        expected = {"spec": str, "ratio": float, "seed": int, "examples": int, "digest": str}
        try:
            spec, ratio, seed, examples, digest = (kind(content[name]) for name, kind in expected.items())
            indices = _positions(content["indices"])
            labels = None if targets is None else _positions(content["labels"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise InputError(f"'{path}' is no forget set; expected the file that `delfast train` writes") from None
        if examples != count:
            raise InputError(
                f"'{path}' is of a training set of {examples} examples, this one has {count}; "
                "use the data set it was made for"
            )
        ascending = len(indices) > 0 and bool((indices.diff() > 0).all())
        whole = labels is None or len(indices) == len(labels)
        if not whole or not ascending or not 0 <= indices[0] <= indices[-1] < examples:
            raise InputError(f"'{path}' lists examples that do not exist, or none, or one twice; train again")
        trained = None
        if targets is not None and labels is not None:
            trained = targets.clone()
            trained[indices] = labels
        loaded = cls(spec, ratio, seed, indices, trained, count)
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


def needs_labels(spec: str) -> bool:
    """Return whether the choice depends on the labels of the training set."""
    return parse_forget(spec)[0] in (NON_IID, MISLABELLED)


def _count(targets: Tensor | None, count: int | None) -> int:
    """Return the number of training examples: ``count``, or else the number of labels."""
    if count is None:
        assert targets is not None
        return len(targets)
    return count


def choose(
    spec: str,
    ratio: float,
    targets: Tensor | None,
    num_classes: int,
    seed: int,
    *,
    count: int | None = None,
    read_list: Callable[[str, Path], list[int]] | None = None,
) -> ForgetSet:
    """Choose the forget set: ``ratio`` of the training examples, by a generator of its own.

    ``iid``: at random. ``non-iid:2,5``: at random among these classes; all their examples, with a line in the log, if
    ``ratio`` exceeds their number. ``mislabelled``: at random, with each label replaced by another class, uniformly.
    ``file:PATH``: the indices in a text file (UTF-8, with or without a byte order mark), separated by white space;
    ``ratio`` has no effect.

    targets: (N,) int64 in [0, num_classes); None where ``needs_labels`` is False, with ``count``, the number of
    training examples. read_list: a function of a file's text and path that returns positions (default: its indices).
    Raises InputError for a ratio outside (0, 1], a class that does not exist, an empty forget set, and one that leaves
    no retain set.
    """
    kind, classes = parse_forget(spec)
    check_ratio(ratio)
    generator = torch.Generator().manual_seed(seed)
    count = _count(targets, count)
    wanted = round(ratio * count)
    pool = torch.arange(count)
    if kind == NON_IID:
        assert targets is not None
        missing = [label for label in classes if label >= num_classes]
        if missing:
            raise InputError(f"expected classes 0 to {num_classes - 1} in '{spec}', got {missing[0]}")
        pool = pool[torch.isin(targets, torch.tensor(classes))]
        if wanted > len(pool):
            log.info("%s holds %d examples, not %d: the forget set is all of them", spec, len(pool), wanted)
    indices = pool[torch.randperm(len(pool), generator=generator)[:wanted]].sort().values
    if kind == "file":
        indices = _listed(Path(os.path.expanduser(spec.removeprefix("file:"))), count, read_list)
    if len(indices) == 0:
        raise InputError(f"the forget set '{spec}' at ratio {ratio} is empty; raise --forget-ratio, or list more")
    if len(indices) == count:
        raise InputError(
            f"the forget set '{spec}' at ratio {ratio} is the whole training set; lower --forget-ratio, or list fewer"
        )
    trained = targets
    if kind == MISLABELLED:
        assert targets is not None
        if num_classes < 2:
            raise InputError("'mislabelled' needs at least 2 classes to flip labels between, the data has 1")
        offset = torch.randint(1, num_classes, (len(indices),), generator=generator)
        trained = targets.clone()
        trained[indices] = (targets[indices] + offset) % num_classes
    return ForgetSet(spec, ratio, seed, indices, trained, count)


def _listed(path: Path, examples: int, read_list: Callable[[str, Path], list[int]] | None) -> Tensor:
    """The sorted indices of a text file. InputError for a word that is no index, out of range, or repeated."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the forget set's indices in '{path}': {reason(error)}") from None
    found = read_indices(text, path, examples) if read_list is None else read_list(text, path)
    indices = torch.tensor(sorted(found), dtype=torch.int64)
    if len(torch.unique(indices)) < len(indices):
        raise InputError(f"expected '{path}' to list each index once, one is there twice; correct it")
    return indices


def read_indices(text: str, path: Path, examples: int) -> list[int]:
    """Return the indices in the text of the file ``path``, separated by white space; InputError for another word."""
    words = text.split()
    for word in words:
        if not word.isdecimal() or len(word) > MAX_DIGITS or int(word) >= examples:
            shown = word if len(word) <= MAX_DIGITS else f"{word[:MAX_DIGITS]}..."
            raise InputError(f"expected '{path}' to list indices from 0 to {examples - 1}, got '{shown}'; correct it")
    return [int(word) for word in words]


def check_ratio(ratio: float) -> None:
    """Raise InputError unless ``ratio`` lies in (0, 1]."""
    if not 0 < ratio <= 1:
        raise InputError(f"expected a forget ratio in (0, 1], got {ratio}")
