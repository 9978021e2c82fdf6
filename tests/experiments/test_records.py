"""Files that others wrote, or edited: every grid, summary and cell is read, or refused in one printable line."""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import asdict
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from rich.console import Console

from delfast.cli import main
from delfast.cli.console import start_log
from delfast.errors import InputError, printable
from delfast.evaluation import Metrics
from delfast.experiments import run as runs
from delfast.experiments.datasets import load
from delfast.experiments.grid import HTML, MARKDOWN, RESULTS
from delfast.experiments.grid.cells import ATTACKS, _described
from delfast.experiments.grid.definition import MAX_CELLS, read_grid
from delfast.experiments.grid.records import MEMBERSHIP, cell_path, network_path
from delfast.experiments.pipeline import Trained, _write_run
from delfast.experiments.progress import log
from delfast.experiments.reports import markdown_table, markdown_text, method_table, terminal_table
from delfast.experiments.reports.pages import own_script
from delfast.experiments.run import open_run
from delfast.mask import Mask
from delfast.provenance import provenance

GRID: dict[str, Any] = {
    "title": "tiny",
    "seeds": [0, 1],
    "budget": 0.3,
    "train": {"data": "digits", "epochs": 1, "lr": 0.02, "batch_size": 64, "train_examples": 300},
    "settings": {"iid": {"forget": "iid"}, "non-iid": {"forget": "non-iid:2,5", "forget_ratio": 0.1}},
    "unlearn": {"epochs": 1},
    "methods": {"ssd": {"alpha": 2}, "del-fast": {"of": "del", "lr": 0.5}},
    "strategies": {"del-h1": {"criterion": "grad", "top_h": 1, "per_example": True}},
    "compare": [
        {"methods": ["del", "del-fast"], "strategies": ["del", "del-h1"], "budgets": [0.3], "settings": ["iid"]},
        {"methods": ["finetune", "ssd"], "strategies": ["everything"]},
    ],
}
SMALL = GRID | {"seeds": [0], "settings": {"iid": {"forget": "iid"}}}
NO_FIGURES = SMALL | {"compare": [{"strategies": ["del", "random"]}, *GRID["compare"][1:]]}
NASTY = "<script>[red]|`*_\x1b[31m\n\u202e&"  # of HTML, of rich, of Markdown, of a terminal


# ---- mutations


class Deleted:
    """In place of a value: its key is gone."""


# a container that has itself inside cannot be in a file
VALUES = st.one_of(
    st.sampled_from([
        *(None, True, False, 0, 1, -1, 0.0, 0.3, -0.5, 1.5, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf),
        *(2**31, 2**63 - 1, 2**63, 2**64, -(2**70), 10**400, Deleted),
        *("", "0.3", "../../x", "/tmp/x", "a/b", ".", "..", "\0", "\x1b[31m", "\n", "\ud800", "é", "x" * 500, NASTY),
        *("folder:~nobody-of-that-name/x", "file:~nobody-of-that-name/x"),
        *([], {}, [[]], [{}], [None], {"a": {}}, ["x"] * 50, [0.1] * 50, {"": 0}, {"setting": "../../x"}),
        [[[[[[[[]]]]]]]], {key: {"a": [{"b": 1}]} for key in "abcdefgh"},
    ]),
    st.text(max_size=5),
    st.integers(),
    st.floats(),
)  # fmt: skip


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to every value inside."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(place for key, each in inside for place in places(each, (*way, key)))]


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """The value with one to three places deleted, renamed, or filled with something else or with another's value."""
    value = deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        *way, key = draw(st.sampled_from(places(value)[1:] or [("nowhere",)]))
        parent = value
        for step in way:
            parent = parent[step]
        new = draw(VALUES)
        if key == "nowhere":
            return new if new is not Deleted else None
        if new is Deleted:
            del parent[key]
        elif isinstance(parent, dict) and draw(st.integers(0, 5)) == 0:
            parent[draw(st.sampled_from(["", "setting", "../../x", "\x1b[31m", "a" * 300, NASTY]))] = parent.pop(key)
        else:
            parent[key] = deepcopy(new)
    return value


