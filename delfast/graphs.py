"""Captured passes: a function of a batch, recorded in a CUDA graph for each shape of batch, and replayed.

A pass of many small kernels waits for the host that launches them. A graph launches them all at once. Before a shape is
captured, its first batch runs as it is; then the function is recorded twice (see ``recording``), captured, replayed
from the same state, and the replay is compared with the first result. Where any of these steps finds a difference, that
shape runs as it is from then on, and the reason is logged once.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from delfast.batches import Indexed, LossFn, map_tensors
from delfast.errors import InputError, one_line
from delfast.execution import CudaGraphs
from delfast.naming import is_parallel
from delfast.recording import Recorder

Function = Callable[[Any], Any]
State = dict[Hashable, Tensor]

MAX_SHAPES = 16  # captured for one function: each holds its activations
# Maximum difference of a replay, relative to the norm of what the run computes: far above the rounding of kernels that
# add in any order, far below the effect of a step that is missing or made with another value
MAX_DIFFERENCE = 2**-6

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
        # thread_local: another thread may train another network meanwhile
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
    state: returns, by any names, every tensor that the function may write and that outlives a run: parameters, buffers,
        an optimizer's state, sums. The first run may replace a tensor, or add one, which begins with zeros.
    is_frequent: returns whether enough batches of this shape come in the whole job. The answer may depend on the batch
        and the job's settings alone: a resumed job must capture what the uninterrupted job captures.
    settings: returns the values that a capture fixes; if they change, another graph is captured.
    vary: changes values in ``state()`` that the caller sets for each run, learning rates for example.
    watched: the modules and the optimizer whose hooks would not run in a replay.
    """

    def __init__(
        self,
        function: Function,
        backend: Backend | None,
        *,
        state: Callable[[], State],
        is_frequent: Callable[[Any], bool] = lambda batch: True,
        settings: Callable[[], Hashable] = lambda: None,
        vary: Callable[[], None] = lambda: None,
        watched: tuple[nn.Module | Optimizer, ...] = (),
    ) -> None:
        self.function = function
        self.backend = backend
        self.state = state
        self.is_frequent = is_frequent
        self.settings = settings
        self.vary = vary
        self.watched = watched
        self._graphs: dict[Hashable, _Graph] = {}
        self._refused: set[Hashable] = set()
        self._reasons: set[str] = set()

    def __call__(self, batch: Any) -> Any:
        """Return the function's result for a batch: in a replay, a copy of the graph's."""
        if self.backend is None or not self.is_frequent(batch):
            return self.function(batch)
        key = (_form(batch), self.settings())
        if key in self._refused:
            return self.function(batch)
        graph = self._graphs.get(key)
        if graph is not None and graph.addresses == _addresses(self.state()):
            return graph.run(batch)
        self._graphs.pop(key, None)  # the state was replaced, by load_state_dict() for example
        reason = self._obstacle(batch)
        if reason is not None:
            self._refuse(key, reason)
            return self.function(batch)
        return self._first(key, batch, self.backend)

    def check_hooks(self) -> None:
        """Drop the graphs if there are foreign hooks by now, which replays would not run."""
        if self._graphs:
            reason = foreign_hooks(self.watched)
            if reason is not None:
                for key in self._graphs:
                    self._refuse(key, reason)
                self._graphs.clear()

    def _obstacle(self, batch: Any) -> str | None:
        """Return why this batch's shape cannot be captured now."""
        odd = _odd_part(batch)
        if odd is not None:
            return f"batches with parts of type {odd}"
        if len(self._graphs) >= MAX_SHAPES:
            return f"more than {MAX_SHAPES} shapes of batches"
        if any(isinstance(each, nn.Module) and is_parallel(each) for each in self.watched):
            return "a model in DistributedDataParallel or DataParallel"
        if any(_is_compiled(m) for each in self.watched if isinstance(each, nn.Module) for m in each.modules()):
            return "a model compiled by torch.compile"
        modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]  # type: ignore[no-untyped-call]
        if modes:
            return f"a mode of torch ({type(modes[0]).__name__})"
        return foreign_hooks(self.watched)

    def _refuse(self, key: Hashable, reason: str) -> None:
        self._refused.add(key)
        if reason not in self._reasons:
            self._reasons.add(reason)
            log.warning("no CUDA graph is used, each step is launched by the host: %s", reason)

    def _first(self, key: Hashable, batch: Any, backend: Backend) -> Any:
        """Run the first batch of a shape; capture the shape, and return the replay's result if it is right."""
        static = map_tensors(batch, lambda t: t.detach().to(backend.device, copy=True))
        before = _Snapshot(self.state(), backend.device)
        runs = [Recorder(self.state().values(), backend.device)]
        with runs[0]:
            expected = backend.run(lambda: self.function(static))
        after = _Snapshot(self.state(), backend.device)
        moved = before.moved(self.state())
        try:
            reason = self._difference(runs, batch, static, before, backend)
            if reason is None and after.drew_on_the_host(before):
                reason = "it draws from Python's or numpy's generator"
            if reason is None:
                before.restore(self.state())
                replay, result = backend.capture(lambda: self.function(static))
                before.restore(self.state())
                graph = _Graph(static, replay, result, moved, _addresses(self.state()))
                found = graph.run(batch)
                if _is_near(before, after, self.state(), expected, found):
                    self._graphs[key] = graph
                    return found
                reason = "a replay differs from the run that it was captured from"
        except Exception as error:
            reason = f"the capture failed ({one_line(error)})"
        except BaseException:
            after.restore(self.state())
            raise
        after.restore(self.state())
        self._refuse(key, reason)
        return expected

    def _difference(
        self, runs: list[Recorder], batch: Any, static: Any, before: _Snapshot, backend: Backend
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


class _Snapshot:
    """Copies of the tensors of a state, and the states of the generators."""

    def __init__(self, state: State, device: torch.device) -> None:
        self.values = {name: tensor.detach().clone() for name, tensor in state.items()}
        self._versions = {name: (tensor, tensor._version) for name, tensor in state.items()}
        self._device = device
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._host = (random.getstate(), numpy.random.get_state(legacy=False))

    def restore(self, state: State) -> None:
        """Put the values back; fill with zeros what the state has more. Version counters do not move."""
        for name, tensor in state.items():
            if name in self.values:
                tensor.data.copy_(self.values[name])
            else:
                tensor.data.zero_()
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)

    def moved(self, state: State) -> list[Tensor]:
        """Return the tensors of ``state`` that were written since, as autograd's version counters have it."""
        known = self._versions
        same = {name for name, t in state.items() if name in known and known[name][0] is t}
        return [t for name, t in state.items() if name not in same or known[name][1] != t._version]

    def drew_on_the_host(self, before: _Snapshot) -> bool:
        """Return whether Python's or numpy's generator moved since ``before``."""
        own, other = self._host, before._host
        return own[0] != other[0] or repr(own[1]) != repr(other[1])


