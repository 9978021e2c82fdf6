"""The order in which `delfast compare` runs networks and cells, and cells whose localization stops early."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delfast.cli import main
from delfast.errors import InputError
from delfast.experiments.datasets import Batches, Examples
from delfast.experiments.grid import MARKDOWN, cells, workers
from delfast.experiments.grid.definition import read_grid
from delfast.experiments.grid.summary import ANYTIME
from delfast.experiments.grid.workers import Stage, run_stages
from tests import ROOT
from tests.experiments.grids import HEAD, TINY, measured, write

# ---- the order


class Task(NamedTuple):
    stage: int
    what: str
    number: int


class Run:
    """``run_stages`` with workers that end in an order of the test's choice; what happened, in ``events``."""

    def __init__(self, sizes: list[tuple[int, int]], count: int, ahead: bool, ends: Iterator[int]) -> None:
        self.events: list[tuple[str, Any]] = []
        self.shown: list[tuple[str, int, int]] = []
        self.running: dict[Future[Any], Task] = {}
        self.ends = ends
        stages = [
            Stage(
                deque(partial(self.refuse, Task(i, "networks", n)) for n in range(networks)),
                deque(partial(self.refuse, Task(i, "cells", n)) for n in range(some)),
                partial(self.events.append, ("check", i)),
            )
            for i, (networks, some) in enumerate(sizes)
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workers, "_pool", self.pool)
            patch.setattr(workers, "wait", self.wait)
            run_stages(stages, count, 1, ahead=ahead, watch=lambda *shown: self.shown.append(shown))
        assert not self.running

    def refuse(self, task: Task) -> None:
        raise AssertionError(f"{task} ran in this process")

    @contextmanager
    def pool(self, count: int, threads: int) -> Iterator[Run]:
        yield self

    def submit(self, task: partial[None]) -> Future[None]:
        future: Future[None] = Future()
        self.running[future] = task.args[0]
        self.events.append(("begin", task.args[0]))
        return future

    def wait(self, futures: dict[Future[Any], Any], **_: Any) -> Any:
        assert list(futures) == list(self.running)
        future = list(self.running)[next(self.ends) % len(self.running)]
        self.events.append(("end", self.running.pop(future)))
        future.set_result(None)
        return type("Waited", (), {"done": {future}})


SIZES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=4)


@given(SIZES, st.integers(1, 5), st.booleans(), st.lists(st.integers(0, 100), min_size=28, max_size=28))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_a_stage_is_finished_before_the_next_and_networks_before_their_cells(
    sizes: list[tuple[int, int]], count: int, ahead: bool, ends: list[int]
) -> None:
    events = Run(sizes, count, ahead, iter(ends)).events
    counts = {(i, "networks"): networks for i, (networks, _) in enumerate(sizes)}
    counts |= {(i, "cells"): some for i, (_, some) in enumerate(sizes)}
    begun = [task for kind, task in events if kind == "begin"]
    assert sorted(begun) == sorted(Task(*key, number) for key, size in counts.items() for number in range(size))
    done, checked, running = dict.fromkeys(counts, 0), set(), 0

    def ready(stage: int) -> bool:
        """Return whether a task of the stage could begin that has not."""
        started = [task for task in begun[:position] if task.stage == stage]
        cells = sum(task.what == "cells" for task in started)
        if len(started) - cells < counts[stage, "networks"]:
            return True
        return stage in checked and cells < counts[stage, "cells"]

    def finished(stage: int) -> bool:
        return all(done[stage, what] == counts[stage, what] for what in ("networks", "cells"))

    position = 0
    for kind, task in events:
        if kind == "check":
            assert task not in checked and done[task, "networks"] == counts[task, "networks"]
            checked.add(task)
        elif kind == "end":
            done[task.stage, task.what] += 1
            running -= 1
        else:
            earlier = range(task.stage)
            assert not any(ready(stage) for stage in earlier)  # a worker takes the first task that can begin
            assert ahead or all(finished(stage) for stage in earlier)
            assert task.what == "networks" or task.stage in checked
            position, running = position + 1, running + 1
            assert running <= count
    assert checked == set(range(len(sizes)))


@given(SIZES, st.integers(1, 5), st.lists(st.integers(0, 100), min_size=28, max_size=28))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_no_worker_of_a_cpu_waits_while_a_network_is_left(
    sizes: list[tuple[int, int]], count: int, ends: list[int]
) -> None:
    events, running, begun = Run(sizes, count, True, iter(ends)).events, 0, 0
    networks = sum(some for some, _ in sizes)
    for kind, task in events:
        if kind == "end":
            assert running == min(count, running + networks - begun) or begun == networks
        running += {"begin": 1, "end": -1, "check": 0}[kind]
        begun += kind == "begin" and task.what == "networks"


def test_progress_is_reported_after_every_task() -> None:
    shown = Run([(2, 1), (0, 1)], 1, False, iter([0] * 9)).shown
    networks = [("networks", done, 2) for done in range(3)]
    assert shown == [*networks, *(("cells", done, 2) for done in range(3))]
    assert Run([(0, 0)], 1, False, iter([])).shown == [("networks", 0, 0), ("cells", 0, 0)]


def test_the_first_error_is_raised() -> None:
    def fail(self: Run, futures: dict[Future[Any], Any], **_: Any) -> Any:
        (future,) = futures
        future.set_exception(InputError("no data"))
        return type("Waited", (), {"done": {future}})

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="no data"):
        patch.setattr(Run, "wait", fail)
        Run([(1, 1)], 2, True, iter([]))


