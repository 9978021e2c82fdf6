"""``compact`` and its handle: change a model to train only the elements that a mask selects, and undo that."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, cast

import torch
from torch import Tensor, nn

from delfast.arguments import check_names, check_type
from delfast.compaction.guard import Guard, rows_name
from delfast.compaction.layers import (
    CompactLayer,
    RowGroup,
    compact_type,
    make_compact,
    may_have_small_maps,
    restore,
    rows_dim,
)
from delfast.errors import InputError
from delfast.eval_mode import refuse_inference_tensors, refuse_writing_layers
from delfast.mask import Mask
from delfast.masked_optimizer import sparse_gradient
from delfast.naming import is_parallel, model_parameters, plain_name, trainable_parameters, unwrap
from delfast.ops.layout import pack
from delfast.parameter_mask import ParameterMask
from delfast.sharding import is_dtensor
from delfast.sole_use import used_alone

Mode = Literal["rows", "dense", "guarded", "frozen"]
"""How a parameter is trained.

rows: through a Parameter of its selected rows. dense: in full, since all of it is selected. guarded: with a dense
gradient that is zero outside the mask. frozen: not at all.
"""


class Compact:
    """Handle of a compact model, and a context manager that undoes it; made by ``compact``.

    Parameters
    ----------
    model : torch.nn.Module
        The model to change.
    mask : Mask
        The elements that may change.
    dense : collection of str
        Names of parameters to train with a dense gradient.

    Attributes
    ----------
    model : torch.nn.Module
        The model inside wrappers.
    original_mask : Mask
        The mask that was passed.
    modes : dict of str to {"rows", "dense", "guarded", "frozen"}
        How each parameter that was trainable is trained: "rows" through a Parameter of its selected rows, "dense" in
        full, "guarded" with a dense gradient that is zero outside the mask, "frozen" not at all.
    mask : Mask
        The elements that may change, by the names and shapes that the compact model's parameters have, for
        ``MaskedSGD(model.named_parameters(), handle.mask)``.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> rows = torch.zeros(8, 4, dtype=torch.bool)
    >>> rows[:2] = True
    >>> handle = delfast.compact(model, delfast.Mask.from_dense({"0.weight": rows}))
    >>> handle
    Compact(rows: 1, dense: 0, guarded: 0, frozen: 3)
    >>> [(name, tuple(parameter.shape)) for name, parameter in handle.named_parameters()]
    [('0.weight_rows', (2, 4))]
    >>> handle.undo()
    """

    def __init__(self, model: nn.Module, mask: Mask, dense: Collection[str]) -> None:
        if is_parallel(model):
            raise InputError(
                "expected a model outside DistributedDataParallel and DataParallel, which have taken its parameters; "
                "call compact() first, then wrap in DistributedDataParallel"
            )
        self.model, self.original_mask = unwrap(model), mask
        parameters = trainable_parameters(self.model)
        chosen = {name: part for name, _, part in mask.match(parameters) if part.selected}
        for name in dense:
            if name not in parameters:
                raise InputError(f"dense names '{name}', which is no trainable parameter of the model; check the name")
        owners = _owners(self.model)
        self.modes: dict[str, Mode] = {}
        self._layers: dict[str, tuple[nn.Module, Tensor | None]] = {}  # layer, flags of the selected rows
        for name, parameter in parameters.items():
            part, owner = chosen.get(name), owners.get(id(parameter))
            if part is None:
                self.modes[name] = "frozen"
            elif part.selected == part.numel:
                self.modes[name] = "dense"
                if owner is not None and may_have_small_maps(owner) and name not in dense:
                    self._layers[name] = (owner, None)  # its gradient may be computed faster
            elif part.by_row and owner is not None and part.dim == rows_dim(owner) and name not in dense:
                self.modes[name] = "rows"
                self._layers[name] = (owner, part.flags)
            else:
                self.modes[name] = "guarded"
        _refuse_sparse(self.model, self._names("guarded"))
        self._chosen, self._rows, self._active = chosen, dict[str, nn.Parameter](), False
        self._idle, self._has_stepped = set(self._names("rows")), False
        self.mask = self._mask()
        self.redo()

    @property
    def ways(self) -> dict[str, Mode]:
        """Former name of ``modes``, before version 0.2."""
        warnings.warn("Compact.ways is deprecated; use Compact.modes", DeprecationWarning, stacklevel=2)
        return self.modes

    def redo(self) -> None:
        """Make the model compact again after ``undo``.

        The Parameters are the same, so that an optimizer made before stays valid. Their values are copied from the
        model. Gradients are dropped: they may belong to elements that must not change.
        """
        if self._active:
            return
        self._active = True
        self._guard: Guard | None = None
        with torch.inference_mode(False):  # Parameters made in inference mode cannot be trained
            self._change()

    def _change(self) -> None:
        """Make the model compact; restore it if an error is raised."""
        parameters = trainable_parameters(self.model)
        try:
            for name, (layer, flags) in self._layers.items():
                compact = make_compact(layer, None if flags is None else flags.nonzero().flatten())
                if flags is None:
                    continue
                if name in self._rows:
                    with torch.no_grad():
                        self._rows[name].copy_(compact.weight_rows)
                    compact.weight_rows = self._rows[name]
                self._rows[name] = compact.weight_rows
            RowGroup(cast(CompactLayer, self._layers[name][0]) for name in self._rows)
            frozen = {name: parameters[name] for name in self._names("frozen")}
            for parameter in frozen.values():
                parameter.requires_grad_(False)
            for parameter in (*parameters.values(), *self._rows.values()):
                parameter.grad = None
            guarded = {name: (parameters[name], self._chosen[name].dense()) for name in self._names("guarded")}
            layers = {name: (parameters[name], cast(CompactLayer, self._layers[name][0])) for name in self._rows}
            self._guard = Guard(self.model, guarded, self.mask.digest, layers, frozen, self._idle)
        except BaseException:
            self._restore()
            raise

    def undo(self) -> None:
        """Write the rows back and restore every module; a second call does nothing.

        Raises
        ------
        InputError
            If the model's Parameters were replaced by sharded ones; nothing is changed.

        Warns
        -----
        RuntimeWarning
            If an optimizer stepped rows that never had a gradient: the network reads that weight through a reference
            from before ``compact``.
        """
        if self._guard is not None and any(map(is_dtensor, self.model.parameters())):
            self._guard.refuse_lost({id(parameter) for parameter in self.model.parameters()})
        self._restore()
        if self._has_stepped and self._idle:
            first, *others = sorted(self._idle)
            rest = f" and {len(others)} more" if others else ""
            warnings.warn(
                f"no gradient reached '{first}'{rest}: the selected rows were not trained; if the network uses this "
                "weight through a reference taken before compact(), name it in dense=[...]",
                RuntimeWarning,
                stacklevel=2,
            )
            self._idle.clear()

    def _restore(self) -> None:
        """Undo without warnings."""
        if not self._active:
            return
        self._active = False
        if self._guard is not None:
            self._guard.remove()
            self._has_stepped |= self._guard.has_stepped
        for layer, _ in self._layers.values():
            if isinstance(layer, CompactLayer):
                restore(layer)
        frozen = set(self._names("frozen"))
        for name, parameter in model_parameters(self.model).items():
            if name in frozen:
                parameter.requires_grad_(True)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Restore the plain model inside the context, to read or change it; afterwards make it compact again.

        Yields
        ------
        None
            The plain model is ``handle.model``.
        """
        self._restore()
        try:
            yield
        finally:
            self.redo()

    def write(self) -> None:
        """Write the rows into the weights, for code that reads the weights' memory directly.

        Forward passes, ``state_dict`` and the steps of optimizers do this themselves.
        """
        for layer, _ in self._layers.values():
            if isinstance(layer, CompactLayer):
                layer.write_rows()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the Parameters to train.

        Returns
        -------
        iterator of torch.nn.Parameter
            In the order of the model.
        """
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and Parameters to train.

        Returns
        -------
        iterator of (str, torch.nn.Parameter)
            By the names that they have in the compact model.
        """
        return (pair for pair in self.model.named_parameters() if pair[1].requires_grad)

    def __enter__(self) -> Compact:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        counts = {mode: len(self._names(mode)) for mode in ("rows", "dense", "guarded", "frozen")}
        return f"Compact({', '.join(f'{mode}: {count}' for mode, count in counts.items())})"

    def _names(self, mode: Mode) -> list[str]:
        """Return the names of the parameters in this mode."""
        return [name for name, chosen in self.modes.items() if chosen == mode]

    def _mask(self) -> Mask:
        """Return the mask by the names and shapes of the compact model."""
        parts = {}
        for name, mode in self.modes.items():
            if mode == "rows":
                part = self._chosen[name]
                shape = (*part.shape[: part.dim], int(part.flags.sum()), *part.shape[part.dim + 1 :])
                name = rows_name(name)
                parts[name] = ParameterMask(shape, "row", pack(part.flags.new_ones(shape[0])))
            elif mode != "frozen":
                parts[name] = self._chosen[name]
        return Mask(parts, {**self.original_mask.metadata, "compact_of": self.original_mask.digest})