def foreign_hooks(watched: Iterable[nn.Module | Optimizer]) -> str | None:
    """Return the first hook, as text, that a replay would not run; None if there is none but delfast's own."""
    for name, hook in _hooks(watched):
        own = getattr(hook, "func", hook)  # of a functools.partial
        if not str(getattr(own, "__module__", "")).startswith("delfast."):
            return f"{name} ({getattr(own, '__qualname__', type(own).__name__)})"
    return None


def _hooks(watched: Iterable[nn.Module | Optimizer]) -> Iterator[tuple[str, Any]]:
    tables: list[tuple[str, Any]] = [
        ("a hook of all modules", module_hooks._global_forward_hooks),
        ("a hook of all modules", module_hooks._global_forward_pre_hooks),
        ("a hook of all modules", module_hooks._global_backward_hooks),
        ("a hook of all modules", module_hooks._global_backward_pre_hooks),
        ("a hook of all optimizers", optimizer_hooks._global_optimizer_pre_hooks),
        ("a hook of all optimizers", optimizer_hooks._global_optimizer_post_hooks),
    ]
    for each in watched:
        if isinstance(each, Optimizer):
            tables += [("a hook of the optimizer", each._optimizer_step_pre_hooks)]
            tables += [("a hook of the optimizer", each._optimizer_step_post_hooks)]
            continue
        for name, module in each.named_modules():
            what = f"a hook of module '{name}'"
            tables += [(what, module._forward_hooks), (what, module._forward_pre_hooks)]
            tables += [(what, module._backward_hooks), (what, module._backward_pre_hooks)]
        for name, parameter in each.named_parameters():
            what = f"a hook of '{name}'"
            tables += [(what, parameter._backward_hooks), (what, parameter._post_accumulate_grad_hooks)]
    for what, table in tables:
        for hook in (table or {}).values():
            yield what, hook


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def _addresses(state: State) -> list[int]:
    return [tensor.data_ptr() for tensor in state.values()]


