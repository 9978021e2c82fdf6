"""The error of one process of a job: its text for the other processes, and errors that cannot be sent to them.

Processes that hold a network together exchange tensors inside its forward and backward passes. A process that fails
there cannot reach the others: they wait for the next tensors of the pass. It raises its error at once, so that its end
ends their wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist
from torch import nn

from delfast.errors import InputError, one_line, printable
from delfast.sharding import is_laid_out

TEXT_BYTES = 4096  # of an error's text that reach the other processes
NOTE = "inside a pass of processes that hold the model together; the others wait until this process ends"

Failure = TypeVar("Failure", bound=Exception)

_MARK = "_delfast_raised_by"  # in an error that contexts around do not exchange: "all" or "one"
contexts = local()  # .inside: whether this thread is inside a job's context; .handled: the error handled around it


def is_inside() -> bool:
    """Return whether this thread is inside a context of a job, which removes the marks of what leaves it."""
    return bool(getattr(contexts, "inside", False))


def raised_by_all(error: Failure) -> Failure:
    """Return an error that every process of a job raises by itself, marked, so that they do not exchange it."""
    vars(error)[_MARK] = "all"  # past a __setattr__ of its own, such as a frozen dataclass's
    return error


def raised_by_one(error: Failure) -> Failure:
    """Return an error that its process raises at once, marked, so that it does not wait for the others."""
    if is_inside() and not is_raised_by_one(error):
        vars(error)[_MARK] = "one"
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(f"on rank {dist.get_rank()}, {NOTE}")
    return error


def is_exchanged(error: BaseException) -> bool:
    """Return whether the other processes can be reached with the error, and have not raised it already.

    They cannot be reached after an error of torch's own collectives: they are gone, or wait for other tensors.
    """
    return not any(_MARK in vars(each) or _left_a_collective(each) for each in _chain(error))


def is_raised_by_one(error: BaseException) -> bool:
    """Return whether an error is one of this process alone, which it raises at once."""
    return any(vars(each).get(_MARK) == "one" for each in _chain(error))


def forget_marks(error: BaseException) -> None:
    """Remove the marks of an error that leaves a call: a caller may raise the same exception in a later call."""
    for each in _chain(error):
        vars(each).pop(_MARK, None)


@contextmanager
def at_once(is_joint: bool = True) -> Iterator[None]:
    """Let no context around exchange an error that is raised inside, if ``is_joint``."""
    try:
        yield
    except Exception as error:
        if is_joint and is_exchanged(error):
            raised_by_one(error)
        raise


@contextmanager
def at_once_in_forward(*networks: nn.Module) -> Iterator[None]:
    """Let no context around exchange an error that leaves a module of a network in whose passes tensors are exchanged.

    An error of the ``loss_fn``, before or after the forward pass, is exchanged.
    """
    try:
        yield
    except Exception as error:
        is_joint = dist.is_available() and dist.is_initialized() and is_exchanged(error)
        if is_joint and any(_left_a_module(error, network) for network in networks):
            raised_by_one(error)
        raise


def _left_a_module(error: BaseException, network: nn.Module) -> bool:
    """Return whether the error was raised in the forward pass of a module of a network whose passes exchange tensors.

    The frames of the traceback show it, whichever modules a ``loss_fn`` calls, compiled or not.
    """
    called = [frame.f_locals.get("self") for frame in _frames(error) if frame.f_code is _CALL]
    if not called:
        return False
    synchronized = any(isinstance(module, nn.SyncBatchNorm) and module.training for module in network.modules())
    if not (synchronized or is_laid_out(network)):
        return False
    own = set(map(id, network.modules()))
    return any(id(module) in own for module in called)


def _left_a_collective(error: BaseException) -> bool:
    return any(frame.f_code.co_filename == dist.distributed_c10d.__file__ for frame in _frames(error))


_CALL = nn.Module._wrapped_call_impl.__code__  # which every call of a module passes through


def _frames(error: BaseException) -> Iterator[Any]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and the errors that it replaced: a handler or a ``finally`` may raise another one.

    The error that a caller of the job handles meanwhile is not one of them.
    """
    seen = {id(getattr(contexts, "handled", None))}
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__context__ if found.__cause__ is None else found.__cause__


# Texts


def encoded(error: Exception, rank: int) -> bytes:
    """Return the text of any error, with its rank, in at most TEXT_BYTES bytes of UTF-8."""
    name = type(error).__name__
    try:
        words = str(error) if isinstance(error, InputError) else f"{name}: {one_line(error)}"
    except Exception:  # of its own __str__: only the name can be reported
        words = name
    place = f" (on rank {rank})".encode()
    return printable(words).encode()[: TEXT_BYTES - len(place)].decode(errors="ignore").encode() + place


def refuse(text: str, *, is_input: bool, cause: Exception | None = None) -> NoReturn:
    """Raise the error of another process, or one that all processes have found."""
    error = raised_by_all((InputError if is_input else RuntimeError)(text))
    # a context manager would take an error whose cause is StopIteration for its own generator's
    raise error from (None if isinstance(cause, StopIteration) else cause)
