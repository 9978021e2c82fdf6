"""Reset masked elements to a new initialization."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from delfast.arguments import check_path, check_seed, check_type
from delfast.bits import checksum
from delfast.copies import copy_of
from delfast.errors import InputError
from delfast.joint_calls import averaging_processes
from delfast.mask import Mask
from delfast.naming import model_parameters, plain_name, refuse_merged, trainable_parameters, unwrap
from delfast.seeding import RESET_SEED, seeded
from delfast.sharding import held_part, is_dtensor, local_part, reshard
from delfast.slices import read_parts
from delfast.sole_use import used_alone

Init = Callable[[], nn.Module] | nn.Module | Mapping[str, Tensor] | str | PathLike[str]
"""Source of new values: a factory, a second model, a state dict, a safetensors file, or "reset_parameters"."""

BLOCKS, BLOCK_BYTES = 256, 4096  # of a file, by which processes compare theirs without reading them as a whole


@used_alone
@torch.no_grad()
def reset_(model: nn.Module, mask: Mask, init: Init, seed: int = RESET_SEED) -> None:
    """Set the masked elements of a model to newly initialized values, in place: θ_j ← θ⁰_j for every masked j.

    Other elements and all buffers stay as they are.

    The parameters may be DTensors (FSDP2, HSDP, tensor parallelism). All processes that hold them make the same call,
    with the same mask, source and seed. Each writes the part that it holds, and all parts together are the values that
    one process would write. Parameters that FSDP2 has gathered are sharded again first.

    A model inside DistributedDataParallel is reset on all processes together, since the replicas would differ
    otherwise: a process that calls ``reset_`` alone waits for the others.

    Parameters
    ----------
    model : torch.nn.Module
        The network to change.
    mask : Mask
        The elements to reset.
    init : callable, torch.nn.Module, Mapping of str to Tensor, str or path, or "reset_parameters"
        Source of the new values. A factory is called without arguments under a private generator seeded with ``seed``.
        Prefer a factory: a network's constructor may initialize differently from its modules' ``reset_parameters``, as
        torchvision's ResNet-18 does. "reset_parameters" calls these on a copy of the model under the same generator. A
        second model or a state dict supplies its own values, plain tensors or DTensors. The path of a safetensors file
        supplies the file's. Of a file, each process reads only what it holds of a sharded model; with a factory, each
        makes the whole network. "reset_parameters" is for models of plain tensors.
    seed : int, default 241202432
        Seed in [0, 2^64). The default is the number of DEL's paper, which no usual training begins from. With the seed
        that training began from, a factory returns that beginning again. The values are those that follow
        ``torch.manual_seed(seed)``; torch's own generators are neither read nor changed.
        A seed that the factory sets itself has no effect.

    Raises
    ------
    InputError
        If the mask is of another architecture, if ``init`` lacks a masked parameter or has it in another shape, if it
        gives the memory of the model's own masked parameters, and if the processes of DDP, or those that hold a sharded
        model, pass different masks, values or files. Of files their headers, the ends of masked tensors and samples are
        compared. Nothing is changed then, in any process; an error of one is raised by all.

    References
    ----------
    Torkzadehmahani et al., "Improved Localized Machine Unlearning Through the Lens of Memorization", TMLR 2025,
    arXiv 2412.02432, section 3.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> model = torch.nn.Linear(2, 2)
    >>> mask = delfast.Mask.from_dense({"weight": torch.tensor([[1, 1], [0, 0]]), "bias": torch.tensor([0, 0])})
    >>> before = model.weight.detach().clone()
    >>> delfast.reset_(model, mask, lambda: torch.nn.Linear(2, 2), seed=1)
    >>> (model.weight != before).tolist()
    [[True, True], [False, False]]
    """
    refuse_merged(unwrap(model))
    targets = model_parameters(unwrap(model), sharded=True)
    processes = averaging_processes(model)
    # no process exchanges anything else inside, so that an error of one is raised by all before any of them writes
    with nullcontext() if processes is None else processes.together():
        check_type("mask", mask, Mask, "a delfast.Mask")
        seed = check_seed(seed)
        matched = {name: (parameter, part) for name, parameter, part in mask.match(targets)}
        parameters = {name: parameter for name, (parameter, _) in matched.items()}
        path = Path(check_path("init", init)) if _is_path(init) else None
        values = _checked_values(model, mask, init, seed, parameters) if path is None else read_parts(path, parameters)
        content = (
            "" if processes is None else _content_of(values) if path is None else _content_of_file(path, parameters)
        )
    if processes is not None:
        processes.check_same_mask(mask.digest)
        processes.check_same(
            content,
            "expected the same fresh values on every process, got different ones; pass the same seed, model, state "
            "dict or file everywhere",
        )
    fresh = {name: held_part(values[name], p) for name, p in parameters.items()} if path is None else values
    parts = [(local_part(p), fresh[name], part.part_of(p).for_ops) for name, (p, part) in matched.items()]
    for device in {held.device for held, _, _ in parts}:
        here = [each for each in parts if each[0].device == device]
        torch.ops.delfast.masked_reset_(
            [held for held, _, _ in here],
            [value.to(held) for held, value, _ in here],
            torch.cat([part.bits.to(device) for _, _, part in here]),
            [part.by_row for _, _, part in here],
        )
    # the op has incremented the version of this process's part, which is another than the DTensor's
    torch.autograd.graph.increment_version([p for p in parameters.values() if is_dtensor(p)])


def _is_path(init: Any) -> bool:
    return isinstance(init, (str, PathLike)) and init != "reset_parameters"


def _checked_values(
    model: nn.Module, mask: Mask, init: Any, seed: int, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the new values of each parameter, as a whole or as DTensors, by plain name. Nothing is exchanged."""
    sharded = [name for name, parameter in parameters.items() if is_dtensor(parameter)]
    if sharded and isinstance(init, str):
        raise InputError(
            f"expected another init than 'reset_parameters' for the sharded '{sharded[0]}', whose values would differ "
            "from those of one process; pass a factory of the network or a safetensors file"
        )
    fresh = _fresh_values(model, init, seed, list(parameters))
    for name, parameter in parameters.items():
        if name not in fresh:
            likewise = ", parametrized in the same way" if ".parametrizations." in f".{name}" else ""
            raise InputError(
                f"expected fresh values for '{name}', init has none; pass a factory of the same network{likewise}"
            )
        if fresh[name].shape != parameter.shape:
            raise InputError(
                f"expected fresh values for '{name}' of shape {tuple(parameter.shape)}, got "
                f"{tuple(fresh[name].shape)}; pass a factory of the same network"
            )
        if fresh[name].is_meta:
            raise InputError(f"expected fresh values for '{name}', got a tensor without data (meta); make it elsewhere")
    _refuse_own({name: parameters[name] for name in parameters if mask[name].selected}, fresh)
    return {name: fresh[name] for name in parameters}


