"""Layers whose weight is trained through a Parameter that holds only its selected rows.

A layer becomes compact by a change of its class: it stays the same object, with the same hooks, buffers and name. Its
weight stays in place, complete and frozen; an optimizer gets ``weight_rows``. Code outside the layer that reads
``layer.weight`` gets a view of the weight whose gradient goes to ``weight_rows``. A layer that is trained in full keeps
its weight as the Parameter and has no rows: only the computation of its gradient changes.

The rules of the weight's device choose how a layer computes the gradient of its rows (``delfast.compaction.rules``). By
an autograd function of ours, or by torch's own layer: then the layer reads its weight as other code does.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, SupportsIndex, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from delfast.compaction.functions import RowsOfConvolution, RowsOfLinear, RowsOfView
from delfast.compaction.plan import RowPlan, plan_rows
from delfast.compaction.rules import LayerKind, rule_of
from delfast.errors import InputError
from delfast.layer_types import layer_type_of
from delfast.sharding import is_dtensor

WEIGHT = "weight"
ROWS = "weight_rows"


class CompactLayer(nn.Module):
    """Base of the compact layers: rows, which are written into the weight, and a ``state_dict`` with plain names."""

    plain_type: ClassVar[type[nn.Module]]  # the layer's class before, and after ``restore``
    bias: Any
    weight_rows: nn.Parameter  # absent where the layer is trained in full
    row_index: Tensor | None  # None where the layer is trained in full
    row_plan: RowPlan  # by the rules of the weight's device
    row_dim: int  # the dimension of the weight along which its rows lie
    row_home: tuple[Tensor]  # the weight of the rows; in a tuple, since the module would register a Parameter again
    row_versions: tuple[int, int]  # of the weight and the rows when last equal; absent if trained in full
    row_group: RowGroup  # the layers whose rows are written together; absent if trained in full
    row_fresh: bool  # the group has written the rows, and nothing has used the layer since; absent if trained in full

    @property
    def whole(self) -> Tensor:
        """The tensor that holds the weight, as registered in the module: for the layer's own use."""
        return cast(Tensor, self._parameters[WEIGHT])

    @property
    def weight(self) -> Tensor:
        """The weight, with the rows written into it, for code that reads the weight and does not call the layer.

        While autograd records: a view of ``whole`` whose backward pass gives ``weight_rows`` the gradient of the
        selected rows. Otherwise, and if the layer is trained in full: ``whole``.
        """
        if self.row_index is None:
            return self.whole
        records = torch.is_grad_enabled() and self.weight_rows.requires_grad
        if records and torch.compiler.is_compiling():  # the compiler decides what is copied
            return self.whole.index_copy(self.row_dim, self.row_index, self.weight_rows)
        self.refresh_rows()
        if not records:
            return self.whole
        view: Tensor = RowsOfView.apply(self.weight_rows, self.whole, self.row_index, self.row_dim)
        view._is_param = True  # isinstance(layer.weight, nn.Parameter) stays true
        return view

    @weight.setter
    def weight(self, value: Any) -> None:  # not called for a Parameter, which nn.Module registers
        raise InputError(_not_replaced("a tensor in its place"))

    def __delattr__(self, name: str) -> None:
        if name == WEIGHT:
            raise InputError(_not_replaced("its removal"))
        super().__delattr__(name)

    def parameter_and_weight(self) -> tuple[Tensor, Tensor]:
        """Return the Parameter that gets the gradient, and the weight to multiply by, with the rows written into it."""
        weight = self.whole
        if self.row_index is None:
            return weight, weight.detach()
        self.refresh_rows()
        return self.weight_rows, weight

    def refresh_rows(self) -> None:
        """Write the rows into the weight, together with those of the group in the first training pass after a step.

        The other layers then compare versions alone. Every other use writes: ``.data`` changes values without a new
        version, as hand-written steps do, and averages that replace the rows for an evaluation.
        """
        if self.row_index is None:
            return
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            if self.row_group.is_due:
                self.row_group.write()
            fresh, self.row_fresh = self.row_fresh, False
            known = (*self.row_home, *self.row_versions)
            if fresh and self.whole is known[0] and (self.whole._version, self.weight_rows._version) == known[1:]:
                return
        self.write_rows()

    def write_rows(self) -> None:
        """Write the rows into the weight; no other element changes."""
        if self.row_index is None:
            return
        if torch.compiler.is_compiling():  # the compiler traces no versions
            with torch.no_grad():
                self.whole.index_copy_(self.row_dim, self.row_index, self.weight_rows.detach())
            return
        write_rows_of([self])

    def compare_versions(self) -> None:
        """Increment the weight's version if the rows have changed; read them from a weight that other code has changed.

        A step between a forward pass and its backward pass is thus an error, while the weight that autograd has saved
        stays valid where another call of this layer writes the same rows.
        """
        known, weight, rows = self.row_versions, self.whole, self.weight_rows
        if weight is not self.row_home[0]:
            raise sharded_since(WEIGHT) if is_dtensor(weight) else InputError(_not_replaced("another tensor"))
        if known[1] != rows._version:
            torch.autograd.graph.increment_version(weight)
        elif known[0] != weight._version:
            self.read_rows()  # directly or through state_dict()

    def notice_changes(self) -> None:
        """Read the rows from a weight that other code has changed, as the next forward pass would."""
        if self.row_index is not None:
            self.compare_versions()

    def record_versions(self) -> None:
        """Record that the weight now contains the rows."""
        self.row_home = (self.whole,)
        if self.row_index is not None:
            self.row_versions, self.row_fresh = (self.whole._version, self.weight_rows._version), False

    def read_rows(self) -> None:
        """Copy the rows from the weight."""
        if self.row_index is None:
            return
        with torch.no_grad():
            self.weight_rows.copy_(self.whole.index_select(self.row_dim, self.row_index))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.write_rows()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.row_index is not None and self.row_index.device != self.whole.device:
            rows, self.row_index = self.row_index, self.row_index.to(self.whole.device)
            self.row_plan = _plan(self, self.whole, rows)
        self.record_versions()  # some devices need another tensor
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        self.write_rows()  # a copied tensor has version 0
        reduced = cast(tuple[Any, ...], super().__reduce_ex__(max(2, int(protocol))))
        state = {name: value for name, value in reduced[2].items() if name != "row_group"}  # a copy has its own
        return _new, (self.plain_type, *reduced[1][1:]), state, *reduced[3:]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.row_index is not None:
            RowGroup([self])
        self.record_versions()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.write_rows()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + ROWS, None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        *_, missing, _, _ = arguments
        self.write_rows()  # elements that are not loaded keep their values
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if prefix + ROWS in missing:
            missing.remove(prefix + ROWS)
        self.read_rows()
        self.record_versions()  # assign=True puts another tensor in place


