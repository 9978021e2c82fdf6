"""The commands of a ledger: what they print, their exit codes, and that reading needs neither the job nor torch."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from delfast.cli import main
from delfast.ledger import Ledger
from delfast.ledger.store import DATABASE, FIRST
from tests.ledger.small import altered, write_job


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    job, model = write_job(tmp_path_factory.mktemp("job"))
    return str(job), str(model)


@pytest.fixture
def ledger(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """A ledger with two requests, made by commands."""
    job, model = files
    path, ids = str(tmp_path / "ledger"), tmp_path / "ids.txt"
    ids.write_text("\ufeffperson-3\r\n\r\n  person-7 \r\nperson-1", encoding="utf-8")
    assert main(["ledger", "init", path, "--job", job, "--model", model]) == 0
    assert capsys.readouterr().out.startswith(f"made the ledger '{path}' for 40 training examples\nhead: ")
    options = ["--reason", "case [bold]7", "--due", "2026-12-31"]
    assert main(["ledger", "add", path, "--job", job, "--ids", str(ids), *options]) == 0
    with Ledger.open(path) as opened:
        assert capsys.readouterr().out == f"added request 1\nhead: {opened.head}\n"
        assert opened.show(1).ids == ("person-3", "person-7", "person-1")
    ids.write_text("person-2\n", encoding="utf-8")
    assert main(["ledger", "add", path, "--job", job, "--ids", str(ids)]) == 0
    capsys.readouterr()
    return path


def test_list_prints_a_table_or_lines_of_json(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", "list", ledger]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["request", "status", "run", "examples", "received", "(UTC)", "due", "reason"]
    assert first.split()[:4] == ["1", "pending", "-", "3"] and re.search(r"2026-12-31 +case \[bold\]7$", first)
    assert second.split()[:4] == ["2", "pending", "-", "1"] and second.endswith("-")
    assert first.index("case") == head.index("reason") and first.index("2026-12-31") == head.index("due")
    assert main(["ledger", "list", ledger, "--json"]) == 0
    requests = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["number"] for each in requests] == [1, 2]
    expected = {"number", "time", "count", "reason", "due", "status", "run"}
    assert all(each.keys() == expected for each in requests) and requests[0]["reason"] == "case [bold]7"


def test_show_prints_a_request_by_number_or_by_example(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Ledger.open(ledger) as opened:
        opened.store.append("started", {"requests": [1, 2], "forget": 4, "settings": {"method": "del"}}, 1)
    assert main(["ledger", "show", ledger, "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "request 1: running in run 1" and lines[2:5] == [
        "due: 2026-12-31",
        "reason: case [bold]7",
        "examples (3): person-3, person-7, person-1",
    ]
    assert [line.partition(" ")[2] for line in lines[5:]] == [
        "received: count 3, due 2026-12-31, 3 examples, reason case [bold]7, request 1",
        "run 1 started: forget 4, 2 requests",
        f"model in use: {Path(ledger).resolve() / 'models/0000.safetensors'}",
    ]
    assert main(["ledger", "show", ledger, "--id", "person-2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["request"]["number"] == 2 and shown["ids"] == shown["originals"] == ["person-2"]
    assert [event["event"] for event in shown["events"]] == ["received", "started"]


def test_many_examples_are_cut_short(
    files: tuple[str, str], ledger: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(f"person-{number}" for number in range(10, 35)).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert main(["ledger", "add", ledger, "--job", files[0], "--ids", "-"]) == 0
    assert main(["ledger", "show", ledger, "3"]) == 0
    assert "person-29 and 5 more (--json prints all)\n" in capsys.readouterr().out


def test_many_requests_are_added_from_lines_of_json(
    files: tuple[str, str],
    ledger: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = ['{"ids": ["person-4", "person-5"], "reason": "case 8"}', "", '{"ids": ["person-6"], "due": "2027-01-01"}']
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    add = ["ledger", "add", ledger, "--job", files[0], "--requests"]
    assert main([*add, "-"]) == 0
    assert capsys.readouterr().out.startswith("added requests 3 to 4\nhead: ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"ids": ["person-30"]}')))
    assert main([*add, "-"]) == 0
    assert capsys.readouterr().out.startswith("added request 5\nhead: ")
    requests = tmp_path / "requests.jsonl"
    for line, message in (
        ('{"ids": ["person-8"]}\n{"ids"', f"line 2 of '{requests}' is no JSON"),
        ('{"ids": ["person-8"]}\n["person-9"]', f"expected a JSON object on line 2 of '{requests}', got list"),
        (
            '{"ids": ["person-8"]}\n\n{"ids": ["person-4"]}',
            f"line 3 of '{requests}': expected examples that no request names yet, got 'person-4'",
        ),
        ('{"ids": ["person-8"]}\n{"ids": ["person-8"]}', f"line 2 of '{requests}': expected every example in one"),
        ('{"ids": ["person-8"]}\n{"ids": ["nobody"]}', f"line 2 of '{requests}': expected identifiers of training"),
        ('{"ids": ["person-8"]}\n{"ids": ["person-9"], "due": "soon"}', f"line 2 of '{requests}': expected the due"),
    ):
        requests.write_text(line, encoding="utf-8")
        assert main([*add, str(requests)]) == 2
        assert message in capsys.readouterr().err
    requests.write_text("\n", encoding="utf-8")
    assert main([*add, str(requests)]) == 0 and "the file holds no request" in capsys.readouterr().out
    with Ledger.open(ledger) as opened:
        assert [request.count for request in opened.requests()] == [3, 1, 2, 1, 1]


def test_an_identifier_that_cannot_be_added_is_named_with_its_line(
    files: tuple[str, str], ledger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tmp_path / "more.txt"
    for text, message in (
        ("person-8\n\nnobody\n", f"line 3 of '{ids}': expected identifiers of training examples"),
        ("person-8\nperson-9\nperson-8\n", f"line 3 of '{ids}': expected every identifier once in a request"),
        ("person-8\nperson-3\n", f"line 2 of '{ids}': expected examples that no request names yet, got 'person-3'"),
    ):
        ids.write_text(text, encoding="utf-8")
        assert main(["ledger", "add", ledger, "--job", files[0], "--ids", str(ids)]) == 2
        error = capsys.readouterr().err
        assert message in error and "of those to add" not in error


def test_a_due_date_that_has_passed_is_marked(
    files: tuple[str, str], ledger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tmp_path / "late.txt"
    ids.write_text("person-8\n", encoding="utf-8")
    assert main(["ledger", "add", ledger, "--job", files[0], "--ids", str(ids), "--due", "2020-01-01"]) == 0
    assert "added request 3\n1 overdue: the due date 2020-01-01 has passed\n" in capsys.readouterr().out
    assert main(["ledger", "list", ledger]) == 0
    assert [("overdue" in line) for line in capsys.readouterr().out.splitlines()] == [False, False, False, True]
    with Ledger.open(ledger) as opened:
        opened.store.append("started", {"requests": [3]}, 1)
        opened.store.append("accepted", {}, 1)
    assert main(["ledger", "list", ledger]) == 0
    assert "overdue" not in capsys.readouterr().out


def test_a_run_that_was_stopped_is_listed_so(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Ledger.open(ledger) as opened:
        opened.store.append("started", {"requests": [1]}, 1)
        assert main(["ledger", "list", ledger]) == 0
        _, first, second, last = capsys.readouterr().out.splitlines()
        assert first.split()[1] == "stopped" and second.split()[1] == "pending"
        assert last == "stopped: continue with delfast ledger run"
        with opened.lock():
            assert main(["ledger", "list", ledger]) == 0
            lines = capsys.readouterr().out.splitlines()
            assert len(lines) == 3 and lines[1].split()[1] == "running"
            assert opened.is_working
        assert not opened.is_working


def test_show_prints_why_a_run_was_rejected(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [
        {"name": "outside_mask", "value": 0, "limit": 0, "held": True, "set": "model"},
        {"name": "relearn_ratio", "value": 2.7, "limit": 1.5, "held": False, "set": "forget", "low": 2.0, "high": 3.0},
    ]
    with Ledger.open(ledger) as opened:
        opened.store.append("started", {"requests": [1], "excluded": [], "attempts": [{}]}, 1)
        opened.store.append("baseline", {"seconds": 0.8270571779867169}, 1)
        opened.store.append("localized", {"attempt": 1}, 1)
        opened.store.append("rejected", {"attempts": [{}], "checks": checks, "advice": ["a larger budget"]}, 1)
    assert main(["ledger", "show", ledger, "1"]) == 0
    out = capsys.readouterr().out
    assert "run 1 started: 1 attempt, 1 request\n" in out and "run 1 baseline: seconds 0.8\n" in out
    assert re.search(
        r"run 1 rejected: 1 attempt\n +check +figure .*\n +Changes outside the mask and the last layer +0 .* held\n",
        out,
    )
    assert re.search(r"\n +Relearning ratio +2.70 +2.00 to 3.00 +1.50 +did not hold\n +- a larger budget\n", out)


def test_purge_prints_nothing_as_done_while_another_process_works(
    files: tuple[str, str], ledger: str, capsys: pytest.CaptureFixture[str]
) -> None:
    purge = ["ledger", "purge", ledger, "--job", files[0], "--yes"]
    model = {"model": {"file": "models/0001.safetensors", "digest": "0" * 64}}
    inputs = {"requests": [1], "excluded": [], "localize_on": "new", "attempts": [{}]}
    with Ledger.open(ledger) as opened:
        opened.store.append("started", inputs, 1)
        opened.store.append("accepted", model, 1)
        with opened.lock():
            assert main(purge) == 2
            printed = capsys.readouterr()
            assert printed.out == "" and "another process is working" in printed.err
    assert main(purge) == 0
    out = capsys.readouterr().out
    assert out.startswith("deleted models/0000.safetensors (") and "requests 1, 2\ndeleted 1 file; " in out


def test_verify_prints_the_head_and_its_exit_code_tells_a_change(
    ledger: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Ledger.open(ledger) as opened:
        head, path = opened.head, opened.store.path
    assert main(["ledger", "verify", ledger]) == 0
    assert capsys.readouterr().out.startswith(
        f"entries that hold: 3\nhead: {head}\nthe ledger holds; only --head finds"
    )
    assert main(["ledger", "verify", ledger, "--head", head]) == 0
    assert capsys.readouterr().out.endswith("the ledger holds, and continues the one of that head\n")
    assert main(["ledger", "verify", ledger, "--head", FIRST]) == 1
    assert f"no entry has the hash {FIRST}: the ledger was rewritten or cut" in capsys.readouterr().out
    assert main(["ledger", "verify", ledger, "--head", "abc"]) == 2
    model = Path(ledger) / "models/0000.safetensors"
    content = model.read_bytes()
    model.unlink()
    assert main(["ledger", "verify", ledger, "--no-files"]) == 0
    assert main(["ledger", "verify", ledger]) == 1
    assert "the recorded file 'models/0000.safetensors' cannot be read" in capsys.readouterr().out
    model.write_bytes(content)
    with altered(path) as connection:
        connection.execute("UPDATE entries SET time = '2020' || substr(time, 5) WHERE number = 2")
    assert main(["ledger", "verify", ledger]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "entry 2 is not as it was written: its hash is another",
        "entries that hold: 1",
        f"hash of the last one that holds: {_first_hash(ledger)}",
        "the ledger does NOT hold",
    ]


def _first_hash(ledger: str) -> str:
    with Ledger.open(ledger) as opened:
        return next(opened.store.entries()).hash


def test_hashed_identifiers_need_the_key_again(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, model = files
    path, key, ids = str(tmp_path / "ledger"), str(tmp_path / "key"), tmp_path / "ids"
    ids.write_text("person-3\n", encoding="utf-8")
    with_key = ["--hash-ids", key]
    add = ["ledger", "add", path, "--job", job, "--ids", str(ids)]
    assert main(["ledger", "init", path, "--job", job, "--model", model, *with_key]) == 0
    assert main(add) == 2 and "pass --hash-ids KEYFILE" in capsys.readouterr().err
    assert main([*add, *with_key]) == 0
    capsys.readouterr()
    assert main(["ledger", "show", path, "1"]) == 0
    assert "HMACs (1): " in (shown := capsys.readouterr().out) and "person" not in shown
    assert main(["ledger", "show", path, "1", "--job", job, *with_key]) == 0
    assert "examples (1): person-3\n" in capsys.readouterr().out
    assert main(["ledger", "show", path, "--id", "person-3", *with_key]) == 0
    assert main(["ledger", "show", path, "--id", "person-4", *with_key]) == 2
    assert "no request names it" in capsys.readouterr().err
    assert main(["ledger", "show", path, "--id", "person-3"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "LEDGER", "--job", "JOB"], "pass one of them"),
        (["add", "LEDGER", "--job", "JOB", "--ids", "-", "--requests", "-"], "pass one of them"),
        (["add", "LEDGER", "--job", "JOB", "--requests", "-", "--reason", "x"], "pass one of them"),
        (["add", "LEDGER", "--ids", "-"], "--job"),
        (["add", "LEDGER", "--job", "JOB", "--ids", "absent"], "cannot read 'absent' (No such file or directory)"),
        (["show", "LEDGER"], "pass one of them"),
        (["show", "LEDGER", "1", "--id", "person-1"], "pass one of them"),
        (["show", "LEDGER", "3"], "expected a request from 1 to 2, got 3"),
        (["list", "absent"], "expected a ledger at 'absent'"),
        (["verify", "absent"], "expected a ledger at 'absent'"),
        (["init", "LEDGER", "--job", "JOB", "--model", "MODEL"], "there is something"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    ledger: str,
    files: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    replaced = {"LEDGER": ledger, "JOB": files[0], "MODEL": files[1]}
    assert main(["ledger", *(replaced.get(each, each) for each in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("delfast: error: ") and error.count("\n") == 1
    with Ledger.open(ledger) as opened:
        assert opened.verify().count == 3


def test_a_reason_cannot_change_the_terminal(
    ledger: str, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with Ledger.open(ledger, job=files[0]) as opened:
        opened.add(["person-9"], reason="a\x1b[2Jb\nc")
    for command in (["list", ledger], ["show", ledger, "3"]):
        assert main(["ledger", *command]) == 0
        out = capsys.readouterr().out
        assert "a\\x1b[2Jb\\nc" in out and "\x1b" not in out


def test_reading_imports_no_large_package_and_ends_with_its_reader(ledger: str) -> None:
    script = (
        "import sys; from delfast.cli import main; code = main(sys.argv[1:]); print(sorted(sys.modules)); exit(code)"
    )
    for command in (["list", ledger], ["show", ledger, "1"], ["verify", ledger]):
        done = subprocess.run([sys.executable, "-c", script, "ledger", *command], capture_output=True, text=True)
        modules = done.stdout.splitlines()[-1]
        assert done.returncode == 0 and "'delfast.ledger'" in modules
        assert all(f"'{name}'" not in modules for name in ("torch", "numpy", "safetensors"))
    command = f"{sys.executable} -m delfast ledger list {ledger} --json | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "change", ["event = 'creaTed'", "payload = '{}'", "payload = 'x'", "payload = '[1]'", "number = 0"]
)
def test_a_first_entry_that_was_altered_is_named(change: str, ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    with altered(Path(ledger) / DATABASE) as connection:
        connection.execute(f"UPDATE entries SET {change} WHERE number = 1")
    assert main(["ledger", "verify", ledger]) == 1
    assert capsys.readouterr().out.startswith("entry 1 is ")
    assert main(["ledger", "list", ledger]) == 2  # nothing is read from it
    error = capsys.readouterr().err
    assert "was altered" in error and error.count("\n") == 1
