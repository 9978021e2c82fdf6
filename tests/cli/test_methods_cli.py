"""Every method and every strategy from the command line, on a few of the digits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from delfast.cli import main
from delfast.experiments import pipeline
from delfast.localization import STRATEGIES
from delfast.mask import Mask
from delfast.unlearning import METHODS

QUICK = {"retrain": ["--epochs", "1"], "ssd": ["--set", "alpha=2"], "influence": ["--set", "samples=20"]}


def run(*arguments: Any) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def read(directory: Path) -> Any:
    return json.loads((directory / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory; beside it the masks that were made."""
    root = tmp_path_factory.mktemp("methods")
    run("train", "--train-examples", 200, "--test-examples", 60, "--epochs", 1, "--lr", 0.05, "--batch-size", 64,
        "--output-dir", root / "run")  # fmt: skip
    return root


def mask_of(root: Path, strategy: str) -> Path:
    path = root / strategy / "mask.safetensors"
    if not path.exists():
        run("localize", root / "run", "--strategy", strategy, "--output-dir", path.parent)
    return path


def unlearn(root: Path, output_dir: Path, method: str, strategy: str | None) -> dict[str, Any]:
    """The summary; with a mask, what lies outside it is checked to have stayed."""
    mask = [] if strategy is None else ["--mask", mask_of(root, strategy)]
    options = QUICK.get(method, ["--epochs", "1"])
    run("unlearn", root / "run", "--method", method, *mask, *options, "--output-dir", output_dir)
    if strategy is not None:
        run("verify", root / "run", output_dir, output_dir / "mask.safetensors")
    summary: dict[str, Any] = read(output_dir)
    assert summary["options"]["method"] == method and 0 <= summary["metrics"]["test_acc"] <= 100
    return summary


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"retrain"}))
def test_every_method_within_dels_mask(method: str, trained: Path, tmp_path: Path) -> None:
    summary = unlearn(trained, tmp_path / "out", method, "del")
    assert summary["options"]["head"] == ("fc" if method == "del" else None)


@pytest.mark.parametrize("method", ["retrain", "finetune"])
def test_without_a_mask_everything_may_change(method: str, trained: Path, tmp_path: Path) -> None:
    unlearn(trained, tmp_path / "out", method, None)
    assert Mask.load(tmp_path / "out" / "mask.safetensors").fraction == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_under_reset_and_finetune(strategy: str, trained: Path, tmp_path: Path) -> None:
    unlearn(trained, tmp_path / "out", "del", strategy)
    metadata = Mask.load(mask_of(trained, strategy)).metadata
    assert {key: metadata[key] for key in ("criterion", "granularity")} == STRATEGIES[strategy]


