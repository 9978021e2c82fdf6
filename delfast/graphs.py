"""Captured passes: a function of a batch, recorded in a CUDA graph for each shape of batch, and replayed.

A pass of many small kernels waits for the host that launches them. A graph launches them all at once. The function is
first recorded twice, on the first batch of a shape and on another of its form (see ``recording``). Then it is captured,
replayed from the same state, and the replay is compared with the first run (see ``snapshots``). The replay counts; the
runs before do not. Where a step finds a difference, that shape runs as it is from then on, and the reason is logged.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from delfast.batches import Indexed, LossFn, map_tensors, tensors_of
from delfast.device_checks import alone
from delfast.errors import InputError, one_line
from delfast.execution import CudaGraphs
from delfast.hooks import foreign_hooks
from delfast.naming import is_parallel
from delfast.recording import Recorder
from delfast.snapshots import Fingerprint, Snapshot, State

Function = Callable[[Any], Any]

MAX_SHAPES = 16  # captured for one function: each holds its activations

log = logging.getLogger("delfast")


class Backend(Protocol):
    """A device that can record the kernels of a function and launch them again."""

    device: torch.device

    def run(self, function: Callable[[], Any]) -> Any:
        """Run the function as it is, where ``capture`` will run it."""

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return the replay of the function's kernels, and the result that each replay writes into."""


