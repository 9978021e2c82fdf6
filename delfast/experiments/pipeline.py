"""The steps of an unlearning run that write a network: train, oracle, unlearn; ``localizing`` has localize.

``train``, ``oracle`` and ``unlearn`` read files and write files. ``run_method`` does the work of the last without
files, for ``unlearn`` and for the cells of a grid.

Seeds derive from ``--seed``. Forget set, initialization and order of the batches: seed. Order of the batches of
unlearning: seed + 2. Initialization of the oracle: seed + 1. Values that a reset writes: seed + 2, because the run's
own initialization would restore the values that training began from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from delfast.errors import InputError
from delfast.evaluation import Metrics, predictions
from delfast.execution import Precision
from delfast.experiments.config import Config
from delfast.experiments.datasets import Batches
from delfast.experiments.localizing import check_localizes, discard_localized, is_of_another, localized_in
from delfast.experiments.losses import Losses, mean_losses
from delfast.experiments.progress import Progress
from delfast.experiments.run import (
    CHECKPOINT,
    FORGET,
    MASK,
    MODEL,
    SETS,
    SUMMARY,
    Run,
    commit,
    output_directory,
)
from delfast.files import save_state, write_json
from delfast.mask import Mask
from delfast.provenance import digest_state, provenance
from delfast.seeding import seeded
from delfast.unlearning import Method, TrainingOptions, UnlearnResult
from delfast.unlearning import train as train_model
from delfast.unlearning import unlearn as unlearn_model
from delfast.unlearning.head import head_parameters
from delfast.unlearning.loop import BatchNormMode

MOMENTUM = 0.9  # of SGD, in every training and finetuning of the DEL paper
ORACLE_OFFSET, UNLEARN_OFFSET = 1, 2  # added to the run's seed
SHADOW_SEED = 1000  # added for each shadow, a network that differs from another only in its seeds


@dataclass(frozen=True)
class Trained:
    """A network that a step wrote, its metrics (percentages), and the seconds of each part of the step."""

    model: nn.Module
    metrics: Metrics | Losses
    seconds: dict[str, float]


def train(
    run: Run,
    output_dir: Path,
    shadow: int = 0,
    *,
    progress: bool = True,
    remedy: str = "another --batch-size",
) -> Trained:
    """Train on the whole training set and write the run directory.

    ``shadow`` > 0 trains with the shadow's seeds. ``progress``: whether to show the training's progress. ``remedy``:
    the choice that the error of an unfit batch size advises.
    """
    everything = torch.arange(run.data.count)
    return _train(run, output_dir, "train", everything, run.config.seed, shadow, progress, remedy)


def oracle(
    run: Run,
    output_dir: Path,
    seed: int | None = None,
    shadow: int = 0,
    *,
    progress: bool = True,
    remedy: str = "another --batch-size",
) -> Trained:
    """Train a newly initialized network on the retain set only, by the same configuration.

    ``seed`` defaults to the run's + 1. The other arguments are those of ``train``.
    """
    seed = _or_default(seed, run.config.seed + ORACLE_OFFSET)
    return _train(run, output_dir, "oracle", run.forget.retain, seed, shadow, progress, remedy)


def adopt(run: Run, model: nn.Module, output_dir: Path, path: Path) -> Trained:
    """Write the run directory of a network that was trained elsewhere, and loaded from ``path``; train nothing.

    InputError if it is no network of the run's kind, and for a forget set with other labels than the data's own.
    """
    if run.forget.changes_labels:
        raise InputError(
            f"expected a forget set with the data's own labels beside a trained network, got '{run.config.forget}'; "
            "use another --forget"
        )
    state = model.state_dict()
    try:
        run.factory().load_state_dict(state)
    except RuntimeError:
        raise InputError(
            f"'{path}' is no {run.config.model_name} of {run.config.data_name}: other names or shapes; load a network "
            "like that of model()"
        ) from None
    with output_directory(output_dir), run.data.naming_errors():
        model = run.placed(model)
        trained = Trained(model, run.measure(model), {})
        _write_run(run, output_dir, "train", trained, {"trained": str(path)}, {}, {"losses": []})
    return trained


def _train(
    run: Run, output_dir: Path, command: str, indices: Tensor, seed: int, shadow: int, progress: bool, remedy: str
) -> Trained:
    config, seed = run.config, seed + SHADOW_SEED * shadow
    batches = run.batches(indices, config.batch_size, shuffle=True, seed=config.seed + SHADOW_SEED * shadow)
    _check_last_batch(run, batches, remedy)
    title = f"{command}: {config.model_name} on {len(indices)} examples of {config.data_name}, {config.epochs} epochs"
    with output_directory(output_dir), run.data.naming_errors():
        with seeded(seed):
            model = run.placed(run.factory())
        if run.config.has_job:
            _check_measurable(run, model)
        result = train_model(
            model,
            batches,
            _sgd(model, config, run.device),
            epochs=config.epochs,
            loss_fn=run.data.loss_fn,
            precision=cast(Precision, config.precision),
            cuda_graphs=run.cuda_graphs,
            progress=Progress(title) if progress else None,
        )
        trained = Trained(model, run.measure(model), {"train": result.seconds})
        _write_run(run, output_dir, command, trained, {"seed": seed}, {}, {"losses": result.losses})
    return trained


def _check_measurable(run: Run, model: nn.Module) -> None:
    """Measure the first batch of each set: what cannot be measured is refused before hours of training."""
    for batches in run.sets().values():
        batch = next(iter(batches))
        if run.data.loss_fn is None:
            predictions(model, [batch])
        else:
            mean_losses(model, {name: [batch] for name in SETS}, run.data.loss_fn, "fp32")


def _sgd(model: nn.Module, config: Config, device: torch.device) -> torch.optim.SGD:
    """The optimizer of a training. On CUDA devices it is fused: torch's other SGDs read the learning rate on the host,
    and no CUDA graph can hold them.
    """
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=MOMENTUM,
        weight_decay=config.weight_decay,
        fused=True if device.type == "cuda" else None,
    )


def run_method(
    run: Run,
    model: nn.Module,
    mask: Mask | None,
    *,
    method: Method,
    batch_size: int,
    seed: int,
    head: str | None = None,
    batchnorm: str = "train",
    patience: int | None = None,
    held_out: float = 0.1,
    compile_model: bool = False,
    checkpoint: Path | None = None,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
    remedy: str = "another --batch-size, or --batchnorm frozen",
) -> UnlearnResult:
    """Make ``model`` unlearn the run's forget set, in place, within ``mask`` (None: everything may change).

    ``seed`` initializes the values that a reset writes, draws labels and orders the batches. With ``patience`` it
    chooses the fraction ``held_out`` of the retain set. ``checkpoint``, ``resume``, ``config``: as for ``unlearn``.
    ``progress``, ``remedy``: as for ``train``.
    """
    trained_on, validation = run.forget.retain, None
    if patience is not None:
        trained_on, aside = _hold_out(run.forget.retain, held_out, seed)
        validation = run.batches(aside, run.data.evaluation_batch)
    sets = {
        "retain": run.batches(trained_on, batch_size, shuffle=True, seed=seed),
        "forget": run.batches(run.forget.indices, batch_size, shuffle=True, seed=seed),
    }
    if method.epochs and batchnorm != "frozen":
        for name in sets.keys() & {method.step_plan} or sets:  # every plan of no set's name trains on both
            _check_last_batch(run, sets[name], remedy)
    shown = None
    if progress:
        shown = Progress(f"unlearn: {method.name} on {len(trained_on)} examples to retain, {method.epochs} epochs")
        if not method.epochs:  # a one-shot method has no training that would log the title
            shown.log_title()
    return unlearn_model(
        cast(nn.Module, torch.compile(model)) if compile_model else model,
        retain=sets["retain"],
        forget=sets["forget"],
        mask=mask,
        method=method,
        init=run.factory,
        loss_fn=run.data.loss_fn,
        seed=seed,
        head=head,
        training=TrainingOptions(
            precision=cast(Precision, run.config.precision),
            cuda_graphs=run.cuda_graphs,
            batchnorm=cast(BatchNormMode, batchnorm),
            validation=validation,
            patience=patience,
            config=config,
            progress=shown,
        ),
        checkpoint=checkpoint,
        resume=resume,
    )


def unlearn(
    run: Run,
    model: nn.Module,
    mask: Mask | None,
    output_dir: Path,
    *,
    method: Method,
    batch_size: int,
    budget: float | None = None,
    strategy: str | None = None,
    seed: int | None = None,
    head: str | None = None,
    batchnorm: str = "train",
    patience: int | None = None,
    held_out: float = 0.1,
    compile_model: bool = False,
    resume: bool = False,
) -> Trained:
    """Run a method and write a run directory and the mask that was trained.

    A method that localizes and gets no mask makes one of this ``budget`` and ``strategy``; see ``localized_in``. Other
    arguments are those of ``run_method``; ``seed`` defaults to the run's + 2. Until the step ends ``output_dir`` holds
    a checkpoint of the last whole epoch. With ``resume`` training continues from it to the same weights.
    """
    check_localizes(method, mask, budget=budget, strategy=strategy)
    step_seed, seed = seed, _or_default(seed, run.config.seed + UNLEARN_OFFSET)
    if head is not None:  # methods that do not train the head ignore its name, a wrong one too
        head_parameters(model, head)
    original = digest_state(model.state_dict())
    choices = {"batch_size": batch_size, "held_out": held_out if patience is not None else None}
    with output_directory(output_dir), run.data.naming_errors(), ExitStack() as stack:
        localization: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        localizes = method.localizes and mask is None
        is_stale = not localizes and is_of_another(output_dir, mask)
        if localizes:
            context = localized_in(output_dir, run, model, budget, strategy, step_seed, resume)
            found = stack.enter_context(context)
            mask, seconds = found.mask, found.seconds
            localization = {name: mask.metadata[name] for name in ("budget", "strategy")}
        result = run_method(
            run,
            model,
            mask,
            method=method,
            batch_size=batch_size,
            seed=seed,
            head=head,
            batchnorm=batchnorm,
            patience=patience,
            held_out=held_out,
            compile_model=compile_model,
            checkpoint=output_dir / CHECKPOINT,
            resume=resume,
            config={**choices, "original": original, **run.digests()},
        )
        result.mask.save(output_dir / MASK)
        trained = Trained(model, run.measure(model), {**seconds, **result.seconds})
        options = {
            "method": method.name,
            **asdict(method),
            **localization,
            **choices,
            "head": result.head,
            "seed": seed,
            "precision": run.config.precision,
            "batchnorm": batchnorm,
            "patience": patience,
        }
        inputs = {"original": original, "mask": "everything" if mask is None else mask.digest}
        inputs["mask_with_head"] = result.mask.digest
        course = {"losses": result.losses, "validation": result.validation, "resumed_from": result.resumed_from}
        _write_run(run, output_dir, "unlearn", trained, options, inputs, course)
        if is_stale:
            discard_localized(output_dir)
        (output_dir / CHECKPOINT).unlink(missing_ok=True)
    return trained


def _hold_out(retain: Tensor, part: float, seed: int) -> tuple[Tensor, Tensor]:
    """The examples to train on and the examples held out, drawn by the seed; both in their former order."""
    count = round(part * len(retain))
    if not 0 < count < len(retain):
        raise InputError(f"expected held_out to leave examples on both sides, got {part} of {len(retain)}")
    order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed))
    return retain[order[count:].sort().values], retain[order[:count].sort().values]


def _or_default(seed: int | None, default: int) -> int:
    return default if seed is None else seed


def _check_last_batch(run: Run, batches: Any, remedy: str) -> None:
    """Refuse a batch of one example whose last feature map in a ResNet would be one pixel.

    ``delfast.unlearn`` reads batch sizes from torch's loaders only, and so cannot refuse it for ``Batches``.
    """
    if not isinstance(batches, Batches):
        return
    alone = len(batches.indices) % batches.batch_size == 1 or batches.batch_size == 1
    if alone and run.config.model.startswith("resnet") and batches.images.shape[-1] <= 8:
        raise InputError(
            f"{len(batches.indices)} examples in batches of {batches.batch_size} leave a batch of one, "
            f"which BatchNorm cannot train on; choose {remedy}"
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
    """Write a run directory.

    ``inputs``: digests of the network and mask that the step began from. ``course``: the training's losses.
    """
    state = trained.model.state_dict()
    origin = {
        "command": command,
        "config": asdict(run.config),
        "options": options,
        "forget": run.describe_forget(),
        "digests": {"model": digest_state(state), **run.digests(), **inputs},
        "provenance": provenance(device=str(run.device), commit=commit()),
    }
    save_state(output_dir / MODEL, state, {"delfast": json.dumps(origin)})
    run.forget.save(output_dir / FORGET)
    results = {"metrics": trained.metrics.as_dict(), "seconds": trained.seconds, **course}
    write_json(output_dir / SUMMARY, {**origin, **results})


def write_evaluation(
    run: Run, output_dir: Path, seed: int | None, precision: Precision, methods: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write the ``summary.json`` of `delfast evaluate`: the metrics of each network by name."""
    summary = {
        "command": "evaluate",
        "options": {"seed": _or_default(seed, run.config.seed), "precision": precision},
        "config": asdict(run.config),
        "forget": run.describe_forget(),
        "methods": methods,
        "provenance": provenance(device=str(run.device)),
    }
    write_json(output_dir / SUMMARY, summary)