def toml(value: Any) -> str:
    """Inline TOML, and text that is none where TOML has no such value."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(str(key))} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool) and value not in range(-(2**200), 2**200):
        return hex(value)  # a decimal one of so many digits cannot be read at all
    return json.dumps(value).replace("\x7f", "\\u007f")


def write_grid(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    items = content.items() if isinstance(content, dict) else [("value", content)]
    path.write_text("".join(f"{toml(str(key))} = {toml(value)}\n" for key, value in items), encoding="utf-8")
    return path


def check_line(text: str) -> None:
    assert text.isprintable() and len(text) < 3000, text[:300]


# ---- grids


def grid_is_read_or_refused(path: Path, content: Any) -> None:
    try:
        grid = read_grid(write_grid(path, content))
    except InputError as error:
        check_line(str(error))
        return
    assert 0 < grid.budget <= 1
    for name in [cell.key for cell in grid.cells] + [network.key for network in grid.trained]:
        assert re.fullmatch(r"[\w.+-]+", name) and len(name.encode()) < 230


@settings(max_examples=120, derandomize=True, deadline=None)
@given(mutated(GRID))
def test_every_mutation_of_a_grid_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    grid_is_read_or_refused(tmp_path_factory.getbasetemp() / "mutated.toml", content)


@pytest.mark.slow
@settings(max_examples=5_000, derandomize=True, deadline=None)
@given(mutated(GRID))
def test_every_mutation_of_a_grid_is_read_or_refused_long(
    tmp_path_factory: pytest.TempPathFactory, content: Any
) -> None:
    grid_is_read_or_refused(tmp_path_factory.getbasetemp() / "mutated.toml", content)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"budget": "0.3"}, "expected budget of .* to be a number, got '0.3'"),
        ({"compare": [{"budgets": ["0.3"]}]}, r"expected budgets of \[\[compare\]\] to be a list, each a number"),
        ({"budget": math.nan}, r"budget in \(0, 1\], got nan"),
        ({"seeds": [2**64]}, "seeds of .* a whole number, got .18446744073709551616|more than 64 bits"),
        ({"seeds": [2**31]}, "expected a seed from 0 to 2147483647, got 2147483648"),
        ({"seeds": [-1]}, "expected a seed from 0 to 2147483647, got -1"),
        ({"seeds": list(range(30_000))}, f"expected a grid of at most {MAX_CELLS} cells, shadows included, got"),
        ({"shadows": 10**9}, f"expected a grid of at most {MAX_CELLS} cells"),
        ({"strategies": {"own": {"per_example": "yes"}}, "compare": [{"strategies": ["own"]}]}, "to be true or false"),
        ({"strategies": {"own": {"top_h": [1]}}, "compare": [{"strategies": ["own"]}]}, "to be a text or a number"),
        ({"methods": {"own": {"of": ["del"]}}}, r"expected \[methods.NAME\] to name one of"),
        ({"settings": {"a" * 65: {"forget": "iid"}}}, "at most 64 bytes"),
        ({"settings": {"../x": {"forget": "iid"}}}, "expected names of .settings. of letters"),
        ({"train": {"lr": 10**400}}, "to be a number, got an integer of more than 64 bits"),
    ],
)
def test_a_grid_of_wrong_values_is_refused(change: dict[str, Any], message: str, tmp_path: Path, capsys: Any) -> None:
    path = write_grid(tmp_path / "grid.toml", GRID | change)
    assert main(["compare", str(path), "--output-dir", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.search(message, lines[0]) and not (tmp_path / "out").exists()
    check_line(lines[0])


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 100_000, "a." * 500 + "a = 1", "a = " + "9" * 5000, "a = 0x" + "f" * 100_000, 'a = "\\ud800"'],
)
def test_toml_that_python_cannot_hold_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_grid(tmp_path / "grid.toml")
    check_line(str(caught.value))


# ---- run directories


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of an untrained network."""
    directory = tmp_path_factory.mktemp("records") / "run"
    directory.mkdir()
    config = runs.Config("digits", "resnet18-thin", "iid", 0.1, 1, 0.1, 64, train_examples=200, test_examples=50)
    run = runs.start(config, torch.device("cpu"))
    _write_run(run, directory, "train", Trained(run.factory(), _metrics(), {"train": 1.0}), {"seed": 0}, {}, {})
    return directory


def _metrics() -> Metrics:
    return Metrics(50.0, 60.0, 70.0, 1.0, 2.0, 3.0, 40.0)


