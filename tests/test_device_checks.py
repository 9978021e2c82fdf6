"""Checks of values on a device, which are read once at the end of a pass."""

from __future__ import annotations

import threading

import pytest
import torch

from delfast import InputError
from delfast.batches import IGNORED, clamped, class_indices, per_example_losses
from delfast.device_checks import SLOTS, DeviceChecks, alone, prefixed, refuse_if
from tests.dispatch import Dispatched

CPU = torch.device("cpu")
TRUE, FALSE = torch.tensor(True), torch.tensor(False)


def test_checks_are_collected_and_read_once() -> None:
    checks = DeviceChecks(CPU)
    with checks, Dispatched() as inside:
        refuse_if(FALSE, "a")
        refuse_if(TRUE, "b")
        refuse_if(FALSE, "b")
    assert not inside.reads
    with pytest.raises(InputError, match=r"^b$"):
        checks.read()
    with pytest.raises(InputError, match=r"^a$"):
        refuse_if(TRUE, "a")  # outside, at once
    refuse_if(FALSE, "a")
    DeviceChecks(CPU).read()


def test_no_error_takes_the_place_of_another() -> None:
    checks = DeviceChecks(CPU)
    with checks:
        for number in range(SLOTS):
            refuse_if(torch.tensor(number == 3), str(number))
        with pytest.raises(RuntimeError, match="more than 16 different checks"):
            refuse_if(FALSE, "one more")
    with pytest.raises(InputError, match=r"^3$"):
        checks.read()


def test_a_text_that_begins_with_its_prefix_keeps_it() -> None:
    checks = DeviceChecks(CPU)
    with pytest.raises(InputError, match=r"^set: failed$"), prefixed("set"):
        with checks:
            refuse_if(TRUE, "failed")
        checks.read()


def test_a_pass_of_another_thread_is_noticed() -> None:
    entered, leave = threading.Event(), threading.Event()

    def run() -> None:
        with DeviceChecks(CPU):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=run)
    with DeviceChecks(CPU), alone() as is_alone:
        assert is_alone
    thread.start()
    entered.wait(10)
    with alone() as is_alone:
        assert not is_alone
    leave.set()
    thread.join()
    with alone() as is_alone:
        assert is_alone


def test_texts_begin_with_where_they_come_from() -> None:
    checks = DeviceChecks(CPU)
    with prefixed("data set"):
        with checks, prefixed("the model"):
            refuse_if(TRUE, "expected x")
        with pytest.raises(InputError, match=r"^data set: the model: expected x$"):
            checks.read()
    with pytest.raises(InputError, match=r"^data set: expected x$"), prefixed("data set"):
        refuse_if(TRUE, "expected x")


def test_labels_on_a_device_are_clamped_for_the_loss_and_refused_afterwards() -> None:
    for labels, good in (([0, 2, 1], True), ([0, 3, 1], False), ([0, -1, 1], False), ([IGNORED, 2, 1], True)):
        targets, checks = torch.tensor(labels), DeviceChecks(CPU)
        with checks:
            valid = clamped(targets, 3, IGNORED)
        inside = (valid == IGNORED) | ((valid >= 0) & (valid < 3))
        assert inside.all() and torch.equal(valid, targets) == good
        if good:
            checks.read()
        else:
            with pytest.raises(InputError, match=r"expected labels in \[0, 3\)"):
                checks.read()
    with DeviceChecks(CPU) as checks:
        assert clamped(torch.tensor([IGNORED]), 3, None).tolist() == [0]
    with pytest.raises(InputError, match="expected labels"):
        checks.read()


def test_ignored_labels_have_no_loss_and_no_accuracy() -> None:
    batch = (torch.randn(3, 4), torch.tensor([1, IGNORED, 0]))
    losses = per_example_losses(torch.nn.Identity(), batch, None)
    assert losses[1] == 0 and losses[0] > 0
    with pytest.raises(InputError, match=r"expected labels in \[0, 4\), got -100 to 1"):
        class_indices(batch[1], batch[0], ignored=None)
