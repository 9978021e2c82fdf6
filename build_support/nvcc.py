"""Runs nvcc and keeps what it made, for benchmarks/ptxas.py: CMake calls `python nvcc.py FOLDER NVCC ARGUMENT...`.

FOLDER gets the machine code for each architecture (sm_90.cubin), and report.json: ptxas' report of all kernels, the CPU
seconds that all of this took, and what nvcc's -MF has written, the files that the source includes.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PTXAS_REPORT = re.compile(r"^(ptxas info .*|    \d+ bytes stack frame.*)\n", re.MULTILINE)


def main(folder: Path, command: list[str]) -> int:
    """Run nvcc by this command and fill the folder; return nvcc's exit status."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as kept:
        result = subprocess.run(
            [*command, "-Xptxas", "-v", "--keep", "--keep-dir", kept], stderr=subprocess.PIPE, text=True
        )
        sys.stderr.write(PTXAS_REPORT.sub("", result.stderr))
        if result.returncode:
            return result.returncode
        for cubin in Path(kept).glob("*.cubin"):
            shutil.copyfile(cubin, folder / f"sm_{_architecture(cubin.stem, command)}.cubin")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    included = Path(command[command.index("-MF") + 1]).read_text(encoding="utf-8")
    report = {"ptxas": result.stderr, "seconds": usage.ru_utime + usage.ru_stime, "included": included}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return 0


def _architecture(stem: str, command: list[str]) -> str:
    """Return "80" for selection.compute_80, "120" for selection.compute_120.sm_120; "selection" is of the only one."""
    _, _, suffix = stem.rpartition(".")
    found = (
        re.search(r"(?:sm|compute)_(\w+)$", suffix) if "." in stem else re.search(r"code=sm_(\w+)", " ".join(command))
    )
    return found[1]  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
