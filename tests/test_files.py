"""Files: whole or not at all, one line of error, and no code run from a pickle."""

from __future__ import annotations

import codecs
import errno
import os
import pickle
import signal
import stat
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from delfast import InputError
from delfast.files import (
    LOCK,
    exclusive,
    is_locked,
    load_state,
    make_output_dir,
    read_json,
    save_state,
    write_atomically,
    write_json,
)
from delfast.provenance import digest_indices, digest_state

if sys.platform != "win32":
    import fcntl


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"old": 1})

    def disk_full(partial: Path) -> None:
        partial.write_text("half of")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, disk_full)
    assert read_json(path) == {"old": 1} and list(tmp_path.iterdir()) == [path]


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        write_json(tmp_path / "a.json", [])
    finally:
        os.umask(umask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


class Malicious:
    def __reduce__(self) -> object:
        return (os.system, ("touch ran",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, save in (("plain.pt", pickle.dump), ("zip.pt", torch.save)):
        with open(tmp_path / name, "wb") as stream:
            save({"weight": Malicious()}, stream)
        with pytest.raises(InputError, match="is refused") as caught:
            load_state(tmp_path / name)
        assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_state_round_trip_with_tied_and_strided_tensors(tmp_path: Path) -> None:
    weight = torch.randn(4, 6)
    state = {"a": weight, "tied": weight, "transposed": weight.t(), "half": weight.half(), "count": torch.tensor(3)}
    for name in ("state.safetensors", "state.pt"):
        if name.endswith(".pt"):
            torch.save(state, tmp_path / name)
        else:
            save_state(tmp_path / name, state)
        loaded = load_state(tmp_path / name)
        assert digest_state(loaded) == digest_state(state)
    assert digest_state({**state, "a": weight + 1}) != digest_state(state)
    assert digest_indices(torch.tensor([1, 2])) != digest_indices(torch.tensor([2, 1]))


def test_unreadable_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"a": ')
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0 not")
    torch.save([1, 2], tmp_path / "list.pt")
    for load, name, message in (
        (read_json, "absent.json", "there is none"),
        (read_json, "broken.json", "cannot read"),
        (load_state, "absent.pt", "there is none"),
        (load_state, "broken.safetensors", "no whole safetensors file"),
        (load_state, "list.pt", "a state dict"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_an_output_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/delfast")):
        with pytest.raises(InputError, match="cannot write to the output directory"):
            make_output_dir(path)
    assert make_output_dir(tmp_path / "new" / "deep").is_dir()
    assert not list((tmp_path / "new" / "deep").iterdir())


# ---- permissions, files that are still written, remains of killed processes


def partials(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.endswith(".partial")]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask_and_the_umask_is_never_touched(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(umask)

    def refuse(_: int) -> int:
        raise AssertionError("another thread's files would become public")

    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", refuse)
            write_json(tmp_path / "a.json", [])
            save_state(tmp_path / "a.safetensors", {"a": torch.zeros(2)})  # which makes a private file of its own
            write_atomically(tmp_path / "a.pt", lambda partial: torch.save([1], partial))
    finally:
        os.umask(before)
    for name in ("a.json", "a.safetensors", "a.pt"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask
    assert not partials(tmp_path)


@contextmanager
def writing(path: Path) -> Iterator[tuple[int, int]]:
    """A process in the middle of writing ``path``: its id, and the pipe on whose end it goes on."""
    begun, begin = os.pipe()
    wait, go_on = os.pipe()
    process = os.fork()
    if not process:

        def write(partial: Path) -> None:
            partial.write_text("half of")
            os.close(go_on)
            os.write(begin, b".")
            os.read(wait, 1)
            partial.write_text("whole")

        try:
            write_atomically(path, write)
        finally:
            os._exit(0)
    os.close(begin)
    os.close(wait)
    assert os.read(begun, 1) == b"."
    yield process, go_on
    os.close(begun)


def test_the_next_write_removes_what_killed_ones_left_and_nothing_that_is_still_written(tmp_path: Path) -> None:
    path, other = tmp_path / "a.json", tmp_path / "a.json.b"
    with writing(path) as (process, go_on):
        write_json(path, {"new": 1})
        write_json(other, [])
        assert len(partials(tmp_path)) == 1
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(go_on)
    write_json(other, [])  # another file: its own temporary files alone
    assert len(partials(tmp_path)) == 1
    write_json(path, {"new": 2})
    assert not partials(tmp_path) and read_json(path) == {"new": 2}


def test_two_processes_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with writing(path) as (process, go_on):
        write_json(path, 1)
        assert read_json(path) == 1
        os.close(go_on)
        os.waitpid(process, 0)
    assert path.read_text() == "whole" and not partials(tmp_path)


@pytest.mark.parametrize("refused", ["fsync of directories", "locks"])
def test_a_file_system_may_refuse(refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def no_directories(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    def no_locks(descriptor: int, _: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if refused == "locks":
        monkeypatch.setattr("fcntl.flock", no_locks)
    else:
        monkeypatch.setattr(os, "fsync", no_directories)
    write_json(tmp_path / "a.json", [1])
    assert read_json(tmp_path / "a.json") == [1] and len(list(tmp_path.iterdir())) == 1


def test_a_disk_that_fails_while_the_directory_is_flushed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def broken(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write_json(tmp_path / "a.json", [1])


# ---- text


def test_text_is_utf_8_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(codecs.BOM_UTF8 + '{"a": "é"}'.encode())
    assert read_json(path) == {"a": "é"}
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"):
        path.write_bytes('{"a": "é"}'.encode(encoding))
        with pytest.raises(InputError, match=r"UTF-16|utf-8") as caught:
            read_json(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 5000, "integer string conversion"),
        ('{"a": "\\ud800"}', "surrogates"),
        ("", "Expecting value"),
    ],
)
def test_json_that_python_cannot_hold_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_a_pipe_is_no_file_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(InputError, match="no regular file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(InputError, match="cannot read"):
        read_json(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        read_json(tmp_path / "a.json" / "b")


def test_errors_are_one_printable_line_whatever_they_quote() -> None:
    error = InputError("no '\x1b[31m\n\u202e\ud800é'; check it")
    assert str(error) == r"no '\x1b[31m\n\u202e\ud800é'; check it"
    assert str(InputError(str(error))) == str(error) == str(pickle.loads(pickle.dumps(error)))


def test_checkpoints_of_several_parts_are_refused_with_advice(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.ones(2)}, "step": 3}, tmp_path / "parts.pt")
    with pytest.raises(InputError, match=r"got a dict with 'model', 'step'; save the model's alone"):
        load_state(tmp_path / "parts.pt")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/.metadata").touch()
    for path in (tmp_path / "checkpoint", tmp_path / "checkpoint/__0_0.distcp"):
        with pytest.raises(InputError, match=r"a checkpoint of torch.distributed; gather the model with"):
            load_state(path)
    gathered = tmp_path / "checkpoint/model.safetensors"  # beside the parts, as the message advises
    save_state(gathered, {"weight": torch.ones(2)})
    assert load_state(gathered).keys() == {"weight"}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_a_lock_that_is_held_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    path.touch()
    with open(path, "rb") as reader, ThreadPoolExecutor(1) as pool:
        fcntl.flock(reader, fcntl.LOCK_SH)
        ended = pool.submit(lambda: (time.sleep(0.05), fcntl.flock(reader, fcntl.LOCK_UN)))
        with exclusive(path, "busy"):
            assert is_locked(path)
        ended.result()
    with exclusive(path, "held"), pytest.raises(InputError, match="busy"), exclusive(path, "busy"):
        pass
