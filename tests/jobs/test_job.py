"""A job: networks and files, data and identifiers, digests and loaders."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import delfast
from delfast import InputError
from delfast.evaluation import accuracy_and_loss
from delfast.files import save_state
from delfast.jobs import Job
from delfast.unlearning import train
from tests.jobs.files import job_of, line_of, network, points

LOAD_SAVE = """
def load(path):
    network = model()
    network.load_state_dict(torch.load(path)["network"])
    return network
"""


def refusal(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# networks


def test_networks_are_new_each_time(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    assert not same(job.model(), job.model())
    fixed = job_of(tmp_path, "\nONLY = model()\ndef model():\n    return ONLY\n")
    fixed.model()
    assert "expected model() to make a new network each time" in refusal(fixed.model)


@pytest.mark.parametrize(
    ("more", "at", "message"),
    [
        ("def model():\n    return [1]\n", "def model():", "model() to return to be a torch.nn.Module, got list"),
        ("def model():\n    raise ValueError('no size')\n", "raise ValueError", "ValueError: no size"),
        ("def model():\n    return nn.Linear('a', 'b')\n", "nn.Linear('a'", "TypeError: "),
        ("def model(size):\n    return size\n", "def model(size)", "TypeError: model() missing 1 required"),
    ],
)
def test_errors_of_model_name_file_and_line(more: str, at: str, message: str, tmp_path: Path) -> None:
    job = job_of(tmp_path, more)
    shown = refusal(job.model)
    assert shown.startswith(f"'{job.path}', line {line_of(job.path, at)}: ") and message in shown


def test_files_hold_a_state_dict_by_default(tmp_path: Path) -> None:
    job, model = job_of(tmp_path), network()
    before = torch.get_rng_state()
    job.save(model, tmp_path / "network.safetensors")
    assert same(job.load(tmp_path / "network.safetensors"), model)
    torch.save(model.state_dict(), tmp_path / "network.pt")
    assert same(job.load(tmp_path / "network.pt"), model)
    assert torch.equal(before, torch.get_rng_state())
    assert "there is none; check the path" in refusal(lambda: job.load(tmp_path / "none.safetensors"))
    save_state(tmp_path / "other.safetensors", nn.Linear(2, 2).state_dict())
    assert "does not fit model()" in refusal(lambda: job.load(tmp_path / "other.safetensors"))


def test_the_files_of_the_job_itself(tmp_path: Path) -> None:
    save = "\ndef save(model, path):\n    torch.save({'network': model.state_dict()}, path)\n"
    job, model = job_of(tmp_path, LOAD_SAVE + save), network()
    job.save(model, tmp_path / "network.pth")
    assert same(job.load(tmp_path / "network.pth"), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.py", "network.pth"]
    assert "there is none" in refusal(lambda: job.load(tmp_path / "none.pth"))


def test_a_save_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "network.pth"
    target.write_text("old")
    job = job_of(tmp_path, LOAD_SAVE + "\ndef save(model, path):\n    path.write_text('x')\n    1 / 0  # here\n")
    assert f"line {line_of(job.path, '# here')}: ZeroDivisionError" in refusal(lambda: job.save(network(), target))
    job = job_of(tmp_path, LOAD_SAVE + "\ndef save(model, path):\n    pass\n")
    assert "expected save(model, path) to write the file" in refusal(lambda: job.save(network(), target))
    full = (
        "\ndef save(model, path):\n    import errno, os\n    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
    )
    with pytest.raises(OSError, match="No space left") as caught:
        job_of(tmp_path, LOAD_SAVE + full).save(network(), target)
    assert caught.value.errno == errno.ENOSPC and target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.py", "network.pth"]


# data


def test_data_sets_are_made_once(tmp_path: Path) -> None:
    job = job_of(tmp_path, "\nCALLS = []\ndef train_set():\n    CALLS.append(1)\n    return points(5, 0)\n")
    assert job.count == 5 and job.train_set is job.train_set
    assert job.source.module.CALLS == [1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("3", "a map-style data set, with len(data) and data[i], got int"),
        ("iter([1])", "got list_iterator"),
        ("{0: 1}", "got dict"),
        ("[]", "at least one example, got none"),
        ("nn.Linear(1, 1)", "got Linear"),
        ("open('/no/such/file')", "FileNotFoundError: [Errno 2]"),
    ],
)
def test_what_is_no_data_set_is_refused(value: str, message: str, tmp_path: Path) -> None:
    job = job_of(tmp_path, f"\ndef train_set():\n    return {value}\n")
    shown = refusal(lambda: job.count)
    assert shown.startswith(f"'{job.path}', line ") and message in shown


def test_identifiers(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    assert list(job.ids) == [str(number) for number in range(40)]
    assert job.positions(["7", "0", "12"]).tolist() == [0, 7, 12]
    named = job_of(tmp_path, "\ndef example_ids():\n    return [f'p{i:02}' for i in reversed(range(40))]\n")
    assert named.positions(["p39", "p00"]).tolist() == [0, 39]
    assert named.positions([]).shape == (0,)
    assert "got 'p40'" in refusal(lambda: named.positions(["p01", "p40", "p41"]))
    assert "'p01' is there twice" in refusal(lambda: named.positions(["p01", "p01"]))
    numbers = job_of(tmp_path, "\nimport numpy\ndef example_ids():\n    return numpy.arange(100, 140)\n")
    assert numbers.ids[:2] == ("100", "101")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("range(39)", "for each of the 40 training examples, got 39"),
        ("[1] * 40", "to be unique, '1' occurs twice"),
        ("['1', 1] + list(range(2, 40))", "to be unique, '1' occurs twice"),
        ("[1.5] * 40", "texts or ints, got 1.5"),
        ("[True] * 40", "texts or ints, got True"),
        ("[' a'] + list(range(39))", "without white space at the ends, got ' a'"),
        ("['a\\n'] + list(range(39))", "printable characters"),
        ("[''] + list(range(39))", "printable characters"),
        ("'ab' * 20", "a list of texts or ints, got"),
    ],
)
def test_unfit_identifiers_are_refused(value: str, message: str, tmp_path: Path) -> None:
    job = job_of(tmp_path, f"\ndef example_ids():\n    return {value}\n")
    shown = refusal(lambda: job.ids)
    assert shown.startswith(f"'{job.path}', line {line_of(job.path, 'example_ids')}: ") and message in shown


def test_the_digest_of_the_data(tmp_path: Path) -> None:
    digest = job_of(tmp_path).data_digest()
    assert digest == job_of(tmp_path, "\nbatch_size = 2\n").data_digest() and len(digest) == 64
    changes = (
        "\ndef example_ids():\n    return range(1, 41)\n",
        "\ndef train_set():\n    return points(41, 0)\n",
        "\ndef train_set():\n    return points(40, 3)\n",
        "\ndef test_set():\n    return points(12, 0)\n",
        "\ndef test_set():\n    return points(13, 1)\n",
    )
    assert len({digest, *(job_of(tmp_path, change).data_digest() for change in changes)}) == 1 + len(changes)


def test_examples_of_any_nesting_have_a_digest(tmp_path: Path) -> None:
    example = "{'x': [numpy.ones(2), torch.ones(1)], 'text': 'a', 'n': 1, 'flag': None}"
    more = "\nimport numpy\ndef train_set():\n    return [EXAMPLE] * 2\n"
    digests = {
        job_of(tmp_path, more.replace("EXAMPLE", each)).data_digest()
        for each in (example, example.replace("ones(2)", "zeros(2)"), example.replace("'a'", "b'a'"))
    }
    assert len(digests) == 3
    job = job_of(tmp_path, more.replace("EXAMPLE", "(object(), 1)"))
    assert "examples of tensors, arrays, numbers and texts, got object" in refusal(job.data_digest)


def test_a_random_transform_is_refused_by_name(tmp_path: Path) -> None:
    more = """