class RowGroup:
    """Compact layers with rows that are written together. Keeps no layer alive.

    ``is_due``: whether the next pass writes all rows, as after an optimizer's step.
    """

    def __init__(self, layers: Iterable[CompactLayer]) -> None:
        self._layers, self.is_due = list[weakref.ref[CompactLayer]](), True
        for layer in layers:
            self._layers.append(weakref.ref(layer))
            layer.row_group = self

    def write(self) -> None:
        """Write the rows of all layers, except where the weight was replaced: an error when the layer is used."""
        self.is_due = False
        living = [layer for reference in self._layers if (layer := reference()) is not None]
        living = [layer for layer in living if layer.__dict__.get("row_group") is self]
        layers = [layer for layer in living if layer.whole is layer.row_home[0]]
        write_rows_of(layers)
        for layer in layers:
            layer.row_fresh = True


def write_rows_of(layers: Sequence[CompactLayer]) -> None:
    """Write the rows of these layers into their weights, by one op for each device; no other element changes.

    InputError for a layer whose weight was replaced.
    """
    batches: dict[torch.device, list[CompactLayer]] = {}
    for layer in layers:
        layer.compare_versions()
        batches.setdefault(layer.whole.device, []).append(layer)
    with torch.no_grad():
        for batch in batches.values():
            torch.ops.delfast.write_rows_(
                [layer.whole for layer in batch],
                [layer.weight_rows for layer in batch],
                [cast(Tensor, layer.row_index) for layer in batch],
                [layer.row_dim for layer in batch],
            )
    for layer in layers:
        layer.record_versions()


def record_versions(modules: Iterable[nn.Module]) -> None:
    """Record that the weights of the compact layers among the modules contain their rows, as after an optimizer's step.

    For code that has written both by other means and incremented their versions: the replay of a captured step, or
    values that were put back. Nothing is written, and no operation is dispatched.
    """
    for module in modules:
        if isinstance(module, CompactLayer):
            module.record_versions()
            if module.row_index is not None:
                module.row_group.is_due = True


def may_have_small_maps(layer: nn.Module) -> bool:
    """Return whether ``by_offsets`` may be faster for this layer's weight gradient, if its feature maps are small."""
    if getattr(layer, "groups", None) != 1:
        return False
    weight = cast(Tensor, layer._parameters[WEIGHT])
    return weight.dtype in rule_of(weight.device, "convolution").min_channels_per_position


