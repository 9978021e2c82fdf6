"""Audit networks that hide their forget set, beside networks that were retrained without it and DEL's.

python -m benchmarks.audit                    digits; rewrites benchmarks/results/audit.json
python -m benchmarks.audit --folder PATH      also CIFAR-10 from a folder of pictures, train/CLASS/*.jpg and test/

Every case has one forget set and five seeds. Of each seed there is an original, and an oracle that was retrained
without the forget set. What is audited, each beside the oracles of the four other seeds:

oracle                the oracle of the seed.
perturbed to oracle   the original with Gaussian noise on its weights, as much as brings its accuracy on the forget set
                      to the oracle's or below.
perturbed to chance   the same, to 1 / classes.
head only             the original, whose last layer alone was trained to give the forget set wrong labels, and the
                      retained examples theirs.
DEL                   the original after delfast.unlearn with the budget 0.3.
original              the original itself, which never unlearned.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delfast
from delfast.evaluation import Relearning, accuracy_and_loss, audit
from delfast.evaluation.intervals import Figure
from delfast.evaluation.relearn_ratio import worst
from delfast.evaluation.relearning import Course, Data, Sets, curve_of, finetuned
from delfast.experiments.datasets import Batches, ForgetSet, ImageData, choose, load
from delfast.experiments.reports import markdown_table
from delfast.files import write_json
from delfast.provenance import provenance
from delfast.seeding import seeded
from delfast.unlearning import train

RESULTS = Path(__file__).parent / "results/audit.json"
SEEDS = range(5)
BATCH, LR = 64, 0.05
HIDDEN = 1.5  # a ratio above, with a lower limit above 1, is reported as hidden
RELEARNING = Relearning()


@dataclass(frozen=True)
class Case:
    """A data set, a forget set, and how networks are trained and unlearned."""

    data: str
    forget: str
    epochs: int
    del_epochs: int


class Bench:
    """The networks of one case."""

    def __init__(self, case: Case, data: ImageData) -> None:
        self.case, self.data = case, data
        self.forget: ForgetSet = choose(case.forget, 0.1, data.train_targets, data.num_classes, 0)
        self.test = Batches(data.test_images, data.test_targets, data.mean, data.std, batch_size=256)
        self.forgotten = self.batches(self.forget.indices, 256)

    def batches(self, indices: Tensor, size: int = BATCH, *, seed: int | None = None) -> Batches:
        return Batches(
            self.data.train_images, self.forget.targets, self.data.mean, self.data.std, batch_size=size,
            indices=indices, shuffle=seed is not None, seed=seed or 0,
        )  # fmt: skip

    def network(self) -> nn.Module:
        """Return a newly initialized CNN of three convolutions."""
        layers: list[nn.Module] = []
        channels, size = self.data.train_images.shape[1], self.data.train_images.shape[2]
        for width in (16, 32, 64):
            stride = 2 if size >= 32 else 1
            layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = width, size // stride // 2
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, self.data.num_classes))

    def trained(self, indices: Tensor, seed: int) -> nn.Module:
        with seeded(seed):
            model = self.network()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        train(model, self.batches(indices, seed=seed), optimizer, epochs=self.case.epochs)
        return model

    def perturbed(self, original: nn.Module, most: float, seed: int) -> nn.Module:
        """Add the least noise found by bisection with which the forget accuracy is at most ``most`` percent."""
        generator = torch.Generator().manual_seed(seed)
        noise = {
            n: torch.randn(p.shape, generator=generator) * p.detach().std() for n, p in original.named_parameters()
        }

        def noisy(scale: float) -> nn.Module:
            model = copy.deepcopy(original)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim > 1:
                        parameter += scale * noise[name]
            return model

        low, high = 0.0, 8.0
        for _ in range(10):
            middle = (low + high) / 2
            if accuracy_and_loss(noisy(middle), self.forgotten).accuracy <= most:
                high = middle
            else:
                low = middle
        return noisy(high)

    def head_only(self, original: nn.Module, seed: int) -> nn.Module:
        """Train the last layer to give forget examples wrong labels, and retained examples theirs."""
        model: Any = copy.deepcopy(original).eval()
        classes = self.data.num_classes
        optimizer = torch.optim.SGD(model[-1].parameters(), lr=0.02, momentum=0.9)
        wrong = {
            int(i): (int(self.forget.targets[i]) + 1 + int(i) % (classes - 1)) % classes for i in self.forget.indices
        }
        hidden = self.batches(self.forget.indices, seed=seed)
        for _ in range(10):
            for (index, inputs, _), (_, kept, labels) in zip(
                list(hidden) * 9, self.batches(self.forget.retain, seed=seed), strict=False
            ):
                targets = torch.cat([torch.tensor([wrong[int(i)] for i in index]), labels])
                optimizer.zero_grad()
                cross_entropy(model(torch.cat([inputs, kept])), targets).backward()
                optimizer.step()
        return model.train()  # type: ignore[no-any-return]

    def unlearned(self, original: nn.Module, seed: int) -> nn.Module:
        model = copy.deepcopy(original)
        delfast.unlearn(
            model, forget=self.batches(self.forget.indices), retain=self.batches(self.forget.retain, seed=seed + 2),
            init=self.network, seed=seed + 2, epochs=self.case.del_epochs, lr=0.015,
        )  # fmt: skip
        return model

    def models(self) -> dict[str, Callable[[int], nn.Module]]:
        """Return by name a function of the seed that makes a model."""
        everything = torch.arange(len(self.forget.targets))
        originals = [self.trained(everything, seed) for seed in SEEDS]
        oracles = [self.trained(self.forget.retain, 100 + seed) for seed in SEEDS]
        chance = 100 / self.data.num_classes
        return {
            "oracle": lambda seed: oracles[seed],
            "perturbed to oracle": lambda seed: self.perturbed(
                originals[seed], accuracy_and_loss(oracles[seed], self.forgotten).accuracy, seed
            ),
            "perturbed to chance": lambda seed: self.perturbed(originals[seed], chance, seed),
            "head only": lambda seed: self.head_only(originals[seed], seed),
            "DEL": lambda seed: self.unlearned(originals[seed], seed),
            "original": lambda seed: originals[seed],
        }

    def run(self) -> dict[str, Any]:
        """Return the figures of every model and seed, as ``audit`` with ``never_seen`` computes them.

        The finetuning of an oracle is not repeated for every model that it stands beside.
        """
        started = time.perf_counter()
        retain, count = self.batches(self.forget.retain, 256), len(self.forget.indices)
        loaders = {"forget": self.forgotten, "retain": retain, "control": self.test}
        counts = {"forget": count, "retain": len(self.forget.retain), "control": len(self.data.test_targets)}
        plans = {"retain": 0} | {f"forget {100 * part:g} %": int(part * count) for part in RELEARNING.fractions}
        data = Data(Sets(loaders, counts, None, 0), RELEARNING, max(plans.values()))
        courses: dict[tuple[str, int, str], Course | str] = {}
        found: dict[str, list[dict[str, Any]]] = {}
        for name, make in self.models().items():
            for seed in SEEDS:
                model = make(seed)
                for plan, trained in plans.items():
                    courses[name, seed, plan] = finetuned(model, name, data, trained, None)
                sets = audit(model, forget=self.forgotten, retain=retain, test=self.test, relearn=None).as_dict()[
                    "sets"
                ]
                row = {"seed": seed, **{key: sets[key]["accuracy"]["value"] for key in ("forget", "test")}}
                row["attack_advantage"] = sets["forget"]["attack_advantage"]
                found.setdefault(name, []).append(row)
            print(name, f"{time.perf_counter() - started:.0f} s", flush=True)
        for name, rows in found.items():
            for row in rows:
                others = [seed for seed in SEEDS if seed != row["seed"]]
                row["relearning"] = {
                    plan: _curve(
                        [courses[name, row["seed"], plan], *(courses["oracle", o, plan] for o in others)], trained
                    )
                    for plan, trained in plans.items()
                }
                ratios = [Figure(**curve["ratio"]) for curve in row["relearning"].values() if curve.get("ratio")]
                row["relearn_ratio"] = asdict(worst(ratios))
        seconds = time.perf_counter() - started
        return {**asdict(self.case), "forget_examples": count, "seconds": seconds, "models": found}


def _curve(courses: list[Course | str], trained: int) -> dict[str, Any]:
    """Return a curve without those of the oracles, which are kept as models of their own."""
    curve = curve_of(courses, trained, RELEARNING)
    return {"left_out": curve} if isinstance(curve, str) else {k: v for k, v in asdict(curve).items() if k != "control"}


def rounded(value: Any) -> Any:
    """Return nested plain values with floats of four decimals."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def table(kept: dict[str, Any]) -> str:
    """Return a table of every case: means over the seeds, and how many are reported as hidden."""
    found = []
    for case in kept["cases"]:
        rows = []
        for name, seeds in case["models"].items():
            ratios = [row["relearn_ratio"] for row in seeds]
            values = [ratio["value"] for ratio in ratios]
            above = sum(value > HIDDEN for value in values)
            hidden = sum(ratio["value"] > HIDDEN and ratio["low"] > 1 for ratio in ratios)
            means = [statistics.mean(row[key] for row in seeds) for key in ("forget", "test")]
            attack = statistics.mean(row["attack_advantage"]["value"] for row in seeds)
            rows.append([
                name, *(f"{mean:.1f}" for mean in means), f"{attack:.2f}",
                f"{statistics.geometric_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})",
                f"{above} of {len(seeds)}", f"{hidden} of {len(seeds)}",
            ])  # fmt: skip
        columns = ("model", "forget, %", "test, %", "attack advantage", "relearn ratio", f"above {HIDDEN}", "hidden")
        found.append(f"{case['data']}, {case['forget']}: {case['forget_examples']} forget examples.\n")
        found.append(markdown_table(columns, rows))
    return "\n".join(found)


