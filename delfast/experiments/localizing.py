"""The localization of a run: ``localize`` writes a directory with the mask, ``find_mask`` returns the mask alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from delfast.arguments import check_choice
from delfast.errors import InputError
from delfast.execution import Precision
from delfast.experiments.run import CHECKPOINT, MASK, SUMMARY, Run, output_directory
from delfast.files import write_json
from delfast.localization import BUDGET, STRATEGIES, WHOLE_TRAINING_SET
from delfast.localization import localize as localize_model
from delfast.mask import Mask
from delfast.provenance import digest_state, provenance
from delfast.unlearning import Method

LOCALIZED = "localized"  # the directory of a run whose method localized


@dataclass(frozen=True)
class Localized:
    """A mask that a step wrote, its description in plain values, and the seconds it took."""

    mask: Mask
    description: dict[str, Any]
    seconds: dict[str, float]


def find_mask(
    run: Run,
    model: nn.Module,
    *,
    budget: float,
    batch_size: int,
    seed: int,
    strategy: str | None = None,
    stop_when_stable: float | None = None,
    **options: Any,
) -> tuple[Mask, float]:
    """Localize the run's forget set in ``model``; return the mask and the seconds it took.

    strategy: a name of ``delfast.STRATEGIES``; None: ``options`` replace it. For those of ``WHOLE_TRAINING_SET`` the
        gradient is over the whole training set.
    options: those of ``delfast.localize``; the strategy's own may be repeated.
    """
    if strategy is not None:
        own = STRATEGIES.get(strategy, {}).items()  # ``localize`` refuses an unknown name
        options = {name: value for name, value in options.items() if (name, value) not in own} | {"strategy": strategy}
    indices = torch.arange(run.forget.count) if strategy in WHOLE_TRAINING_SET else run.forget.indices
    options |= {"cuda_graphs": run.cuda_graphs, "loss_fn": run.data.loss_fn}
    started = time.perf_counter()
    batches = run.batches(indices, batch_size)
    if stop_when_stable is None:
        mask = localize_model(model, batches, budget, seed=seed, **options)
    else:
        options |= {"stop_when_stable": stop_when_stable, "batch_size": batch_size}
        mask = localize_model(model, run.data.examples(batches), budget, seed=seed, **options)
    return mask, time.perf_counter() - started


def localize(
    run: Run,
    model: nn.Module,
    output_dir: Path,
    *,
    budget: float,
    preset: str,
    strategy: str | None = None,
    seed: int | None = None,
    stop_when_stable: float | None = None,
    precision: Precision = "fp32",
    **options: Any,
) -> Localized:
    """Localize the run's forget set in ``model`` and write ``mask.safetensors`` and ``summary.json``.

    Arguments are those of ``find_mask``; ``seed`` defaults to the run's.
    """
    check_choice("precision", precision, Precision)
    seed, batch_size = run.config.seed if seed is None else seed, run.config.batch_size
    options = {"preset": preset, **STRATEGIES.get(strategy or "", {}), **options}
    with output_directory(output_dir), run.data.naming_errors():
        mask, duration = find_mask(
            run,
            model,
            budget=budget,
            batch_size=batch_size,
            seed=seed,
            strategy=strategy,
            stop_when_stable=stop_when_stable,
            precision=precision,
            **options,
        )
        seconds = {"localize": duration}
        digests = {"model": digest_state(model.state_dict()), **run.digests()}
        mask = Mask(mask.parameters, {**mask.metadata, "digests": digests})
        mask.save(output_dir / MASK)
        description = describe_mask(mask, output_dir / MASK)
        if strategy is not None:
            options["strategy"] = strategy
        if stop_when_stable is not None:
            options |= {"stop_when_stable": stop_when_stable, "batch_size": batch_size}
        summary = {
            "command": "localize",
            "config": asdict(run.config),
            "options": {"budget": budget, **options, "seed": seed, "precision": precision},
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


def check_localizes(method: Method, mask: Mask | None, **given: float | str | None) -> None:
    """Raise InputError for an option of the localization that is given where nothing is localized."""
    for name, value in given.items():
        if value is not None and not method.localizes:
            raise InputError(
                f"expected no --{name} for '{method.name}', which does not localize, got {value}; pass the --mask of "
                f"`delfast localize --{name} {value}`"
            )
        if value is not None and mask is not None:
            raise InputError(f"expected --{name} or --mask, got both; leave --{name} out, or --mask")


@contextmanager
def localized_in(
    output_dir: Path,
    run: Run,
    model: nn.Module,
    budget: float | None,
    strategy: str | None,
    seed: int | None,
    resume: bool,
) -> Iterator[Localized]:
    """Localize for the training inside the context: ``localized/`` of the run directory is what ``localize`` writes.

    ``budget`` and ``strategy`` default to 0.3 and "del", ``seed`` to the run's. What was written is removed if the
    training is refused before its first checkpoint. With ``resume`` and a checkpoint the mask that is there is read and
    not made again: a GPU may round a gradient in another way, and the checkpoint fits one mask only.
    """
    directory = output_dir / LOCALIZED
    budget, strategy = BUDGET if budget is None else budget, "del" if strategy is None else strategy
    seed = run.config.seed if seed is None else seed
    if resume and (output_dir / CHECKPOINT).exists() and (directory / SUMMARY).is_file():  # written last
        mask = _read_again(directory / MASK, run, model, {"budget": budget, "strategy": strategy, "seed": seed})
        yield Localized(mask, describe_mask(mask, directory / MASK), {"localize": 0.0})
        return
    options: dict[str, Any] = {"preset": "paper", "per_example": False}  # the command's defaults
    found = localize(run, model, directory, budget=budget, strategy=strategy, seed=seed, **options)
    try:
        yield found
    except InputError:
        if not (output_dir / CHECKPOINT).exists():
            discard_localized(output_dir)
        raise


def is_of_another(output_dir: Path, mask: Mask | None) -> bool:
    """Return whether ``localized/`` of the run directory has another mask than the run: it is of an earlier run."""
    path = output_dir / LOCALIZED / MASK
    return path.is_file() and (mask is None or Mask.load(path).digest != mask.digest)


def discard_localized(output_dir: Path) -> None:
    """Remove what ``localize`` wrote to ``localized/``, and the directory if nothing else is there."""
    directory = output_dir / LOCALIZED
    for name in (SUMMARY, MASK):
        (directory / name).unlink(missing_ok=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _read_again(path: Path, run: Run, model: nn.Module, settings: dict[str, Any]) -> Mask:
    """Load the mask of the run that is resumed. InputError if it is of other settings, another network or set."""
    mask = Mask.load(path)
    for name, value in settings.items():
        if mask.metadata.get(name) != value:
            raise InputError(
                f"expected the {name} {mask.metadata.get(name)} of the run to resume, got {value}; repeat the command "
                "that was stopped, or leave --resume out"
            )
    if mask.metadata.get("digests") != {"model": digest_state(model.state_dict()), **run.digests()}:
        raise InputError(f"'{path}' is not of this network and forget set; resume in the directory of its own run")
    return mask
