"""The steps of an unlearning run, each from files to files: train, oracle, localize, unlearn.

Seeds, from the one ``--seed``: forget set = seed; initialization = seed; order of the batches = seed, in
unlearning seed + 2; initialization of the oracle = seed + 1; fresh values for the reset = seed + 2 (with the run's own
initialization the reset would restore the very values training began from).
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from delfast.arguments import check_choice
from delfast.errors import InputError
from delfast.evaluation import Metrics
from delfast.experiments.datasets import Batches, Examples
from delfast.experiments.progress import log, progress
from delfast.experiments.run import CHECKPOINT, EVALUATION_BATCH, FORGET, MASK, MODEL, SUMMARY, Run, check_batch_size
from delfast.files import make_output_dir, save_state, write_json
from delfast.localization import WHOLE_TRAINING_SET, check_localize
from delfast.localization import localize as find_mask
from delfast.mask import Mask
from delfast.naming import trainable_parameters
from delfast.provenance import digest_state, provenance
from delfast.seeding import seeded
from delfast.unlearning import Method, TrainingOptions
from delfast.unlearning import train as train_network
from delfast.unlearning import unlearn as unlearn_network
from delfast.unlearning.head import head_parameters
from delfast.unlearning.loop import BatchNormMode, Precision

MOMENTUM = 0.9  # of SGD, in every training and finetuning of the DEL paper
ORACLE_SEED, RESET_SEED = 1, 2  # added to the run's seed
SHADOW_SEED = 1000  # and this for each shadow, a network like another but for its seeds


@dataclass(frozen=True)
class Trained:
    """A network that a step wrote, its metrics (percentages), and the seconds of each of the step's parts."""

    model: nn.Module
    metrics: Metrics
    seconds: dict[str, float]


@dataclass(frozen=True)
class Localized:
    """A mask that a step wrote, its description in plain values, and the seconds it took."""

    mask: Mask
    description: dict[str, Any]
    seconds: dict[str, float]


def train(run: Run, output_dir: Path, shadow: int = 0) -> Trained:
    """Train on the whole training set and write the run directory. ``shadow``: above 0, another such network."""
    everything = torch.arange(len(run.data.train_targets))
    return _train(run, output_dir, "train", everything, run.config.seed, shadow)


def oracle(run: Run, output_dir: Path, seed: int | None = None, shadow: int = 0) -> Trained:
    """Train a fresh network on the retain set alone, by the same configuration; ``seed`` defaults to the run's + 1."""
    seed = _or_default(seed, run.config.seed + ORACLE_SEED)
    return _train(run, output_dir, "oracle", run.forget.retain, seed, shadow)


def _train(run: Run, output_dir: Path, command: str, indices: Tensor, seed: int, shadow: int) -> Trained:
    config, seed = run.config, seed + SHADOW_SEED * shadow
    batches = run.batches(indices, config.batch_size, shuffle=True, seed=config.seed + SHADOW_SEED * shadow)
    _check_last_batch(run, batches)
    make_output_dir(output_dir)
    with seeded(seed):
        model = run.placed(run.factory())
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=MOMENTUM, weight_decay=config.weight_decay)
    log.info(f"{command}: {config.model} on {len(indices)} examples of {config.data}, {config.epochs} epochs")
    precision = cast(Precision, config.precision)
    result = train_network(model, batches, optimizer, epochs=config.epochs, precision=precision, progress=progress)
    trained = Trained(model, run.measure(model), {"train": result.seconds})
    _write_run(run, output_dir, command, trained, {"seed": seed}, {}, {"losses": result.losses})
    return trained


def localize(
    run: Run,
    model: nn.Module,
    output_dir: Path,
    *,
    seed: int | None = None,
    stop_when_stable: float | None = None,
    **options: Any,
) -> Localized:
    """Localize the run's forget set in ``model`` and write ``mask.safetensors`` and ``summary.json``.

    options: those of ``delfast.localize``. Strategies in ``WHOLE_TRAINING_SET`` take the whole training set.
    """
    check_localize(**options, stop_when_stable=stop_when_stable)
    make_output_dir(output_dir)
    seed = _or_default(seed, run.config.seed)
    everything = options.get("strategy", "del") in WHOLE_TRAINING_SET
    indices = torch.arange(len(run.forget.targets)) if everything else run.forget.indices
    started = time.perf_counter()
    batches = run.batches(indices, run.config.batch_size)
    if stop_when_stable is None:
        mask = find_mask(model, batches, seed=seed, **options)
    else:
        options |= {"stop_when_stable": stop_when_stable, "batch_size": run.config.batch_size}
        mask = find_mask(model, Examples(batches), seed=seed, **options)
    seconds = {"localize": time.perf_counter() - started}
    digests = {"model": digest_state(model.state_dict()), **run.digests()}
    mask = Mask(mask.parameters, {**mask.metadata, "digests": digests})
    mask.save(output_dir / MASK)
    description = describe_mask(mask, output_dir / MASK)
    summary = {
        "command": "localize",
        "config": asdict(run.config),
        "options": {**options, "seed": seed},
        "forget": run.describe_forget(),
        "mask": description,
        "seconds": seconds,
        "digests": {**digests, "mask": mask.digest},
        "provenance": provenance(device=str(run.device)),
    }
    write_json(output_dir / SUMMARY, summary)
    return Localized(mask, description, seconds)


def describe_mask(mask: Mask, path: Path) -> dict[str, Any]:
    """A saved mask in plain values; ``bytes`` is the size of its file."""
    return {
        "budget": mask.metadata.get("budget"),
        "selected": mask.selected,
        "total": mask.total,
        "fraction": mask.fraction,
        "channels": mask.channels,
        "bytes": path.stat().st_size,
        "digest": mask.digest,
    }