def _content_of(values: Mapping[str, Any]) -> str:
    """Return text that is the same for the same values; of a DTensor, each process holds another part of the values."""
    forms = {
        name: f"{value.device_mesh.shape} {value.placements}" if is_dtensor(value) else int(checksum(value))
        for name, value in values.items()
    }
    return str(forms)


def _content_of_file(path: Path, names: Iterable[str]) -> str:
    """Return a digest of a safetensors file's header, of both ends of each tensor of these names, and of samples.

    The samples are blocks at even distances. Files that differ elsewhere alone have one digest.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    wanted = set(names)
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        header = file.read(begin - 8)
        digest.update(header)
        held = [form["data_offsets"] for name, form in json.loads(header).items() if plain_name(name) in wanted]
        ends = [at for start, end in held for at in (begin + start, max(begin + start, begin + end - BLOCK_BYTES))]
        for start in sorted({*ends, *range(0, size, max(BLOCK_BYTES, size // BLOCKS))}):
            file.seek(start)
            digest.update(file.read(BLOCK_BYTES))
    return f"{size} {digest.hexdigest()}"


def _fresh_values(model: nn.Module, init: Any, seed: int, needed: list[str]) -> dict[str, Tensor]:
    """Return new values by plain name. A state dict may name a tied parameter by any of its names, so keep them all."""
    if isinstance(init, Mapping):
        if not all(isinstance(value, Tensor) for value in init.values()):
            raise InputError("expected init to be a state dict (name -> tensor), got other values; pass the inner dict")
        return {plain_name(name): value.detach() for name, value in init.items()}
    if isinstance(init, str) and init == "reset_parameters":
        with seeded(seed):
            fresh = _reset_parameters_of_copy(unwrap(model), needed)
    else:
        fresh = _make_network(init, seed, "pass a factory, a model, a state dict or a path")
    named = fresh.named_parameters(remove_duplicate=False)
    return {plain_name(name): parameter.detach() for name, parameter in named}


def fresh_state(network: nn.Module, init: Init, seed: int) -> dict[str, Tensor]:
    """Return the state dict, buffers included, of a model or of the network that a factory makes as in ``reset_``.

    Raises InputError for an ``init`` that is neither, and for the memory of a trainable parameter of ``network``.
    """
    made = _make_network(init, seed, "pass a factory of it, or a second model")
    fresh = {plain_name(name): parameter for name, parameter in made.named_parameters(remove_duplicate=False)}
    _refuse_own(trainable_parameters(network, sharded=True), fresh)
    return made.state_dict()


def _refuse_own(parameters: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> None:
    """Raise InputError, by name, for a new value in the memory of the parameter whose values it would replace.

    Values are not compared: those of a network that was never trained may come back under its own seed.
    """
    for name, parameter in parameters.items():
        address = _address(parameter)
        if name in fresh and address is not None and address == _address(fresh[name]):
            raise InputError(
                "expected init to return a newly initialized network, it returned the model itself or its state dict: "
                f"'{name}' is in the model's own memory, so nothing would change; pass a factory: lambda: Net()"
            )


def _address(tensor: Tensor) -> tuple[torch.device, int] | None:
    """Return the address of a tensor's memory, of a DTensor that of the part held here; None for one without data."""
    held = local_part(tensor)
    if held.is_meta or not held.numel():
        return None
    return held.device, held.untyped_storage().data_ptr()


