"""Masks, files, numbers, signatures and options stay as users have them written down. See tests/golden/make.py."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import delfast
from tests.golden import make
from tests.golden.networks import Exact, linear_in_logits, seeded

TOLERANCE = 1e-4  # relative: float32 rounds each of some thousand sums of a short training differently


def compare(made: Any, kept: Any, file: str) -> None:
    """Fail with the entries that differ."""
    if made != kept:
        again = f"if that is intended: python -m tests.golden.make {file}"
        pytest.fail("\n".join([f"{file}.json differs; {again}", *differences(made, kept, "")]), pytrace=False)


def differences(made: Any, kept: Any, where: str) -> list[str]:
    """Return a line for each entry of nested objects that differs."""
    if made == kept:
        return []
    if not isinstance(made, dict) or not isinstance(kept, dict):
        return [f"{where}: kept {kept}, made {made}"]
    names = dict.fromkeys([*kept, *made])
    return [line for name in names for line in differences(made.get(name), kept.get(name), f"{where}/{name}")]


def skip_elsewhere(kept: dict[str, Any]) -> None:
    """Skip where this machine may round differently."""
    here = make.machine()
    different = [
        f"{name} {here[name]} instead of {value}" for name, value in kept["machine"].items() if here[name] != value
    ]
    if different:
        pytest.skip(f"results were kept on a machine that may round differently: {', '.join(different)}")


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    return make.make("numbers")


@pytest.fixture(scope="module")
def commands() -> dict[str, Any]:
    return make.make("commands")


def test_public_signatures_are_those_that_are_kept() -> None:
    compare(make.make("signatures"), make.kept("signatures"), "signatures")


def test_masks_and_their_files_are_those_that_are_kept() -> None:
    compare(make.make("masks")["everywhere"], make.kept("masks")["everywhere"], "masks")


def test_exact_results_are_those_that_are_kept(numbers: dict[str, Any]) -> None:
    compare(numbers["everywhere"], make.kept("numbers")["everywhere"], "numbers")


def test_rounded_results_are_near_those_that_are_kept(numbers: dict[str, Any]) -> None:
    made, kept = numbers["near"], make.kept("numbers")["near"]
    assert made.keys() == kept.keys()
    for name, values in kept.items():
        assert made[name] == pytest.approx(values, rel=TOLERANCE), name


def test_rounded_results_are_those_that_are_kept_on_the_same_machine(numbers: dict[str, Any]) -> None:
    kept = make.kept("numbers")
    skip_elsewhere(kept)
    compare(numbers["here"], kept["here"], "numbers")


@pytest.mark.parametrize("part", ["options", "files", "keys", "contents", "masks", "columns of results.csv"])
def test_the_command_line_is_that_which_is_kept(part: str, commands: dict[str, Any]) -> None:
    compare(commands["everywhere"][part], make.kept("commands")["everywhere"][part], "commands")


def test_the_commands_compute_what_is_kept_on_the_same_machine(commands: dict[str, Any]) -> None:
    kept = make.kept("commands")
    skip_elsewhere(kept)
    compare(commands["here"], kept["here"], "commands")


# ---- files of the tree before


def test_mask_files_of_the_tree_before_are_read() -> None:
    kept = make.kept("masks")["everywhere"]
    for name, path in make.MASKS.items():
        mask, expected = delfast.Mask.load(path), kept[make.CASES[name]]
        assert (mask.digest, mask.selected) == (expected["digest"], expected["selected"])
        assert sorted({*mask.metadata, "precision"}) == expected["metadata"]  # the files were written before precision


def test_a_mask_file_of_the_tree_before_is_written_again_with_the_same_bytes(tmp_path: Path) -> None:
    for path in make.MASKS.values():
        delfast.Mask.load(path).save(tmp_path / path.name)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_checkpoint_of_the_tree_before_is_resumed_to_the_same_weights(tmp_path: Path) -> None:
    shutil.copy(make.CHECKPOINT, tmp_path / "checkpoint.pt")
    kept = make.kept("numbers")["everywhere"]
    assert make.resumed(tmp_path / "checkpoint.pt") == kept["resumed"]
    assert kept["resumed"]["resumed_from"] == 1
    assert kept["resumed"]["weights"] == kept["unlearn, del"]["weights"]  # those of a run that was not interrupted


def test_an_optimizers_state_of_the_tree_before_is_loaded() -> None:
    kept = make.kept("numbers")["everywhere"]["MaskedAdamW"]
    masked = make.masked_optimizer("MaskedAdamW", seeded(Exact))
    masked.load_state_dict(torch.load(make.OPTIMIZER, weights_only=True))
    assert make.optimizer_state(masked) == kept["state"]


def test_signed_channels_of_the_tree_before_are_loaded() -> None:
    signed = delfast.SignedChannels.load(make.SIGNED)
    expected = make.kept("numbers")["everywhere"]["signed_channels"]
    assert make.digest({"matrix": signed.matrix, "examples": signed.examples}) == expected


# ---- the kept values themselves


def test_the_exact_gradients_are_exact() -> None:
    """In float64 they are the same numbers: no sum was rounded, so its order does not matter."""
    model, double = seeded(Exact).eval(), seeded(Exact).eval().double()
    wide = [(images.double(), labels) for images, labels in make.FORGET]
    for per_example in (False, True):
        single = delfast.score(model, make.FORGET, per_example=per_example, loss_fn=linear_in_logits)
        exact = delfast.score(double, wide, per_example=per_example, loss_fn=linear_in_logits)
        assert single.gradients is not None and exact.gradients is not None
        for name, gradient in single.gradients.items():
            assert torch.equal(gradient.double(), exact.gradients[name]), name
    few = [(images.double(), labels) for images, labels in make.SIGNS]
    options: dict[str, Any] = {"criterion": "squared_grad", "per_example": True, "loss_fn": linear_in_logits}
    squares = delfast.score(make.signs(model), make.SIGNS, **options)
    exact = delfast.score(make.signs(double), few, **options)
    assert squares.gradients is not None and exact.gradients is not None
    for name, gradient in squares.gradients.items():
        assert torch.equal(gradient.double(), exact.gradients[name]), name
    signed = delfast.signed_channels(seeded(Exact).eval(), make.FORGET, loss_fn=linear_in_logits)
    wider = delfast.signed_channels(seeded(Exact).eval().double(), wide, loss_fn=linear_in_logits)
    assert numpy.array_equal(signed.matrix, wider.matrix)


def test_kept_files_are_small_and_hold_no_code() -> None:
    files = [path for path in make.FILES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100_000
    for path in (make.CHECKPOINT, make.OPTIMIZER):
        assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []


def test_the_values_are_made_by_public_names_alone() -> None:
    """No module inside delfast is imported: those are what moves."""
    for path in sorted(make.KEPT.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("delfast.")], path