@pytest.fixture(scope="module")
def one_load() -> Any:
    """The data, read once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs, "load", lru_cache(load))
        yield


def run_is_opened_or_refused(directory: Path, name: str, content: Any) -> None:
    before = (directory / name).read_bytes()
    try:
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
        runs.load_model(open_run(directory, torch.device("cpu")), directory)
    except InputError as error:
        check_line(str(error))
    finally:
        (directory / name).write_bytes(before)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(data=st.data(), name=st.sampled_from([runs.SUMMARY, runs.FORGET]))
def test_every_mutation_of_a_run_is_opened_or_refused(trained: Path, one_load: None, data: Any, name: str) -> None:
    content = json.loads((trained / name).read_text(encoding="utf-8"))
    run_is_opened_or_refused(trained, name, data.draw(mutated(content)))


@pytest.mark.slow
@settings(max_examples=2_000, derandomize=True, deadline=None)
@given(data=st.data(), name=st.sampled_from([runs.SUMMARY, runs.FORGET]))
def test_every_mutation_of_a_run_is_opened_or_refused_long(trained: Path, one_load: None, data: Any, name: str) -> None:
    content = json.loads((trained / name).read_text(encoding="utf-8"))
    run_is_opened_or_refused(trained, name, data.draw(mutated(content)))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("epochs", "many", "expected epochs of config of .* to be a whole number, got 'many'"),
        ("seed", 2**64, "expected seed of config .* got an integer of more than 64 bits"),
        ("seed", -1, "expected a seed from 0 to"),
        ("lr", None, "expected lr of config .* to be a number, got None"),
        ("channels_last", 1, "to be true or false, got 1"),
        ("train_examples", 0.5, "to be a whole number, got 0.5"),
    ],
)
def test_an_edited_summary_is_refused(
    trained: Path, tmp_path: Path, key: str, value: Any, message: str, capsys: Any
) -> None:
    before = (trained / runs.SUMMARY).read_text(encoding="utf-8")
    content = json.loads(before)
    content["config"][key] = value
    try:
        (trained / runs.SUMMARY).write_text(json.dumps(content), encoding="utf-8")
        assert main(["localize", str(trained), "--output-dir", str(tmp_path / "mask")]) == 2
    finally:
        (trained / runs.SUMMARY).write_text(before, encoding="utf-8")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.search(message, lines[0]) and not (tmp_path / "mask").exists()


@pytest.mark.parametrize("name", ["x" * 300, "loop", "\x1b[31m\n"])
@pytest.mark.parametrize("command", ["localize", "oracle", "unlearn", "evaluate"])
def test_a_path_that_can_be_no_run_is_refused(command: str, name: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    output_dir = [] if command == "evaluate" else ["--output-dir", str(tmp_path / "out")]
    assert main([command, str(tmp_path / name), *output_dir]) == 2
    lines = capsys.readouterr().err.split("\n")[:-1]
    assert len(lines) == 1 and lines[0].startswith("delfast: error: ") and not (tmp_path / "out").exists()
    check_line(lines[0])


# ---- cells of others


class Finished:
    """An output directory of ``compare`` as a run would leave it, with made-up numbers, and its grid."""

    def __init__(self, root: Path, content: dict[str, Any]) -> None:
        self.path, self.out = write_grid(root / "grid.toml", content), root / "out"
        grid = read_grid(self.path)
        origin = provenance(device="cpu")
        attacks = dict.fromkeys(ATTACKS, 50.0)
        for number, network in enumerate(grid.trained):
            summary = {
                "config": asdict(network.config),
                "digests": {"model": f"{number:064}", "data": "0", "forget": "0"},
                "forget": {"spec": network.config.forget, "examples": 30, "of": 300},
                "metrics": _metrics().as_dict(),
                "seconds": {"train": 2.0},
                "provenance": origin,
            }
            self.write(network_path(self.out, network) / runs.SUMMARY, summary)
            self.write(network_path(self.out, network) / MEMBERSHIP, attacks)
        for cell in grid.cells:
            digests = {
                each.which: json.loads((network_path(self.out, each) / runs.SUMMARY).read_text())["digests"]["model"]
                for each in cell.networks()
            }
            gaps = {"delta_forget": 1.0, "delta_mia": -1.0, "delta_test": 0.5, "kl_forget": 0.1, "kl_test": 0.2}
            result = {
                "cell": _described(cell),
                "networks": digests,
                "metrics": {**_metrics().as_dict(), **gaps},
                "attacks": attacks,
                "mask": {"fraction": 0.3, "channels": 3, "digest": "0"},
                "changed": 0.3,
                "losses": [1.0],
                "seconds": {"localize": 0.5, "prepare": 0.1, "finetune": 1.0},
                "provenance": {**origin, "threads": 1},
            }
            self.write(cell_path(self.out, cell), result)

    @staticmethod
    def write(path: Path, value: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")

    def report(self) -> int:
        return main(["compare", str(self.path), "--output-dir", str(self.out), "--report-only"])

    def records(self) -> list[Path]:
        return sorted([*self.out.glob("cells/*.json"), *self.out.glob("networks/*/*.json")])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("finished") / "a" / "b", NO_FIGURES)


def everything_below(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file()}


@contextmanager
def undrawn() -> Iterator[None]:
    """Make figures and do not write them, which takes nearly all of a report's time."""
    with (
        patch("delfast.experiments.grid.report.save_figure", lambda figure, path: None),
        patch("delfast.experiments.grid.report.inline_svg", lambda figure, name, label: Markup("<svg></svg>")),
    ):
        yield


