"""Captured passes on a GPU: the same results as passes that the host launches."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import delfast
from delfast import InputError, TrainingOptions
from delfast.evaluation import accuracy_and_loss
from delfast.experiments.networks import build
from delfast.graphs import CudaBackend
from delfast.unlearning import METHODS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]

MAX_MEMORY = 1.15  # of the launched passes' peak, the saved copy of the state included
TRAINED = sorted(name for name, method in METHODS.items() if method().epochs)


class Dropped(nn.Module):
    """A network with BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop = build("resnet18-thin", 10, 3, 32), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.body(x))


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Dropped().cuda().to(memory_format=torch.channels_last)


def batches(count: int = 10, examples: int = 16, device: str = "cuda") -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, examples, 3, 32, 32, generator=generator)
    y = torch.randint(10, (count, examples), generator=generator)
    return [(inputs.to(device), targets.to(device)) for inputs, targets in zip(x, y, strict=True)]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every capture."""
    made: list[int] = []
    original = CudaBackend.capture

    def capture(self: CudaBackend, function: Any) -> Any:
        made.append(1)
        return original(self, function)

    monkeypatch.setattr(CudaBackend, "capture", capture)
    return made


def near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, of=name: f"{of}: {text}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_localization_gives_the_same_mask(precision: Any, captures: list[int]) -> None:
    model, found = make_model(), batches()
    expected = delfast.localize(model, found, 0.3, precision=precision, cuda_graphs=False)
    mask = delfast.localize(model, found, 0.3, precision=precision)
    assert captures and expected.jaccard(mask) > 0.99


@pytest.mark.parametrize("per_example", ["score", "signed"])
def test_per_example_passes_give_the_same_sums(per_example: str, captures: list[int]) -> None:
    model, found = make_model(), batches(12)
    if per_example == "score":
        results = [
            delfast.score(model, found, "grad", per_example=True, cuda_graphs=c).gradients for c in (False, True)
        ]
        assert results[0] is not None and results[1] is not None
        near(results[1], results[0])
    else:
        matrices = [
            torch.from_numpy(delfast.signed_channels(model, found, cuda_graphs=c).matrix) for c in (False, True)
        ]
        near({"matrix": matrices[1]}, {"matrix": matrices[0]})
    assert captures


def test_evaluation_gives_the_same_figures(captures: list[int]) -> None:
    model, found = make_model(), batches()
    expected = accuracy_and_loss(model, found, cuda_graphs=False)
    result = accuracy_and_loss(model, found)
    assert captures and abs(result.loss - expected.loss) < 1e-4 and abs(result.accuracy - expected.accuracy) < 1


def unlearned(method: str, captured: bool, **options: Any) -> tuple[dict[str, Tensor], list[float]]:
    model = make_model()
    needs = METHODS[method].needs
    torch.manual_seed(5)
    result = delfast.unlearn(
        model,
        retain=batches(),
        forget=batches(8),
        init=(lambda: make_model(7)) if {"init", "everything"} & needs else None,
        mask=None if "everything" in needs else delfast.localize(make_model(), batches(8), 0.3, cuda_graphs=False),
        head="body.fc" if METHODS[method].trains_head else None,
        method=method,
        seed=1,
        epochs=2,
        training=TrainingOptions(cuda_graphs=captured, **options.pop("training", {})),
        **options,
    )
    return model.state_dict(), result.losses


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_trains_alike(method: str, captures: list[int]) -> None:
    expected, losses = unlearned(method, captured=False)
    assert not captures
    found, others = unlearned(method, captured=True)
    assert captures
    torch.testing.assert_close(torch.tensor(others), torch.tensor(losses), rtol=1e-2, atol=1e-3)
    assert all(bool(value.isfinite().all()) for value in found.values() if value.is_floating_point())
    assert found.keys() == expected.keys()


class Stopped(Exception):
    pass


def test_a_resumed_run_gives_the_same_bits(tmp_path: Path) -> None:
    def stop(found: Any, description: str, total: int) -> Any:
        if description.startswith("epoch 2/"):
            raise Stopped
        return found

    expected, _ = unlearned("finetune", captured=True)
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Stopped):
        unlearned("finetune", captured=True, checkpoint=path, training={"progress": stop})
    found, _ = unlearned("finetune", captured=True, checkpoint=path, resume=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def peak(function: Any) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved()


def test_the_peak_of_memory_is_near_that_of_launched_steps() -> None:
    def run(captured: bool) -> None:
        model = build("resnet18", 10, 3, 32).cuda()
        found = batches(8, 256)
        delfast.unlearn(
            model, retain=found, method="finetune", epochs=1, training=TrainingOptions(cuda_graphs=captured)
        )

    run(captured=False)
    assert peak(lambda: run(captured=True)) <= MAX_MEMORY * peak(lambda: run(captured=False))


def test_a_capture_that_fails_leaves_the_device_usable(captures: list[int], caplog: pytest.LogCaptureFixture) -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    model = make_model()
    with caplog.at_level(logging.WARNING, "delfast"):
        delfast.unlearn(
            model, retain=batches(), method="finetune", loss_fn=loss_fn, epochs=1,
            training=TrainingOptions(cuda_graphs=True),
        )  # fmt: skip
    assert captures and "the capture failed" in caplog.text
    delfast.unlearn(model, retain=batches(), method="finetune", epochs=1)  # dropout, and a capture that works
    assert bool(torch.rand(3, device="cuda").isfinite().all())


@pytest.mark.parametrize("captured", [False, True])
def test_labels_out_of_range_leave_the_device_usable(captured: bool) -> None:
    found = batches()
    found[5] = (found[5][0], found[5][1] + 10)
    with pytest.raises(InputError, match=r"expected labels in \[0, 10\)"):
        delfast.localize(make_model(), found, 0.3, cuda_graphs=captured)
    assert torch.zeros(3, device="cuda").sum() == 0


def test_a_step_waits_for_nothing_on_the_device() -> None:
    model, found = make_model(), batches()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for captured in (False, True):

            def progress(steps: Any, description: str, total: int) -> Any:
                for number, step in enumerate(steps):
                    torch.cuda.set_sync_debug_mode("error" if 2 <= number < total - 1 else "default")
                    yield step
                torch.cuda.set_sync_debug_mode("default")

            torch.cuda.set_sync_debug_mode("default")
            training = TrainingOptions(cuda_graphs=captured, progress=progress)
            delfast.unlearn(model, retain=found, method="l1-sparse", epochs=2, training=training)
    finally:
        torch.cuda.set_sync_debug_mode("default")
