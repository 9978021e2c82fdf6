"""--cuda-graphs and --precision: every command passes them on to the functions of the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from delfast import Mask, graphs
from delfast.cli import main
from delfast.experiments import pipeline
from delfast.experiments.run import choose_device, open_run
from tests.graphs.double import Double

TRAIN = "train --train-examples 120 --test-examples 60 --batch-size 16 --epochs 1 --forget iid --forget-ratio 0.3"
GRID = """
seeds = [0]
[train]
epochs = 1
lr = 0.02
batch_size = 32
train_examples = 120
test_examples = 60
[settings.iid]
forget = "iid"
[unlearn]
epochs = 1
[[compare]]
methods = ["finetune"]
strategies = ["del"]
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("options")
    run(f"{TRAIN} --output-dir {path / 'run'}")
    run(f"localize {path / 'run'} --output-dir {path / 'mask'}")
    return path


def run(command: str, code: int = 0) -> None:
    assert main(command.split()) == code


def commands(root: Path, out: Path) -> dict[str, str]:
    """Return every command that has the option, its results in ``out``."""
    (root / "grid.toml").write_text(GRID, encoding="utf-8")
    return {
        "train": f"{TRAIN} --output-dir {out}",
        "oracle": f"oracle {root / 'run'} --output-dir {out}",
        "localize": f"localize {root / 'run'} --output-dir {out}",
        "unlearn": f"unlearn {root / 'run'} --mask {root / 'mask/mask.safetensors'} --epochs 1 --output-dir {out}",
        "evaluate": f"evaluate {root / 'run'} --output-dir {out}",
        "compare": f"compare {root / 'grid.toml'} --workers 1 --output-dir {out}",
    }


NAMES = ("train", "oracle", "localize", "unlearn", "evaluate", "compare")


@pytest.mark.parametrize("name", NAMES)
def test_graphs_that_no_device_has_are_refused_before_anything_is_written(
    name: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = commands(root, tmp_path / "out")[name]
    for choice, message in (("on", "a model on a CUDA device"), ("sometimes", "--cuda-graphs to be auto, on or off")):
        run(f"{command} --device cpu --cuda-graphs {choice}", code=2)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "compare"])  # which starts processes
def test_graphs_are_used_as_asked(name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with a double of CUDA's graphs; its training cannot be captured, since torch's SGD is not fused."""
    results: dict[str, Any] = {}
    for choice in ("on", "off"):
        made: list[Double] = []

        def make(device: torch.device, made: list[Double] = made) -> Double:
            made.append(Double(device))
            return made[-1]

        monkeypatch.setitem(graphs.BACKENDS, "cpu", make)
        run(f"{commands(root, tmp_path / choice)[name]} --device cpu --cuda-graphs {choice}")
        assert bool(sum(backend.replays for backend in made)) == (choice == "on")
        results[choice] = json.loads((tmp_path / choice / "summary.json").read_text(encoding="utf-8"))
        results[choice] = {key: results[choice].get(key) for key in ("metrics", "methods", "losses", "mask")}
        if results[choice]["mask"]:
            del results[choice]["mask"]["bytes"]
    assert results["on"] == results["off"]


def test_a_grids_cells_pass_the_option_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from delfast.experiments.grid import cells
    from delfast.experiments.grid.definition import read_grid

    commands(root, tmp_path)
    grid = read_grid(root / "grid.toml")
    chosen: list[Any] = []

    def start(config: Any, device: torch.device, load_data: Any, cuda_graphs: Any) -> Any:
        chosen.append(cuda_graphs)
        raise KeyError

    monkeypatch.setattr(cells, "start", start)
    stage = cells._stage(tmp_path, grid, "cpu", False)
    for task in (*stage.networks, *stage.cells):
        with pytest.raises(KeyError):
            task()
    assert chosen == [False] * 3  # the original, the oracle and the cell


def test_localize_and_evaluate_take_a_precision(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        run(f"localize {root / 'run'} --precision {precision} --output-dir {out / 'mask'}")
        mask = Mask.load(out / "mask" / "mask.safetensors")
        assert mask.metadata["precision"] == precision
        run(f"evaluate {root / 'run'} --precision {precision} --output-dir {out / 'metrics'}")
        summaries = [json.loads((out / part / "summary.json").read_text()) for part in ("mask", "metrics")]
        assert [summary["options"]["precision"] for summary in summaries] == [precision] * 2
        (metrics,) = summaries[1]["methods"].values()
        found[precision] = mask, metrics["test_loss"]
    assert found["bf16"][0].jaccard(found["fp32"][0]) > 0.9
    assert found["fp32"][0].jaccard(Mask.load(root / "mask" / "mask.safetensors")) == 1  # the default
    assert 0 < abs(found["bf16"][1] - found["fp32"][1]) < 0.05 * found["fp32"][1]
    capsys.readouterr()
    for command in ("localize", "evaluate"):
        run(f"{command} {root / 'run'} --precision fp8 --output-dir {tmp_path / 'bad'}", code=2)
        assert "precision to be one of fp32, bf16" in capsys.readouterr().err and not (tmp_path / "bad").exists()


def test_training_is_fused_on_cuda_alone(root: Path) -> None:
    opened = open_run(root / "run", choose_device("cpu"))
    model = opened.factory()
    for device, fused in (("cpu", None), ("cuda", True)):
        optimizer = pipeline._sgd(model, opened.config, torch.device(device))
        assert optimizer.defaults["fused"] is fused and optimizer.defaults["momentum"] == pipeline.MOMENTUM