@used_alone
def compact(model: nn.Module, mask: Mask, *, dense: Collection[str] = ()) -> Compact:
    """Change ``model`` to train only what ``mask`` selects, until ``undo()`` or the end of the context.

    A Linear or convolution with whole selected rows (output channels) is trained through a Parameter of those
    rows. Its backward pass computes the gradient of the rows alone, optimizers keep state for the rows alone, and the
    other rows cannot change. Layers without a selected element compute no weight gradient, and the backward pass ends
    at the lowest layer that has one. Other parameters keep a dense gradient behind a guard: biases and norms, masks of
    single elements, tied parameters, subclasses of the layers and other modules. ``handle.modes`` lists the mode of
    each parameter.

    ``state_dict()`` and ``load_state_dict()`` keep the plain names and shapes. Wrap the model with
    DistributedDataParallel or ``torch.compile``, and make the optimizer, after this call. The model is protected for
    as long as it lives, also without a reference to the handle, and nothing here keeps the model alive.

    A network may read ``layer.weight`` itself. While autograd records, that is a view of the weight whose gradient goes
    to the rows.

    Parameters
    ----------
    model : torch.nn.Module
        The model, changed in place; not within DistributedDataParallel or DataParallel.
    mask : Mask
        The elements that may change.
    dense : collection of str, default ()
        Names of parameters that keep a dense gradient behind the guard: weights that the network uses through a
        reference from before this call.

    Returns
    -------
    Compact
        The handle; as a context manager it calls ``undo()`` at the end.

    Raises
    ------
    InputError
        For a mask of another architecture, a model within DistributedDataParallel, or an unknown name. In an
        optimizer's step: for an optimizer that was made before this call, or a gradient of what is not selected.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> batches = [(torch.randn(8, 4), torch.arange(8) % 3)]
    >>> mask = delfast.localize(model, batches, 0.3)
    >>> with delfast.compact(model, mask) as handle:
    ...     optimizer = torch.optim.SGD(handle.parameters(), lr=0.1, momentum=0.9)
    ...     for inputs, targets in batches:
    ...         torch.nn.functional.cross_entropy(model(inputs), targets).backward()
    ...         optimizer.step()
    """
    if isinstance(dense, str):
        raise InputError(f"expected dense to be a list of names, got '{dense}'; write [{dense!r}]")
    check_type("mask", mask, Mask, "a delfast.Mask")
    check_names("dense", dense)
    refuse_writing_layers(model)
    refuse_inference_tensors(model)
    return Compact(model, mask, [plain_name(name) for name in dense])


def _owners(model: nn.Module) -> dict[int, nn.Module | None]:
    """Map the id of each parameter to the layer that can be trained by its rows; to None if tied, or no such layer."""
    found: dict[int, nn.Module | None] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fits = name == "weight" and compact_type(type(module)) is not None and "forward" not in module.__dict__
            fits = fits and parameter.ndim > 1 and parameter.is_floating_point() and not _has_hooks(parameter)
            found[id(parameter)] = module if fits and id(parameter) not in found else None
    return found


def _refuse_sparse(model: nn.Module, guarded: Collection[str]) -> None:
    """Raise InputError for an embedding with sparse gradients in part of the mask: a guard needs dense gradients."""
    for module in model.modules():
        if getattr(module, "sparse", False) is True:
            for name, parameter in model_parameters(model).items():
                if name in guarded and any(parameter is own for own in module.parameters(recurse=False)):
                    raise sparse_gradient(name)


def _has_hooks(parameter: Tensor) -> bool:
    """Return whether the user has put hooks on the parameter, which must still get the whole gradient."""
    hooks = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
    return any(hooks)