def compact_type(layer_type: type[nn.Module]) -> type[CompactLayer] | None:
    """Return the compact class for a layer of this type; None for a layer that cannot be trained by rows."""
    known = layer_type_of(layer_type)
    if layer_type not in COMPACT and known is not None and not issubclass(layer_type, CompactLayer):
        # a registered layer runs its own forward pass, which reads ``weight``, unless it is known to be x W
        base = _TransposedLinear if layer_type.forward is known.linear_forward else CompactLayer
        made = type(f"Compact{layer_type.__name__}", (base, layer_type), {"plain_type": layer_type})
        COMPACT.setdefault(layer_type, made)  # a class that another thread has made meanwhile stays
    return COMPACT.get(layer_type)


def rows_dim(layer: nn.Module) -> int:
    """Return the dimension of the layer's weight that holds its rows, the output channels."""
    known = layer_type_of(type(layer))
    return 0 if known is None else known.output_dim


def make_compact(layer: nn.Module, rows: Tensor | None) -> CompactLayer:
    """Make ``layer`` compact, to train only these rows (int64, ascending) of its weight; None: all rows.

    Its type must have a ``compact_type``.
    """
    weight, dim = cast(Tensor, layer.weight), rows_dim(layer)
    plan, index, selected = _plan(layer, weight, rows), None, None
    if rows is not None:
        index = rows.to(weight.device)
        selected = torch.empty_like(weight.detach().narrow(dim, 0, len(rows)))  # in the weight's memory format
        selected.copy_(weight.detach().index_select(dim, index))
    changed = compact_type(type(layer))
    assert changed is not None
    compact = cast(CompactLayer, layer)  # no allocation below this line: a layer is changed completely or not at all
    compact.__class__ = changed
    # no buffers: weight averaging would average them, and DDP would broadcast them in every pass
    compact.row_index, compact.row_plan, compact.row_dim = index, plan, dim
    if selected is not None:
        compact.weight_rows = nn.Parameter(selected)
        weight.requires_grad_(False)
        RowGroup([compact])
    compact.record_versions()
    return compact


def restore(layer: CompactLayer) -> nn.Module:
    """Undo ``make_compact``: write the rows back, and make the weight trainable again.

    A weight that replaced the layer's own does not change.
    """
    weight = layer._parameters.get(WEIGHT)  # None if old weight_norm has removed it before it was refused
    if weight is layer.row_home[0]:
        layer.write_rows()
    if layer.row_index is not None:
        del layer.weight_rows, layer.row_versions, layer.row_fresh, layer.row_group
        if weight is not None:
            weight.requires_grad_(True)
    del layer.row_index, layer.row_plan, layer.row_dim, layer.row_home
    plain = cast(nn.Module, layer)
    plain.__class__ = layer.plain_type
    return plain


def _plan(layer: nn.Module, weight: Tensor, rows: Tensor | None) -> RowPlan:
    """Return the plan for these rows (int64, ascending; None: all) by the rules of the weight's device."""
    groups = cast(int, getattr(layer, "groups", 1))
    if rows is None:
        return RowPlan(None, None, None, groups)
    dim, rule = rows_dim(layer), rule_of(weight.device, _kind(layer))
    plan = plan_rows(rows.cpu(), weight.shape[dim], weight.shape[1 - dim] * groups, groups, rule)
    return plan.to(weight.device)


def _kind(layer: nn.Module) -> LayerKind:
    return "convolution" if hasattr(layer, "groups") else "linear"


def _new(plain_type: type[nn.Module], *arguments: Any) -> CompactLayer:
    """Return a compact layer without its state, for ``pickle`` and ``copy``."""
    made = compact_type(plain_type)
    if made is None:
        raise InputError(
            f"expected {plain_type.__name__} to be registered, as it was where the compact model was saved; call "
            "delfast.register_layer first"
        )
    return made.__new__(made, *arguments)


def sharded_since(name: str) -> InputError:
    """Return the error for a compact model whose Parameters were replaced by sharded ones."""
    return InputError(
        f"expected the Parameters that compact() made, got a model whose '{name}' was replaced since, by fully_shard() "
        "or another sharding, so that the mask does not protect it; shard the model without compact(), and train it by "
        "delfast.optim.MaskedSGD or MaskedAdamW"
    )


def _not_replaced(what: str) -> str:
    return (
        f"expected a compact layer to keep its weight, got {what}; assign, parametrize, normalize, prune or use "
        "functional_call before compact() or after undo(), and copy values under no_grad"
    )


def _as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the operands of a layer in the dtypes that autocast chooses."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    x, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, weight))
    return x, weight, bias if bias is None or bias.dtype == torch.float64 else bias.to(dtype)


