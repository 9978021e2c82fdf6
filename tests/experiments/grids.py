"""Small grids that several tests run."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from PIL import Image

from delfast.experiments.grid import RESULTS

HEAD = """
title = "tiny"
seeds = [0, 1]
[train]
data = "digits"
epochs = 1
lr = 0.02
batch_size = 64
train_examples = 300
test_examples = 100
[settings.non-iid]
forget = "non-iid:2,5"
[unlearn]
epochs = 1
[methods.ssd]
alpha = 2
"""
TINY = (
    HEAD
    + """
[[compare]]
strategies = ["del", "salloc", "random"]
budgets = [0.1, 0.3]
[[compare]]
methods = ["finetune", "ssd", "retrain"]
strategies = ["everything"]
[[compare]]
methods = ["finetune"]
strategies = ["del", "salloc"]
"""
)


def write(directory: Path, text: str) -> Path:
    path = directory / "grid.toml"
    path.write_text(text, encoding="utf-8")
    return path


def measured(output_dir: Path) -> list[dict[str, str]]:
    """The rows of results.csv without their times."""
    with open(output_dir / RESULTS, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [{k: v for k, v in row.items() if "seconds" not in k and k != "relative_time"} for row in rows]


def images_of(folder: Path, seed: int) -> str:
    """Write a folder of small random images and return it as data."""
    generator = torch.Generator().manual_seed(seed)
    for part, count in (("train", 12), ("test", 4)):
        for name in "abc":
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / part / name / f"{number}.png")
    return f"folder:{folder}"