def copy_into(static: Any, batch: Any) -> None:
    """Copy every tensor of ``batch`` into the tensor of ``static``, a batch of the same form, at its place."""
    source = iter(_tensors(batch))
    map_tensors(static, lambda t: t.copy_(next(source), non_blocking=True))


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(batch, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


def _form(value: Any) -> Hashable:
    """Return what one graph fixes of a batch: shapes, dtypes, strides, names; numbers are compared by ``Recorder``."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, Indexed):
        return (value.source, _form(value.rows))  # the graph reads from this source
    if isinstance(value, Mapping):
        return tuple((name, _form(item)) for name, item in value.items())
    if isinstance(value, (tuple, list)):
        return (len(value), *(_form(item) for item in value if type(item) is not int))
    if isinstance(value, (bool, str, bytes, type(None))):
        return value
    return type(value).__name__


def _odd_part(value: Any) -> str | None:
    """Return the type of a part of a batch whose tensors, if any, could not be found."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return next((odd for odd in map(_odd_part, value) if odd is not None), None)
    known = (Tensor, Indexed, bool, int, float, str, bytes, type(None), numpy.ndarray)
    return None if isinstance(value, known) else type(value).__name__


def _varied(value: Any) -> Any:
    """Return a batch of the same form with other values: examples in another order, other numbers."""
    if isinstance(value, Tensor):
        return value.flip(0) if value.ndim else value + value.new_ones(())
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float, numpy.ndarray)):
        return value + 1
    if isinstance(value, dict):
        return {name: _varied(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(map(_varied, value))
    return map_tensors(value, _varied)


def _with_tensors_of(static: Any, values: Any) -> Any:
    """Return ``values`` with its tensors replaced by those of ``static``, into which they are copied."""
    copy_into(static, values)
    tensors = iter(_tensors(static))
    return map_tensors(values, lambda _: next(tensors))


def _is_near(before: _Snapshot, after: _Snapshot, state: State, expected: Any, found: Any) -> bool:
    """Return whether the state and the result of a replay are those of the first run, up to rounding.

    Differences of the state are measured against the step that the first run made, so that no step at all is found.
    """
    if state.keys() != after.values.keys():
        return False
    wrong = [_differs(tensor, after.values[name], before.values.get(name)) for name, tensor in state.items()]
    pairs = zip(_tensors(expected), _tensors(found), strict=True)
    wrong += [_differs(other, reference) for reference, other in pairs]
    return not wrong or not bool(torch.stack([flag.to(wrong[0].device) for flag in wrong]).any())


def _differs(value: Tensor, reference: Tensor, start: Tensor | None = None) -> Tensor:
    """Return whether a value differs from its reference, relative to the way from its start, or else from zero."""
    if not reference.is_floating_point():
        return (value != reference).any()
    with torch.no_grad():
        rounding = 8 * torch.finfo(reference.dtype).eps * _norm(reference)
        change = _norm(reference if start is None else reference - start)
        return ~(_norm(value - reference) <= MAX_DIFFERENCE * change + rounding)  # NaN counts as different


def _norm(tensor: Tensor) -> Tensor:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor.detach(), dtype=wide)
    return norm
