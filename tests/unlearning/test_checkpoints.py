"""Checkpoints and other archives: numpy's numbers, every flipped bit, a full disk, and states that cannot be read."""

from __future__ import annotations

import copy
import errno
import functools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import delfast
from delfast import InputError, Mask, TrainingOptions
from delfast.files import load_archive, load_state, save_archive, save_state, write_json
from delfast.optim import MaskedAdamW, MaskedSGD
from delfast.unlearning import train
from tests import cases

FORGET, RETAIN = cases.image_batches(12, seed=1), cases.image_batches(24, seed=2)
LINEAR = [(torch.randn(4, 6, generator=torch.Generator().manual_seed(i)), torch.tensor([0, 1, 2, 0])) for i in range(3)]


class Interrupted(Exception):
    pass


def stop_in(epoch: int) -> Callable[[Any, str, int], Any]:
    def progress(batches: Any, description: str, total: int) -> Any:
        if description.startswith(f"epoch {epoch}/"):
            raise Interrupted
        return batches

    return progress


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


NUMPY: dict[str, Any] = {
    "epochs": numpy.int64(3), "lr": numpy.float32(0.013), "momentum": numpy.float32(0.7),
    "weight_decay": numpy.float64(1e-3), "seed": numpy.int64(5),
    "config": {"ratio": numpy.float32(0.1), "rows": (numpy.int8(1), [numpy.bool_(True)]), "name": numpy.str_("x")},
}  # fmt: skip
PYTHON: dict[str, Any] = {
    "epochs": 3, "lr": float(numpy.float32(0.013)), "momentum": float(numpy.float32(0.7)), "weight_decay": 1e-3,
    "seed": 5, "config": {"ratio": float(numpy.float32(0.1)), "rows": [1, [True]], "name": "x"},
}  # fmt: skip


@pytest.mark.parametrize("method", ["del", "relabel", "scrub"])
def test_numpys_numbers_and_a_str_path_resume_to_the_same_weights(method: str, tmp_path: Path) -> None:
    """A run saved with numpy's settings and resumed with Python's ends with the weights of an uninterrupted run."""

    def run(settings: dict[str, Any], progress: Any = None, **options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = cases.SmallNet()
        needs: dict[str, Any] = {"init": cases.SmallNet} if method == "del" else {}
        patience = type(settings["seed"])(2)
        config = settings["config"]
        training = TrainingOptions(validation=[*RETAIN], patience=patience, config=config, progress=progress)
        settings = {name: value for name, value in settings.items() if name != "config"}
        sets = {"forget": FORGET, "retain": RETAIN}
        delfast.unlearn(model, **sets, method=method, training=training, **needs, **settings, **options)
        return weights(model)

    expected = run(PYTHON)
    path = str(tmp_path / "checkpoint.pt")
    with pytest.raises(Interrupted):
        run(NUMPY, checkpoint=path, progress=stop_in(3))
    assert torch.equal(run(PYTHON, checkpoint=path, resume=True), expected)
    with pytest.raises(Interrupted):
        run(NUMPY, checkpoint=path, progress=stop_in(2))
    assert torch.equal(run(NUMPY, checkpoint=path, resume=True), expected)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "masked"])
def test_numpys_numbers_in_an_optimizer_resume_to_the_same_weights(kind: str, tmp_path: Path) -> None:
    def run(number: Callable[[float], Any], **options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        optimizer: torch.optim.Optimizer
        if kind == "sgd":
            optimizer = torch.optim.SGD(model.parameters(), lr=number(0.05), momentum=number(0.9))
        elif kind == "adamw":
            betas = (numpy.float64(number(0.9)), numpy.float64(number(0.99)))  # torch takes no float32 here
            optimizer = torch.optim.AdamW(model.parameters(), lr=number(0.05), betas=betas, weight_decay=number(0.1))
        else:
            mask = delfast.score(model, criterion="weight").select(0.5)
            optimizer = MaskedSGD(model.named_parameters(), mask, lr=number(0.05), momentum=number(0.9))
        train(model, LINEAR, optimizer, epochs=3, final_lr=number(0.1), max_norm=number(1.0), **options)
        return weights(model)

    def python(value: float) -> float:
        return float(numpy.float32(value))

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Interrupted):
        run(numpy.float32, checkpoint=path, progress=stop_in(2))
    assert torch.equal(run(numpy.float32, checkpoint=path, resume=True), run(python))