class _Product(CompactLayer):
    """Linear layers."""

    def runs_by_torch(self, input: Tensor) -> bool:
        """Return whether torch's own layer runs: too many rows, or too few positions, to gather channels."""
        rule = rule_of(input.device, "linear")
        if self.row_plan.gathered is None or not rule.dense_by_torch:
            return rule.dense_by_torch
        kind, dtype = input.device.type, input.dtype
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        return not rule.has_enough_positions(math.prod(input.shape[:-1]), dtype)

    def _multiply(self, input: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        """Return input Wᵀ + b, for rows (n, in) and weight (out, in) as ``nn.Linear`` has them."""
        x, weight, bias = _as_autocast(input, weight, self.bias)
        # flatten: for other than two dimensions linear returns a view, and a Function's views refuse in-place changes
        flat = torch.atleast_2d(x).flatten(0, -2)  # type: ignore[no-untyped-call]
        result: Tensor = RowsOfLinear.apply(flat, rows, weight, bias, self.row_plan.gathered, self.row_plan.kept)
        return result if flat is x else result.reshape(*x.shape[:-1], weight.shape[0])


class CompactLinear(_Product, nn.Linear):
    """``nn.Linear``, compact."""

    plain_type = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        if self.runs_by_torch(input):
            return super().forward(input)
        return self._multiply(input, *self.parameter_and_weight())


class _TransposedLinear(_Product):
    """A registered linear layer with a weight (in, out)."""

    def forward(self, input: Tensor) -> Tensor:
        if self.runs_by_torch(input):
            return cast(Tensor, super().forward(input))
        rows, weight = self.parameter_and_weight()
        return self._multiply(input, rows.t(), weight.t())


class _Convolutional(CompactLayer):
    """Convolutions, except their padding."""

    stride: Any
    padding: Any
    dilation: Any
    kernel_size: Any
    groups: int
    padding_mode: Any
    _reversed_padding_repeated_twice: Any
    _output_padding: Any

    def runs_by_torch(self, input: Tensor) -> bool:
        """Return whether torch's own layer runs: gathering channels does not pay."""
        return self.row_plan.gathered is None and rule_of(input.device, "convolution").dense_by_torch

    def _convolve(self, input: Tensor, padding: Any, transposed: bool, output_padding: Any) -> Tensor:
        rows, weight = self.parameter_and_weight()
        x, weight, bias = _as_autocast(input, weight, self.bias)
        spatial = weight.dim() - 2
        batched = x if x.dim() == spatial + 2 else x.unsqueeze(0)
        geometry = (self.stride, padding, self.dilation, transposed, output_padding)
        plan = self.row_plan
        result: Tensor = RowsOfConvolution.apply(
            batched, rows, weight, bias, plan.gathered, plan.opposite, plan.kept, geometry, self.groups,
            plan.groups,
        )  # fmt: skip
        return result if batched is x else result.squeeze(0)


class _Forward(_Convolutional):
    """An ordinary convolution."""

    def forward(self, input: Tensor) -> Tensor:
        if self.runs_by_torch(input):
            return cast(Tensor, super().forward(input))
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):  # "same" may pad one side more
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = functional.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(self.kernel_size)
        return self._convolve(input, padding, False, (0,) * len(self.kernel_size))


class _Transposed(_Convolutional):
    """A transposed convolution."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.runs_by_torch(input):
            return cast(Tensor, super().forward(input, output_size))
        spatial = len(self.kernel_size)
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
        )
        return self._convolve(input, self.padding, True, output_padding)


class CompactConv1d(_Forward, nn.Conv1d):
    """``nn.Conv1d``, compact."""

    plain_type = nn.Conv1d


class CompactConv2d(_Forward, nn.Conv2d):
    """``nn.Conv2d``, compact."""

    plain_type = nn.Conv2d


class CompactConv3d(_Forward, nn.Conv3d):
    """``nn.Conv3d``, compact."""

    plain_type = nn.Conv3d


class CompactConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d``, compact."""

    plain_type = nn.ConvTranspose1d


class CompactConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d``, compact."""

    plain_type = nn.ConvTranspose2d


class CompactConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d``, compact."""

    plain_type = nn.ConvTranspose3d


COMPACT: dict[type[nn.Module], type[CompactLayer]] = {
    made.plain_type: made
    for made in (
        CompactLinear,
        CompactConv1d,
        CompactConv2d,
        CompactConv3d,
        CompactConvTranspose1d,
        CompactConvTranspose2d,
        CompactConvTranspose3d,
    )
}