def test_the_settings_of_a_seed_come_before_the_next_seed(tmp_path: Path) -> None:
    text = TINY.replace("[unlearn]", '[settings.iid]\nforget = "iid"\n[unlearn]')
    parts = cells._parts(read_grid(write(tmp_path, text)))
    found = [{(cell.config.seed, cell.setting) for cell in part.cells} for part in parts]
    assert found == [{(0, "non-iid")}, {(0, "iid")}, {(1, "non-iid")}, {(1, "iid")}]
    assert all(len(part.cells) == 11 and len(part.trained) == 2 for part in parts)


# ---- anytime localization


def test_a_cell_that_stops_early_has_its_examples_and_overlaps(tmp_path: Path) -> None:
    text = HEAD.replace("seeds = [0, 1]", "seeds = [0]").replace("[unlearn]", "[unlearn]\nbatch_size = 4")
    for bound in (0.2, 1.0):
        text += f'[strategies."anytime-{bound}"]\ncriterion = "weighted_grad"\ngranularity = "channel"\n'
        text += f"stop_when_stable = {bound}\n"
    text += '[[compare]]\nstrategies = ["del", "anytime-0.2", "anytime-1.0"]\n'
    path, out = write(tmp_path, text), tmp_path / "out"
    grid = read_grid(path)
    (out / "cells").mkdir(parents=True)
    for network in grid.trained:
        cells._train(out, network, "cpu")
    for cell in grid.cells:
        cells.run_cell(out, cell, "cpu")
    assert main(["compare", str(path), "--output-dir", str(out), "--report-only"]) == 0
    rows = {row["strategy"]: row for row in measured(out) if row["method"] == "del"}
    assert all(rows["del"][name] == "" for name in ANYTIME)
    early, late = ({name: float(rows[f"anytime-{bound}"][name]) for name in ANYTIME} for bound in (0.2, 1.0))
    of = early["anytime_of"]
    assert early["anytime_examples"] == 8 < of and early["anytime_overlap"] >= 0.2  # two masks, of 4 and 8 examples
    assert early["anytime_overlap"] < 1 and 0 < early["anytime_overlap_of_all"] < 1
    assert late["anytime_examples"] == late["anytime_of"] == of and late["anytime_overlap_of_all"] == 1
    assert rows["anytime-1.0"]["forget_acc"] == rows["del"]["forget_acc"]  # the mask is that of all examples
    report = (out / MARKDOWN).read_text(encoding="utf-8")
    assert "non-iid - Anytime localization" in report and f"| anytime-0.2 | 8.00 | {of:.2f} | " in report


def test_a_bad_bound_is_refused(tmp_path: Path) -> None:
    own = '[strategies.own]\ncriterion = "{}"\ngranularity = "channel"\nstop_when_stable = {}\n[[compare]]\n'
    for criterion, bound, message in (
        ("grad", "1.5", "stop_when_stable in"),
        ("grad", "true", "stop_when_stable of strategy 'own' to be a number"),
        ("weight", "0.9", "a criterion with a gradient"),
    ):
        path = write(tmp_path, HEAD + own.format(criterion, bound) + 'strategies = ["own"]\n')
        with pytest.raises(InputError, match=message):
            read_grid(path)


def test_examples_are_the_same_one_by_one_and_together() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, 3, 4, 4), dtype=torch.uint8, generator=generator)
    batches = Batches(
        images, torch.arange(9), torch.rand(3), torch.rand(3), batch_size=4, indices=torch.arange(9).flip(0)
    )
    examples = Examples(batches)
    for together, position in zip(examples.__getitems__([7, 0, 3]), (7, 0, 3), strict=True):
        alone = examples[position]
        assert all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(together, alone, strict=True))
        assert int(together[0]) == int(together[2]) == 8 - position


# ---- the grids of the paper's core


@pytest.mark.slow
@pytest.mark.parametrize("name, model", [("cifar10-resnet18-core", "resnet18-thin"), ("cifar10-vit-core", "vit")])
def test_every_row_of_the_core_is_measured(name: str, model: str, tmp_path: Path) -> None:
    """On digits, in an epoch each, with two workers."""
    text = (ROOT / f"experiments/paper/{name}.toml").read_text(encoding="utf-8")
    text = re.sub(r"epochs = 30", "epochs = 1", text).replace("seeds = [0, 1, 2]", "seeds = [0]")
    text = re.sub(r"model = .*", f'model = "{model}"\ntrain_examples = 120\ntest_examples = 40', text)
    path, out = write(tmp_path, text), tmp_path / "out"
    arguments = ["compare", str(path), "--data", "digits", "--output-dir", str(out), "--workers", "2"]
    assert main(arguments) == 0
    rows = measured(out)
    found = {(row["setting"], row["method"], row["strategy"]) for row in rows}
    masks = ("del", "del-per-example", "del-anytime-95", "del-anytime-99", "salloc", "random")
    expected = {("original", "everything"), ("oracle", "everything"), ("finetune", "everything"), ("salun", "salloc")}
    expected |= {("del", strategy) for strategy in masks}
    assert found == {(setting, *each) for setting in ("non-iid", "mislabelled") for each in expected}
    assert all(row["mia"] for row in rows)
    assert all(row["anytime_examples"] for row in rows if "anytime" in row["strategy"])