def test_the_state_of_a_masked_optimizer_with_numpys_numbers_can_be_read(tmp_path: Path) -> None:
    model = nn.Linear(6, 3)
    mask = delfast.score(model, criterion="weight").select(0.5)
    one = numpy.float64(0.1)
    for optimizer in (
        MaskedSGD(model.named_parameters(), mask, lr=one, momentum=one),
        MaskedSGD([{"params": list(model.named_parameters()), "lr": one}], mask),
        MaskedAdamW(model.named_parameters(), mask, lr=one, betas=(one, one), eps=one, weight_decay=one),
    ):
        torch.save(optimizer.state_dict(), tmp_path / "o.pt")
        optimizer.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))


def test_masks_made_with_numpys_numbers_are_saved(tmp_path: Path) -> None:
    model, generator = cases.SmallNet(), torch.Generator().manual_seed(0)
    images = torch.cat([batch[0] for batch in FORGET])
    data = TensorDataset(images, torch.randint(0, 3, (len(images),), generator=generator))
    made = {
        "numpy": delfast.localize(
            model, data, numpy.float32(0.25), seed=numpy.int64(1), stop_when_stable=numpy.float32(0.875),
            batch_size=numpy.int64(4), top_h=numpy.int64(3), per_example=numpy.bool_(True),
        ),
        "python": delfast.localize(
            model, data, 0.25, seed=1, stop_when_stable=0.875, batch_size=4, top_h=3, per_example=True
        ),
        "random": delfast.score(model, criterion="random", seed=numpy.uint8(7)).select(numpy.float64(0.5)),
    }  # fmt: skip
    for name, mask in made.items():
        mask.save(tmp_path / name)
        assert Mask.load(tmp_path / name).metadata == json.loads(json.dumps(mask.metadata)) == dict(mask.metadata)
    assert made["numpy"].metadata == made["python"].metadata and made["numpy"].digest == made["python"].digest
    assert made["random"].digest == delfast.score(model, criterion="random", seed=7).select(0.5).digest