def report_is_made_or_refused(finished: Finished, path: Path, text: str) -> None:
    root = finished.path.parents[2]
    before, there = path.read_text(encoding="utf-8"), everything_below(root)
    try:
        path.write_text(text, encoding="utf-8")
        errors = io.StringIO()
        with redirect_stderr(errors), redirect_stdout(io.StringIO()), undrawn():
            code = finished.report()
        lines = errors.getvalue().split("\n")[:-1]
    finally:
        path.write_text(before, encoding="utf-8")
    new = everything_below(root) - there
    assert all(finished.out in path.parents for path in new), new
    for line in lines:
        check_line(line)
    assert code == 0 or (code == 2 and lines[-1].startswith("delfast: error: ")), lines[-1]
    if not code:
        for name in (MARKDOWN, HTML):
            text = (finished.out / name).read_text(encoding="utf-8")
            text = text.replace(own_script(), "", 1 if name == HTML else 0)
            assert "<script" not in text and "\x1b" not in text and "\u202e" not in text


@settings(max_examples=30, derandomize=True, deadline=None)
@given(data=st.data())
def test_every_mutation_of_results_is_reported_or_refused(finished: Finished, data: Any) -> None:
    path = data.draw(st.sampled_from(finished.records()))
    content = data.draw(mutated(json.loads(path.read_text(encoding="utf-8"))))
    report_is_made_or_refused(finished, path, json.dumps(content))


@pytest.mark.slow
@settings(max_examples=1_500, derandomize=True, deadline=None)
@given(data=st.data())
def test_every_mutation_of_results_is_reported_or_refused_long(finished: Finished, data: Any) -> None:
    path = data.draw(st.sampled_from(finished.records()))
    content = data.draw(mutated(json.loads(path.read_text(encoding="utf-8"))))
    report_is_made_or_refused(finished, path, json.dumps(content))


@settings(max_examples=15, derandomize=True, deadline=None)
@given(data=st.data())
def test_every_mutation_of_packed_results_is_reported_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    own = Finished(tmp_path_factory.mktemp("packed") / "a" / "b", NO_FIGURES)
    kept = own.out.with_name("kept")
    with patch("delfast.experiments.grid.report.plot_answer", lambda ranked: None):
        assert main(["compare", str(own.path), "--output-dir", str(own.out), "--report-only", "--pack", str(kept)]) == 0
    own.out = kept
    path = kept / data.draw(st.sampled_from(["cells.jsonl", "networks.jsonl"]))
    lines = path.read_text(encoding="utf-8").splitlines()
    position = data.draw(st.integers(0, len(lines) - 1))
    lines[position] = json.dumps(data.draw(mutated(json.loads(lines[position]))))
    report_is_made_or_refused(own, path, "\n".join(lines))


@pytest.mark.parametrize(
    "which, setting",
    [
        *(("cells", name) for name in ("../../x", "/tmp/x", "..", "iid\x1b[31m", NASTY, "other")),
        ("networks", "../../x"),
    ],
)
def test_a_setting_named_in_a_result_reaches_no_path(setting: str, which: str, tmp_path: Path, capsys: Any) -> None:
    """Nor does it through the tables of a record: membership, metrics, seconds."""
    own = Finished(tmp_path / "a" / "b" / "c", SMALL)
    for path in own.records():
        content = json.loads(path.read_text(encoding="utf-8"))
        if which == "networks" and "networks" in path.parts:
            content |= {"setting": setting}
            for table in ("metrics", "forget"):
                content.get(table, {})["setting"] = setting
        elif which == "cells" and "cells" in path.parts:
            content["cell"]["setting"] = setting
        path.write_text(json.dumps(content), encoding="utf-8")
    there = everything_below(tmp_path)
    code = own.report()
    line = capsys.readouterr().err.splitlines()[-1:]
    assert all(own.out in path.parents for path in everything_below(tmp_path) - there)
    if which == "cells":
        assert code == 2 and "to be of setting 'iid', got " in line[0]
        check_line(line[0])
    else:
        assert code == 0 and setting not in (own.out / RESULTS).read_text(encoding="utf-8")


