"""The mask that bfloat16 and channels-last give, beside float32's: overlap, and DEL's gaps to the oracle with each.

``python -m benchmarks.precision [--data digits|folder:PATH]`` trains a network in float32 for each of three seeds, and
its oracle. It localizes the forget set by the mean gradient and per example, in both precisions and layouts, and
unlearns with every mask. Training, unlearning and measuring stay in float32, so that only the masks differ. With one
thread, beside other work, the digits take 8 minutes and 2,000 images of CIFAR-10 take 22. The results of each data set
are kept in benchmarks/results/precision.json; ``python -m benchmarks.tables`` writes them into docs/results.md.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from delfast.evaluation import gaps
from delfast.experiments import localizing, pipeline
from delfast.experiments.grid.summary import mean
from delfast.experiments.reports import markdown_table
from delfast.experiments.run import Config, Run, choose_device, start
from delfast.files import read_json, write_json
from delfast.localization import BUDGET
from delfast.mask import Mask
from delfast.provenance import provenance
from delfast.unlearning import Del

RESULTS = Path(__file__).parent / "results/precision.json"
SEEDS = (0, 1, 2)
GAPS = ("delta_forget", "delta_mia", "delta_test")
COLUMNS = ("gradient", "precision", "layout", "overlap", "minimum", "Δ forget", "Δ MIA", "Δ test")


@dataclass(frozen=True)
class Settings:
    """SGD settings: the training of original and oracle, and DEL's finetuning; None: all examples."""

    epochs: int
    lr: float
    finetune_epochs: int
    finetune_lr: float
    train_examples: int | None = None
    test_examples: int | None = None


DIGITS = Settings(epochs=25, lr=0.02, finetune_epochs=15, finetune_lr=0.015)  # the demo's
IMAGES = Settings(15, 0.02, 6, 0.015, train_examples=2000, test_examples=2000)
BATCH_SIZE = 64


def measure(data: str, data_dir: str | None, seed: int) -> dict[str, Any]:
    """Return the gaps of one seed's original, and overlap and gaps of each mask."""
    settings = DIGITS if data == "digits" else IMAGES
    config = Config(
        data=data,
        data_dir=data_dir,
        model="resnet18-thin",
        forget="non-iid:2,5",
        forget_ratio=0.1,
        epochs=settings.epochs,
        lr=settings.lr,
        batch_size=BATCH_SIZE,
        seed=seed,
        train_examples=settings.train_examples,
        test_examples=settings.test_examples,
        channels_last=True,  # the faster training
    )
    run = start(config, choose_device("cpu"))
    with tempfile.TemporaryDirectory() as directory:
        original = pipeline.train(run, Path(directory) / "original", progress=False)
        oracle = pipeline.oracle(run, Path(directory) / "oracle", progress=False)
    method = Del(epochs=settings.finetune_epochs, lr=settings.finetune_lr)
    masks: list[dict[str, Any]] = []
    done: dict[str, dict[str, float]] = {}  # by the mask's digest: equal masks give equal networks
    for per_example, found in itertools.groupby(_masks(run, original.model), lambda each: each[0]["per_example"]):
        reference = None
        for options, mask in found:
            reference = mask if reference is None else reference
            if mask.digest not in done:
                done[mask.digest] = _gaps(run, original.model, mask, method, oracle.metrics)
            masks.append({**options, "overlap": mask.jaccard(reference), **done[mask.digest], "digest": mask.digest})
        if not per_example:
            assert reference is not None
            again = _gaps(run, original.model, reference, method, oracle.metrics, other_seed=1000)
    return {
        "seed": seed,
        "oracle": oracle.metrics.as_dict(),
        "original": {**original.metrics.as_dict(), **gaps(original.metrics, oracle.metrics)},
        "masks": masks,
        "another seed of unlearning": again,
    }