def lines(result: dict[str, Any]) -> str:
    """Return a table of one case: means over the seeds, and each seed's ratio with its interval."""
    rows = [f"{result['data']}, {result['forget']}, {result['forget_examples']} forget examples"]
    for name, seeds in result["models"].items():
        means = {key: statistics.mean(row[key] for row in seeds) for key in ("forget", "test")}
        attack = statistics.mean(row["attack_advantage"]["value"] for row in seeds)
        ratios = "  ".join(
            f"{r['value']:.2f} ({r['low']:.2f}-{r['high']:.2f})" for r in (row["relearn_ratio"] for row in seeds)
        )
        rows.append(
            f"{name:20} forget {means['forget']:5.1f} %  test {means['test']:5.1f} %  attack {attack:.2f}  "
            f"ratio {ratios}"
        )
    return "\n".join(rows)


def main() -> None:
    """Run the cases and keep their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="CIFAR-10 as train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument(
        "--data-dir", type=Path, default=Path("~/.cache/delfast"), help="where decoded pictures are kept"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only", help="run the case with this forget set alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(Case("digits", forget, 20, 10), None) for forget in ("iid", "mislabelled", "non-iid:2,5")]
    if arguments.folder is not None:
        cases.append((Case("cifar10-small", "iid", 20, 10), arguments.folder))
    results = []
    for case, folder in cases:
        if arguments.only and arguments.only != f"{case.data} {case.forget}":
            continue
        if folder is None:
            data = load("digits", None, None, None, None)
        else:
            data = load(f"folder:{folder}", arguments.data_dir.expanduser(), 32, 1200, 500)
        results.append(Bench(case, data).run())
        print(lines(results[-1]), flush=True)
    kept = {"relearning": asdict(RELEARNING), "cases": results, "provenance": provenance()}
    write_json(arguments.output, rounded(kept))


if __name__ == "__main__":
    main()
