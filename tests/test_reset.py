"""reset_: fresh values on the mask, everything else untouched; bad input changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import delfast
from delfast import InputError
from delfast.files import save_state
from delfast.reset import _content_of_file
from tests import cases


def model_and_mask(granularity: Any = "channel") -> tuple[nn.Module, delfast.Mask]:
    torch.manual_seed(0)
    model = cases.Everything()
    return model, delfast.score(model, cases.everything_batches()).select(0.4, granularity)


@pytest.mark.parametrize("granularity", ["channel", "param"])
@pytest.mark.parametrize("form", ["factory", "model", "state_dict", "prefixed", "file"])
def test_masked_entries_are_fresh_and_the_rest_is_bit_identical(granularity: Any, form: str, tmp_path: Path) -> None:
    model, mask = model_and_mask(granularity)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    fresh = cases.Everything()
    save_state(tmp_path / "fresh.safetensors", {f"module.{name}": value for name, value in fresh.state_dict().items()})
    init: Any = {
        "factory": cases.Everything,
        "model": fresh,
        "state_dict": fresh.state_dict(),
        "file": str(tmp_path / "fresh.safetensors"),
        "prefixed": {f"module.{name}": value for name, value in fresh.state_dict().items()},
    }[form]
    generator = torch.get_rng_state()
    delfast.reset_(model, mask, init, seed=5)
    assert torch.equal(torch.get_rng_state(), generator)  # the caller's random numbers go on as they were
    expected, dense = fresh.state_dict(), mask.to_dense()
    for name, value in model.state_dict().items():
        chosen = dense.get(name, torch.zeros(value.shape, dtype=torch.bool))
        if name == "second.weight":
            chosen = dense["first.weight"]
        assert torch.equal(value[chosen], expected[name if name != "second.weight" else "first.weight"][chosen]), name
        assert torch.equal(value[~chosen], before[name][~chosen]), name


@pytest.mark.parametrize("seed", [0, 1, 7, 42, 123, 1000, 1234, 1337, 2024, 3407])
def test_by_default_no_usual_start_of_a_training_comes_back(seed: int) -> None:
    """With the seed that a training began from, a reset would restore what it began with."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

    torch.manual_seed(seed)
    model = make()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    everything = delfast.Mask.from_dense({name: torch.ones_like(p) for name, p in model.named_parameters()})
    delfast.reset_(model, everything, init=make)
    assert not any((old == new).any() for old, new in zip(start, model.parameters(), strict=True))
    batches = [(torch.randn(4, 4), torch.arange(4) % 3)]
    unlearned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, old in zip(unlearned.parameters(), start, strict=True):
            parameter.copy_(old)
    delfast.unlearn(unlearned, retain=batches, mask=everything, init=make, epochs=1, lr=1e-12)
    for new, value in zip(model.parameters(), unlearned.parameters(), strict=True):
        torch.testing.assert_close(value, new)


def test_the_seed_decides() -> None:
    results = []
    for seed in (0, 0, 1):
        model, mask = model_and_mask()
        delfast.reset_(model, mask, cases.Everything, seed=seed)
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_reset_parameters_only_where_asked_for_and_covered() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    mask = delfast.score(model, criterion="weight").select(1.0)
    before = copy.deepcopy(model.state_dict())
    delfast.reset_(model, mask, "reset_parameters", seed=3)
    assert not torch.equal(model[0].weight, before["0.weight"]) and torch.equal(model[1].bias, before["1.bias"])
    everything, mask = model_and_mask()
    mask = delfast.score(everything, criterion="weight").select(1.0)
    before = copy.deepcopy(everything.state_dict())
    with pytest.raises(InputError, match=r"'temperature' belongs to a Everything, which has no reset_parameters"):
        delfast.reset_(everything, mask, "reset_parameters")
    assert all(torch.equal(value, before[name]) for name, value in everything.state_dict().items())


def test_bad_input_changes_nothing(tmp_path: Path) -> None:
    model, _ = model_and_mask()
    (tmp_path / "damaged").write_bytes(b"\0" * 20)
    before = copy.deepcopy(model.state_dict())
    other = delfast.score(cases.SmallNet(), criterion="weight").select(0.5)
    short = {name: value for name, value in model.state_dict().items() if name != "conv1.weight"}
    wrong = {**model.state_dict(), "conv1.weight": torch.zeros(8, 8, 5)}
    save_state(tmp_path / "short", short)
    save_state(tmp_path / "wrong", wrong)
    whole = delfast.score(model, criterion="weight").select(1.0)
    for bad_mask, init, message in (
        (other, cases.SmallNet, "which the model does not have"),
        (whole, short, "fresh values for 'conv1.weight', init has none"),
        (whole, wrong, r"fresh values for 'conv1.weight' of shape \(8, 8, 3\), got \(8, 8, 5\)"),
        (whole, tmp_path / "short", r"'.*short' to have a tensor 'conv1.weight' of shape \(8, 8, 3\), got none"),
        (whole, tmp_path / "wrong", r"'.*wrong' to have a tensor .* of shape \(8, 8, 3\), got one of \(8, 8, 5\)"),
        (whole, tmp_path / "damaged", r"'.*damaged' is no whole safetensors file \("),
        (whole, "absent", "expected a safetensors file at 'absent', there is none; check the path"),
        (whole, lambda: 3, "expected init to make a whole network, got int"),
    ):
        with pytest.raises(InputError, match=message):
            delfast.reset_(model, bad_mask, init)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_reset_to_the_models_own_values_is_refused() -> None:
    """A reset to these would change nothing. Values are not compared: a seed may give the beginning back."""
    model, mask = model_and_mask()
    before = copy.deepcopy(model.state_dict())
    shared = cases.Everything()
    shared.get_submodule("first").weight = model.get_submodule("first").weight
    batches: Any = cases.everything_batches()
    unlearnings: dict[str, Any] = {"del": {"mask": mask}, "retrain": {}}
    own: list[Any] = [model, lambda: model, lambda: nn.DataParallel(model), model.state_dict(), shared]
    for init in own:
        with pytest.raises(InputError, match="newly initialized network, it returned the model itself"):
            delfast.reset_(model, mask, init)
    for method, options in unlearnings.items():
        with pytest.raises(InputError, match="newly initialized network, it returned the model itself"):
            delfast.unlearn(model, retain=batches, method=method, init=lambda: model, epochs=1, lr=0.1, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    elsewhere = delfast.Mask.from_dense(
        {name: value & (name != "first.weight") for name, value in mask.to_dense().items()}
    )
    delfast.reset_(model, elsewhere, shared)  # what no element is selected of may be shared
    delfast.reset_(model, mask, copy.deepcopy(model))


def test_16_bit_and_channels_last_models_reset_too() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = cases.SmallNet().to(dtype).to(memory_format=torch.channels_last)
        mask = delfast.score(model, criterion="weight").select(1.0)
        torch.manual_seed(0)
        expected = cases.SmallNet().to(dtype)
        delfast.reset_(model, mask, cases.SmallNet, seed=0)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_files_are_compared_by_the_ends_of_what_is_read(tmp_path):
    """A small tensor may lie between the samples of a large file."""
    values = {f"{number}.weight": torch.zeros(1_000_000) for number in range(2)} | {"1.bias": torch.zeros(900)}
    save_file(values, tmp_path / "one")
    save_file(values | {"1.bias": torch.ones(900)}, tmp_path / "two")
    save_file(values, tmp_path / "same")
    one, two, same = (_content_of_file(tmp_path / name, ["1.bias", "0.weight"]) for name in ("one", "two", "same"))
    assert one == same != two