class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 9
    def __getitem__(self, i):
        return torch.rand(4), 0
def train_set():
    return Noisy()
"""
    shown = refusal(job_of(tmp_path, more).data_digest)
    assert "expected example 0 to be the same each time it is read, it differs (a random transform?)" in shown


def test_class_targets(tmp_path: Path) -> None:
    wanted = points(40, 0).tensors[1]
    assert torch.equal(job_of(tmp_path).targets(), wanted)
    listed = "\ndef train_set():\n    data = points(40, 0)\n    return [(x, CLASS) for x, y in data]\n"
    for value in ("y", "int(y)", "y.numpy()[()]"):
        assert torch.equal(job_of(tmp_path, listed.replace("CLASS", value)).targets(), wanted)
    for value in ("float(y)", "int(y) - 1", "bool(y)", "torch.stack([y, y])", "str(int(y))"):
        assert job_of(tmp_path, listed.replace("CLASS", value)).targets() is None
    floats = "\ndef train_set():\n    return TensorDataset(torch.ones(3, 4), torch.ones(3))\n"
    assert job_of(tmp_path, floats).targets() is None
    assert job_of(tmp_path, "\ndef train_set():\n    return [{'x': 1}] * 3\n").targets() is None


# loaders


def order(job: Job, **options: Any) -> list[list[list[float]]]:
    loader = job.batches(torch.arange(10, 35), batch_size=8, **options)
    return [torch.cat([inputs for inputs, _ in loader])[:, 0].tolist() for _ in range(2)]


def test_batches_are_the_examples_in_an_order_of_the_seed(tmp_path: Path) -> None:
    job = job_of(tmp_path, "\nbatch_size = 7\n")
    inputs = points(40, 0).tensors[0]
    before = torch.get_rng_state()
    plain = order(job)
    assert plain == [inputs[10:35, 0].tolist()] * 2
    assert order(job, seed=3) == plain
    shuffled = order(job, shuffle=True, seed=3)
    assert shuffled == order(job, shuffle=True, seed=3) != order(job, shuffle=True, seed=4)
    assert shuffled[0] != shuffled[1] and sorted(shuffled[0]) == sorted(shuffled[1]) == sorted(plain[0])
    assert torch.equal(before, torch.get_rng_state())
    assert [len(batch[0]) for batch in job.batches(torch.tensor([3, 1]))] == [2]
    assert [len(batch[0]) for batch in job.test_batches()] == [7, 5]
    assert [len(batch[0]) for batch in job.test_batches(torch.arange(3), batch_size=2)] == [2, 1]
    assert list(job.batches(torch.tensor([], dtype=torch.int64), shuffle=True)) == []
    assert "positions from 0 to 39, got -1 to 3" in refusal(lambda: job.batches(torch.tensor([3, -1])))


def test_preprocess_is_applied_to_every_batch(tmp_path: Path) -> None:
    job = job_of(tmp_path, "\ndef preprocess(batch):\n    return batch[0] * 2, batch[1]\n")
    (inputs, targets), *_ = job.batches(torch.arange(5))
    own = points(40, 0).tensors
    assert torch.equal(inputs, own[0][:5] * 2) and torch.equal(targets, own[1][:5])
    wrong = job_of(tmp_path, "\ndef preprocess(batch):\n    return batch.images  # here\n")
    shown = refusal(lambda: list(wrong.test_batches()))
    assert f"line {line_of(wrong.path, '# here')}: AttributeError" in shown


def test_the_library_takes_what_a_job_returns(tmp_path: Path) -> None:
    job = job_of(tmp_path, "\nbatch_size = 8\n")
    torch.manual_seed(0)
    model, everything = job.model(), torch.arange(job.count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, job.batches(everything, shuffle=True), optimizer, epochs=20, loss_fn=job.loss_fn)
    assert accuracy_and_loss(model, job.batches(everything)).accuracy > 80
    forget, retain = job.batches(everything[:8]), job.batches(everything[8:], shuffle=True)
    mask = delfast.localize(model, forget, budget=0.5)
    delfast.unlearn(model, forget=forget, retain=retain, mask=mask, init=job.model, epochs=5, lr=0.05)
    assert delfast.evaluate(model, forget, retain, job.test_batches(), mia=False).retain_acc > 50


def test_errors_inside_a_network_name_the_line(tmp_path: Path) -> None:
    more = """