def unlearn(
    run: Run,
    model: nn.Module,
    mask: Mask | None,
    output_dir: Path,
    *,
    method: Method,
    batch_size: int,
    head: str | None = None,
    seed: int | None = None,
    batchnorm: str = "train",
    patience: int | None = None,
    held_out: float = 0.1,
    compile_model: bool = False,
    resume: bool = False,
) -> Trained:
    """Have ``model`` unlearn the run's forget set, in place; write a run directory, and the mask that was trained.

    mask: None where everything may change. While it runs ``output_dir`` holds a checkpoint of the last whole epoch,
    from which ``resume`` goes on to the same weights. ``seed`` (default: the run's + 2) initializes the values reset
    to, draws labels and orders the batches, and with ``patience`` chooses the ``held_out`` part of the retain set.
    """
    seed = _or_default(seed, run.config.seed + RESET_SEED)
    method.check()
    check_choice("batchnorm", batchnorm, BatchNormMode)
    check_batch_size(batch_size)
    if method.localizes and mask is None:
        raise InputError(f"'{method.name}' works within a mask, got none; make one with `delfast localize`: --mask")
    if mask is not None:
        mask.match(trainable_parameters(model))  # raises if the mask is for another architecture
    if head is not None:
        head_parameters(model, head)  # raises if there is none
    trained_on, validation = run.forget.retain, None
    if patience is not None:
        trained_on, aside = _hold_out(run.forget.retain, held_out, seed)
        validation = run.batches(aside, EVALUATION_BATCH)
    retain = run.batches(trained_on, batch_size, shuffle=True, seed=seed)
    forget = run.batches(run.forget.indices, batch_size, shuffle=True, seed=seed)
    if method.epochs and batchnorm != "frozen":
        for batches in (retain, forget) if "forget" in method.needs else (retain,):
            _check_last_batch(run, batches, ", or --batchnorm frozen")
    make_output_dir(output_dir)
    log.info(f"unlearn: {method.name} on {len(trained_on)} examples to retain, {method.epochs} epochs")
    checkpoint = output_dir / CHECKPOINT
    original = digest_state(model.state_dict())
    result = unlearn_network(
        cast(nn.Module, torch.compile(model)) if compile_model else model,
        retain=retain,
        forget=forget,
        mask=mask,
        method=method,
        init=run.factory,
        seed=seed,
        head=head,
        training=TrainingOptions(
            precision=cast(Precision, run.config.precision),
            batchnorm=cast(BatchNormMode, batchnorm),
            validation=validation,
            patience=patience,
            config={
                "batch_size": batch_size,
                "held_out": held_out if patience is not None else None,
                "original": original,
                **run.digests(),
            },
            progress=progress,
        ),
        checkpoint=checkpoint,
        resume=resume,
    )
    result.mask.save(output_dir / MASK)
    trained = Trained(model, run.measure(model), dict(result.seconds))
    options = {
        "method": method.name,
        **asdict(method),
        "batch_size": batch_size,
        "head": result.head,
        "seed": seed,
        "precision": run.config.precision,
        "batchnorm": batchnorm,
        "patience": patience,
        "held_out": held_out if patience is not None else None,
    }
    inputs = {"original": original, "mask": "everything" if mask is None else mask.digest}
    inputs["mask_with_head"] = result.mask.digest
    course = {"losses": result.losses, "validation": result.validation, "resumed_from": result.resumed_from}
    _write_run(run, output_dir, "unlearn", trained, options, inputs, course)
    checkpoint.unlink(missing_ok=True)
    return trained


def _hold_out(retain: Tensor, part: float, seed: int) -> tuple[Tensor, Tensor]:
    """The examples to train on and those held out, drawn by the seed; both in the order they had."""
    count = round(part * len(retain))
    if not 0 < count < len(retain):
        raise InputError(f"expected held_out to leave examples on both sides, got {part} of {len(retain)}")
    order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed))
    return retain[order[count:].sort().values], retain[order[:count].sort().values]


def _or_default(seed: int | None, default: int) -> int:
    return default if seed is None else seed


def _check_last_batch(run: Run, batches: Batches, way_out: str = "") -> None:
    """InputError where a ResNet would meet a batch of one example whose last feature map is one pixel."""
    alone = len(batches.indices) % batches.batch_size == 1 or batches.batch_size == 1
    if alone and run.config.model.startswith("resnet") and run.data.image_size <= 8:
        raise InputError(
            f"{len(batches.indices)} examples in batches of {batches.batch_size} leave a batch of one, "
            f"which BatchNorm cannot train on; choose another --batch-size{way_out}"
        )


def _write_run(
    run: Run,
    output_dir: Path,
    command: str,
    trained: Trained,
    options: dict[str, Any],
    inputs: dict[str, str],
    course: dict[str, Any],
) -> None:
    """Write a run directory. ``inputs``: digests of what the step began from; ``course``: how the training went."""
    state = trained.model.state_dict()
    origin = {
        "command": command,
        "config": asdict(run.config),
        "options": options,
        "forget": run.describe_forget(),
        "digests": {"model": digest_state(state), **run.digests(), **inputs},
        "provenance": provenance(device=str(run.device)),
    }
    save_state(output_dir / MODEL, state, {"delfast": json.dumps(origin)})
    run.forget.save(output_dir / FORGET)
    results = {"metrics": trained.metrics.as_dict(), "seconds": trained.seconds, **course}
    write_json(output_dir / SUMMARY, {**origin, **results})
