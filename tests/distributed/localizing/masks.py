"""The mask of every selection, on every layout, is the one of one process."""

from __future__ import annotations

import functools
import itertools
import warnings

import delfast
from tests.distributed.localizing.networks import (
    LAYOUTS,
    batches,
    ddp,
    fsdp,
    fsdp_of_some,
    loss_fn,
    network,
    salun,
)

SELECTIONS = {
    f"{granularity} {aggregate} {policy} {budget}": {
        "granularity": granularity, "aggregate": aggregate, "policy": policy, "budget": budget
    }
    for granularity, aggregate, policy in (
        *itertools.product(["channel"], ("topk_mean", "mean", "max", "sum"), ("whole", "exact")),
        ("param", "max", "whole"),
    )
    for budget in (0.25, 0.5, 1.0)
}  # fmt: skip


def digests(model, loader=None, **options):
    """Return the digest of every selection, by every criterion."""
    found = {}
    for criterion in ("weighted_grad", "grad", "weight", "random", "shallowest", "deepest"):
        gradient = criterion in ("weighted_grad", "grad")
        scores = delfast.score(
            model, (loader or batches()) if gradient else None, criterion, loss_fn=loss_fn if gradient else None,
            **options,
        )  # fmt: skip
        for name, settings in SELECTIONS.items():
            if criterion in ("shallowest", "deepest") and settings["granularity"] == "param":
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # units that score 0
                found[f"{criterion} {name}"] = scores.select(**settings).digest
    return found


@functools.cache
def of_one_process():
    return digests(network())


def digests_of(layout, rank):
    model, group = layout()
    return digests(model, group=group)


# Sets of fewer batches than processes


def few(layout, rank=None, batch_count=2):
    """Return digests of channels and elements. One process streams the scores of channels if there is one batch."""
    model, group = (network(), None) if layout is None else layout()
    loader = batches(3 * batch_count - 1)
    assert len(loader) == batch_count
    return {each: salun(model, loader, granularity=each, group=group).digest for each in ("channel", "param")}


@functools.cache
def few_alone(batch_count):
    return few(None, batch_count=batch_count)


# Parameters that compete, of a network with others that do not


PATTERNS = {
    "sharded left out": {"exclude": ["up.*", "head.bias"]},
    "sharded alone": {"include": ["up.*"]},
    "whole alone": {"include": ["scale", "mix.*"]},  # of fsdp_of_some the ones that are not sharded
}


def by_patterns(layout, rank):
    """Return digests; gradients and hooks of parameters that do not compete stay as they are."""
    model, group = layout()
    called = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(called.append)
    found = {name: salun(model, batches(), group=group, **options).digest for name, options in PATTERNS.items()}
    assert not called and all(parameter.grad is None for parameter in model.parameters())
    return found


@functools.cache
def by_patterns_of_one():
    return {name: salun(network(), batches(), **options).digest for name, options in PATTERNS.items()}


def per_example(rank):
    model, group = ddp()
    return {
        criterion: salun(model, batches(), criterion=criterion, per_example=True, group=group).digest
        for criterion in ("weighted_grad", "squared_grad")
    }


@functools.cache
def per_example_of_one():
    return {
        criterion: salun(network(), batches(), criterion=criterion, per_example=True).digest
        for criterion in ("weighted_grad", "squared_grad")
    }


# Scenarios and their checks


def scenarios(count):
    found = {layout.__name__: functools.partial(digests_of, layout) for layout in LAYOUTS[count]}
    for layout in LAYOUTS[count]:
        for number in (1, 2):
            found[f"{number}, {layout.__name__}"] = functools.partial(few, layout, batch_count=number)
    if count == 2:
        found |= {f"patterns {f.__name__}": functools.partial(by_patterns, f) for f in (ddp, fsdp, fsdp_of_some)}
        found["per example"] = per_example
    return found


def check(count, all_ranks):
    for layout in LAYOUTS[count]:
        for rank, found in enumerate(all_ranks(layout.__name__)):
            different = {key for key, value in of_one_process().items() if found[key] != value}
            assert not different, (layout, rank, different)
        for number in (1, 2):
            assert all_ranks(f"{number}, {layout.__name__}") == [few_alone(number)] * count, (layout, number)
    if count != 2:
        return
    for layout in (ddp, fsdp, fsdp_of_some):
        assert all_ranks(f"patterns {layout.__name__}") == [by_patterns_of_one()] * count, layout
    assert all_ranks("per example") == [per_example_of_one()] * count