def _masks(run: Run, model: nn.Module) -> Iterator[tuple[dict[str, Any], Mask]]:
    """Yield the options and the mask of each localization; float32 in the default layout comes first of its kind."""
    for per_example, precision, channels_last in itertools.product((False, True), ("fp32", "bf16"), (False, True)):
        options = {"per_example": per_example, "precision": precision, "channels_last": channels_last}
        layout = torch.channels_last if channels_last else torch.contiguous_format
        placed = copy.deepcopy(model).to(memory_format=layout)
        seed = run.config.seed
        yield options, localizing.find_mask(run, placed, budget=BUDGET, batch_size=BATCH_SIZE, seed=seed, **options)[0]


def _gaps(run: Run, model: nn.Module, mask: Mask, method: Del, oracle: Any, other_seed: int = 0) -> dict[str, float]:
    """Unlearn within the mask; return the gaps to the oracle."""
    unlearned, seed = copy.deepcopy(model), run.config.seed + pipeline.UNLEARN_OFFSET + other_seed
    pipeline.run_method(run, unlearned, mask, method=method, batch_size=BATCH_SIZE, seed=seed, progress=False)
    return dict(gaps(run.measure(unlearned), oracle))


def table(result: dict[str, Any]) -> str:
    """Return the measurement of one data set: the machine, then a row for each kind of mask."""
    rows, seeds = [], result["seeds"]
    for kinds in zip(*(seed["masks"] for seed in seeds), strict=True):
        gradient = "per example" if kinds[0]["per_example"] else "mean"
        layout = "channels-last" if kinds[0]["channels_last"] else "default"
        overlaps = [kind["overlap"] for kind in kinds]
        mean_overlap, minimum = f"{sum(overlaps) / len(overlaps):.4f}", f"{min(overlaps):.4f}"
        rows.append([gradient, kinds[0]["precision"], layout, mean_overlap, minimum, *_mean_gaps(kinds)])
    again = [seed["another seed of unlearning"] for seed in seeds]
    rows.append(["mean, another seed of unlearning", "fp32", "default", "1.0000", "1.0000", *_mean_gaps(again)])
    rows.append(["not unlearned", "", "", "", "", *_mean_gaps([seed["original"] for seed in seeds])])
    made = result["provenance"]
    head = f"`{result['command']}`: {result['cpu']}, 1 thread, {made['backend']['isa']}; torch {made['torch']}; "
    head += f"{len(result['seeds'])} seeds."
    return "\n".join([head, "", markdown_table(COLUMNS, rows)])


def _mean_gaps(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Return each gap's mean over the seeds as text; a sum that rounds to 0 may be below it."""
    return [str(mean([each[name] for each in measured])).replace("-0.00 ", "0.00 ") for name in GAPS]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description="Compare masks by precision.")
    parser.add_argument("--data", default="digits", help="digits (default), or folder:PATH with the images of CIFAR-10")
    parser.add_argument("--data-dir", help="directory of decoded images (default: ~/.cache/delfast)")
    arguments = parser.parse_args()
    from cpuinfo import get_cpu_info  # comes with pytest-benchmark, which the tables do without

    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    kind = "folder:PATH" if arguments.data.startswith("folder:") else arguments.data
    command = "python -m benchmarks.precision" + ("" if kind == "digits" else f" --data {kind}")
    seeds = []
    for seed in SEEDS:
        seeds.append(measure(arguments.data, arguments.data_dir, seed))
        result = {
            "command": command,
            "cpu": get_cpu_info()["brand_raw"],
            "settings": {**asdict(DIGITS if kind == "digits" else IMAGES), "batch_size": BATCH_SIZE, "budget": BUDGET},
            "seeds": seeds,
            "provenance": provenance(device="cpu"),
        }
        kept = read_json(RESULTS) if RESULTS.is_file() else {}
        write_json(RESULTS, {**kept, kind: result})
        print(table(result), flush=True)


if __name__ == "__main__":
    main()
