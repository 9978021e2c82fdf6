"""Files: written whole or not at all, and read without executing code in them."""

from __future__ import annotations

import codecs
import errno
import glob
import io
import json
import os
import pickle
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from delfast.errors import InputError, one_line
from delfast.plain import number

if sys.platform != "win32":
    import fcntl

LOCK_SECONDS = 0.2  # for a lock that ``is_locked`` holds in another process: microseconds, if that is not suspended
LOCK = "lock"  # name of the file that a process locks while it writes
# errors of file systems that cannot flush directories or lock files, and of Windows, which cannot open directories
UNSUPPORTED = {
    *(errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK),
    *(errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR),
}


@contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Make the operating system's errors inside the context name ``path``, such as that of a full disk.

    torch.save and safetensors hide the system's error in an exception of their own, and others name the temporary file.
    """
    try:
        yield
    except Exception as error:
        code = _system_error(error, path)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def _system_error(error: Exception, path: Path) -> int | None:
    """Return the system's error number if ``error`` is its failure to write ``path``; None for another failure."""
    if isinstance(error, SafetensorError):
        found = re.search(r"\(os error (\d+)\)", str(error))
        return int(found[1]) if found else None
    cause: BaseException | None = error
    while isinstance(cause, RuntimeError):  # torch's writer wraps the error of a failed write
        cause = cause.__context__
    if not isinstance(cause, OSError) or cause.errno is None:
        return None
    own = cause.filename is None or f".{path.name}." in str(cause.filename)
    return cause.errno if own else None


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary file beside ``path``, flush the file to the disk and rename it to ``path``.

    A reader gets the old file or the new one, never half of one. If ``write`` fails, the temporary file is removed,
    ``path`` is as it was, and the error is raised; an OSError then has the name of ``path``. Temporary files of
    processes that were killed are removed first; those of processes that still write stay.
    """
    path = Path(path)
    with naming_errors(path):
        with directory_for(path) as (directory, mode):
            partial = directory / "partial"
            write(partial)
            with open(partial, "rb+") as stream:
                if sys.platform != "win32":
                    os.fchmod(stream.fileno(), mode)  # safetensors and mapped tensors create private files
                os.fsync(stream.fileno())
            os.replace(partial, path)
        sync_directory(path.parent)


@contextmanager
def directory_for(path: Path) -> Iterator[tuple[Path, int]]:
    """Yield a private directory beside ``path``, removed at the end, and the mode that the umask gives to new files.

    A file in the directory is locked while its process lives; the system releases the lock however the process ends.
    """
    remove_abandoned(path.parent, glob.escape(path.name))
    directory, lock = _locked_directory(path)
    try:
        yield directory, stat.S_IMODE(os.fstat(lock).st_mode)
    finally:
        os.close(lock)
        shutil.rmtree(directory, ignore_errors=True)  # the next run removes what remains


def remove_abandoned(directory: Path, names: str = "*") -> None:
    """Remove what killed processes left in ``directory`` while they wrote files whose names match the pattern."""
    for abandoned in directory.glob(f".{names}.*.partial"):
        _remove_abandoned(abandoned)


@contextmanager
def exclusive(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock of the file ``path``, which is made if needed, until the context ends or the process does.

    InputError with the text ``busy`` if another process holds it for longer than ``is_locked`` does; OSError where the
    file system has no locks.
    """
    with open(path, "ab") as stream, naming_errors(path):
        end = time.monotonic() + LOCK_SECONDS
        while not _lock(stream.fileno(), wait=False, needed=True):
            if time.monotonic() > end:
                raise InputError(busy)
            time.sleep(LOCK_SECONDS / 100)
        yield


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of the file ``path``; also where that cannot be found out."""
    if not path.exists():  # nobody ever locked it
        return False
    with open(path, "rb") as stream:
        if sys.platform == "win32":
            return True
        try:
            fcntl.flock(stream.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)  # closing the file ends it
        except OSError:
            return True
        return False


def _locked_directory(path: Path) -> tuple[Path, int]:
    while True:
        directory = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        directory.mkdir(mode=0o700)
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _lock(lock, wait=True)
        if (directory / LOCK).exists():
            return directory, lock
        os.close(lock)  # another process removed the directory as abandoned just before it was locked


def _remove_abandoned(directory: Path) -> None:
    """Remove the directory unless a process holds its lock."""
    try:
        lock = os.open(directory / LOCK, os.O_RDWR)
    except OSError:  # another process has removed it, or it is another user's
        return
    try:
        if _lock(lock, wait=False):
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(descriptor: int, *, wait: bool, needed: bool = False) -> bool:
    """Lock an open file until it is closed; return False if another process holds the lock.

    Where the system has no locks, return False too, or raise its OSError if the lock is ``needed``.
    """
    if sys.platform == "win32":
        if needed:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if isinstance(error, BlockingIOError) or (error.errno in UNSUPPORTED and not needed):
            return False
        raise
    return True


def sync_directory(path: Path) -> None:
    """Flush a rename to the disk, so that it survives a power cut, if the system can flush directories."""
    try:
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, atomically; numpy's numbers become Python's."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=number) + "\n"
    write_atomically(path, lambda partial: _write_text(partial, text))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    write_atomically(path, lambda partial: _write_text(partial, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """Read a file as UTF-8, with or without a byte order mark.

    Raises OSError if the file is missing or no regular file (reading a pipe would wait for its other end), and
    ValueError if it is not UTF-8; both with a reason of one line.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16 text; save it as UTF-8")
    if b"\0" in content:
        raise ValueError("it is no text, or UTF-16 or UTF-32; save it as UTF-8")
    return content.decode("utf-8-sig")