class Wrong(nn.Linear):
    def forward(self, x):
        return super().forward(x[:, :2])  # here
def model():
    return Wrong(4, 3)
"""
    job = job_of(tmp_path, more)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        accuracy_and_loss(job.model(), job.test_batches())
    with job.naming_errors(), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError  # of other code: unchanged

    def measure() -> None:
        with job.naming_errors():
            accuracy_and_loss(job.model(), job.test_batches())

    shown = refusal(measure)
    assert f"line {line_of(job.path, '# here')}: RuntimeError" in shown and "cannot be multiplied" in shown


def test_a_subset_of_a_tensor_dataset_feeds_by_index(tmp_path: Path) -> None:
    """With torch's own collate function the examples can stay on a device: see delfast.feeding."""
    from delfast.batches import Indexed
    from delfast.feeding import feed

    job = job_of(tmp_path)
    assert type(job.train_set) is TensorDataset
    batches = list(feed(job.batches(torch.arange(6)), torch.device("cpu"), resident=True))
    assert all(isinstance(batch, Indexed) for batch in batches)


def test_a_network_that_is_loaded_is_a_new_one(tmp_path: Path) -> None:
    """Two networks of a run, before and after, would be one."""
    only = "\nONLY = model()\ndef load(path):\n    ONLY.load_state_dict(torch.load(path))\n    return ONLY\n"
    job = job_of(tmp_path, only + "\ndef save(model, path):\n    torch.save(model.state_dict(), path)\n")
    job.save(network(), tmp_path / "network.pt")
    job.load(tmp_path / "network.pt")
    shown = refusal(lambda: job.load(tmp_path / "network.pt"))
    assert shown.startswith(
        f"'{job.path}', line {line_of(job.path, 'def load')}: expected load() to make a new network"
    )
    new = job_of(
        tmp_path, LOAD_SAVE + "\ndef save(model, path):\n    torch.save({'network': model.state_dict()}, path)\n"
    )
    new.save(network(), tmp_path / "new.pt")
    kept = [new.load(tmp_path / "new.pt") for _ in range(3)]
    assert len({id(each) for each in kept}) == 3


