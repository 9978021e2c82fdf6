"""Decoded images that are kept on disk: what is decoded again and when, damage, limits, several processes."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy
import PIL
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from delfast.errors import InputError
from delfast.experiments.datasets import ImageData, array_cache, load, pictures, subset
from delfast.experiments.datasets.array_cache import ArrayCache
from delfast.files import LOCK, directory_for

KEY = "0123456789abcdef" * 4
SIDE, TRAIN, TEST = 8, 10, 6
OLD = 10**18  # ns: 2001


def write_image(path: Path, shade: int) -> None:
    """Write an image. Its file has the same size for every shade, and the time that some archives give to all files."""
    Image.fromarray(numpy.arange(shade, shade + SIDE * SIDE * 3, dtype=numpy.uint8).reshape(SIDE, SIDE, 3)).save(path)
    os.utime(path, ns=(0, OLD))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images of one size and time, which need not be two seconds old to be kept."""
    monkeypatch.setattr(pictures, "SETTLED", -3600.0)
    for (part, count), label in product((("train", TRAIN // 2), ("test", TEST // 2)), ("cat", "dog")):
        place = tmp_path / "images" / part / label
        place.mkdir(parents=True)
        for position in range(count):
            write_image(place / f"{position}.bmp", 10 * position + (label == "dog"))
    return tmp_path / "images"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that are decoded, in order."""
    names: list[str] = []
    original = pictures._open

    def counted(source: pictures.Pictures, position: int) -> Image.Image:
        names.append(source.name(position))
        return original(source, position)

    monkeypatch.setattr(pictures, "_open", counted)
    return names


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The log's lines since the last call."""

    def taken() -> list[str]:
        messages = [record.getMessage() for record in caplog.records if record.name.startswith("delfast")]
        caplog.clear()
        assert all("\n" not in message for message in messages)
        return messages

    with caplog.at_level(logging.INFO, logger="delfast"):
        yield taken


def equal(left: ImageData, right: ImageData) -> bool:
    """Return whether two data sets agree in every value."""
    same = (torch.equal(getattr(left, name), getattr(right, name)) for name in ("mean", "std"))
    return left.digest == right.digest and left.num_classes == right.num_classes and all(same)


# --- a folder of images ---------------------------------------------------------------------------


def test_a_folder_is_decoded_once(folder: Path, decoded: list[str], tmp_path: Path) -> None:
    plain = load(f"folder:{folder}", tmp_path / "a", SIDE)
    assert len(decoded) == len(set(decoded)) == TRAIN + TEST
    again = load(f"folder:{folder}", tmp_path / "a", SIDE)
    assert len(decoded) == TRAIN + TEST and equal(plain, again)
    again.train_images.zero_()  # what a caller does to its images is not kept
    assert equal(plain, load(f"folder:{folder}", tmp_path / "a", SIDE))
    assert equal(plain, load(f"folder:{folder}", tmp_path / "a"))  # the first image gives the size
    assert decoded[TRAIN + TEST :] == [str(folder / "train" / "cat" / "0.bmp")]
    load(f"folder:{folder}", tmp_path / "a", 4)
    assert len(decoded) == 2 * (TRAIN + TEST) + 1


@pytest.mark.parametrize("train, test", list(product((None, TRAIN, 3), (None, 1))))
def test_only_the_images_of_a_run_are_decoded(
    folder: Path, decoded: list[str], tmp_path: Path, train: int | None, test: int | None
) -> None:
    whole = load(f"folder:{folder}", tmp_path / "whole", SIDE)
    decoded.clear()
    for already in ("nothing", "everything"):
        assert equal(load(f"folder:{folder}", tmp_path / "a", SIDE, train, test), subset(whole, train, test))
        # the statistics are those of the whole training set: that is decoded where they are not kept
        expected = TRAIN + (TEST if test is None else test) if already == "nothing" else 0
        assert len(decoded) == len(set(decoded)) == expected
        decoded.clear()
    other = load(f"folder:{folder}", tmp_path / "a", SIDE, 4, 2)
    assert len(decoded) == 4 + 2 and equal(other, subset(whole, 4, 2))


def test_a_subset_of_a_folder_too_large_for_memory_is_the_same(
    folder: Path, decoded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load(f"folder:{folder}", tmp_path / "a", SIDE, 4, None)
    decoded.clear()
    monkeypatch.setattr(pictures, "IN_MEMORY", (TRAIN + TEST) * 3 * SIDE * SIDE - 1)
    for _ in range(2):
        assert equal(load(f"folder:{folder}", tmp_path / "b", SIDE, 4, None), plain)
    assert len(decoded) == TRAIN + TEST and len(list((tmp_path / "b" / "images").iterdir())) == 2


def test_more_images_than_there_are_are_refused_before_any_is_decoded(folder: Path, decoded: list[str]) -> None:
    for counts, message in (((TRAIN + 1, None), "at most 10 train_examples"), ((1, TEST + 1), "6 test_examples of")):
        with pytest.raises(InputError, match=message):
            load(f"folder:{folder}", None, SIDE, *counts)
    assert not decoded


def replaced(image: Path) -> None:
    write_image(image, 200)
    os.utime(image)


def replaced_with_its_old_time(image: Path) -> None:
    write_image(image, 200)


def renamed_over(image: Path) -> None:
    write_image(image.with_name("new.bmp"), 200)
    image.with_name("new.bmp").replace(image)


def removed(image: Path) -> None:
    image.unlink()


def added(image: Path) -> None:
    write_image(image.with_name("9.bmp"), 200)


def of_another_class(image: Path) -> None:
    image.rename(image.parent.with_name("dog") / "9.bmp")


def swap(one: Path, other: Path) -> None:
    """Swap two folders: the same names, sizes and times of files, but other images."""
    for start, end in ((one, "old"), (other, one.name), (one.with_name("old"), other.name)):
        start.rename(start.with_name(end))


def classes_swapped(image: Path) -> None:
    swap(image.parent, image.parent.with_name("dog"))


def folders_swapped(image: Path) -> None:
    swap(image.parent / "a", image.parent / "b")


@pytest.mark.parametrize(
    "change",
    [
        replaced,
        replaced_with_its_old_time,
        renamed_over,
        removed,
        added,
        of_another_class,
        classes_swapped,
        folders_swapped,
    ],
)
@pytest.mark.parametrize("in_memory", [pictures.IN_MEMORY, 0])
def test_changed_files_are_decoded_again(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], in_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "IN_MEMORY", in_memory)
    for place, shade in (("a", 100), ("b", 101)):
        (folder / "train" / "cat" / place).mkdir()
        write_image(folder / "train" / "cat" / place / "0.bmp", shade)
    before = [load(f"folder:{folder}", tmp_path / "a", SIDE, count).digest for count in (None, 4)]
    change(folder / "train" / "cat" / "0.bmp")
    for count, old in zip((None, 4), before, strict=True):
        new = load(f"folder:{folder}", tmp_path / "a", SIDE, count)
        assert equal(new, load(f"folder:{folder}", tmp_path / f"b{count}", SIDE, count))
        assert new.digest != old or count is not None  # a subset may be of other files alone


@pytest.mark.parametrize("in_memory", [pictures.IN_MEMORY, 0])
def test_images_that_changed_just_now_are_not_kept(
    folder: Path, decoded: list[str], tmp_path: Path, in_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load(f"folder:{folder}", tmp_path / "plain", SIDE)
    decoded.clear()
    monkeypatch.setattr(pictures, "SETTLED", 3600.0)  # another change might leave the same times
    monkeypatch.setattr(pictures, "IN_MEMORY", in_memory)
    for _ in range(2):
        assert equal(load(f"folder:{folder}", tmp_path / "a", SIDE), plain)
    assert len(decoded) == 2 * (TRAIN + TEST) and not [path for path in (tmp_path / "a").rglob("*") if path.is_file()]


def test_only_the_owner_may_read_decoded_images(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(f"folder:{folder}", tmp_path / "a", SIDE)
    monkeypatch.setattr(pictures, "IN_MEMORY", 0)
    load(f"folder:{folder}", tmp_path / "a", SIDE)
    for name in ("decoded", "images"):
        assert (tmp_path / "a" / name).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("in_memory", [pictures.IN_MEMORY, 0])
@pytest.mark.parametrize("module, name, value", [(PIL, "__version__", "0.0.0"), (pictures, "DECODER", 0)])
def test_another_decoder_decodes_again(
    folder: Path,
    decoded: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    name: str,
    value: object,
    in_memory: int,
) -> None:
    monkeypatch.setattr(pictures, "IN_MEMORY", in_memory)
    load(f"folder:{folder}", tmp_path / "a", SIDE)
    monkeypatch.setattr(module, name, value)
    load(f"folder:{folder}", tmp_path / "a", SIDE)
    assert len(decoded) == 2 * (TRAIN + TEST)


def test_a_damaged_entry_is_decoded_again_and_replaced(
    folder: Path, decoded: list[str], tmp_path: Path, lines: Callable[[], list[str]]
) -> None:
    plain = load(f"folder:{folder}", tmp_path / "a", SIDE)
    entries = sorted((tmp_path / "a" / "decoded").iterdir())
    assert len(entries) == 3 and lines() == []
    for entry in entries:
        content = entry.read_bytes()
        middle = len(content) // 2
        entry.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        assert equal(plain, load(f"folder:{folder}", tmp_path / "a", SIDE))
        told = lines()
        assert len(told) == 1 and f"cannot use '{entry}'" in told[0]
        assert entry.read_bytes() == content
        entry.write_bytes(sorted(entries)[entry == entries[0]].read_bytes())  # a whole file, of another key
        assert equal(plain, load(f"folder:{folder}", tmp_path / "a", SIDE)) and len(lines()) == 1
    decoded.clear()
    assert equal(plain, load(f"folder:{folder}", tmp_path / "a", SIDE)) and not decoded and lines() == []


def test_a_data_directory_that_cannot_be_written_is_one_line(
    folder: Path, tmp_path: Path, lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load(f"folder:{folder}", tmp_path / "a", SIDE)
    (tmp_path / "file").write_text("")
    assert equal(plain, load(f"folder:{folder}", tmp_path / "file", SIDE))
    told = lines()
    assert len(told) == 1 and f"arrays are not kept: cannot write to '{tmp_path}/file/decoded'" in told[0]

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", denied)  # as in a read-only directory, which root would write to
    monkeypatch.setattr(array_cache, "write_atomically", denied)
    assert equal(plain, load(f"folder:{folder}", tmp_path / "a", SIDE)) and lines() == []
    assert equal(subset(plain, 3, None), load(f"folder:{folder}", tmp_path / "a", SIDE, 3))
    assert [line.rpartition(" (")[2] for line in lines()] == ["Permission denied)"]


# --- the cache by itself --------------------------------------------------------------------------


def entry_bytes(array: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    numpy.savez(stream, **{KEY: array.numpy()})
    return stream.getvalue()


ARRAY = torch.arange(60, dtype=torch.uint8).view(5, 12)
CONTENT = entry_bytes(ARRAY)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ArrayCache:
    cache = ArrayCache(tmp_path_factory.mktemp("cache"))
    cache.write(KEY, ARRAY)
    assert cache._path(KEY).stat().st_size == len(CONTENT)
    return cache


@settings(max_examples=300)
@given(st.integers(0, len(CONTENT) - 1), st.integers(0, 255), st.booleans())
@example(0, 0, True)
def test_a_damaged_entry_is_never_another_array(cache: ArrayCache, place: int, value: int, cut: bool) -> None:
    damaged = CONTENT[:place] if cut else CONTENT[:place] + bytes([value]) + CONTENT[place + 1 :]
    cache._path(KEY).write_bytes(damaged)
    found = cache.read(KEY)
    assert found is None or (found.dtype == ARRAY.dtype and torch.equal(found, ARRAY))
    assert not cut or found is None


@pytest.mark.parametrize(
    "array", [torch.empty(0, 3, 4, 4, dtype=torch.uint8), torch.arange(2**40, 2**40 + 6).view(2, 3), ARRAY.T]
)
def test_arrays_are_read_as_they_were_written(tmp_path: Path, array: torch.Tensor) -> None:
    cache = ArrayCache(tmp_path / "deep" / "cache")
    assert cache.read(KEY) is None and not (tmp_path / "deep").exists()
    cache.write(KEY, array)
    found = cache.read(KEY)
    assert found is not None and found.dtype == array.dtype and torch.equal(found, array)
    assert [path.name for path in cache.directory.iterdir()] == [f"{KEY[:20]}.npz"]


def test_the_least_recently_used_entries_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, keys = ArrayCache(tmp_path), [f"{position}{KEY[1:]}" for position in range(4)]
    (tmp_path / "of another kind").write_bytes(b"0" * 10_000)
    size = len(CONTENT)
    monkeypatch.setattr(array_cache, "MAX_BYTES", 3 * size)
    for age, key in enumerate(keys[:3]):
        cache.write(key, ARRAY)
        os.utime(cache._path(key), ns=(0, OLD + age))
    assert cache.read(keys[0]) is not None  # used last now
    cache.write(keys[3], ARRAY)
    assert [cache.read(key) is not None for key in keys] == [True, False, True, True]
    cache.write(keys[1], torch.zeros(3 * size + 1, dtype=torch.uint8))  # larger than the limit
    assert [cache.read(key) is not None for key in keys] == [True, False, True, True]
    assert (tmp_path / "of another kind").exists()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    cache, other = ArrayCache(tmp_path), f".{'f' * 20}.npz"
    abandoned = tmp_path / f"{other}.12345678.partial"
    abandoned.mkdir()
    (abandoned / LOCK).touch()
    with directory_for(tmp_path / f"{'e' * 20}.npz") as (in_use, _):
        cache.write(KEY, ARRAY)
        assert in_use.is_dir() and not abandoned.exists()
    assert cache.read(KEY) is not None


def test_several_users_read_write_and_remove_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(array_cache, "MAX_BYTES", 2 * len(CONTENT))  # of three entries one is always removed
    keys = [f"{position}{KEY[1:]}" for position in range(3)]

    def work(worker: int) -> int:
        cache, hits = ArrayCache(tmp_path), 0
        for turn in range(40):
            key = keys[(worker + turn) % 3]
            found = cache.read(key)
            hits += found is not None
            assert found is None or torch.equal(found, ARRAY + int(key[0]))
            cache.write(key, ARRAY + int(key[0]))
        return hits

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(work, range(4))) > 0
    assert lines() == [] and len(list(tmp_path.iterdir())) == 2