def _make_network(init: Any, seed: int, advice: str) -> nn.Module:
    """Return, without its wrappers, the given network or the one that the given factory makes under the seed."""
    if callable(init) and not isinstance(init, nn.Module):
        with seeded(seed):
            init = init()
    if not isinstance(init, nn.Module):
        raise InputError(f"expected init to make a whole network, got {type(init).__name__}; {advice}")
    network = unwrap(init)
    reshard(network)
    return network


def _reset_parameters_of_copy(model: nn.Module, needed: list[str]) -> nn.Module:
    """Copy ``model`` and reset the copy's modules; InputError if a needed parameter is not reset by its module."""
    # peft's LoRA layers set one of their two matrices to 0, which the matrix, an nn.Linear, does not
    adapted = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "reset_lora_parameters"))
    fresh = copy_of(model)
    parameters = {plain_name(name): (name, parameter) for name, parameter in fresh.named_parameters()}
    owners = {name: fresh.get_submodule(parameters[name][0].rpartition(".")[0]) for name in needed}
    for name, owner in owners.items():
        if parameters[name][0].startswith(adapted):
            raise InputError(
                f"'{name}' belongs to a LoRA layer, which does not initialize it by reset_parameters(); pass a factory "
                "of the network, or a state dict of fresh adapters, as init"
            )
        if not callable(getattr(owner, "reset_parameters", None)):
            raise InputError(
                f"'{name}' belongs to a {type(owner).__name__}, which has no reset_parameters(); "
                "pass a factory of the network as init"
            )
        parameters[name][1].fill_(math.nan)  # NaN that remains afterwards shows what was not reset
    for module in fresh.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    now = {plain_name(name): parameter for name, parameter in fresh.named_parameters()}
    for name, owner in owners.items():
        if name not in now or bool(now[name].isnan().any()):
            raise InputError(
                f"expected reset_parameters() of the {type(owner).__name__} to reset '{name}', it does not; pass a "
                "factory of the network as init"
            )
    return fresh
