"""Stop a command: by a signal, which cleans up as an error does, or by the end of the parent process."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any


class Stopped(BaseException):
    """The end of a command by a signal. A BaseException, so that ``except Exception`` does not catch it."""

    INTERRUPTED = 128 + signal.SIGINT

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.exit_code = 128 + number


@contextmanager
def stopping() -> Iterator[None]:
    """Raise ``Stopped`` at Ctrl-C and SIGTERM, so that temporary files and worker processes are removed.

    A signal that the caller ignores or handles is left to the caller. Outside the main thread, which alone can handle
    signals, the context has no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ordinary: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    handled = [number for number, handler in ordinary.items() if signal.getsignal(number) == handler]
    for number in handled:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, ordinary[number])


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C until the context ends. Processes started inside ignore it from their first instruction."""
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing's own process; starting it later would unblock signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_after(wait: Callable[[], object]) -> None:
    """End this process as soon as ``wait`` returns, whatever the process is doing.

    ``wait`` reads a pipe that nobody writes to. It returns when the other end closes, because the parent closed it or
    died, by any signal.
    """

    def watch() -> None:
        try:
            wait()
        finally:
            os._exit(1)

    threading.Thread(target=watch, name="delfast-parent", daemon=True).start()
