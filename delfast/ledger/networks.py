"""Networks of a ledger's files, and the random numbers that work on them draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from delfast.errors import InputError
from delfast.ledger.artefacts import digest_file, is_inside

if TYPE_CHECKING:
    from delfast.ledger.records import Records


class AlteredFile(InputError):
    """A recorded file is missing or has another content."""


@contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's own generators inside the context, since dropout draws from no other; restore them at its end."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def load_recorded(ledger: Records, recorded: Mapping[str, str], device: torch.device) -> nn.Module:
    """Load a network of the ledger to the device. AlteredFile if its file is not as it was recorded."""
    path = recorded_file(ledger.path, recorded)
    return ledger.job.load(path).to(device)


def recorded_file(ledger: Path, recorded: Mapping[str, str]) -> Path:
    """Return the path of a recorded file. AlteredFile if the file is missing or not as it was recorded."""
    path = ledger / recorded["file"]
    if not is_inside(recorded["file"]) or not path.is_file() or digest_file(path) != recorded["digest"]:
        raise AlteredFile(f"'{path}' is not as the ledger recorded it; restore it, and see `delfast ledger verify`")
    return path
