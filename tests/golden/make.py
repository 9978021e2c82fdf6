"""Values that renaming and moving modules must not change, and how to write them again after an intended change::

    python -m tests.golden.make                  # every JSON file here, from the tree as it is
    python -m tests.golden.make signatures       # that one alone
    python -m tests.golden.make --files          # files/ too: then no test reads files of an earlier tree any longer

Only names that users have are used: those of ``delfast`` and ``delfast.ledger``, and the command ``python -m delfast``.

Each JSON file has a part "everywhere", equal on every machine, and may have a part "here": results that depend on how
the CPU's libraries round, equal where ``machine()`` is the same. "near" holds sums of such results for other machines.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import inspect
import json
import tempfile
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

import delfast
from delfast import ledger
from tests.golden import command_line, networks
from tests.golden.networks import Batches, Classifier, Exact, Interrupted, seeded

KEPT = Path(__file__).parent
FILES = KEPT / "files"
CHECKPOINT, OPTIMIZER, SIGNED = FILES / "checkpoint.pt", FILES / "optimizer.pt", FILES / "signed"
MASKS = {"rows": FILES / "rows.safetensors", "elements": FILES / "elements.safetensors"}
FORGET, RETAIN = networks.batches(8, seed=1), networks.batches(24, seed=2)
SIGNS = [(images.sign(), labels) for images, labels in FORGET]
CASES = {"rows": "del, paper, 0.3", "elements": "salloc, paper, 0.3"}  # the cases of ``masks`` that these files hold
VERSIONS = ("delfast", "torch")  # keys of a mask's metadata


def machine() -> dict[str, Any]:
    """Return what rounding may depend on."""
    status = delfast.status()
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": next((line.partition(":")[2].strip() for line in names if line.startswith("model name")), None),
        "backend": status["backend"],
        "isa": status["isa"],
    }


def digest(values: Any) -> str:
    """Return the SHA-256 (hex) of tensors or arrays by name: names in order, dtypes, shapes and values."""
    total = hashlib.sha256()
    for name, value in values.items():
        array = value.detach().contiguous().numpy() if isinstance(value, Tensor) else numpy.ascontiguousarray(value)
        total.update(f"{name} {array.dtype} {array.shape}".encode() + b"\0" + array.tobytes())
    return total.hexdigest()


# ---- signatures


def signatures() -> dict[str, Any]:
    """Return names, kinds and defaults of the parameters of what is public, and the fields of what it returns."""
    return {
        "delfast": {name: _described(getattr(delfast, name)) for name in delfast.__all__ if name != "__version__"},
        "methods": {
            name: {field.name: field.default for field in dataclasses.fields(method) if field.init}
            for name, method in ((name, plain_run(name)[1].method) for name in METHODS)
        },
        "results": {name: _described(type(value)) for name, value in _results().items()},
        "ledger": {name: _described(getattr(ledger, name)) for name in ledger.__all__},
    }


def _described(value: Any) -> Any:
    if isinstance(value, types.ModuleType):
        classes = {name: each for name, each in vars(value).items() if isinstance(each, type)}
        own = {name: each for name, each in classes.items() if issubclass(each, torch.optim.Optimizer)}
        return {name: _described(each) for name, each in own.items() if each is not torch.optim.Optimizer}
    if isinstance(value, type):
        return {"": _signature(value)} | {
            name: "property" if _is_property(member) else _signature(getattr(value, name))
            for base in reversed(value.__mro__)
            if base.__module__.partition(".")[0] == "delfast"
            for name, member in vars(base).items()
            if not name.startswith("_") and (_is_property(member) or callable(getattr(value, name)))
        }
    return _signature(value) if callable(value) else value


def _is_property(member: Any) -> bool:
    return isinstance(member, property) or hasattr(member, "attrname")  # functools.cached_property


def _signature(function: Any) -> str:
    """Return the signature without annotations, which a type checker compares."""
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _results() -> dict[str, Any]:
    model = seeded(Classifier)
    scores = delfast.score(model, FORGET)
    mask = scores.select(0.3)
    found = delfast.critmem(model, FORGET)
    with delfast.compact(model, mask) as handle:
        pass
    return {
        "score": scores,
        "compact": handle,
        "critmem": found,
        "critmem.examples": found.examples[0],
        "signed_channels": delfast.signed_channels(model, FORGET),
        "unlearn": plain_run("finetune")[1],
        "evaluate": delfast.evaluate(model, FORGET, RETAIN, [*FORGET], mia=False),
        "Mask.parameters": mask["conv.weight"],
        "Mask.table": mask.table()[0],
    }


# ---- masks


def masks() -> dict[str, Any]:
    """Return the masks of every strategy, preset, granularity, aggregate and policy, from exact gradients."""
    found = {name: _mask_record(make()) for name, make in _masks().items()}
    return {"everywhere": found}


def _masks() -> dict[str, Callable[[], delfast.Mask]]:
    def localize(**options: Any) -> Callable[[], delfast.Mask]:
        budget = options.pop("budget", 0.3)
        loss_fn = None if options.get("criterion") == "critmem" else networks.linear_in_logits
        model = seeded(Classifier) if loss_fn is None else seeded(Exact)
        return lambda: delfast.localize(model.eval(), FORGET, budget, **{"seed": 4, "loss_fn": loss_fn, **options})

    cases = {
        f"{name}, {preset}, {budget}": localize(preset=preset, budget=budget, **options)
        for name, options in delfast.STRATEGIES.items()
        for preset in ("paper", "published-code")
        for budget in (0.1, 0.3)
    }
    for aggregate in ("mean", "sum", "max"):
        cases[f"del, {aggregate}"] = localize(aggregate=aggregate)
    for top_h in (1, 3, 0.5):
        cases[f"del, top_h {top_h}"] = localize(top_h=top_h, policy="exact")
    for criterion in ("weighted_grad", "grad"):
        for granularity in ("channel", "param"):
            name = f"per example, {criterion}, {granularity}"
            cases[name] = localize(criterion=criterion, granularity=granularity, per_example=True)
    cases["per example, squared_grad"] = lambda: delfast.localize(
        signs(seeded(Exact)).eval(), SIGNS, 0.3, criterion="squared_grad", per_example=True,
        loss_fn=networks.linear_in_logits,
    )  # fmt: skip
    examples = [(images, label) for batch in FORGET for images, label in zip(*batch, strict=True)]
    cases["until stable"] = lambda: delfast.localize(
        seeded(Exact).eval(), examples, 0.3, loss_fn=networks.linear_in_logits, stop_when_stable=0.5,
        batch_size=2, seed=3,
    )  # fmt: skip
    return cases


def signs(model: Exact) -> Exact:
    """Replace every weight by its sign, so that squares of gradients stay below 2**24."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sign_()
    return model


