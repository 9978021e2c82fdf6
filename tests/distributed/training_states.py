"""State of sharded optimizers, saved and loaded: what the processes of one job check, layout by layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import delfast
from delfast import Mask
from delfast.naming import model_parameters
from delfast.sharding import is_dtensor, local_part, part_of
from tests.distributed.layouts import (
    OPTIMIZERS,
    Net,
    assert_equal_parts,
    masks,
    network,
    sharded,
    take_steps,
)  # fmt: skip


def check_checkpoints(layout: str, folder: Path) -> None:
    """Three steps by two processes, then three by these; the checkpoint's own step changes nothing."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    for (kind, mask), (name, make) in zip(masks().items(), OPTIMIZERS.items(), strict=True):
        one, path = network(), folder / f"{name}-{kind}"
        theirs = make(one.named_parameters(), mask)
        if not (path / ".metadata").exists():
            model = sharded(layout, network())
            ours = make(model.named_parameters(), mask)
            take_steps(model, ours, range(3))
            parts = dict(zip(("model", "optimizer"), get_state_dict(model, ours), strict=True))
            checkpoint.save(parts, checkpoint_id=path)
        model = sharded(layout, network())
        ours = make(model.named_parameters(), mask)
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, ours), strict=True))
        assert_equal_parts(model, one)
        state = parts["optimizer"]["state"]
        assert state.keys() == dict(one.named_parameters()).keys()
        for key, entry in state.items():
            assert entry.pop("step") == 0 and bool(entry) == bool(mask[key].selected)
            parameter = model.get_parameter(key)
            for value in entry.values():
                assert value.shape == parameter.shape and is_dtensor(value) == is_dtensor(parameter)
                assert not is_dtensor(value) or value.placements == parameter.placements  # type: ignore[attr-defined]
            entry["step"] = torch.zeros(())
        checkpoint.load(parts, checkpoint_id=path)
        set_state_dict(model, ours, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
        take_steps(one, theirs, range(3))
        for key, entry in ours.state_dict()["state"].items():
            part = mask[one_name(ours, key)]
            assert entry["step"] == (3 if part.selected else 0)
            for value in entry.values():
                assert not value.ndim or not local_part(value)[~part.part_of(value).dense()].any()
                assert not value.ndim or value.shape == part.shape
        for net, optimizer in ((one, theirs), (model, ours)):
            take_steps(net, optimizer, range(3, 6))
        assert_equal_parts(model, one)


def one_name(optimizer: Any, index: int) -> str:
    return optimizer.param_groups[0]["param_names"][index]


def check_other_forms_of_state(layout: str) -> None:
    """Check state that is gathered, flattened, or of one process: each goes on bit for bit."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    for mask, make in zip(masks().values(), OPTIMIZERS.values(), strict=True):
        one, model = network(), sharded(layout, network())
        ours, theirs = make(model.named_parameters(), mask), make(one.named_parameters(), mask)
        take_steps(one, theirs, range(2))
        take_steps(model, ours, range(2))
        forms = [StateDictOptions(flatten_optimizer_state_dict=True)]
        if "+" not in layout:  # torch itself cannot split a gathered state along two mesh dimensions (2.14)
            forms.insert(0, StateDictOptions(full_state_dict=True))
        for options in forms:
            state = get_optimizer_state_dict(model, ours, options=options)
            ours = make(model.named_parameters(), mask)
            set_optimizer_state_dict(model, ours, state, options=options)
            if options.full_state_dict:
                theirs = make(one.named_parameters(), mask)
                set_optimizer_state_dict(one, theirs, state, options=StateDictOptions(strict=False))
            for net, optimizer in ((one, theirs), (model, ours)):
                take_steps(net, optimizer, range(2, 3))
            assert_equal_parts(model, one)
        ours = make(model.named_parameters(), mask)
        ours.load_state_dict(theirs.state_dict())
        for net, optimizer in ((one, theirs), (model, ours)):
            take_steps(net, optimizer, range(3, 4))
        assert_equal_parts(model, one)


def check_whole_job(layout: str, folder: Path) -> None:
    """Mask, reset, three epochs with clipping; resumed by more processes. No element outside the mask has changed."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    if layout not in ("fsdp", "hsdp"):
        return
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shared, own = folder / "mask.safetensors", folder / f"mask-{rank}.safetensors"
    for path in (shared, own):  # all processes write the one, at the same time
        masks()["elements"].save(path)
    mask = Mask.load(shared)
    assert shared.read_bytes() == own.read_bytes()
    model, begun, job = sharded(layout, network()), network(), folder / "checkpoint"
    optimizer = OPTIMIZERS["adamw"](model.named_parameters(), mask)
    if processes == 2:
        delfast.reset_(model, mask, Net, seed=4)
    else:
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.load(parts, checkpoint_id=job)
        set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    for epoch in range(3):
        torch.manual_seed(10 * epoch + rank)
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.randn(5, 6)), torch.arange(5) % 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    for name, p in model_parameters(model, sharded=True).items():
        chosen, old = (part_of(value, p) for value in (mask[name].dense(), begun.get_parameter(name)))
        held = local_part(p)
        assert torch.equal(held[~chosen].view(torch.int32), old[~chosen].view(torch.int32)), name
        assert bool((held[chosen] != old[chosen]).any()) == bool(chosen.any()), name
    if processes == 2:
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.save(parts, checkpoint_id=job)
