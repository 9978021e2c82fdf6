"""Run the commands one after the other in one process, as ``python -m delfast`` does, and return what they write."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

KEPT_RUN = Path(__file__).parent / "files" / "run"  # a run directory, with SHAPES in place of its weights
MODEL, SHAPES, SUMMARY = "model.safetensors", "shapes.json", "summary.json"
COMMANDS = (
    "train", "oracle", "localize", "unlearn", "evaluate", "init-job", "compare", "sequence", "verify", "bench",
    "doctor", "demo",
    "ledger init", "ledger add", "ledger list", "ledger show", "ledger verify",
    "ledger run", "ledger references", "ledger purge", "ledger report",
)  # fmt: skip
GRID = """
title = "golden"
seeds = [3]
[train]
data = "digits"
epochs = 1
lr = 0.02
batch_size = 64
train_examples = 150
test_examples = 50
[settings.non-iid]
forget = "non-iid:2,5"
[unlearn]
epochs = 1
[methods.finetune-fast]
of = "finetune"
lr = 0.05
[methods.ssd]
alpha = 2
[strategies.first]
criterion = "grad"
top_h = 1
[[compare]]
strategies = ["del"]
[[compare]]
methods = ["finetune-fast"]
strategies = ["first"]
[[compare]]
methods = ["ssd"]
strategies = ["everything"]
"""
TRAIN = "--train-examples 200 --test-examples 100 --batch-size 64 --epochs 1 --forget iid --forget-ratio 0.2 --seed 3"
RUNS = {
    "run": f"train {TRAIN} --output-dir run",
    "oracle": "oracle run --output-dir oracle",
    "mask": "localize run --budget 0.2 --preset published-code --output-dir mask",
    "random": "localize run --strategy random-param --output-dir random",
    "out": "unlearn run --mask random/mask.safetensors --epochs 1 --output-dir out",
    "metrics": "evaluate out --oracle oracle --output-dir metrics",
    "verified": "verify run out out/mask.safetensors --output-dir verified",
    "kept-mask": "localize kept --strategy weight --seed 7 --output-dir kept-mask",
    "grid": "compare grid.toml --workers 1 --output-dir grid",
}
# as __main__.py is run by `python -m delfast`; the marker ends each command's output
SCRIPT = """
import json, runpy, sys
for arguments in json.load(open("commands.json")):
    sys.argv = ["delfast", *arguments]
    code = 0
    try:
        runpy.run_module("delfast", run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        code = exit.code
    print(f"== {code}", flush=True)
"""
VARYING = ("seconds", "provenance", "bytes")  # times, versions, and a size that depends on the length of a version
ROUNDED = ("metrics", "methods", "attacks", "losses", "validation", "mask", "changed", "networks", "parameters", "rows")
ROUNDED += ("confidence", "correctness", "entropy", "m_entropy", "prob")  # attacks
ALIKE = ("data", "forget")  # digests that no rounding changes


def measure(directory: Path) -> dict[str, Any]:
    """Return the options of every command, and what the commands write, run in this empty directory."""
    (directory / "grid.toml").write_text(GRID, encoding="utf-8")
    restore_run(directory / "kept")
    options = _outputs(directory, [[*name.split(), "--help"] for name in COMMANDS], list(RUNS.values()))
    files = sorted(
        path.relative_to(directory).as_posix()
        for name in RUNS
        for path in (directory / name).rglob("*")
        if path.is_file()
    )
    contents = {
        name: json.loads((directory / name).read_text(encoding="utf-8")) for name in files if name.endswith(".json")
    }
    with open(directory / "grid" / "results.csv", encoding="utf-8", newline="") as stream:
        columns = next(csv.reader(stream))
    return {
        "everywhere": {
            "options": {name: _options(text) for name, text in zip(COMMANDS, options, strict=True)},
            "files": files,
            "columns of results.csv": columns,
            "keys": {name: _keys(content) for name, content in contents.items()},
            "contents": {name: _without_rounded(content) for name, content in contents.items()},
            # masks that depend on no gradient
            "masks": {name: contents[f"{name}/{SUMMARY}"]["mask"]["digest"] for name in ("random", "kept-mask")},
        },
        "here": {name: _rounded(content) for name, content in contents.items()},
    }


def _outputs(directory: Path, helps: list[list[str]], runs: list[str]) -> list[str]:
    """Run the commands in one process; return the output of those that ask for help."""
    commands = [*helps, *(run.split() for run in runs)]
    (directory / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    settings = {"OMP_NUM_THREADS": "1", "COLUMNS": "250", "NO_COLOR": "1", "TERM": "dumb"}
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=directory,
        env={**os.environ, **settings, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    outputs = re.split(r"^== (.*)\n", done.stdout, flags=re.MULTILINE)
    codes = dict(zip(map(" ".join, commands), outputs[1::2], strict=False))
    if len(codes) < len(commands) or set(codes.values()) != {"0"}:
        raise AssertionError(f"expected every command to succeed, got {codes}: {done.stderr}")
    return outputs[0 : 2 * len(helps) : 2]


def _options(text: str) -> list[str]:
    """Return the options, and the arguments of the usage line, that a help text lists."""
    usage = re.search(r"Usage: .*", text)
    # in capitals, or in braces: that depends on the version of typer
    arguments = usage[0].partition("[OPTIONS]")[2].replace("{", "").replace("}", "").upper().split() if usage else []
    return [*arguments, *sorted(set(re.findall(r"^[│\s*]*(--[a-z][\w-]*)", text, flags=re.MULTILINE)))]


def _keys(value: Any) -> str | None:
    """Return the keys of nested objects on one line; those of a list are its first item's."""
    if isinstance(value, list):
        return _keys(value[0]) if value else None
    if not isinstance(value, dict):
        return None
    below = {key: _keys(item) for key, item in sorted(value.items())}
    return " ".join(f"{key}({keys})" if keys else key for key, keys in below.items())


def _without_rounded(value: Any) -> Any:
    """Return the nested value without what depends on rounding, times or versions."""
    if isinstance(value, list):
        return [_without_rounded(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: {name: each for name, each in item.items() if name in ALIKE}
        if key == "digests"
        else _without_rounded(item)
        for key, item in value.items()
        if key not in (*VARYING, *ROUNDED)
    }


def _rounded(content: dict[str, Any]) -> dict[str, Any]:
    """Return what depends on rounding, except rows and tables, which repeat it beside times."""
    found = {key: content[key] for key in (*ROUNDED, "digests") if key in content and key not in ("rows", "parameters")}
    if "mask" in found:
        found["mask"] = {key: value for key, value in found["mask"].items() if key not in VARYING}
    return found


# ---- the kept run directory


def restore_run(run: Path) -> None:
    """Write the kept run directory, with weights that are a function of their position."""
    shutil.copytree(KEPT_RUN, run)
    shapes = json.loads((run / SHAPES).read_text(encoding="utf-8"))
    save_file(_state(shapes), run / MODEL)
    (run / SHAPES).unlink()


def keep_run() -> None:
    """Keep a run directory of the tree as it is; the digest in its summary becomes that of the weights by position."""
    making = KEPT_RUN.with_name("making")
    making.mkdir()
    try:
        _outputs(making, [], [RUNS["run"]])
        run = making / "run"
        trained = load_file(run / MODEL)
        shapes = {name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in trained.items()}
        (run / MODEL).unlink()
        (run / SHAPES).write_text(json.dumps(shapes) + "\n", encoding="utf-8")
        summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
        summary["digests"]["model"] = _digest(_state(shapes))
        (run / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(KEPT_RUN, ignore_errors=True)
        run.rename(KEPT_RUN)
    finally:
        shutil.rmtree(making)


def _state(shapes: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
    state = {}
    for name, (dtype, *shape) in shapes.items():
        values = torch.arange(math.prod(shape)) * 37 % 101 + 1
        state[name] = (values / 64 if dtype == "float32" else values).to(getattr(torch, dtype)).view(shape)
    return state


def _digest(state: dict[str, torch.Tensor]) -> str:
    """Return the digest of a network, as a run's summary holds it."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        own = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + b"\0")
        own.update(tensor.contiguous().numpy().tobytes())
        total.update(name.encode() + b"\0" + own.digest())
    return total.hexdigest()
