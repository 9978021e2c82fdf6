"""Files: whole or not at all, one line of error, and no code run from a pickle."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from delfast import InputError
from delfast.files import load_state, make_output_dir, read_json, save_state, write_atomically, write_json
from delfast.provenance import digest_indices, digest_state


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
