"""Free parameters, which no layer function uses: class tokens, position embeddings, temperatures, layer scales.

Where an operation broadcasts such a parameter over the examples (dim 0), each example gets its own copy: the same
values and, in the backward pass, its own gradient. The copies share their memory. A computation on parameters
alone before that (``temperature.exp()``, ``position[:, :n]``) is stored as a function, which ``vmap`` repeats per copy
where its result and the data are combined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from delfast.errors import one_line

MAX_COPY_ELEMENTS = 2**26  # in the per-example gradients of one parameter

ELEMENTWISE = {
    *("add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "pow", "where"),
    *("maximum", "minimum", "lerp", "addcmul", "addcdiv", "truediv", "radd", "rmul", "rtruediv", "rdiv", "rpow"),
    *("iadd", "isub", "imul", "itruediv"),
}
EXPAND = {"expand", "expand_as", "broadcast_to"}
# functions that stop the gradient
STOPS = {torch.Tensor.detach, vars(torch._C.TensorBase)["data"].__get__, vars(torch._C.TensorBase)["grad"].__get__}
SAME_SHAPE = {"to", "contiguous", "clone", "float", "double", "half", "bfloat16", "type", "type_as", "dropout"}


@dataclass(frozen=True)
class Derived:
    """A tensor computed from parameters alone.

    compute: returns the tensor from the parameters' values, by name.
    row: the slice (1, ...) that the tensor repeats along dim 0, if its slices are known to be equal.
    """

    tensor: Tensor
    names: tuple[str, ...]
    compute: Callable[[Mapping[str, Tensor]], Tensor]
    row: Derived | None = None


class FreeParameters:
    """The free parameters of one pass, what is computed from them alone, and their copies.

    ``copies``: (name, rows) -> leaf (rows, *shape). The slices of its gradient along dim 0 belong to one row each.
    """

    def __init__(self, parameters: Mapping[str, Tensor], unknown: dict[str, str]) -> None:
        self.parameters = parameters
        self.unknown = unknown
        self.copies: dict[tuple[str, int], Tensor] = {}
        self._derived = {id(p): Derived(p, (n,), itemgetter(n)) for n, p in parameters.items()}
        self._versions = {id(p): p._version for p in parameters.values()}

    def names_in(self, value: Any) -> list[str]:
        """Return the parameters that the tensors in ``value`` are or are computed from."""
        names: list[str] = []
        self._find(value, names)
        return list(dict.fromkeys(names))

    def _find(self, value: Any, names: list[str]) -> None:
        derived = self._derived.get(id(value))  # no generators: this runs for every operation of the network
        if derived is not None:
            names += derived.names
        elif isinstance(value, (tuple, list)):
            for item in value:
                self._find(item, names)
        elif isinstance(value, dict):
            for item in value.values():
                self._find(item, names)

    def use(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[bool, Any]:
        """Return (True, result) for an operation with a rule; else (False, None), and nothing is computed."""
        name = str(getattr(func, "__name__", "")).strip("_")
        own = [self._derived[id(t)] for t in tensors_in((args, kwargs)) if id(t) in self._derived]
        others = [t for t in tensors_in((args, kwargs)) if id(t) not in self._derived]
        # after an in-place change, now or before, the stored functions no longer compute these tensors
        changed = [d for d in own if d.tensor._version != self._versions[id(d.tensor)]]
        if "out" in kwargs or changed or (_in_place(func) and id(args[0]) in self._derived):
            return False, None
        if any(n in self.unknown for derived in own for n in derived.names):
            return False, None
        meet = None
        if name in ELEMENTWISE:
            meet = self._elementwise
        elif name in ("cat", "concat", "concatenate", "stack"):
            meet = self._joined
        elif name == "matmul":
            meet = self._matmul
        if meet is not None and self._is_data(own, others):
            replaced = meet(name, args, kwargs, own, others)
            if replaced is None:
                return False, None
            return True, replaced if isinstance(replaced, Tensor) else func(*replaced[0], **replaced[1])
        if any(t.requires_grad or (t.is_floating_point() and name not in ELEMENTWISE) for t in others):
            return False, None
        return self._parameters_alone(func, name, args, kwargs, own)

    def _is_data(self, own: list[Derived], others: list[Tensor]) -> bool:
        """Return whether an operation mixes in more than a constant that fits into the parameters' shape."""
        if any(t.requires_grad for t in others):
            return True
        try:
            mine = [derived.tensor for derived in own]
            return _broadcast([*mine, *others]) != _broadcast(mine)
        except RuntimeError:
            return bool(others)

    def _elementwise(self, name: str, args: Any, kwargs: Any, own: list[Derived], others: list[Tensor]) -> Any:
        shape = _broadcast(tensors_in((args, kwargs)))
        swap: dict[int, Tensor] = {}
        for derived in own:
            copies = self._aligned(derived, shape)
            if copies is None:
                return None
            swap[id(derived.tensor)] = copies
        return replace(args, swap), replace(kwargs, swap)

    def _aligned(self, derived: Derived, shape: torch.Size) -> Tensor | None:
        """Return copies (rows, ...) that broadcast as ``derived`` does in an operation with a result of ``shape``."""
        if not shape:
            return None
        rows, ndim = shape[0], derived.tensor.ndim
        if ndim < len(shape):
            copies = self._copy(derived, rows)
            return None if copies is None else copies.reshape(rows, *[1] * (len(shape) - 1 - ndim), *copies.shape[1:])
        if derived.tensor.shape[0] != 1:
            if derived.row is None or derived.tensor.shape[0] != rows:
                return None
            derived = derived.row
        copies = self._copy(derived, rows)
        return None if copies is None else copies.flatten(0, 1)

    def _joined(self, name: str, args: Any, kwargs: Any, own: list[Derived], others: list[Tensor]) -> Any:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        shape = others[0].shape
        if dim % (len(shape) + (name == "stack")) == 0:
            return None
        swap: dict[int, Tensor] = {}
        for derived in own:
            copies = self._aligned(derived, shape) if derived.tensor.ndim == len(shape) else None
            if copies is None:
                return None
            swap[id(derived.tensor)] = copies
        return replace(args, swap), replace(kwargs, swap)

    def _matmul(self, name: str, args: Any, kwargs: Any, own: list[Derived], others: list[Tensor]) -> Tensor | None:
        """Compute data (rows, *, F) @ parameter (F, M) with one copy of the parameter per row."""
        if len(own) != 1 or len(others) != 1 or kwargs or len(args) != 2 or args[0] is not others[0]:
            return None
        data, weight = others[0], own[0].tensor
        if data.ndim < 2 or weight.ndim != 2:
            return None
        copies = self._copy(own[0], data.shape[0])
        if copies is None:
            return None
        if data.ndim == 2:
            return torch.matmul(data.unsqueeze(1), copies).squeeze(1)
        return torch.matmul(data, copies.reshape(data.shape[0], *[1] * (data.ndim - 3), *weight.shape))

    def _copy(self, derived: Derived, rows: int) -> Tensor | None:
        """Return one copy of ``derived`` per row, (rows, *shape); None if the gradients would need too much memory."""
        sizes = [derived.tensor.numel(), *(self.parameters[name].numel() for name in derived.names)]
        if max(sizes) * rows > MAX_COPY_ELEMENTS:
            return None
        leaves = {name: self._leaf(name, rows) for name in derived.names}
        try:
            result: Tensor = torch.func.vmap(derived.compute)(leaves)
        except RuntimeError as error:  # an operation that vmap does not support
            for name in derived.names:
                self.unknown.setdefault(name, f"is used where vmap fails ({one_line(error)})")
            return None
        return result

    def _leaf(self, name: str, rows: int) -> Tensor:
        if (name, rows) not in self.copies:
            parameter = self.parameters[name].detach()
            self.copies[name, rows] = parameter.expand(rows, *parameter.shape).requires_grad_()
        return self.copies[name, rows]

    def _parameters_alone(
        self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], own: list[Derived]
    ) -> tuple[bool, Any]:
        if func in STOPS:
            return True, func(*args, **kwargs)
        output = func(*args, **kwargs)
        if not any(t.is_floating_point() for t in tensors_in(output)):
            return True, output  # shapes, numbers, comparisons
        names = tuple(dict.fromkeys(n for derived in own for n in derived.names))

        def compute(values: Mapping[str, Tensor]) -> Any:
            swap = {id(derived.tensor): derived.compute(values) for derived in own}
            return func(*replace(args, swap), **replace(kwargs, swap))

        if isinstance(output, Tensor):
            row = self._row(func, name, output, args, kwargs, own[0]) if len(own) == 1 else None
            self._remember(Derived(output, names, compute, row))
        else:
            for index, part in enumerate(output):
                if isinstance(part, Tensor):
                    self._remember(Derived(part, names, partial(_part, index, compute)))
        return True, output

    def _remember(self, derived: Derived) -> None:
        if id(derived.tensor) not in self._derived:  # some operations return their argument
            self._derived[id(derived.tensor)] = derived
            self._versions[id(derived.tensor)] = derived.tensor._version

    def _row(self, func: Any, name: str, output: Tensor, args: Any, kwargs: Any, source: Derived) -> Derived | None:
        """Return the slice that ``output`` repeats along dim 0, if this operation repeats it or keeps it repeated."""
        start, repeated = source, func
        if name in SAME_SHAPE and source.row is not None:
            start = source.row
        elif output.ndim == 0 or (source.tensor.ndim == output.ndim and source.tensor.shape[0] != 1):
            return None
        elif name in EXPAND:

            def repeated(*args: Any, **kwargs: Any) -> Any:
                return func(*args, **kwargs)[:1]

        elif name == "repeat" and len(args) > 1:
            sizes = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:]
            args = (args[0], (1, *sizes[1:]))
        else:
            return None

        def compute(values: Mapping[str, Tensor]) -> Any:
            swap = {id(source.tensor): start.compute(values)}
            return repeated(*replace(args, swap), **replace(kwargs, swap))

        swap = {id(source.tensor): start.tensor}
        return Derived(repeated(*replace(args, swap), **replace(kwargs, swap)), source.names, compute)


def _part(index: int, compute: Callable[..., Any], values: Mapping[str, Tensor]) -> Any:
    return compute(values)[index]


def _in_place(func: Any) -> bool:
    name = str(getattr(func, "__name__", ""))
    return (name.endswith("_") and not name.endswith("__")) or name in (
        "__iadd__",
        "__isub__",
        "__imul__",
        "__setitem__",
    )


def _broadcast(tensors: Iterable[Tensor]) -> torch.Size:
    shape: torch.Size = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
    return shape


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def replace(value: Any, swap: Mapping[int, Tensor]) -> Any:
    """Return ``value`` with every tensor whose id is in ``swap`` replaced."""
    if isinstance(value, Tensor):
        return swap.get(id(value), value)
    if isinstance(value, (tuple, list)):
        items = [replace(item, swap) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: replace(item, swap) for key, item in value.items()}
    return value