def read_json(path: Path) -> Any:
    """Read a JSON file; InputError if it is missing or no JSON."""
    with _json_errors(path):
        return _json_value(read_text(path))


def read_json_lines(path: Path) -> list[Any]:
    """Read a file of one JSON value a line; InputError if it is missing or a line is no JSON."""
    with _json_errors(path):
        return [_json_value(line) for line in read_text(path).split("\n") if line.strip()]


def _json_value(text: str) -> Any:
    value = json.loads(text)
    if "\\ud" in text.lower():  # half of a surrogate pair is no text: no file could keep it
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


@contextmanager
def _json_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading JSON into InputError."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"expected a JSON file at '{path}', there is none; check the path") from None
    except RecursionError:
        raise InputError(f"cannot read '{path}' as JSON: it is nested too deeply; write it again") from None
    except (OSError, ValueError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"cannot read '{path}' as JSON: {reason(error)}; write it again") from None


def save_state(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Save a state dict as safetensors, atomically. Tensors that share memory are written once per name."""
    # safetensors refuses aliased storage; a tied parameter is stored under each of its names
    tensors = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in state.items()}
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata=dict(metadata or {})))


def load_state(path: Path) -> dict[str, Tensor]:
    """Load a state dict from ``.safetensors``, or from any other file by ``torch.load(weights_only=True)``.

    Raises InputError if the file is missing or damaged, holds anything except named tensors, or is a pickle with code,
    which is never run.
    """
    path = Path(path)
    checkpoint = path if path.is_dir() else path.parent if path.suffix == ".distcp" else None
    if checkpoint is not None and (checkpoint / ".metadata").is_file():
        raise InputError(
            f"expected a state file, got '{path}', a checkpoint of torch.distributed; gather the model with "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), and save that"
        )
    if not path.is_file():
        raise InputError(f"expected a state file at '{path}', there is none; check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = load_archive(path)
    except SafetensorError as error:
        raise InputError(f"'{path}' is no whole safetensors file ({one_line(error)}); write it again") from None
    except Exception as error:  # load_file raises many kinds, for a dtype that torch lacks for example
        raise InputError(f"'{path}' is refused: {one_line(error)}; save a plain state dict as .safetensors") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        found = type(state).__name__
        if isinstance(state, dict):
            found = f"a dict with {', '.join(map(repr, list(state)[:5]))}; save the model's alone"
        raise InputError(f"expected '{path}' to hold a state dict (name -> tensor), got {found}")
    return state


def save_archive(path: Path, value: object) -> None:
    """Write ``value`` by ``torch.save``, atomically; ``unreadable_types`` lists the types that cannot be read again."""

    def write(partial: Path) -> None:
        with open(partial, "wb") as stream:  # torch's writer passes this stream's OSErrors on
            torch.save(value, stream)

    write_atomically(path, write)


def load_archive(path: Path) -> Any:
    """Read a file of ``torch.save``: tensors and plain values, on the CPU. No code in the file is run.

    ``torch.save`` writes a checksum of every record. ``torch.load`` ignores it, so it is checked here; files in the
    format before torch 1.6 have none. Raises ValueError, with the reason in one line, for a file that is damaged or
    holds other objects.
    """
    try:
        _check_checksums(path)
    except OSError as error:
        raise ValueError(error.strerror or one_line(error)) from None
    except Exception:  # zipfile raises many kinds for a damaged archive
        raise ValueError("it is damaged") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds, and its text advises loading without weights_only
        raise ValueError("it is damaged or holds more than tensors and plain values") from None


def _check_checksums(path: Path) -> None:
    with open(path, "rb") as stream:
        if stream.read(4) != b"PK\x03\x04":  # by these bytes torch.load recognizes an archive
            return
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise zipfile.BadZipFile


def unreadable_types(value: object) -> list[str]:
    """Return the names of the classes in ``value`` that ``load_archive`` refuses to read."""
    with io.BytesIO() as buffer:
        try:
            torch.save(_without_data(value), buffer)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            return [one_line(error)]
        buffer.seek(0)
        return torch.serialization.get_unsafe_globals_in_checkpoint(buffer)


def _without_data(value: Any) -> Any:
    """Copy nested dicts, lists and tuples, with empty tensors in place of all tensors."""
    if isinstance(value, Tensor):
        return torch.empty(0)
    if type(value) in (dict, OrderedDict):
        return {key: _without_data(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return [_without_data(item) for item in value]
    return value


def make_output_dir(path: Path, option: str = "--output-dir") -> Path:
    """Make ``path`` and its parents, and check that files can be written there.

    InputError if they cannot; it advises another value of the command line's ``option``.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe-"):
            return path
    except OSError as error:
        raise InputError(
            f"cannot write to the output directory '{path}' ({error.strerror}); choose another {option}"
        ) from None


def reason(error: Exception) -> str:
    """Return why a file could not be read: an OSError's text without number and path, another error's first line."""
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
