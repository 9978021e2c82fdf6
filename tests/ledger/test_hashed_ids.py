"""Identifiers as HMACs: nothing in the ledger says whose examples they are, and the key is never in it."""

from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

import pytest

from delfast.errors import InputError
from delfast.ledger import Ledger
from tests.ledger.small import EXAMPLES

KEY = b"0123456789abcdef-secret"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(KEY + b"\n")  # an editor ends the last line
    return path


@pytest.fixture
def hashed(files: tuple[Path, Path], tmp_path: Path, key: Path) -> Path:
    """A ledger with two requests."""
    job, model = files
    with Ledger.create(tmp_path / "ledger", job=job, model=model, hash_ids=key) as ledger:
        assert ledger.add(["person-3", "person-11"], reason="case 7") == 1 and ledger.add(["person-5"]) == 2
    return tmp_path / "ledger"


def everything_in(ledger: Path) -> bytes:
    paths = [path for path in ledger.rglob("*") if path.is_file()]
    assert paths
    return b"".join(path.read_bytes() for path in paths)


def test_no_file_of_the_ledger_holds_an_identifier_or_the_key(
    hashed: Path, key: Path, files: tuple[Path, Path]
) -> None:
    with Ledger.open(hashed, job=files[0], hash_ids=key) as ledger:
        with pytest.raises(InputError, match="'person-3', which request 1 names"):  # errors are for the screen alone
            ledger.add(["person-3"])
        while_open = everything_in(hashed)  # the write-ahead log too
    for content in (while_open, everything_in(hashed)):
        assert b"case 7" in content and b"person" not in content.lower() and KEY not in content
        assert KEY.hex().encode() not in content


def test_identifiers_are_plain_hmacs(hashed: Path, key: Path, files: tuple[Path, Path]) -> None:
    expected = tuple(hmac.new(KEY, name.encode(), hashlib.sha256).hexdigest() for name in ("person-3", "person-11"))
    with Ledger.open(hashed) as ledger:  # without the key
        details = ledger.show(1)
        assert details.ids == expected and details.originals is None and ledger.created["hash_ids"] is True
        assert [request.count for request in ledger.requests()] == [2, 1] and ledger.verify().holds
        assert ledger.created["key_check"] == hmac.new(KEY, b"delfast ledger\n", hashlib.sha256).hexdigest()
    with Ledger.open(hashed, job=files[0], hash_ids=key) as ledger:
        assert ledger.show(1).originals == ("person-3", "person-11") and ledger.show(1).ids == expected
        assert ledger.positions([1]).tolist() == [3, 11] and ledger.positions([1, 2]).tolist() == [3, 5, 11]
        assert ledger.find("person-5") == 2 and ledger.find("person-6") is None


def test_the_key_is_needed_again(hashed: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    with Ledger.open(hashed, job=files[0]) as ledger:
        for call in (lambda: ledger.add(["person-4"]), lambda: ledger.find("person-3"), lambda: ledger.positions([1])):
            with pytest.raises(InputError, match="pass --hash-ids KEYFILE"):
                call()
        assert ledger.show(1).originals is None
    wrong = tmp_path / "wrong"
    wrong.write_bytes(KEY + b"x")
    with pytest.raises(InputError, match="is not that of the ledger"):
        Ledger.open(hashed, hash_ids=wrong)
    with pytest.raises(InputError, match=r"cannot read the key file .*No such file"):
        Ledger.open(hashed, hash_ids=tmp_path / "absent")
    assert not (tmp_path / "absent").exists()  # only a new ledger makes a key


def test_a_key_is_made_for_its_owner_alone(files: tuple[Path, Path], tmp_path: Path) -> None:
    job, model = files
    keys = [tmp_path / "one", tmp_path / "two"]
    for number, key in enumerate(keys):
        with Ledger.create(tmp_path / f"ledger-{number}", job=job, model=model, hash_ids=key) as ledger:
            assert ledger.add(["person-1"]) == 1
        assert stat.S_IMODE(key.stat().st_mode) == 0o600 and len(key.read_text()) == 65
    assert keys[0].read_text() != keys[1].read_text()
    with Ledger.open(tmp_path / "ledger-0", job=job, hash_ids=keys[0]) as ledger:
        assert ledger.find("person-1") == 1


@pytest.mark.parametrize("content", [b"", b" \n", b"short"])
def test_a_short_key_is_refused(content: bytes, files: tuple[Path, Path], tmp_path: Path) -> None:
    job, model = files
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(InputError, match="expected a key of at least 16 bytes"):
        Ledger.create(tmp_path / "ledger", job=job, model=model, hash_ids=tmp_path / "key")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_key_inside_the_ledger_is_refused(hashed: Path, key: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    inside, link = hashed / "key", tmp_path / "link"
    inside.write_bytes(KEY)
    link.symlink_to(inside)
    for path in (inside, link, hashed / "models" / ".." / "key"):
        with pytest.raises(InputError, match="expected a key file outside the ledger"):
            Ledger.open(hashed, job=files[0], hash_ids=path)
    with Ledger.open(hashed, job=files[0], hash_ids=key) as ledger:
        assert ledger.find("person-3") == 1


def test_a_key_for_a_ledger_without_is_refused(ledger: Ledger, key: Path) -> None:
    with pytest.raises(InputError, match="stores identifiers as text and has no key"):
        Ledger.open(ledger.path, hash_ids=key)


def test_stored_forms_of_all_examples_differ(hashed: Path, key: Path, files: tuple[Path, Path]) -> None:
    with Ledger.open(hashed, job=files[0], hash_ids=key) as ledger:
        forms = {ledger.identifiers.stored(each) for each in ledger.job.ids}
    assert len(forms) == EXAMPLES and all(len(form) == 64 for form in forms)
