"""Compact training: a masked model that computes, stores and steps only what its mask lets change."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, cast

import torch
from torch import Tensor, nn

from delfast.arguments import check_names, check_type
from delfast.batches import refuse_inference_tensors, refuse_writing_layers
from delfast.compaction.guard import Guard, rows_name
from delfast.compaction.layers import CompactLayer, compact_type, make_compact, may_have_small_maps, restore, rows_dim
from delfast.errors import InputError
from delfast.mask import Mask, ParameterMask
from delfast.naming import is_parallel, plain_name, trainable_parameters, unique_parameters, unwrap
from delfast.ops.layout import pack
from delfast.optim import sparse_gradient
from delfast.sole_use import used_alone

Mode = Literal["rows", "dense", "guarded", "frozen"]
"""How a parameter is trained. rows: through a Parameter of its selected rows. dense: as a whole, all of it is selected.
guarded: with a dense gradient, of which the mask's part is used. frozen: not at all.
"""


class Compact:
    """The handle of ``compact``, and a context manager that undoes it.

    modes: name -> Mode, of every parameter that was trainable. mask: what may change of the model as it is now, by the
    names its parameters have now: for ``MaskedSGD(model.named_parameters(), handle.mask)``.
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
        self._layers: dict[str, tuple[nn.Module, Tensor | None]] = {}  # and the flags of the selected rows
        for name, parameter in parameters.items():
            part, owner = chosen.get(name), owners.get(id(parameter))
            if part is None:
                self.modes[name] = "frozen"
            elif part.selected == part.numel:
                self.modes[name] = "dense"
                if owner is not None and may_have_small_maps(owner) and name not in dense:
                    self._layers[name] = (owner, None)  # for the way its gradient is computed
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
        """``modes`` under the name it had before version 0.2."""
        warnings.warn("Compact.ways is deprecated; use Compact.modes", DeprecationWarning, stacklevel=2)
        return self.modes

    def redo(self) -> None:
        """Make the model compact again after ``undo``: the same Parameters, so an optimizer of theirs goes on. Values
        are taken from the model as it is; gradients, which may be of entries that are not to move, are dropped.
        """
        if self._active:
            return
        self._active = True
        self._guard: Guard | None = None
        with torch.inference_mode(False):  # what is made there cannot be trained outside it
            self._change()

    def _change(self) -> None:
        """Make the model compact, or leave it as it was if an error is raised."""
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
            frozen = {name: parameters[name] for name in self._names("frozen")}
            for parameter in frozen.values():
                parameter.requires_grad_(False)
            for parameter in (*parameters.values(), *self._rows.values()):
                parameter.grad = None
            guarded = {name: (parameters[name], self._chosen[name].dense()) for name in self._names("guarded")}
            layers = {name: (parameters[name], cast(CompactLayer, self._layers[name][0])) for name in self._rows}
            self._guard = Guard(guarded, self.mask.digest, layers, frozen, self._idle)
        except BaseException:
            self._restore()
            raise

    def undo(self) -> None:
        """Write the rows back and make every module what it was; nothing happens the second time.

        Warn of rows that an optimizer held in its steps and that never had a gradient.
        """
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
        for name, parameter in unique_parameters(self.model.named_parameters()):
            if name in frozen:
                parameter.requires_grad_(True)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Inside, the model is what it was, to be looked at or changed; afterwards it is compact again."""
        self._restore()
        try:
            yield
        finally:
            self.redo()

    def write(self) -> None:
        """Put the rows into the weights, for code that reads those. Forward passes, ``state_dict`` and the steps of
        optimizers do so anyway.
        """
        for layer, _ in self._layers.values():
            if isinstance(layer, CompactLayer):
                layer.write_rows()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The Parameters to train."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The Parameters to train, by the names that they have now."""
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
        return [name for name, chosen in self.modes.items() if chosen == mode]

    def _mask(self) -> Mask:
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
    """Change ``model`` to train what ``mask`` selects and nothing else, until ``undo()``, or as a context::

        with delfast.compact(model, mask) as handle:
            optimizer = torch.optim.AdamW(handle.parameters(), fused=True)
            ...

    A Linear or convolution of which whole rows (output channels) are selected is trained through a Parameter of those
    rows: its backward pass computes their gradient alone, optimizers keep state for them alone, and the other rows
    cannot move. Layers of which nothing is selected compute no gradient, and the backward pass ends at the lowest layer
    that has one. What cannot be split so (biases and norms, masks of single elements, tied parameters, subclasses and
    other modules) keeps its dense gradient behind a guard; ``handle.modes`` says which parameter goes which way.

    ``state_dict()`` has the names and shapes it had, and ``load_state_dict`` takes them. Wrap with DDP or
    ``torch.compile``, and make the optimizer, afterwards. The model is protected while it lives, whether or not the
    handle is kept; nothing here keeps the model alive.

    A network may read ``layer.weight`` itself: with gradients on, that is a view of the weight, and its gradient goes
    to the rows. dense: names of parameters to keep out, which then have a dense gradient behind the guard: weights that
    the network uses through a reference from before ``compact()``.

    Raises InputError for a mask of another architecture, a model that DDP has wrapped already, or an unknown name; and
    in an optimizer's step, for one that was made before, or a gradient of what is not selected.
    """
    if isinstance(dense, str):
        raise InputError(f"expected dense to be a list of names, got '{dense}'; write [{dense!r}]")
    check_type("mask", mask, Mask, "a delfast.Mask")
    check_names("dense", dense)
    refuse_writing_layers(model)
    refuse_inference_tensors(model)
    return Compact(model, mask, [plain_name(name) for name in dense])


def _owners(model: nn.Module) -> dict[int, nn.Module | None]:
    """id of a parameter -> the layer that can be trained by rows of it; None where it is tied or the layer cannot."""
    found: dict[int, nn.Module | None] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fits = name == "weight" and compact_type(type(module)) is not None and "forward" not in module.__dict__
            fits = fits and parameter.ndim > 1 and parameter.is_floating_point() and not _has_hooks(parameter)
            found[id(parameter)] = module if fits and id(parameter) not in found else None
    return found


def _refuse_sparse(model: nn.Module, guarded: Collection[str]) -> None:
    """InputError for an embedding with sparse gradients if the mask selects a part of it: a guard takes dense ones."""
    for module in model.modules():
        if getattr(module, "sparse", False) is True:
            for name, parameter in unique_parameters(model.named_parameters()):
                if name in guarded and any(parameter is own for own in module.parameters(recurse=False)):
                    raise sparse_gradient(name)


def _has_hooks(parameter: Tensor) -> bool:
    """The user's, which must go on seeing the whole gradient."""
    hooks = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
    return any(hooks)