def test_reports_show_names_as_they_are(tmp_path: Path, capsys: Any) -> None:
    """The title, the forget set, the device and the reason of a failure are anybody's text."""
    own = Finished(tmp_path, SMALL | {"title": NASTY})
    failed, *others = own.out.glob("cells/*.json")
    content = json.loads(failed.read_text(encoding="utf-8"))
    own.write(failed, {"cell": content["cell"], "networks": content["networks"], "failed": NASTY})
    for path in others:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["provenance"]["device"] = NASTY
        own.write(path, content)
    for path in own.out.glob("networks/*/summary.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        content["forget"]["spec"] = NASTY
        own.write(path, content)
    assert own.report() == 0

    class Page(HTMLParser):
        shown = ""

        def handle_data(self, data: str) -> None:
            self.shown += data

        def handle_starttag(self, tag: str, attributes: Any) -> None:
            assert tag != "script"

    page, text = Page(), (own.out / HTML).read_text(encoding="utf-8")
    assert text.count(own_script()) == 1
    page.feed(text.replace(own_script(), ""))
    plain = r"<script>[red]|`*_\x1b[31m\n\u202e&"
    assert page.shown.count(plain) >= 5  # in <title> and the heading, the forget set, the failure, the footer
    markdown = (own.out / MARKDOWN).read_text(encoding="utf-8")
    escaped = markdown_text(NASTY)
    assert markdown.startswith(f"# {escaped}\n") and f"Forget set {escaped}, " in markdown
    assert f"| {escaped.replace('|', chr(92) + '|')} |" in markdown and f", {escaped}, threads: 1" in markdown
    assert "<script" not in markdown and "\x1b" not in markdown


# Markdown's backslash escapes: any punctuation of ASCII (CommonMark 0.31, section 2.4)
MARKUP = re.compile(r"(?<!\\)(?:\\\\)*[`*\[\]~$#]|[<>]")


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from("\\`*_[]<>&#|~$!a \n\x1b://www."), st.characters())))
def test_markdown_of_any_text_has_no_markup_and_gives_the_text_back(text: str) -> None:
    escaped = markdown_text(text)
    assert escaped.isprintable() and not MARKUP.search(escaped) and "://" not in escaped and "www." not in escaped
    shown = html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", escaped))
    assert shown == printable(text)
    row = markdown_table(["", "b"], [[escaped, "x"]]).splitlines()[-1]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3


def test_a_table_of_methods_leaves_out_what_no_method_has() -> None:
    accuracies = {"forget_acc": 100.0, "retain_acc": 100.0, "test_acc": 50.0, "mia": 0.5}
    columns, rows = method_table({"original": {**accuracies, "seconds": {"train": 1.5, "measure": 1.0}}})
    assert columns == ["method", "forget acc", "retain acc", "test acc", "MIA", "seconds"]
    assert rows == [["original", "100.00", "100.00", "50.00", "0.50", "2.5"]]
    columns, rows = method_table({"original": accuracies, "oracle": {**accuracies, "delta_test": 1.0}})
    assert columns == ["method", "forget acc", "retain acc", "test acc", "MIA", "Δ test"]
    assert [row[-1] for row in rows] == ["", "1.00"]


def test_terminal_tables_show_names_as_text(capsys: Any) -> None:
    for names in ([NASTY, "x"], ["[link=https://a]b[/link]", ":smile: [/bold]"]):
        Console(width=200, force_terminal=True, color_system=None).print(terminal_table(names[0], names, [names]))
        shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)  # the table's own
        assert "\x1b" not in shown and "\u202e" not in shown
        assert shown.count(printable(names[0])) == 3 and shown.count(names[1]) >= 2


def test_log_lines_are_printable(capsys: Any) -> None:
    start_log()
    log.info(NASTY)
    assert capsys.readouterr().err == f"delfast: {printable(NASTY)}\n"


def test_verify_shows_names_of_a_state_file_as_text(tmp_path: Path, capsys: Any) -> None:
    state = {NASTY: torch.ones(2, 3), "[bold]b": torch.ones(2)}
    torch.save(state, tmp_path / "[red]state.pt")
    Mask.from_dense({name: torch.ones_like(value) for name, value in state.items()}).save(tmp_path / "m.safetensors")
    arguments = [str(tmp_path / name) for name in ("[red]state.pt", "[red]state.pt", "m.safetensors")]
    assert main(["verify", *arguments]) == 0
    out = capsys.readouterr().out
    assert "[bold]b" in out and "\x1b" not in out and "\u202e" not in out