def test_del_localizes_as_localize_does(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--budget", 0.2, "--strategy", "salloc"]
    command = ["unlearn", trained / "run", "--epochs", 1, "--lr", 0.02, "--output-dir"]
    run("localize", trained / "run", *chosen, "--output-dir", tmp_path / "mask")
    run(*command, tmp_path / "two", "--mask", tmp_path / "mask")
    run("verify", trained / "run", tmp_path / "two", tmp_path / "two")  # the mask of the run directory
    run(*command, tmp_path / "one", *chosen)
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one["digests"] == two["digests"] and one["metrics"] == two["metrics"]
    assert one["options"] == {**two["options"], "budget": 0.2, "strategy": "salloc"}
    assert set(one["seconds"]) == {"localize", "prepare", "finetune"}
    written, alone = read(tmp_path / "one" / "localized"), read(tmp_path / "mask")
    for part in ("command", "options", "forget", "mask", "digests"):
        assert written[part] == alone[part], part

    capsys.readouterr()
    beside = ["--mask", str(tmp_path / "mask" / "mask.safetensors"), "--budget", "0.2"]
    assert main([*(str(each) for each in command), str(tmp_path / "no"), *beside]) == 2
    assert "expected --budget or --mask, got both" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.long
def test_a_stopped_run_goes_on_within_its_mask(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, chosen = tmp_path / "out", ["--budget", 0.2, "--strategy", "salloc"]
    command = ["unlearn", trained / "run", "--epochs", 1, "--lr", 0.02, "--output-dir"]
    run(*command, tmp_path / "whole", *chosen)
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_write_run", lambda *_: sys.exit(9))
        assert stopped([*command, out, *chosen]) == 9
    arguments = [str(each) for each in (*command, out, "--budget", 0.3, "--strategy", "salloc", "--resume")]
    capsys.readouterr()
    assert main(arguments) == 2 and "expected the budget 0.2 of the run to resume, got 0.3" in capsys.readouterr().err
    run(*command, out, *chosen, "--resume")
    assert read(out)["digests"] == read(tmp_path / "whole")["digests"] and read(out)["seconds"]["localize"] == 0
    assert main(arguments) == 0  # no run is there to resume: it localizes
    assert read(out / "localized")["options"]["budget"] == read(out)["options"]["budget"] == 0.3


def stopped(arguments: list[Any]) -> int | str | None:
    """The exit status of a command that is ended inside."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.mark.long
def test_a_run_that_does_not_localize_keeps_no_mask_of_an_earlier_one(trained: Path, tmp_path: Path) -> None:
    out, localized = tmp_path / "out", tmp_path / "out" / "localized"
    command = ["unlearn", trained / "run", "--epochs", 1, "--output-dir", out]
    run(*command)
    run(*command, "--mask", localized)
    assert read(localized)["digests"]["mask"] == read(out)["digests"]["mask"]  # the run's own
    run(*command, "--method", "finetune")
    assert not localized.exists()
    run(*command)
    run(*command, "--mask", mask_of(trained, "salloc"))
    assert not localized.exists() and (out / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"retrain"}))
def test_every_pair(method: str, strategy: str, trained: Path, tmp_path: Path) -> None:
    unlearn(trained, tmp_path / "out", method, strategy)


def test_hyperparameters_are_set_and_kept(trained: Path, tmp_path: Path) -> None:
    options = [
        "--method",
        "scrub",
        "--epochs",
        1,
        "--set",
        "alpha=0.25",
        "--set",
        "max_epochs=1",
        "--weight-decay",
        0.001,
    ]
    run("unlearn", trained / "run", *options, "--output-dir", tmp_path / "out")
    kept = read(tmp_path / "out")["options"]
    assert (kept["alpha"], kept["max_epochs"], kept["weight_decay"], kept["gamma"]) == (0.25, 1, 0.001, 0.99)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--method", "magic"], "expected method to be one of del, finetune"),
        (["--budget", "30"], "expected a budget in (0, 1], got 30"),
        (["--strategy", "magic"], "expected strategy to be one of del, salloc"),
        (["--patience", "1", "--held-out", "1"], "expected held_out to leave examples on both sides"),
        (
            ["--method", "scrub", "--budget", "0.3"],
            "expected no --budget for 'scrub', which does not localize, got 0.3",
        ),
        (["--method", "retrain", "--strategy", "del"], "expected no --strategy for 'retrain', which does not localize"),
        (["--method", "scrub", "--set", "alpha"], "expected --set NAME=VALUE, as alpha=0.9, got 'alpha'"),
        (["--method", "scrub", "--set", "alpha=much"], "expected --set NAME=VALUE, as alpha=0.9, got 'alpha=much'"),
        (["--method", "scrub", "--set", "beta=1"], "'scrub' has no hyperparameter 'beta'"),
        (["--method", "scrub", "--set", "temperature=0"], "expected temperature > 0 for 'scrub', got 0.0"),
        (["--method", "ssd", "--epochs", "2"], "expected epochs = 0 for 'ssd', got 2"),
    ],
)
def test_bad_methods_are_refused_before_anything_is_written(
    options: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["unlearn", str(trained / "run"), *options, "--output-dir", str(tmp_path / "out")])
    assert code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()
