"""Checks of values on a device, which are read once at the end of a pass: the host does not wait in every batch."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from delfast.errors import InputError

SLOTS = 16  # different errors of a device; allocated at once, since a captured graph may not allocate

_entered = threading.local()
_threads: Counter[int] = Counter()  # the threads inside a pass
_lock = threading.RLock()


class DeviceChecks:
    """The checks of one pass over batches, or of one job. Inside ``with checks:`` they collect; ``read`` raises.

    A failed check makes every result since the last ``read`` void. device: where values will be checked.
    """

    def __init__(self, device: torch.device) -> None:
        self._slots: dict[torch.device, Tensor] = {}  # bool (SLOTS,): whether each error occurred
        self._errors: dict[torch.device, list[str]] = {}
        self._prepare(device)

    def __enter__(self) -> DeviceChecks:
        with _lock:  # not while another thread captures
            _threads[threading.get_ident()] += 1
        _stack().append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _stack().pop()
        _threads[threading.get_ident()] -= 1

    def add(self, failed: Tensor, error: str) -> None:
        """Remember ``error`` if ``failed``, a bool scalar tensor, is true."""
        if failed.device not in self._slots:
            self._prepare(failed.device)
        errors = self._errors[failed.device]
        if error not in errors:
            if len(errors) == SLOTS:
                raise RuntimeError(f"more than {SLOTS} different checks in one pass")
            errors.append(error)
        self._slots[failed.device][errors.index(error)].logical_or_(failed)

    def tensors(self) -> dict[Any, Tensor]:
        """Return the tensors that the checks write to, by their devices."""
        return dict(self._slots)

    def read(self) -> None:
        """Raise InputError with the first error that occurred. The host waits for each device that had a check."""
        for device, errors in self._errors.items():
            if errors:
                found = [e for e, failed in zip(errors, self._slots[device].tolist(), strict=False) if failed]
                if found:
                    raise InputError(found[0])

    def _prepare(self, device: torch.device) -> None:
        # outside inference mode, or they could not be changed in a pass that computes gradients
        with torch.inference_mode(False):
            self._slots[device] = torch.zeros(SLOTS, dtype=torch.bool, device=device)
        self._errors[device] = []


@contextmanager
def alone() -> Iterator[bool]:
    """Let no other thread begin a pass inside the context. Yields whether none has begun one."""
    with _lock:
        yield not any(count for thread, count in _threads.items() if thread != threading.get_ident())


@contextmanager
def prefixed(text: str) -> Iterator[None]:
    """Begin the text of every InputError inside the context with ``text``, once, also of those that are read later."""
    outer = getattr(_entered, "prefix", "")
    _entered.prefix = f"{outer}{text}: "
    try:
        yield
    except InputError as error:
        if not str(error).startswith(f"{text}: "):
            error.args = (f"{text}: {error}",)  # the same error: processes that raise it together have marked it
        raise
    finally:
        _entered.prefix = outer


def refuse_if(failed: Tensor, error: str) -> None:
    """Raise InputError with ``error`` if ``failed``, a bool scalar tensor, is true.

    Inside ``DeviceChecks`` it is raised when these are read, else at once, for which the host waits for the device.
    """
    stack = _stack()
    if stack:
        stack[-1].add(failed, f"{getattr(_entered, 'prefix', '')}{error}")
    elif bool(failed):
        raise InputError(error)


def _stack() -> list[DeviceChecks]:
    stack: list[DeviceChecks] | None = getattr(_entered, "stack", None)
    if stack is None:
        stack = _entered.stack = []
    return stack