def test_a_random_preprocess_is_refused_by_name(tmp_path: Path) -> None:
    steady = "\ndef preprocess(batch):\n    return batch[0].mul_(2), batch[1]\n"
    assert job_of(tmp_path, steady).data_digest() == job_of(tmp_path).data_digest()
    for change in ("batch[0] + 0.1 * torch.rand(1)", "batch[0] if torch.rand(1) < 0.5 else batch[0].flip(1)"):
        job = job_of(tmp_path, f"\ndef preprocess(batch):\n    return {change}, batch[1]\n")
        torch.manual_seed(0)
        shown = refusal(job.data_digest)
        assert shown.startswith(f"'{job.path}', line {line_of(job.path, 'def preprocess')}: expected preprocess()")


def test_a_last_batch_of_one_joins_the_one_before_it_in_training(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    for count, size, sizes in (
        (13, 4, [4, 4, 5]),
        (5, 4, [5]),
        (12, 4, [4, 4, 4]),
        (14, 4, [4, 4, 4, 2]),
        (1, 4, [1]),  # there is no batch before it
        (3, 1, [1, 1, 1]),
        (0, 4, []),
    ):
        loader = job.batches(torch.arange(count), batch_size=size, shuffle=True)
        drawn = [batch[0] for batch in loader]
        assert [len(each) for each in drawn] == sizes and len(loader) == len(sizes)
        assert count == 0 or len(torch.cat(drawn).unique(dim=0)) == count
    assert [len(batch[0]) for batch in job.batches(torch.arange(13), batch_size=4)] == [4, 4, 4, 1]


def test_a_shuffled_loader_draws_as_torchs_own(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    generator = torch.Generator().manual_seed(5)
    own = DataLoader(job.train_set, 8, shuffle=True, generator=generator)
    loader = job.batches(torch.arange(40), batch_size=8, shuffle=True, seed=5)
    for _ in range(2):
        for ours, theirs in zip(loader, own, strict=True):
            assert torch.equal(ours[0], theirs[0])