def _mask_record(mask: delfast.Mask) -> dict[str, Any]:
    metadata = {name: "" if name in VERSIONS else value for name, value in mask.metadata.items()}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "mask"
        delfast.Mask(mask.parameters, metadata).save(path)
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    return {
        "digest": mask.digest,
        "selected": mask.selected,
        "channels": mask.channels,
        "file": content,
        "metadata": sorted(mask.metadata),
    }


# ---- scores, resets, steps and whole runs


METHODS: dict[str, dict[str, Any]] = {
    "del": {"epochs": 2, "head": "head"},
    "finetune": {"epochs": 2},
    "gradient-ascent": {"epochs": 2},
    "neggrad+": {"epochs": 2},
    "relabel": {"epochs": 2},
    "l1-sparse": {"epochs": 2},
    "influence": {},
    "ssd": {},
    "scrub": {"epochs": 2},
    "retrain": {"epochs": 2},
}
WITHOUT_LOGITS = ("del", "finetune", "gradient-ascent", "neggrad+", "l1-sparse", "retrain")


def run_method(name: str, loss_fn: Any = None, stop: int | None = None, **options: Any) -> tuple[Exact, Any]:
    """Return a network that has unlearned by a method, and its result. ``stop``: see ``Batches``."""
    model = seeded(Exact) if loss_fn else seeded(Classifier)
    mask = None
    if name not in ("retrain", "del") or loss_fn:
        mask = delfast.Mask.load(MASKS["rows"]) if name != "retrain" else None
    retain = RETAIN * 4 if name == "ssd" else RETAIN  # for its default alpha
    result = delfast.unlearn(
        model,
        retain=Batches(retain, stop),
        forget=Batches(FORGET),
        mask=mask,
        method=name,
        init=type(model),
        loss_fn=loss_fn,
        seed=5,
        **METHODS[name],
        **options,
    )
    return model, result


@functools.cache
def plain_run(name: str) -> tuple[Exact, Any]:
    """Return a classifier that has unlearned by a method with cross-entropy, and the result."""
    return run_method(name)


def resumed(checkpoint: Path) -> dict[str, Any]:
    """Return the result of "del" with exact gradients, resumed from a checkpoint of its first epoch."""
    model, result = run_method("del", networks.linear_in_weights, checkpoint=checkpoint, resume=True)
    return {"weights": digest(model.state_dict()), "losses": len(result.losses), "resumed_from": result.resumed_from}


