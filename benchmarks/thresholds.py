"""Measure the ledger's three thresholds on networks that were retrained, and on one that never unlearned.

python -m benchmarks.thresholds    rewrites benchmarks/results/thresholds.json; about 3 minutes of one core

The job is the one that `delfast init-job` writes. Of each seed and size there is a forget set of random examples, and a
network retrained without it. Each is audited as `delfast ledger run` does it, beside references that know a random
half of the examples. The original network, which saw every example, is audited beside them for a few seeds. The attack
alone is also made on many more sets: parts of the examples that a network was trained without. Ten of these sets of one
network are the earlier sets of one ledger.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import delfast.cli.example_job
from delfast.evaluation import Reference, Relearning, audit
from delfast.files import write_json
from delfast.jobs import Accept, Job, read_job
from delfast.provenance import provenance
from delfast.seeding import seeded
from delfast.unlearning import train

RESULTS = Path(__file__).parent / "results/thresholds.json"
SIZES = (20, 50)
NEVER_SEEN = (5, 10, 20, 50)  # sizes of the sets for the attack alone
EARLIER = 10  # sets of a ledger
REFERENCES = 4
LEFT_OUT = 400  # examples of the training set that the networks for the attack alone never see
ORIGINALS = 3  # seeds of each size for which the original network is audited too


def trained(job: Job, positions: Tensor, seed: int) -> nn.Module:
    """Return a network trained on these examples, as the ledger trains references and retrains."""
    with seeded(seed):
        network = job.model()
    settings = job.training
    optimizer = torch.optim.SGD(network.parameters(), settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
    train(network, job.batches(positions, shuffle=True, seed=seed), optimizer, epochs=settings.epochs)
    return network


def rows(job: Job, seeds: int) -> Iterator[dict[str, Any]]:
    """Yield the figures of every network."""
    everything = torch.arange(job.count)
    original = trained(job, everything, 0)
    known = torch.zeros(REFERENCES, job.count, dtype=torch.bool)
    networks = []
    for number in range(REFERENCES):
        order = torch.randperm(job.count, generator=torch.Generator().manual_seed(500 + number))
        known[number, order[: job.count // 2]] = True
        networks.append(trained(job, known[number].nonzero().flatten(), 500 + number))
    first = _audited(job, original, everything[:20], everything[20:], [], 0, None)["test"]
    for seed in range(seeds):
        for size in SIZES:
            order = torch.randperm(job.count, generator=torch.Generator().manual_seed(1000 * size + seed))
            forget, retain = order[:size].sort().values, order[size:].sort().values
            references = [
                Reference(network, {"forget": members[forget]})
                for network, members in zip(networks, known, strict=True)
            ]
            audited = {"retrained": trained(job, retain, 100 + seed)}
            if seed < ORIGINALS:
                audited["original"] = original
            for name, network in audited.items():
                found = _audited(job, network, forget, retain, references, seed, Relearning())
                yield {
                    "network": name,
                    "seed": seed,
                    "examples": size,
                    "test_drop": first - found["test"],
                    "attack_advantage": found["attack_advantage"],
                    "relearn_ratio": found["relearn_ratio"],
                }


def attacks(job: Job, networks: int = 10) -> dict[str, dict[str, list[float]]]:
    """Return the attack on sets that a network never saw, by the number of examples.

    "values": the advantage of each set. "earlier": for each ledger of ten sets of one network, the largest lower end of
    their intervals, by which a set of an earlier run rejects.
    """
    found: dict[str, dict[str, list[float]]] = {str(size): {"values": [], "earlier": []} for size in NEVER_SEEN}
    for seed in range(networks):
        order = torch.randperm(job.count, generator=torch.Generator().manual_seed(seed))
        unseen, seen = order[:LEFT_OUT], order[LEFT_OUT:].sort().values
        network = trained(job, seen, 200 + seed)
        for size in NEVER_SEEN:
            audited = [
                _audited(job, network, part.sort().values, seen[:100], [], seed, None) for part in unseen.split(size)
            ]
            figures = [each["attack_advantage"] for each in audited]
            kept = found[str(size)]
            kept["values"] += [round(each["value"], 4) for each in figures]
            for first in range(0, len(figures) - EARLIER + 1, EARLIER):
                lowest = max(each["low"] for each in figures[first : first + EARLIER])
                kept["earlier"].append(round(lowest, 4))
    return found


def _audited(
    job: Job,
    network: nn.Module,
    forget: Tensor,
    retain: Tensor,
    references: list[Reference],
    seed: int,
    relearn: Relearning | None,
) -> dict[str, Any]:
    figures = audit(
        network,
        forget=job.batches(forget),
        retain=job.batches(retain),
        test=job.test_batches(),
        references=references or None,
        relearn=relearn,
        seed=seed,
    ).as_dict()
    return {
        "test": figures["sets"]["test"]["accuracy"]["value"],
        "attack_advantage": figures["sets"]["forget"]["attack_advantage"],
        "relearn_ratio": figures["relearn_ratio"],
    }


def values(found: list[dict[str, Any]], network: str, size: int, name: str) -> list[float]:
    """Return one figure of the networks of a kind, sorted."""
    chosen = [row[name] for row in found if row["network"] == network and row["examples"] == size]
    return sorted(each["value"] if isinstance(each, dict) else each for each in chosen)


def table(result: dict[str, Any]) -> str:
    """Return how often each default threshold held, and the largest figure, as a Markdown table."""
    rows = ["| network | examples | figure | limit | held | largest |", "| --- | ---: | --- | ---: | ---: | ---: |"]

    def add(network: str, size: int, name: str, limit: float, found: list[float]) -> None:
        held = f"{sum(each <= limit for each in found)} of {len(found)}"
        rows.append(f"| {network} | {size} | `{name}` | {limit:g} | {held} | {max(found):.2f} |")

    accept = asdict(Accept())
    for network in ("retrained", "original"):
        for size in SIZES:
            for name, limit in accept.items():
                add(network, size, name, limit, values(result["networks"], network, size, name))
    limit = accept["attack_advantage"]
    for size, each in result["attacks"].items():
        add("never saw them", int(size), "attack_advantage", limit, each["values"])
    for size, each in result["attacks"].items():
        if each["earlier"]:
            add(f"never saw {EARLIER} sets", int(size), "earlier_attack_advantage", limit, each["earlier"])
    return "\n".join(rows)


def main() -> None:
    """Measure the networks, keep every figure, and print each threshold's figures in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    job = read_job(delfast.cli.example_job.__file__)
    found: list[dict[str, Any]] = []
    attacked = attacks(job)
    for row in rows(job, arguments.seeds):
        found.append(row)
        result = {"attacks": attacked, "networks": found, "provenance": provenance()}
        write_json(arguments.output, result)
    print(table(result))


if __name__ == "__main__":
    main()
