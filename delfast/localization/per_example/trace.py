"""A record of the calls of a forward pass, which decides whether a batch has its examples along the trial's axes.

The example axis of a tensor follows from shapes and calls alone, unless a call routes by data: indexing with tensors,
sorting, scattering. If a batch makes the trial's calls (sizes may grow with N) and moves nothing along the examples,
its examples lie along the trial's axes.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from delfast.layer_types import registered_functions
from delfast.localization.per_example.free import tensors_in

# Function names without leading and trailing underscores: "add" is torch.add, Tensor.add_ and Tensor.__add__.

# Functions that move values to positions which depend on values, or that give access to memory.
ROUTES = {
    *("masked_select", "masked_scatter", "nonzero", "nonzero_static", "argwhere", "unique", "unique2", "unique_dim"),
    *("unique_consecutive", "bincount", "histc", "take", "put", "index_put", "map", "map2", "apply", "combinations"),
    *("cartesian_prod", "as_strided", "as_strided_copy", "as_strided_scatter", "embedding_bag", "segment_reduce"),
    *("pack_padded_sequence", "pad_packed_sequence", "pad_sequence", "block_diag", "set", "resize", "resize_as"),
    *("to_sparse", "sparse_mask", "coalesce", "spmm", "sspaddmm", "smm", "hsmm", "hspmm", "dsmm", "saddmm"),
    *("fliplr", "flipud", "rot90", "msort", "renorm", "frombuffer"),
}
# Functions that expose or replace a tensor's memory: later changes of it cannot be recorded.
EXPORTS_MEMORY = {"set", "numpy", "array", "dlpack", "untyped_storage", "storage", "data_ptr"}
# Functions that move or combine values along a dim -> the position of that argument, and its default.
ALONG = {
    **dict.fromkeys(("gather", "scatter", "scatter_add", "scatter_reduce", "index_select", "index_add"), (1, None)),
    **dict.fromkeys(("index_copy", "index_fill", "index_reduce", "cumsum", "cumprod", "cummax", "cummin"), (1, None)),
    **dict.fromkeys(("logcumsumexp", "softmax", "log_softmax", "softmin", "flip"), (1, None)),
    **dict.fromkeys(("sort", "argsort"), (1, -1)),
    **dict.fromkeys(("topk", "kthvalue", "diff"), (2, -1)),
    **dict.fromkeys(("roll", "take_along_dim"), (2, None)),
}
# Functions that select a part along a dim. The trial's few examples may not show that parts are reordered.
PARTS = {
    **dict.fromkeys(("select", "narrow"), (1, None)),
    "unbind": (1, 0),
    **dict.fromkeys(("split", "chunk", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"), (2, 0)),
}
LOOKUPS = {"index_select", "gather", "take_along_dim"}  # in a constant, the result has the index's example axis
# Functions that return their argument or a copy, depending on strides, dtype and device.
SAME = {
    *("to", "contiguous", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda"),
    *("int", "long", "bool"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout"),
}
RANDOM = {"multinomial", "bernoulli", "normal", "uniform", "exponential", "poisson", "cauchy", "geometric", "random"}


class Trace:
    """The calls of one forward pass. ``record`` stores a call, or compares it with that of a ``reference``.

    Tensors are numbered in the order of their appearance, which identifies an argument by the call that made it.

    examples: the number of examples, N.
    inputs: the batch's tensors.
    owned: id -> the network's parameters and buffers.

    ``difference``: why the examples may lie along other axes than in the reference; None if they do not.
    ``is_other``: whether the reason is that other calls were made.
    """

    def __init__(
        self, examples: int, inputs: Sequence[Tensor], owned: Mapping[int, Tensor], reference: Trace | None = None
    ) -> None:
        self.examples = examples
        self.reference = reference
        self.difference: str | None = None
        if reference is not None and reference.examples == examples:
            self.difference = "has as many examples as its trial, so that no dim grows with their number"
        self.is_other = False
        self.calls: list[tuple[Any, list[Any], list[int]]] = []  # function, arguments, arguments that may grow with N
        self.shapes: list[torch.Size] = []  # by number
        self.origins: list[Any] = []
        self._count = 0
        self._inputs = {id(t): index for index, t in enumerate(inputs)}
        self._owned = owned
        self._held = list(inputs)  # keeps tensors alive that are identified by their id
        self._numbers: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._constant: set[int] = set()  # numbers of tensors that do not depend on the batch's values
        self._differentiable: set[int] = set()
        self._ranges: set[int] = set()  # torch.arange(n), along some dim

    def matches(self, losses: int) -> bool:
        """Return whether the finished forward pass equals the reference's; ``losses`` is its number of losses."""
        reference = self.reference
        if self.difference is None and (reference is None or self._count != len(reference.calls)):
            self._differ("makes fewer calls than its trial")
        if self.difference is None and reference is not None and losses != self.examples:
            self._differ("has another number of losses than of examples", is_other=False)
        return self.difference is None

    def record(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Record a call and its output, or compare them with the reference's."""
        if self.difference is not None:
            return
        name = str(getattr(func, "__name__", "")).strip("_")
        if name in EXPORTS_MEMORY:
            self._differ(f"exposes or replaces a tensor's memory ({name})", is_other=False)
            return
        if name == "setitem":
            output = args[0]
        elif not isinstance(output, Tensor) and next(tensors_in(output), None) is None:
            return  # shapes and numbers: later calls have them as arguments
        arguments: list[Any] = []
        sizes: list[int] = []
        numbers: list[int] = []
        self._describe(args, arguments, sizes, numbers)
        if kwargs:
            self._describe(kwargs, arguments, sizes, numbers)
        if self.reference is None:
            self.calls.append((func, arguments, sizes))
        elif self._is_next(func, arguments, sizes) and self._routes(func, name, args, kwargs, numbers):
            self._differ(f"routes by data ({name})", is_other=False)
        self._number_outputs(name, args, output, numbers, sizes)

    def _differ(self, reason: str, is_other: bool = True) -> None:
        if self.difference is None:
            self.difference, self.is_other = reason, is_other

    def _describe(self, value: Any, arguments: list[Any], sizes: list[int], numbers: list[int]) -> None:
        """Append a description of ``value``: integers, which may be multiples of N, to ``sizes``."""
        if isinstance(value, Tensor):
            number = self._number(value)
            numbers.append(number)
            arguments += (Tensor, number)
        elif type(value) is int:
            arguments.append(int)
            sizes.append(value)
        elif isinstance(value, (tuple, list)):
            arguments += (tuple, len(value))
            for item in value:
                self._describe(item, arguments, sizes, numbers)
        elif isinstance(value, dict):
            for key, item in value.items():
                arguments.append(key)
                self._describe(item, arguments, sizes, numbers)
        elif isinstance(value, slice):
            arguments.append(slice)
            for item in (value.start, value.stop, value.step):
                self._describe(item, arguments, sizes, numbers)
        elif hasattr(value, "__array__"):
            number = value.item() if isinstance(value, numpy.generic) else value
            if hasattr(number, "__array__"):
                self._differ("has NumPy arrays as arguments", is_other=False)
            else:
                self._describe(number, arguments, sizes, numbers)
        else:
            arguments.append(value if _is_plain(value) else type(value))

    def _number(self, t: Tensor) -> int:
        known = self._numbers.get(id(t))
        if known is not None and known[0]() is t:
            return known[1]
        if id(t) in self._owned:
            origin: Any = ("owned", id(t))
        elif id(t) in self._inputs:
            origin = ("input", self._inputs[id(t)])
        elif t.requires_grad:
            origin = None
            self._differ("is computed by an operation that cannot be captured", is_other=False)
        else:  # neither the network's nor the batch's: a floating-point tensor has to be the trial's
            origin = ("other", id(t) if t.is_floating_point() else 0)
            if self.reference is None:
                self._held.append(t)
        is_constant = origin is not None and origin[0] != "input" and (origin[0] == "owned" or origin[1] != 0)
        return self._append(t, origin, is_constant)

    def _append(self, t: Tensor, origin: Any, is_constant: bool) -> int:
        number = len(self.shapes)
        self.shapes.append(t.shape)
        self.origins.append(origin)
        self._numbers[id(t)] = (weakref.ref(t), number)
        if is_constant:
            self._constant.add(number)
        if t.requires_grad:
            self._differentiable.add(number)
        if self.reference is not None and self.difference is None:
            theirs = self.reference.shapes
            if number >= len(theirs) or origin != self.reference.origins[number]:
                self._differ("uses other tensors than its trial")
            elif t.shape != theirs[number] and not self._is_scaled(t.shape, theirs[number]):
                self._differ("makes tensors of other shapes than its trial")
        return number

    def _is_scaled(self, mine: Sequence[int], theirs: Sequence[int]) -> bool:
        """Return whether one dim differs, by the number of examples."""
        changed = [(a, b) for a, b in zip(mine, theirs, strict=False) if a != b]
        return len(mine) == len(theirs) and len(changed) == 1 and self._grows(*changed[0])

    def _grows(self, mine: int, theirs: int) -> bool:
        assert self.reference is not None
        each, rest = divmod(mine, self.examples)
        return not rest and theirs == each * self.reference.examples

    def _is_next(self, func: Any, arguments: list[Any], sizes: list[int]) -> bool:
        """Return whether the reference's next call is this one; moves on to it."""
        assert self.reference is not None
        if self._count < len(self.reference.calls):
            their_func, their_arguments, their_sizes = self.reference.calls[self._count]
            self._count += 1
            if func == their_func and arguments == their_arguments:
                pairs = zip(sizes, their_sizes, strict=True)
                if sizes == their_sizes or all(a == b or self._grows(a, b) for a, b in pairs):
                    return True
        self._differ("makes other calls than its trial")
        return False

    def _number_outputs(
        self, name: str, args: Sequence[Any], output: Any, numbers: list[int], sizes: list[int]
    ) -> None:
        first = args[0] if args else None
        if name in SAME and isinstance(output, Tensor) and isinstance(first, Tensor):
            self._numbers[id(output)] = (weakref.ref(output), numbers[0])
            return
        is_constant = name not in RANDOM and "rand" not in name and all(n in self._constant for n in numbers)
        if output is first and not is_constant and numbers[0] in self._constant:
            self._written(numbers[0], first)
        for t in (output,) if isinstance(output, Tensor) else tensors_in(output):
            number = self._append(t, name, is_constant)
            if self._is_range(name, args, numbers, sizes, t):
                self._ranges.add(number)
            elif self._loses_examples(number, numbers):
                self._differ(f"combines examples ({name})", is_other=False)

    def _is_range(self, name: str, args: Sequence[Any], numbers: list[int], sizes: list[int], t: Tensor) -> bool:
        """Return whether a call gives 0 to n - 1 along some dim: ``arange(n)``, or one with dims of size 1 added."""
        if name == "arange":
            return len(sizes) == len(args) and sizes[:-1] in ([], [0])
        if len(numbers) != 1 or numbers[0] not in self._ranges or t.numel() != self.shapes[numbers[0]].numel():
            return False
        parts = args[1] if name == "getitem" and isinstance(args[1], tuple) else args[1:2]
        plain = all(part is None or part is ... or isinstance(part, slice) for part in parts)
        return name in ("unsqueeze", "view", "reshape") or (name == "getitem" and plain)

    def _written(self, number: int, t: Tensor) -> None:
        """Remove from the constants a tensor that data were written into, and all that may share its memory."""
        is_shared = t._is_view() or self.origins[number][0] == "owned"
        self._constant = set() if is_shared else {n for n in self._constant if self.origins[n][0] == "owned"}

    def _loses_examples(self, output: int, numbers: list[int]) -> bool:
        """Return whether arguments with a gradient have an example axis and the output has none."""
        if self.reference is None or self.difference is not None:
            return False
        return (
            output in self._differentiable
            and not self._dims(output)
            and any(n in self._differentiable and self._dims(n) for n in numbers)
        )

    def _dims(self, number: int) -> list[int]:
        """Return the dims that grow with N: the examples lie along them."""
        assert self.reference is not None
        mine, theirs = self.shapes[number], self.reference.shapes[number]
        return [dim for dim, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]

    def _routes(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], numbers: list[int]) -> bool:
        """Return whether a call may move examples to positions that depend on values."""
        if name in ROUTES or "nested" in name or "sparse" in name or "packed" in name:
            return True
        if not _is_torchs(func):
            return func not in registered_functions()  # the trial checks that registered functions are linear layers
        if name in ("getitem", "setitem"):
            return self._indexes(name, numbers[0], args[1])
        if name == "where":
            return len(args) + len(kwargs) < 3
        if name == "repeat_interleave":
            return len(numbers) > 1
        if name == "embedding":
            weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
            return not isinstance(weight, Tensor) or self._number(weight) not in self._constant
        if name in LOOKUPS and numbers[0] in self._constant:
            return False
        if name in ALONG:
            return self._is_along(_dims_of(name, *ALONG[name], args, kwargs), numbers)
        if name in PARTS:
            return self._is_along(_dims_of(name, *PARTS[name], args, kwargs), numbers[:1])
        return False

    def _is_along(self, dims: Sequence[int] | None, numbers: list[int]) -> bool:
        """Return whether the examples may lie along one of ``dims``; None means all dims."""
        if dims is None:
            return True
        ndim = len(self.shapes[numbers[0]])  # a one-dimensional index has no example axis
        alike = [n for n in numbers if len(self.shapes[n]) == ndim > 0]
        return any(dim % ndim in self._dims(n) for n in alike for dim in dims)

    def _indexes(self, name: str, number: int, index: Any) -> bool:
        """Return whether ``t[index]`` moves examples, t the tensor ``number``."""
        parts = index if isinstance(index, tuple) else (index,)
        if name == "getitem" and number in self._constant and any(isinstance(part, Tensor) for part in parts):
            return False  # a lookup: the result has the index's example axis
        shape, grown = self.shapes[number], self._dims(number)
        for part, dims in _indexed(parts, len(shape)):
            if dims.isdisjoint(grown) or (isinstance(part, slice) and part == slice(None)):
                continue
            is_own = isinstance(part, Tensor) and part.numel() == shape[min(dims)]
            if (
                not is_own or self._number(part) not in self._ranges
            ):  # t[arange(N), position] selects one element per example
                return True
        return False