class CudaBackend:
    """CUDA graphs of one device, with one memory pool for all."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do meanwhile, pinning memory for example, is their own
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result


BACKENDS: dict[str, Callable[[torch.device], Backend]] = {"cuda": CudaBackend}


def make_backend(cuda_graphs: CudaGraphs, device: torch.device, loss_fn: LossFn | None = None) -> Backend | None:
    """Return the backend of a job on ``device``; None if nothing is to be captured.

    With a caller's ``loss_fn``, True states that it is a pure function of tensors, and "auto" captures nothing. A
    function with a true attribute ``is_pure`` is one of delfast's own.
    InputError for True on a device without graphs.
    """
    check_cuda_graphs(cuda_graphs, device)
    make = BACKENDS.get(device.type)
    is_pure = cuda_graphs is True or loss_fn is None or getattr(loss_fn, "is_pure", False)
    return make(device) if make is not None and cuda_graphs is not False and is_pure else None


def check_cuda_graphs(cuda_graphs: CudaGraphs, device: torch.device) -> None:
    """Raise InputError for True on a device without graphs."""
    if cuda_graphs is True and device.type not in BACKENDS:
        raise InputError(f"expected a model on a CUDA device for cuda_graphs=True, got {device}; pass 'auto'")


class Graphed:
    """A function of a batch whose runs are replays of a graph where that can be.

    function: writes to the tensors of ``state()``, and returns tensors in tuples, lists and dicts, or None.
    eager: what runs instead where nothing is captured; by default the function.
    state: returns, by any names, every tensor that the function may write and that outlives a run: parameters, buffers,
        an optimizer's state, sums. The first run may replace a tensor, or add one, which begins with zeros.
    is_frequent: returns whether enough batches of this shape come in the whole job. The answer may depend on the batch
        and the job's settings alone: a resumed job must capture what the uninterrupted job captures.
    settings: returns the values that a capture fixes; if they change, another graph is captured.
    vary: changes values in ``state()`` that the caller sets for each run, learning rates for example.
    release: frees what a run leaves behind, gradients for example, before a capture allocates it again.
    after_replay: records in Python that a run has been.
    watched: the modules and the optimizer whose hooks would not run in a replay.
    """

    def __init__(
        self,
        function: Function,
        backend: Backend | None,
        *,
        eager: Function | None = None,
        state: Callable[[], State],
        is_frequent: Callable[[Any], bool] = lambda batch: True,
        settings: Callable[[], Hashable] = lambda: None,
        vary: Callable[[], None] = lambda: None,
        release: Callable[[], None] = lambda: None,
        after_replay: Callable[[], None] = lambda: None,
        watched: tuple[nn.Module | Optimizer, ...] = (),
    ) -> None:
        self.function = function
        self.backend = backend
        self.eager = function if eager is None else eager
        self.state = state
        self.is_frequent = is_frequent
        self.settings = settings
        self.vary = vary
        self.release = release
        self.after_replay = after_replay
        self.watched = watched
        self._graphs: dict[Hashable, _Graph] = {}
        self._refused: set[Hashable] = set()
        self._reasons: set[str] = set()

    def __call__(self, batch: Any) -> Any:
        """Return the function's result for a batch: in a replay, a copy of the graph's."""
        if self.backend is None or not self.is_frequent(batch):
            return self.eager(batch)
        odd = _odd_part(batch)
        if odd is not None:
            self._report(f"batches with {odd}")
            return self.eager(batch)
        key = (_form(batch), self.settings())
        if key in self._refused:
            return self.eager(batch)
        graph = self._graphs.get(key)
        if graph is not None and graph.addresses == _addresses(self.state()):
            found = graph.run(batch)
            self.after_replay()
            return found
        self._graphs.pop(key, None)  # the state was replaced, by load_state_dict() for example
        if len(self._graphs) >= MAX_SHAPES:
            self._refuse(key, f"more than {MAX_SHAPES} shapes of batches")
            return self.eager(batch)
        with alone() as is_alone:
            reason = self._obstacle() if is_alone else "a pass of another thread at the same time"
            if reason is None:
                return self._first(key, batch, self.backend)
        self._report(reason)
        self.backend = None  # for all shapes
        return self.eager(batch)

    def check_hooks(self) -> None:
        """Capture and replay nothing any more if there are foreign hooks now, which replays would not run.

        For the beginning of each pass: a hook that is registered within a pass runs from the next pass on.
        """
        reason = foreign_hooks(self.watched) if self._graphs else None
        if reason is not None:
            self._report(reason)
            self._graphs.clear()
            self.backend = None

    def _modules(self) -> list[nn.Module]:
        return [module for each in self.watched if isinstance(each, nn.Module) for module in each.modules()]

    def _obstacle(self) -> str | None:
        """Return why nothing can be captured now."""
        if torch.is_inference_mode_enabled():
            return "torch.inference_mode()"
        if any(isinstance(each, nn.Module) and is_parallel(each) for each in self.watched):
            return "a model in DistributedDataParallel or DataParallel"
        if any(map(_is_compiled, self._modules())):
            return "a model compiled by torch.compile"
        modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]  # type: ignore[no-untyped-call]
        if modes:
            return f"a mode of torch ({type(modes[0]).__name__})"
        return foreign_hooks(self.watched)

    def _refuse(self, key: Hashable, reason: str) -> None:
        self._refused.add(key)
        self._report(reason)

    def _report(self, reason: str) -> None:
        if reason not in self._reasons:
            self._reasons.add(reason)
            log.warning("no CUDA graph is used, each step is launched by the host: %s", reason)

    def _first(self, key: Hashable, batch: Any, backend: Backend) -> Any:
        """Run the first batch of a shape; capture the shape, and return the replay's result if it is right.

        Of the runs before, which do not count, nothing is kept but a copy of the state from which all of them begin.
        """
        static = map_tensors(batch, lambda t: t.detach().to(backend.device, copy=True))
        before = Snapshot(self.state(), backend.device, self._modules())
        expected: Fingerprint | None = None
        try:
            runs = [Recorder(self.state().values(), backend.device)]
            with runs[0]:
                result = backend.run(lambda: self.function(static))
            expected = Fingerprint(result, before, self.state())
            moved = before.moved(self.state())
            reason = before.changed_on_the_host()
            reason = reason or runs[0].reason or self._difference(runs, batch, static, before, backend)
            if reason is None:
                before.restore(self.state())
                self.release()
                replay, result = backend.capture(lambda: self.function(static))
                before.restore(self.state())
                graph = _Graph(static, replay, result, moved, _addresses(self.state()))
                found = graph.run(batch)
                if expected.is_near(Fingerprint(found, before, self.state())):
                    self._graphs[key] = graph
                    self.after_replay()
                    return found
                reason = "a replay differs from the run that it was captured from"
        except Exception as error:
            if expected is None:
                raise  # of the batch itself
            reason = f"the capture failed ({one_line(error)})"
        finally:
            if key not in self._graphs:
                before.restore(self.state())
        self._refuse(key, reason)
        return self.eager(batch)

    def _difference(
        self, runs: list[Recorder], batch: Any, static: Any, before: Snapshot, backend: Backend
    ) -> str | None:
        """Record the function with other batches and values, and return what differs.

        The first run may make what later runs find, an optimizer's state for example: then the next two are compared.
        """
        other = _varied(static)
        for _ in range(2):
            before.restore(self.state())
            runs.append(Recorder(self.state().values(), backend.device))
            self.vary()
            values = _with_tensors_of(static, other)
            with runs[-1]:
                backend.run(functools.partial(self.function, values))
            copy_into(static, batch)
            reason = runs[-1].reason or runs[-2].difference(runs[-1])
            if reason is None:
                break
            other = _varied(other)
        return reason


class _Graph:
    """The graph of one shape of batch."""

    def __init__(
        self, static: Any, replay: Callable[[], None], result: Any, moved: list[Tensor], addresses: list[int]
    ) -> None:
        self.static, self.replay, self.result = static, replay, result
        self.moved, self.addresses = moved, addresses

    def run(self, batch: Any) -> Any:
        """Replay the graph on a batch. The copies and the replay are on one stream, so neither overtakes the other."""
        copy_into(self.static, batch)
        self.replay()
        # the graph writes past autograd: a backward pass through an older value must not pass unnoticed
        torch.autograd.graph.increment_version(self.moved)
        return map_tensors(self.result, lambda t: t.detach().clone())


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def _addresses(state: State) -> list[int]:
    return [tensor.data_ptr() for tensor in state.values()]


def copy_into(static: Any, batch: Any) -> None:
    """Copy every tensor of ``batch`` into the tensor of ``static``, a batch of the same form, at its place."""
    source = iter(tensors_of(batch))
    map_tensors(static, lambda t: t.copy_(next(source), non_blocking=True))


def _form(value: Any) -> Hashable:
    """Return what one graph fixes of a batch: shapes, dtypes, strides, names; numbers are compared by ``Recorder``."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, Indexed):
        return (weakref.ref(value.source), _form(value.rows))  # the graph reads from this source
    if isinstance(value, Mapping):
        return tuple((name, _form(item)) for name, item in value.items())
    if isinstance(value, (tuple, list)):
        return (len(value), *(_form(item) for item in value if type(item) is not int))
    if isinstance(value, (bool, str, bytes, type(None))):
        return value
    return type(value).__name__


