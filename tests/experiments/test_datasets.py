"""Data sets, batches and forget sets."""

import errno
import gzip
import json
import os
import pickle
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from delfast.errors import InputError
from delfast.experiments.datasets import Batches, ForgetSet, choose, images, load, pictures, subset
from delfast.experiments.datasets.batches import one_ahead


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def batches(data, **options):
    return Batches(data.train_images, data.train_targets, data.mean, data.std, **options)


# --- data sets ------------------------------------------------------------------------------------


@pytest.mark.long
def test_digits_are_a_fixed_stratified_split(digits):
    assert digits.train_images.shape == (1437, 1, 8, 8) and digits.test_images.shape == (360, 1, 8, 8)
    assert digits.train_images.dtype == torch.uint8 and digits.train_targets.dtype == torch.int64
    assert digits.train_images.max() == 255 and digits.train_images.min() == 0
    assert (digits.num_classes, digits.channels, digits.image_size) == (10, 1, 8)
    share = digits.train_targets.bincount() / torch.cat([digits.train_targets, digits.test_targets]).bincount()
    assert (share - 0.8).abs().max() < 0.01
    assert digits.digest == load("digits").digest


def test_statistics_are_those_of_the_training_images(digits):
    scaled = digits.train_images.double() / 255
    torch.testing.assert_close(digits.mean.double(), scaled.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(digits.std.double(), scaled.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", ["mnist", "cifar", "", "folder"])
def test_unknown_data_is_refused(spec):
    with pytest.raises(InputError, match="expected data digits"):
        load(spec)


def test_image_size_is_for_folders_alone():
    with pytest.raises(InputError, match="folder:PATH and hub:NAME alone"):
        load("digits", image_size=16)


def write_idx(path, array):
    head = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


def write_fashion_mnist(folder, numbers):
    arrays = {
        "train-images-idx3": numbers.integers(0, 256, (20, 28, 28), dtype=numpy.uint8),
        "train-labels-idx1": numpy.arange(20, dtype=numpy.uint8) % 10,
        "t10k-images-idx3": numbers.integers(0, 256, (10, 28, 28), dtype=numpy.uint8),
        "t10k-labels-idx1": numpy.arange(10, dtype=numpy.uint8),
    }
    for name, array in arrays.items():
        write_idx(folder / f"{name}-ubyte.gz", array)
    return arrays


def test_fashion_mnist_from_its_four_files(tmp_path):
    arrays = write_fashion_mnist(tmp_path, numpy.random.default_rng(0))
    data = load("fashion-mnist", tmp_path)
    assert data.train_images.shape == (20, 1, 28, 28)
    assert torch.equal(data.train_images[:, 0], torch.from_numpy(arrays["train-images-idx3"]))
    assert torch.equal(data.test_targets, torch.arange(10))


def test_damaged_idx_file_is_named(tmp_path):
    write_fashion_mnist(tmp_path, numpy.random.default_rng(0))
    broken = tmp_path / "t10k-images-idx3-ubyte.gz"
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(InputError, match=r"t10k-images-idx3-ubyte\.gz") as caught:
        load("fashion-mnist", tmp_path)
    assert "\n" not in str(caught.value)


def test_cifar10_layout_is_channels_first(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    numbers = numpy.random.default_rng(0)
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    flat = {}
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        flat[name] = numbers.integers(0, 256, (4, 3072), dtype=numpy.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": flat[name], "labels": [0, 1, 2, 9]}))
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # these are no originals
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    data = load("cifar10", tmp_path)
    assert data.train_images.shape == (20, 3, 32, 32) and data.test_images.shape == (4, 3, 32, 32)
    first = torch.from_numpy(flat["data_batch_1"]).reshape(4, 3, 32, 32)  # CIFAR's bytes are channels-first
    assert torch.equal(data.train_images[:4], first)
    assert data.test_targets.tolist() == [0, 1, 2, 9]


@pytest.mark.parametrize("spec, name", [("cifar10", "CIFAR10"), ("svhn", "SVHN"), ("fashion-mnist", "FashionMNIST")])
def test_failed_download_says_what_was_looked_for(tmp_path, monkeypatch, spec, name):
    from torchvision import datasets

    def no_network(self):
        raise OSError("no network\nat all")

    monkeypatch.setattr(getattr(datasets, name), "download", no_network)
    with pytest.raises(InputError, match="--data-dir") as caught:
        load(spec, tmp_path)
    assert str(tmp_path) in str(caught.value) and "no network" in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    numbers = numpy.random.default_rng(0)
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for position in range(3):
                pixels = numbers.integers(0, 256, (12, 12, 3), dtype=numpy.uint8)
                Image.fromarray(pixels).save(tmp_path / part / label / f"{position}.png")
    return tmp_path


def test_folder_of_images(folder):
    data = load(f"folder:{folder}")
    assert data.train_images.shape == (6, 3, 12, 12) and data.train_targets.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = numpy.array(Image.open(folder / "train" / "dog" / "2.png"))
    assert torch.equal(data.train_images[5], torch.from_numpy(pixels).permute(2, 0, 1))
    assert load(f"folder:{folder}", image_size=8).test_images.shape == (6, 3, 8, 8)


def test_a_folder_too_large_for_memory_is_mapped_from_a_file_that_is_made_once(folder, tmp_path_factory, monkeypatch):
    plain, cache = load(f"folder:{folder}"), tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(pictures, "SETTLED", -3600.0)  # images that changed just now are not kept
    monkeypatch.setattr(pictures, "IN_MEMORY", 12 * 3 * 12 * 12 - 1)
    mapped = load(f"folder:{folder}", cache)
    files = {path: path.stat().st_mtime_ns for path in (cache / "images").iterdir()}
    assert len(files) == 2 and sum(path.stat().st_size for path in files) == 12 * 3 * 12 * 12
    assert mapped.digest == plain.digest == load(f"folder:{folder}", cache).digest
    assert torch.equal(mapped.mean, plain.mean) and torch.equal(mapped.std, plain.std)
    assert {path: path.stat().st_mtime_ns for path in (cache / "images").iterdir()} == files
    Image.new("RGB", (12, 12)).save(folder / "train" / "cat" / "0.png")  # another image: another file
    assert not load(f"folder:{folder}", cache).train_images[0].any() and len(list((cache / "images").iterdir())) == 3


def test_a_data_set_of_the_hub_is_read_like_the_folder_it_was_made_of(folder, tmp_path_factory, monkeypatch):
    datasets = pytest.importorskip("datasets")  # its cache would go to the home directory
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))
    plain = load(f"folder:{folder}")
    (folder / "test").rename(folder / "validation")
    data = load(f"hub:{folder}")
    assert data.digest == plain.digest and data.num_classes == 2
    assert load(f"hub:{folder}", image_size=8).test_images.shape == (6, 3, 8, 8)
    (folder / "validation").rename(folder / "extra")
    with pytest.raises(InputError, match="splits train and test or validation, labelled, got"):
        load(f"hub:{folder}")
    with pytest.raises(InputError, match="cannot be had"):
        load(f"hub:{folder}/nowhere")


def test_without_datasets_the_hub_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs Hugging Face's datasets .*pip install 'delfast\[hub\]'"):
        load("hub:clane9/imagenet-100")


def test_folder_with_bad_content_is_refused(folder):
    with pytest.raises(InputError, match="no such folder"):
        load(f"folder:{folder}/nowhere")
    Image.new("RGB", (10, 12)).save(folder / "train" / "cat" / "0.png")
    with pytest.raises(InputError, match="10x12, not square"):
        load(f"folder:{folder}")
    (folder / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cannot read the image .*0\.png"):
        load(f"folder:{folder}", image_size=8)
    (folder / "test" / "dog").rename(folder / "test" / "wolf")
    with pytest.raises(InputError, match="'dog' is in one alone"):
        load(f"folder:{folder}", image_size=8)


# --- batches --------------------------------------------------------------------------------------


def test_batches_taken_ahead_are_the_same(digits):
    plain, ahead = (list(batches(digits, batch_size=100, shuffle=True, seed=3, ahead=flag)) for flag in (False, True))
    assert len(plain) == len(ahead) == 15
    for left, right in zip(plain, ahead, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_an_error_while_a_batch_is_taken_ahead_is_raised():
    def items():
        yield 1
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk is gone"):
        list(one_ahead(items()))
    assert next(one_ahead(iter([1, 2, 3]))) == 1  # left early


def test_batches_hold_every_example_once_and_normalised(digits):
    chosen = torch.arange(0, 101)
    loader = batches(digits, batch_size=32, indices=chosen, shuffle=True, seed=3)
    seen = list(loader)
    assert [len(index) for index, _, _ in seen] == [32, 32, 32, 5] and len(loader) == 4
    index, inputs, targets = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert torch.equal(index.sort().values, chosen) and not torch.equal(index, chosen)
    assert torch.equal(targets, digits.train_targets[index]) and inputs.dtype == torch.float32
    expected = (digits.train_images[index].float() / 255 - digits.mean[0]) / digits.std[0]
    assert torch.equal(inputs, expected)


def test_order_depends_on_seed_and_epoch_alone(digits):
    def order(seed, epoch, passes_before=0):
        loader = batches(digits, batch_size=500, shuffle=True, seed=seed)
        for _ in range(passes_before):
            list(loader)
        torch.manual_seed(passes_before)  # the global generator has no say
        loader.set_epoch(epoch)
        return torch.cat([index for index, _, _ in loader])

    assert torch.equal(order(0, 5), order(0, 5, passes_before=2))
    assert not torch.equal(order(0, 5), order(0, 6))
    assert not torch.equal(order(0, 6), order(1, 5))


def test_images_are_placed_on_a_device_once(digits, monkeypatch):
    monkeypatch.setattr(images, "resident", lambda tensor, device: tensor.clone())
    cpu = torch.device("cpu")
    data = replace(digits)
    placed = data.images("train", cpu)
    assert placed is data.images("train", cpu) is not data.train_images
    assert torch.equal(data.images("test", cpu), data.test_images)
    assert data.images("train", torch.device("meta")) is not placed
    assert len(subset(data, 30, None).images("train", cpu)) == 30  # a copy of the data does not take over its images


def test_no_examples_make_no_batches(digits):
    empty = batches(digits, batch_size=4, indices=torch.empty(0, dtype=torch.int64))
    assert len(empty) == 0 and list(empty) == []


def test_batches_refuse_bad_input(digits):
    with pytest.raises(InputError, match="batch size of at least 1, got 0"):
        batches(digits, batch_size=0)
    with pytest.raises(InputError, match="1437 images and 5 targets"):
        Batches(digits.train_images, digits.train_targets[:5], digits.mean, digits.std, batch_size=4)
    for bad in ([-1, 3], [0, 1437]):
        with pytest.raises(InputError, match=rf"indices in \[0, 1437\), .* got {bad[0]} to {bad[1]}"):
            batches(digits, batch_size=4, indices=torch.tensor(bad))


# --- forget sets ----------------------------------------------------------------------------------


def test_iid_takes_a_share_at_random(digits):
    targets = digits.train_targets
    chosen = choose("iid", 0.1, targets, 10, seed=0)
    assert len(chosen.indices) == 144 and torch.equal(chosen.indices, chosen.indices.unique())
    assert torch.equal(chosen.targets, targets)
    assert len(targets[chosen.indices].unique()) == 10
    assert chosen.digest == choose("iid", 0.1, targets, 10, seed=0).digest
    assert chosen.digest != choose("iid", 0.1, targets, 10, seed=1).digest
    both = torch.cat([chosen.indices, chosen.retain])
    assert torch.equal(both.sort().values, torch.arange(len(targets)))


def test_choosing_leaves_the_global_generator_alone(digits):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    choose("mislabelled", 0.1, digits.train_targets, 10, seed=0)
    assert torch.equal(torch.rand(1), expected)


def test_non_iid_draws_from_its_classes(digits):
    chosen = choose("non-iid:2,5", 0.1, digits.train_targets, 10, seed=0)
    assert len(chosen.indices) == 144
    assert digits.train_targets[chosen.indices].unique().tolist() == [2, 5]


def test_non_iid_may_cover_a_whole_class_and_says_so(digits, caplog):
    with caplog.at_level("INFO", logger="delfast"):
        chosen = choose("non-iid:7", 0.5, digits.train_targets, 10, seed=0)
    assert torch.equal(chosen.indices, (digits.train_targets == 7).nonzero().flatten())
    assert "the forget set is all of them" in caplog.text


def test_mislabelled_flips_each_label_to_another_class(digits):
    targets = digits.train_targets.clone()
    chosen = choose("mislabelled", 0.5, targets, 10, seed=0)
    assert torch.equal(targets, digits.train_targets)  # the input stays
    changed = (chosen.targets != targets).nonzero().flatten()
    assert torch.equal(changed, chosen.indices)
    assert chosen.targets.min() >= 0 and chosen.targets.max() <= 9
    offsets = ((chosen.targets - targets) % 10)[chosen.indices].bincount(minlength=10)
    # uniform over the nine other classes: 718 / 9 = 80 each, standard deviation 8.4
    assert offsets[0] == 0 and offsets[1:].min() > 40 and offsets[1:].max() < 120


@pytest.mark.parametrize(
    "spec, ratio, message",
    [
        ("iid", 0.0, r"ratio in \(0, 1\], got 0.0"),
        ("iid", 1.5, r"ratio in \(0, 1\], got 1.5"),
        ("iid", float("nan"), r"ratio in \(0, 1\], got nan"),
        ("iid", 1e-6, "is empty"),
        ("iid", 1.0, "whole training set"),
        ("non-iid:2,11", 0.1, "classes 0 to 9 in 'non-iid:2,11', got 11"),
        ("non-iid", 0.1, "expected a forget set"),
        ("non-iid:a", 0.1, "expected a forget set"),
        ("random", 0.1, "expected a forget set"),
    ],
)
def test_bad_forget_sets_are_refused(digits, spec, ratio, message):
    with pytest.raises(InputError, match=message):
        choose(spec, ratio, digits.train_targets, 10, seed=0)


def test_forget_set_survives_its_file(digits, tmp_path):
    path = tmp_path / "forget.json"
    chosen = choose("mislabelled", 0.1, digits.train_targets, 10, seed=4)
    chosen.save(path)
    loaded = ForgetSet.load(path, digits.train_targets)
    assert (loaded.spec, loaded.ratio, loaded.seed) == ("mislabelled", 0.1, 4)
    assert torch.equal(loaded.indices, chosen.indices) and torch.equal(loaded.targets, chosen.targets)


def test_altered_forget_file_is_refused(digits, tmp_path):
    path = tmp_path / "forget.json"
    choose("iid", 0.1, digits.train_targets, 10, seed=4).save(path)
    with pytest.raises(InputError, match="1437 examples, this one has 10"):
        ForgetSet.load(path, digits.train_targets[:10])
    content = json.loads(path.read_text())
    for change, message in [
        ({"labels": [(content["labels"][0] + 1) % 10, *content["labels"][1:]]}, "digest"),
        ({"indices": [-1, *content["indices"][1:]]}, "do not exist"),
        ({"indices": "all"}, "is no forget set"),
    ]:
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(InputError, match=message):
            ForgetSet.load(path, digits.train_targets)


# --- forget sets from a file ----------------------------------------------------------------------


def test_a_file_of_indices_is_a_forget_set(digits, tmp_path):
    path = tmp_path / "withdrawn.txt"
    path.write_text("7 3\n1200\n", encoding="utf-8")
    chosen = choose(f"file:{path}", 0.1, digits.train_targets, digits.num_classes, 0)
    assert chosen.indices.tolist() == [3, 7, 1200] and torch.equal(chosen.targets, digits.train_targets)
    for text, message in (
        ("3 -1", "indices from 0 to 1436, got '-1'"),
        ("3 1437", "got '1437'"),
        ("3 x", "got 'x'"),
        ("3 7 3", "one is there twice"),
        ("", "is empty"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            choose(f"file:{path}", 0.1, digits.train_targets, digits.num_classes, 0)
    with pytest.raises(InputError, match="cannot read the forget set's indices"):
        choose(f"file:{tmp_path}/none.txt", 0.1, digits.train_targets, digits.num_classes, 0)


def test_a_subset_is_the_same_each_time(digits):
    some = subset(digits, 100, None)
    assert some.train_images.shape[0] == 100 and len(some.test_targets) == len(digits.test_targets)
    assert torch.equal(some.train_targets, subset(digits, 100, 5).train_targets)
    assert torch.equal(some.mean, digits.mean) and some.digest != digits.digest


@pytest.mark.parametrize(
    "encoding, message",
    [("utf-8", None), ("utf-8-sig", None), ("utf-16", "UTF-16 text; save it as UTF-8"), ("utf-16-le", "UTF-16"),
     ("utf-16-be", "UTF-16"), ("utf-32", "UTF-16")],
)  # fmt: skip
def test_an_index_file_may_begin_with_a_byte_order_mark(digits, tmp_path, encoding, message):
    path = tmp_path / "withdrawn.txt"
    path.write_bytes("3\r\n7\r\n".encode(encoding))
    if message is None:
        assert choose(f"file:{path}", 0.1, digits.train_targets, 10, 0).indices.tolist() == [3, 7]
        return
    with pytest.raises(InputError, match=message) as caught:
        choose(f"file:{path}", 0.1, digits.train_targets, 10, 0)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_index_file_that_is_none_is_refused_and_not_waited_for(digits, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").write_text("9" * 5000)
    for name, message in (("pipe", "no regular file"), (".", "no regular file"), ("huge", "got '9"), ("a\0b", "null")):
        with pytest.raises(InputError, match=message) as caught:
            choose(f"file:{tmp_path}/{name}", 0.1, digits.train_targets, 10, 0)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    with pytest.raises(InputError, match="expected a forget set"):
        choose(f"non-iid:{'9' * 5000}", 0.1, digits.train_targets, 10, 0)


# --- folders of images that are not what they seem ------------------------------------------------


def test_what_begins_with_a_dot_is_no_class_and_no_image(folder):
    plain = load(f"folder:{folder}")
    for part in ("train", "test"):
        (folder / part / ".ipynb_checkpoints").mkdir()
        (folder / part / "cat" / ".thumbnails").mkdir()
        for hidden in (".ipynb_checkpoints/0.png", "cat/.thumbnails/0.png", "cat/._0.png"):
            (folder / part / hidden).write_bytes(b"no image")
    (folder / "train" / ".DS_Store").write_bytes(b"")
    (folder / "train" / "notes.txt").write_text("no image")
    data = load(f"folder:{folder}")
    assert data.num_classes == 2 and data.digest == plain.digest


def test_images_come_in_the_order_of_torchvisions_image_folder(folder):
    from torchvision.datasets import ImageFolder

    for part in ("train", "test"):
        for name in ("b/0.PNG", "b-c/0.png", "b/a/1.png", "a.png", "B.png", "é.png"):
            (folder / part / "cat" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12)).save(folder / part / "cat" / name)
    (folder / "train" / "dog" / "linked").symlink_to(folder / "test" / "dog")  # followed, as there
    train, _, _ = pictures._folder(f"folder:{folder}")
    expected = ImageFolder(str(folder / "train"))
    assert [(train.name(i), int(target)) for i, target in enumerate(train.targets)] == expected.samples


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"\0" * 100))


def bomb(path):
    path.write_bytes(png(50_000, 50_000))


def text_bomb(path):
    path.write_bytes(png(12, 12, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 80_000_000))))


def to_nothing(path):
    path.symlink_to(path.parent / "nothing.png")


def to_itself(path):
    path.symlink_to(path)


@pytest.mark.parametrize(
    "make, message",
    [(os.mkfifo, "no regular file"), (bomb, "could be decompression bomb"), (text_bomb, "cannot read the image"),
     (to_nothing, "No such file"), (to_itself, "symbolic links"), (Path.touch, "cannot identify")],
)  # fmt: skip
def test_an_image_that_cannot_be_read_is_one_line_whatever_its_name(folder, make, message):
    make(folder / "train" / "cat" / "\x1b[31m\n\u202e9.png")
    with pytest.raises(InputError, match=message) as caught:
        load(f"folder:{folder}", image_size=8)
    assert r"\x1b[31m\n" in str(caught.value) and str(caught.value).isprintable()


def link_to_parent(folder):
    (folder / "train" / "cat" / "loop").symlink_to(folder / "train" / "cat")


def two_links(folder):
    """Followed without a check they double the images at every level, until the names are too long."""
    for name in ("one", "two"):
        (folder / "train" / "cat" / name).symlink_to(folder / "train")


def class_that_is_its_root(folder):
    for part in ("train", "test"):
        (folder / part / "all").symlink_to(folder / part)


@pytest.mark.parametrize("make", [link_to_parent, two_links, class_that_is_its_root])
def test_links_that_lead_back_are_refused_by_name(folder, make):
    make(folder)
    with pytest.raises(InputError, match="is read already; remove the link"):
        load(f"folder:{folder}")


def test_a_folder_that_cannot_be_read_is_refused(folder, monkeypatch):
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InputError, match=r"cannot read '.*dog' \(Permission denied\)"):
        load(f"folder:{folder}")
    monkeypatch.undo()
    for path in (folder / "test" / "dog").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"expected images in '.*dog', there is none"):
        load(f"folder:{folder}")


@pytest.mark.parametrize(
    "change",
    [{"indices": [1.5]}, {"indices": [[1]]}, {"indices": [2**70]}, {"indices": [True]}, {"labels": None},
     {"seed": float("inf")}, {"seed": "9" * 5000}, {"ratio": []}, {"labels": [2**64]}, {"examples": "all"}],
)  # fmt: skip
def test_a_forget_file_of_other_types_is_refused(digits, tmp_path, change):
    path = tmp_path / "forget.json"
    choose("iid", 0.1, digits.train_targets, 10, seed=4).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=r"is no forget set"):
        ForgetSet.load(path, digits.train_targets)
