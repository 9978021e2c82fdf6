"""The files of a job's networks, and its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from delfast.arguments import describe
from delfast.batches import LossFn
from delfast.errors import InputError
from delfast.files import load_state, save_state, write_atomically
from delfast.jobs.source import ADVICE, Source
from delfast.seeding import seeded


def load_network(source: Source, file: Path, make_model: Callable[[], nn.Module]) -> nn.Module:
    """Return the network whose state dict a file holds."""
    state = load_state(file)
    with seeded(0):  # values that the state replaces: draw none from the process's generator
        model = make_model()
    try:
        model.load_state_dict(state)
    except RuntimeError:
        raise InputError(
            f"'{file}' does not fit model() of '{source.path}': other names or shapes; pass a file of this network"
        ) from None
    return model


def save_network(source: Source, model: nn.Module, file: Path) -> None:
    """Write a network to a file, whole or not at all: by the job's ``save``, or else its state dict."""
    if source.function("save") is None:
        save_state(file, model.state_dict())
        return

    def write(partial: Path) -> None:
        named = partial.with_name(f"{partial.name}-{file.name}")  # some formats are chosen by the suffix
        with _passing_system_errors():
            source.call("save", model, named)
        if not named.is_file():
            raise InputError(
                f"{source.place('save')}: expected save(model, path) to write the file 'path', it did not; {ADVICE}"
            )
        named.rename(partial)

    write_atomically(file, write)


@contextmanager
def _passing_system_errors() -> Iterator[None]:
    """Raise the system's own error, such as a full disk, where the job's ``save`` failed by one."""
    try:
        yield
    except InputError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise


def checked_loss(source: Source) -> LossFn | None:
    """Return the job's ``loss_fn``, which then refuses, with file and line, a result of another kind."""
    function = source.function("loss_fn")
    if function is None:
        return None

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        losses = function(model, batch)
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            shown = str(tuple(losses.shape)) if isinstance(losses, Tensor) else describe(losses)
            raise InputError(
                f"{source.place('loss_fn')}: expected loss_fn to return per-example losses (N,), got {shown}; use "
                "reduction='none'"
            )
        return losses

    return loss_fn