def _dims_of(
    name: str, position: int, default: int | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Sequence[int] | None:
    """Return the dims along which a function of ALONG or PARTS works; None for all elements."""
    value: Any = next((kwargs[key] for key in ("dim", "dims", "axis") if key in kwargs), default)
    if len(args) > position:
        value = args[position:] if name == "flip" and isinstance(args[position], int) else args[position]
    dims = [value] if isinstance(value, int) else value
    return dims if isinstance(dims, (tuple, list)) and all(isinstance(dim, int) for dim in dims) else None


def _indexed(parts: Sequence[Any], ndim: int) -> Iterator[tuple[Any, set[int]]]:
    """Yield the parts of an index, each with the dims that it indexes."""
    widths = [
        0 if part is None or part is ... or isinstance(part, bool)
        else part.ndim if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)
        else 1
        for part in parts
    ]  # fmt: skip
    dim = 0
    for part, width in zip(parts, widths, strict=True):
        if width:
            yield part, set(range(dim, dim + width))
        dim += ndim - sum(widths) if part is ... else width


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(
        value, (bool, float, complex, str, torch.dtype, torch.device, torch.memory_format, torch.layout, type(...))
    )


def _is_torchs(func: Any) -> bool:
    """Return whether this is one of torch's own functions, so that its name identifies what it computes."""
    module = getattr(func, "__module__", None)
    if module is None:
        return not isinstance(func, types.FunctionType)
    return bool(module.split(".")[0] == "torch") and not module.startswith("torch._ops")