def _odd_part(value: Any) -> str | None:
    """Return a part of a batch, as text, that cannot be copied into a graph, or whose tensors cannot be found."""
    if isinstance(value, PackedSequence):
        return "a PackedSequence"
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and not value.is_nested and not value.requires_grad
        return None if plain else "sparse or nested tensors, or tensors that require a gradient"
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return next((odd for odd in map(_odd_part, value) if odd is not None), None)
    if isinstance(value, numpy.ndarray):
        return None if value.dtype.kind in "biuf" else "arrays that are no numbers"
    known = (Indexed, bool, int, float, str, bytes, type(None))
    return None if isinstance(value, known) else f"parts of type {type(value).__name__}"


def _varied(value: Any) -> Any:
    """Return a batch of the same form with other values: examples in another order, other numbers."""
    if isinstance(value, Tensor):
        return value.flip(0) if value.ndim else value + value.new_ones(())
    if isinstance(value, bool):
        return value
    if isinstance(value, numpy.ndarray):
        return value if value.dtype.kind == "b" else value + 1
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, dict):
        return {name: _varied(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(map(_varied, value))
    return map_tensors(value, _varied)


def _with_tensors_of(static: Any, values: Any) -> Any:
    """Return ``values`` with its tensors replaced by those of ``static``, into which they are copied."""
    copy_into(static, values)
    tensors = iter(tensors_of(static))
    return map_tensors(values, lambda _: next(tensors))
