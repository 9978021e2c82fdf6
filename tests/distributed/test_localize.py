"""Localization by several processes selects the mask of one process, to the digest, on every layout.

All themes share one start of the processes, since a start costs seconds.
"""

from __future__ import annotations

import pytest

import delfast
from benchmarks.distributed import ERROR, bytes_to_select, exchanged
from tests.distributed import one_rank
from tests.distributed.localizing import errors, loaders, masks, passes
from tests.distributed.localizing.networks import FEATURES, batches, fsdp, loss_fn, network
from tests.distributed.spawning import run_in_processes
from tests.groups import gloo_group

THEMES = {"masks": masks, "loaders": loaders, "passes": passes, "errors": errors, "one rank": one_rank}


def exchanged_to_select(rank):
    model, mesh = fsdp()
    return exchanged(delfast.score(model, batches(), loss_fn=loss_fn, group=mesh))


@pytest.fixture(scope="module", params=[2, 3, 4])
def job(request, tmp_path_factory):
    """Return the number of processes, and rank by rank what each scenario of each theme returns."""
    count = request.param
    scenarios = {(theme, name): f for theme, module in THEMES.items() for name, f in module.scenarios(count).items()}
    scenarios["exchanged"] = exchanged_to_select
    return count, run_in_processes(count, scenarios, tmp_path_factory.mktemp("job"))


@pytest.mark.parametrize("theme", THEMES)
def test_processes(job, theme):
    count, results = job
    THEMES[theme].check(count, lambda name: [result[theme, name] for result in results])


def test_bytes_exchanged_to_select(job):
    """The formula by which benchmarks/distributed.py computes the bytes of large models."""
    shapes = [tuple(p.shape) for p in network().parameters()]
    in_layers = [(shape[1], shape[0]) if shape == (FEATURES, FEATURES) else shape for shape in shapes]
    channels, elements = bytes_to_select(in_layers)
    for result in job[1]:
        found = result["exchanged"]
        ties = found[1] - elements  # those of the last parameter are ranked by their indices
        assert found[0] == channels and 0 <= ties <= 2**11 * 8 + ERROR, (found, channels, elements)


def test_a_group_of_one_process(tmp_path):
    with gloo_group(tmp_path / "store"):
        for layout in masks.LAYOUTS[1]:
            assert masks.digests_of(layout, 0) == masks.of_one_process(), layout
            assert [masks.few(layout, 0, number) for number in (1, 2)] == [masks.few_alone(number) for number in (1, 2)]
