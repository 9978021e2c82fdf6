"""Unlearning by several processes, under DDP and FSDP2: a step is the mean of W steps of one process."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import delfast
from tests.distributed import one_rank
from tests.distributed.spawning import error_of, run_in_processes
from tests.distributed.unlearning import (
    SHARDED,
    TRAINED,
    decoder,
    examples,
    expected,
    few,
    fully_sharded,
    same_as,
    sampled,
    texts,
    unlearned,
    with_batchnorm,
)  # fmt: skip
from tests.distributed.unlearning_errors import (
    FAILING,
    REFUSED,
    SHARDED_REFUSED,
    failing,
    refused,
    sharded_refused,
)  # fmt: skip
from tests.distributed.unlearning_fsdp import (
    PRECISIONS,
    check_held_out_losses,
    check_stopping,
    held_out_losses,
    sharded,
    sharded_buffers,
    stopping,
    two_dimensions,
)  # fmt: skip


def of_few(rank):
    return unlearned("finetune", rank, retain=few(rank))


def of_sampler(rank):
    return unlearned("finetune", rank, retain=sampled(rank, dist.get_world_size()))


def of_padded(rank):
    """Return the losses of shares with repeats at the end, in another order in each epoch, and with omissions."""
    count = dist.get_world_size()
    orders = [{"size": 23}, {"size": 23, "shuffle": True, "seed": 4}, {"size": 31, "drop_last": True, "shuffle": True}]
    return [unlearned("finetune", rank, retain=sampled(rank, count, **order))[1] for order in orders]


def of_batchnorm(rank):
    """Return the state, whose running statistics are the first process's."""
    return unlearned("finetune", rank, make=with_batchnorm)[0]


TEXT_METHODS, LM_LOSS = ("del", "neggrad+"), delfast.causal_lm_loss


def of_texts(name, rank, **options):
    """Unlearn a list of dicts, with a shuffled loader of dicts to retain."""
    retain, forget = texts(15, 1, rank), list(texts(6, 2))
    return unlearned(name, rank, retain, forget, make=decoder, loss_fn=LM_LOSS, **options)


def checkpoints(folder, rank):
    """Return the results of an uninterrupted run, and of one that is interrupted after an epoch and resumed."""
    whole = unlearned("relabel", rank)
    path = folder / f"checkpoint-{rank}.pt"

    def interrupting(batches, description, total):
        if description.startswith("epoch 2"):
            raise ZeroDivisionError
        return batches

    options = {"checkpoint": path, "resume": True}
    stopped = error_of(lambda: unlearned(
        "relabel", rank, training=delfast.TrainingOptions(progress=interrupting), **options))  # fmt: skip
    assert stopped is not None and "ZeroDivisionError" in stopped[1]
    resumed = unlearned("relabel", rank, **options)
    one_file = error_of(lambda: unlearned("relabel", rank, checkpoint=folder / "one.pt"))
    if rank:
        path.unlink()
    missing = error_of(lambda: unlearned("relabel", rank, **options))
    return whole, resumed, one_file, missing


@pytest.mark.slow
def test_four_processes_on_a_mesh_of_two_dimensions(tmp_path):
    scenarios = {name: functools.partial(sharded, name) for name in ("del", "neggrad+")}
    precise = {
        name: functools.partial(unlearned, "del", **wrapping, **options)
        for name, (wrapping, options) in PRECISIONS.items()
    }
    results = run_in_processes(
        4, {**scenarios, **precise, "tensor": two_dimensions, "held out": held_out_losses}, tmp_path
    )
    for name in scenarios:
        same_as([result[name] for result in results], expected(name, 4), name)
    for name, (_, options) in PRECISIONS.items():
        rtol = 2e-2 if "bf16" in name else 2e-4  # gradients in bfloat16 are rounded in each sum of two
        same_as([result[name] for result in results], expected("del", 4, **options), name, rtol)
    check_held_out_losses([result["held out"] for result in results])
    for result in results:
        assert result["tensor"][0] == "InputError" and "tensor parallelism" in result["tensor"][1], result["tensor"]


