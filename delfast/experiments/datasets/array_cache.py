"""Arrays that are computed once: a directory of files, checked when read and limited in size."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from delfast.files import reason, remove_abandoned, write_atomically

log = logging.getLogger(__name__)

MAX_BYTES = 4 * 2**30  # of all entries of a directory; above it, the least recently used are removed


class ArrayCache:
    """Arrays by key, in files of a directory that several processes may use at once.

    An entry is an uncompressed .npz file, which holds a CRC-32 of its array. The time of the file is that of its last
    use. The directory is made by the first ``write``, for its owner alone. No failure of the disk is an error: an entry
    that cannot be read is computed again, and one that cannot be written is not kept. Both are reported in one line of
    the log.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._keeps = True  # until a write fails

    def read(self, key: str) -> Tensor | None:
        """Return the array of a key, in memory; None where the directory has none that is whole."""
        path = self._path(key)
        try:
            with numpy.load(path, allow_pickle=False) as archive:  # reading to the end compares the checksums
                array = torch.from_numpy(archive[key])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # zipfile and numpy raise many kinds for a damaged archive
            log.info("cannot use '%s' (%s); computing its array again", path, reason(error))
            return None
        with suppress(OSError):  # a read-only directory: nothing is removed from it either
            os.utime(path)
        return array

    def write(self, key: str, array: Tensor) -> None:
        """Keep an array under a key; remove what was not used for the longest time if all entries exceed MAX_BYTES."""
        if not self._keeps or array.nbytes > MAX_BYTES:
            return

        named: dict[str, Any] = {key: array.numpy()}

        def save(partial: Path) -> None:
            with open(partial, "wb") as stream:
                numpy.savez(stream, **named)

        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self._path(key), save)
            self._trim()
        except OSError as error:
            self._keeps = False
            log.info("arrays are not kept: cannot write to '%s' (%s)", self.directory, reason(error))

    def _path(self, key: str) -> Path:
        return self.directory / f"{key[:20]}.npz"

    def _trim(self) -> None:
        remove_abandoned(self.directory)
        total = 0
        for _, size, path in sorted(self._entries(), reverse=True):
            total += size
            if total > MAX_BYTES:
                path.unlink(missing_ok=True)

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """Time of the last use (ns), size (bytes) and path of every entry."""
        for path in self.directory.glob("*.npz"):
            with suppress(FileNotFoundError):  # another process has just removed it
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path
