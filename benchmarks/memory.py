"""Peak memory of a process. Each side runs in its own process, since a process keeps its peak."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable


def added_peak(module: str, *arguments: object) -> int:
    """Return the bytes that ``module.print_peak(*arguments)`` prints, in a new process."""
    call = f"print_peak({', '.join(map(repr, arguments))})"
    command = [sys.executable, "-c", f"from {module} import print_peak; {call}"]
    return int(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def print_added_peak(warm_up: Callable[[], object], run: Callable[[], object]) -> None:
    """Print the bytes that ``run`` adds to the peak after ``warm_up``; see ``own_added_peak``."""
    print(own_added_peak(warm_up, run))


def own_added_peak(warm_up: Callable[[], object], run: Callable[[], object]) -> int:
    """Return the bytes that ``run`` adds to this process's peak after ``warm_up``, in which libraries allocate."""
    warm_up()
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024