@pytest.mark.parametrize("count", [2, 3])
def test_processes(count, tmp_path):
    scenarios = {name: functools.partial(unlearned, name) for name in TRAINED}
    scenarios |= {
        "few": of_few,
        "sampled": of_sampler,
        "padded": of_padded,
        "batchnorm": of_batchnorm,
        "stopping": stopping,
    }
    scenarios |= {f"fsdp {name}": functools.partial(sharded, name) for name in SHARDED}
    scenarios["fsdp buffers"] = sharded_buffers
    scenarios |= {f"text {name}": functools.partial(of_texts, name) for name in TEXT_METHODS}
    scenarios |= {f"fsdp text {name}": functools.partial(of_texts, name, wrap=fully_sharded) for name in TEXT_METHODS}
    if count == 2:
        scenarios["fsdp refused"] = sharded_refused
        for name, (wrapping, options) in PRECISIONS.items():
            scenarios[name] = functools.partial(unlearned, "del", **wrapping, **options)
        scenarios["broken"] = functools.partial(one_rank.broken_unlearn, tmp_path)
        scenarios |= {"refused": refused, "failing": failing, "resumed": functools.partial(checkpoints, tmp_path)}
    results = run_in_processes(count, scenarios, tmp_path)

    def all_ranks(name):
        return [result[name] for result in results]

    for name in TRAINED:
        reference = expected(name, count)
        same_as(all_ranks(name), reference, name)
        if name in SHARDED:
            same_as(all_ranks(f"fsdp {name}"), reference, f"fsdp {name}")
    for name in TEXT_METHODS:
        reference = expected(name, count, texts(15, 1), list(texts(6, 2)), make=decoder, head="head", loss_fn=LM_LOSS)
        same_as(all_ranks(f"text {name}"), reference, f"text {name}")
        same_as(all_ranks(f"fsdp text {name}"), reference, f"fsdp text {name}")
    same_as(all_ranks("few"), expected("finetune", count, few(0)), "few")
    together = DataLoader(examples(24), batch_size=4 * count)
    same_as(all_ranks("sampled"), expected("finetune", 1, together), "sampled")
    assert all(found == all_ranks("padded")[0] for found in all_ranks("padded"))
    for scenario in ("batchnorm", "fsdp buffers"):
        first, *others = all_ranks(scenario)
        assert all(torch.equal(first[name], other[name]) for other in others for name in first), scenario
    check_stopping(all_ranks("stopping"))
    if count != 2:
        return
    for name, (_, options) in PRECISIONS.items():
        same_as(all_ranks(name), expected("del", count, **options), name)
    one_rank.check_errors(all_ranks("broken"), one_rank.BROKEN_UNLEARN)
    assert all(found["works"] for found in all_ranks("broken"))
    for found in all_ranks("refused"):
        for name, (kind, text) in REFUSED.items():
            assert found[name] is not None and found[name][0] == kind and text in found[name][1], (name, found[name])
    for found in all_ranks("fsdp refused"):
        for name, text in SHARDED_REFUSED.items():
            assert found[name] is not None and found[name][0] == "InputError" and text in found[name][1], (
                name, found[name]
            )  # fmt: skip
    for found, after in all_ranks("failing"):
        for name, (kind, text) in FAILING.items():
            assert found[name] is not None and found[name][0] == kind and text in found[name][1], (name, found[name])
        same_as([after], expected("finetune", count), "after errors")
    for whole, resumed, one_file, missing in all_ranks("resumed"):
        assert resumed[1:] == whole[1:] and all(torch.equal(resumed[0][name], whole[0][name]) for name in whole[0])
        assert "expected a checkpoint file for each process" in one_file[1]
        assert "expected checkpoints of as many epochs on every process" in missing[1]
