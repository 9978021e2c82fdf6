"""Reading and writing files: whole or not at all, and never executing what is read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from delfast.errors import InputError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk and rename it over ``path``.

    A reader sees the old file or the new one, never half of one. If ``write`` fails (a full disk, say) the
    temporary file is removed, ``path`` is as it was, and the error goes on.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        write(partial)
        with open(partial, "rb+") as stream:
            os.fsync(stream.fileno())
        umask = os.umask(0)  # mkstemp makes private files; give this one the ordinary permissions
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself must survive a power cut
    finally:
        os.close(directory)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda partial: _write_text(partial, text))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    write_atomically(path, lambda partial: _write_text(partial, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; InputError if it is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"expected a JSON file at '{path}', there is none; check the path") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read '{path}' as JSON: {one_line(error)}; write it anew") from None


def save_state(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Save a state dict as safetensors, atomically. Tensors that share memory are written once per name."""
    # safetensors refuses aliased storage; a tied parameter is stored under each of its names
    tensors = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in state.items()}
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata=dict(metadata or {})))


def load_state(path: Path) -> dict[str, Tensor]:
    """Load a state dict: safetensors by its suffix, anything else by ``torch.load(weights_only=True)``.

    Raises InputError if the file is missing, damaged, holds anything but named tensors, or is a pickle that
    carries code (which is never run).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"expected a state file at '{path}', there is none; check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"'{path}' is no whole safetensors file ({one_line(error)}); write it anew") from None
    except Exception:  # torch.load raises many kinds, and its texts advise to load without weights_only
        raise InputError(
            f"'{path}' is refused: it is damaged or holds more than tensors; save a plain state dict as .safetensors"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"expected '{path}' to hold a state dict (name -> tensor), got {type(state).__name__}")
    return state


def make_output_dir(path: Path) -> Path:
    """Make ``path`` and its parents, and check that files can be written there. InputError if they cannot."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe-"):
            return path
    except OSError as error:
        raise InputError(
            f"cannot write to the output directory '{path}' ({error.strerror}); choose another --output-dir"
        ) from None


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