def masked_optimizer(name: str, model: Exact) -> Any:
    """Build one of the masked optimizers, by element."""
    options = {"MaskedSGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, "MaskedAdamW": {"lr": 0.01}}[name]
    return getattr(delfast.optim, name)(model.named_parameters(), delfast.Mask.load(MASKS["elements"]), **options)


def stepped(name: str) -> tuple[Exact, Any]:
    """Return a network after three steps with given gradients, and its masked optimizer."""
    model = seeded(Exact)
    masked = masked_optimizer(name, model)
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = networks.pattern(parameter) * (step + 1) / 4
        masked.step()
    return model, masked


def optimizer_state(masked: Any) -> str:
    """Return the digest of the optimizer's state tensors."""
    state = masked.state_dict()["state"]
    return digest({f"{index} {name}": value for index, entry in state.items() for name, value in entry.items()})


def numbers() -> dict[str, Any]:
    """Return digests of what is computed with a mask, or to make one."""
    everywhere: dict[str, Any] = {}
    model = seeded(Exact).eval()
    for per_example in (False, True):
        scores = delfast.score(model, FORGET, per_example=per_example, loss_fn=networks.linear_in_logits)
        everywhere[f"gradients, per_example={per_example}"] = digest(scores.gradients)
        for aggregate in ("topk_mean", "mean", "sum", "max"):
            everywhere[f"{aggregate}, per_example={per_example}"] = digest({"": scores.channel_scores(aggregate)})
    signed = delfast.signed_channels(model, FORGET, loss_fn=networks.linear_in_logits)
    everywhere["signed_channels"] = digest({"matrix": signed.matrix, "examples": signed.examples})
    found = delfast.critmem(seeded(Classifier), FORGET)
    everywhere["critmem"] = {name: count.tolist() for name, count in found.counts.items()}
    for name, path in MASKS.items():
        changed = seeded(Exact)
        delfast.reset_(changed, delfast.Mask.load(path), init=Exact, seed=6)
        everywhere[f"reset_, {name}"] = digest(changed.state_dict())
        with delfast.compact(seeded(Exact), delfast.Mask.load(path)) as handle:
            networks.linear_in_logits(handle.model.eval(), FORGET[0]).sum().backward()
            gradients = {name: p.grad for name, p in handle.named_parameters() if p.grad is not None}
            everywhere[f"compact, {name}"] = digest(gradients)
    for name in ("MaskedSGD", "MaskedAdamW"):
        changed, masked = stepped(name)
        everywhere[name] = {"weights": digest(changed.state_dict()), "state": optimizer_state(masked)}
    for name in WITHOUT_LOGITS:
        changed, result = run_method(name, networks.linear_in_weights)
        everywhere[f"unlearn, {name}"] = {"weights": digest(changed.state_dict()), "mask": result.mask.digest}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "checkpoint.pt"
        _interrupted(path)
        everywhere["resumed"] = resumed(path)
        content = torch.load(path, weights_only=True)
        everywhere["checkpoint"] = {"keys": sorted(content), "config": content["config"]}
    here, near = {}, {}
    for name in METHODS:
        changed, result = plain_run(name)
        here[name] = {"weights": digest(changed.state_dict()), "losses": result.losses}
        near[name] = {name: float(p.detach().double().abs().sum()) for name, p in changed.named_parameters()}
    metrics = delfast.evaluate(seeded(Classifier), FORGET, RETAIN, [*FORGET])
    here["evaluate"] = near["evaluate"] = metrics.as_dict()
    return {"everywhere": everywhere, "machine": machine(), "here": here, "near": near}


def _interrupted(path: Path) -> None:
    """Write the checkpoint of the first of two epochs."""
    try:
        run_method("del", networks.linear_in_weights, stop=1, checkpoint=path)
    except Interrupted:
        return
    raise AssertionError("the run was not interrupted")


def commands() -> dict[str, Any]:
    """Return the command line's options, and what its commands write: see ``command_line``."""
    with tempfile.TemporaryDirectory() as directory:
        return {"machine": machine(), **command_line.measure(Path(directory))}


MAKERS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "signatures": signatures,
    "masks": masks,
    "numbers": numbers,
    "commands": commands,
}


def make(name: str) -> dict[str, Any]:
    """Return what the file ``name``.json holds, from the tree as it is, computed by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # strategies that look at no example, and budgets above what they rank
            return json.loads(json.dumps(MAKERS[name]()))  # type: ignore[no-any-return]
    finally:
        torch.set_num_threads(threads)


def kept(name: str) -> dict[str, Any]:
    """Return what the file ``name``.json holds."""
    return json.loads((KEPT / f"{name}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def write_files() -> None:
    """Write the masks, the checkpoint, the optimizer's state, the signed channels and the run directory."""
    FILES.mkdir(exist_ok=True)
    made = _masks()
    for name, path in MASKS.items():
        made[CASES[name]]().save(path)
    _interrupted(CHECKPOINT)
    torch.save(stepped("MaskedAdamW")[1].state_dict(), OPTIMIZER)
    for path in SIGNED.glob("*"):
        path.unlink()
    if SIGNED.exists():
        SIGNED.rmdir()
    model = seeded(Exact).eval()
    delfast.signed_channels(model, FORGET, loss_fn=networks.linear_in_logits, path=SIGNED)
    command_line.keep_run()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.golden.make")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MAKERS)} (default: all)")
    parser.add_argument("--files", action="store_true", help="write files/ again too")
    arguments = parser.parse_args()
    if arguments.files:
        write_files()
    for name in arguments.names or MAKERS:
        text = json.dumps(make(name), indent=1, sort_keys=True) + "\n"
        (KEPT / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