def flip(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def flips_are_noticed(tmp_path: Path, count: int) -> int:
    """Resume from ``count`` checkpoints with one bit flipped; check the weights, or count the refusal."""
    path = tmp_path / "checkpoint.pt"

    def run(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        train(model, LINEAR, torch.optim.Adam(model.parameters(), lr=0.05), epochs=2, checkpoint=path, **options)
        return model

    with pytest.raises(Interrupted):
        run(progress=stop_in(2))
    whole = path.read_bytes()
    expected = weights(run(resume=True))
    generator, refused = random.Random(3), 0
    for _ in range(count):
        path.write_bytes(flip(whole, generator))
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        before = weights(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        try:
            train(model, LINEAR, optimizer, epochs=2, checkpoint=path, resume=True)
        except InputError as error:
            text = str(error)
            assert "\n" not in text and "weights_only" not in text and str(path) in text
            assert torch.equal(weights(model), before)
            refused += 1
        else:
            assert torch.equal(weights(model), expected)
    return refused


def test_flipped_bits_are_refused_or_change_nothing(tmp_path: Path) -> None:
    assert flips_are_noticed(tmp_path, 60) > 20


@pytest.mark.slow
def test_1000_flipped_bits_are_refused_or_change_nothing(tmp_path: Path) -> None:
    assert flips_are_noticed(tmp_path, 1000) > 400


def test_flipped_bits_of_a_state_file_are_noticed(tmp_path: Path) -> None:
    """torch's archives have checksums; a .safetensors file has none, but always loads as tensors."""
    state = {"weight": torch.randn(40, 30), "steps": torch.tensor([3])}
    torch.save(state, tmp_path / "whole.pt")
    save_state(tmp_path / "whole.safetensors", state)
    generator, refused = random.Random(4), {".pt": 0, ".safetensors": 0}
    for name in ("whole.pt", "whole.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for number in range(150):
            path = tmp_path / f"damaged{Path(name).suffix}"
            header = whole[:300] if number % 2 else whole  # half of the flips in the header
            path.write_bytes(flip(header, generator) + whole[len(header) :])
            try:
                loaded = load_state(path)
            except InputError as error:
                assert "\n" not in str(error) and "weights_only" not in str(error)
                refused[path.suffix] += 1
                continue
            assert all(isinstance(value, torch.Tensor) for value in loaded.values())
            if path.suffix == ".pt":
                assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    assert min(refused.values()) > 30, refused


def test_old_archives_without_checksums_load(tmp_path: Path) -> None:
    state = {"weight": torch.randn(4, 3)}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_state(tmp_path / "old.pt")["weight"], state["weight"])


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from delfast import Mask
from delfast.experiments.datasets.pictures import Pictures, _decode
from delfast.files import save_archive, save_state, write_json
from PIL import Image
directory = Path(sys.argv[1])
if sys.argv[2] == "limit":  # a limit on a file's size stands for the disk's: the write fails in the middle
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
big = {"w": torch.rand(400, 400)}
pictures = Pictures(lambda i: Image.new("RGB", (256, 256)), str, torch.zeros(4), "four")
for name, write in (
    ("mask", lambda path: Mask.from_dense({"w": torch.rand(1_200_000) < 0.5}).save(path)),
    ("archive.pt", lambda path: save_archive(path, big)),
    ("state.safetensors", lambda path: save_state(path, big)),
    ("summary.json", lambda path: write_json(path, "x" * 500_000)),
    ("images", lambda path: _decode(pictures, 256, path)),
):
    try:
        write(directory / name)
    except OSError as error:
        print(error.errno, Path(error.filename).relative_to(directory).parts[0], error.strerror, sep="|")
"""


@pytest.mark.long
@pytest.mark.parametrize("how", ["limit", pytest.param("disk", marks=pytest.mark.slow)])
def test_a_full_disk_is_named_with_the_file(how: str, tmp_path: Path) -> None:
    directory = tmp_path / "disk"
    directory.mkdir()
    names = ("mask", "archive.pt", "state.safetensors", "summary.json")
    for name in names:
        (directory / name).write_text("old")
    number = errno.EFBIG if how == "limit" else errno.ENOSPC
    mounted = False
    if how == "disk":
        mount = shutil.which("mount")
        if mount is None or os.geteuid() != 0:
            pytest.skip("only root can mount a small disk")
        done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(directory)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no small disk here: {done.stderr.decode().strip()}")
        mounted = True
    try:
        arguments = [sys.executable, "-c", FULL_DISK, str(directory), how]
        result = subprocess.run(arguments, capture_output=True, text=True, check=True)
        left = sorted(path.name for path in directory.iterdir())
    finally:
        if mounted:
            subprocess.run(["umount", str(directory)], check=True)
    expected = [f"{number}|{name}|{os.strerror(number)}" for name in (*names, "images")]
    assert result.stdout.splitlines() == expected, result.stderr
    assert left == (["images"] if mounted else sorted((*names, "images")))
    assert all((directory / name).read_text() == "old" for name in names)


def test_a_device_that_is_always_full_is_named_as_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    for buffering in (0, -1):
        full = functools.partial(open, "/dev/full", "wb", buffering)
        monkeypatch.setattr("delfast.files.open", lambda *_, full=full: full(), raising=False)
        with pytest.raises(OSError, match=r"No space left on device: '.*archive.pt'") as caught:
            save_archive(tmp_path / "archive.pt", {"w": torch.ones(9)})
        assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_errors_that_are_not_the_disks_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_json(tmp_path / "absent" / "x.json", 1)
    assert caught.value.filename == str(tmp_path / "absent" / "x.json")
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {1, 2})
    with pytest.raises(RuntimeError, match="not the disk"):
        save_archive(tmp_path / "x.pt", Unpicklable())


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("not the disk")


class WithExtraState(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.fc, self.extra = nn.Linear(6, 3), extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc(x)
        return result

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_a_state_that_could_not_be_read_again_is_refused_before_training(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    for extra in (numpy.ones(3), numpy.float32(1), Path("x"), {"deep": [Interrupted("x")]}, lambda: None):
        model = WithExtraState(extra)
        before = copy.deepcopy(model.fc.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(InputError, match="the model's state to hold tensors and plain values, got") as caught:
            train(model, LINEAR, optimizer, epochs=1, checkpoint=path)
        assert "\n" not in str(caught.value) and not path.exists()
        assert all(torch.equal(value, before[name]) for name, value in model.fc.state_dict().items())
    for extra in (None, {"scale": torch.ones(2), "names": ["a"], "sizes": (1, 2.5)}, torch.ones(3)):
        model = WithExtraState(extra)
        train(model, LINEAR, torch.optim.SGD(model.parameters(), lr=0.1), epochs=1, checkpoint=path)
        assert set(load_archive(path)["model"]) == {"fc.weight", "fc.bias", "_extra_state"}


def test_a_config_that_is_no_json_is_refused_before_training(tmp_path: Path) -> None:
    model = cases.SmallNet()
    before = weights(model)
    for value in (Path("x"), {1, 2}, torch.ones(2), numpy.ones(2)):
        with pytest.raises(InputError, match="plain JSON values in the config of a checkpoint"):
            delfast.unlearn(
                model, forget=FORGET, retain=RETAIN, init=cases.SmallNet, epochs=1, checkpoint=tmp_path / "c.pt",
                training=TrainingOptions(config={"value": value}),
            )  # fmt: skip
    assert torch.equal(weights(model), before) and not list(tmp_path.iterdir())
