"""The search for the classifier head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

from delfast.batches import LossFn, per_example_losses
from delfast.dispatch import ObservingMode
from delfast.errors import InputError
from delfast.eval_mode import evaluating
from delfast.naming import model_parameters, unwrap

_COPIES = (torch.ops.aten._to_copy, torch.ops.aten.clone, torch.ops.aten._unsafe_view)
_FRESH = (torch.ops.aten.lift_fresh,)  # the tensors of ``torch.tensor(...)``, which no operation has made
_NONE: tuple[frozenset[str], bool] = (frozenset(), False)
F = TypeVar("F", bound=Callable[..., Any] | None)
MAX_NAMED = 5  # candidates in an error message


def find_head(model: nn.Module, batch: Any, loss_fn: LossFn | None = None) -> str:
    """Return the name of the layer that computes the logits, by a forward pass on ``batch``: see ``HeadSearch``."""
    network = unwrap(model)
    search = HeadSearch(network)
    with uncompiled(network), evaluating(network), torch.inference_mode(False), torch.no_grad(), search:
        per_example_losses(network, batch, uncompiled_function(loss_fn))
    return search.head()


def uncompiled_function(function: F) -> F:
    """Return the function inside ``torch.compile``, or ``function``: a mode does not get the operations in a graph."""
    original: F = getattr(function, "_torchdynamo_orig_callable", function)
    return original


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[None]:
    """Run the network's compiled modules in eager mode inside the context, so that one pass compiles no graph.

    Only this network is changed, and restored. torch's own switch, ``set_stance``, holds for all threads.
    """
    calls, children = [], []
    for module in network.modules():
        if module._compiled_call_impl is not None:
            calls.append((module, module._compiled_call_impl))
        for name, child in module._modules.items():
            # by name: the import of torch._dynamo takes a second
            if child is not None and type(child).__name__ == "OptimizedModule":
                children.append((module, name, child))
    try:
        for module, _ in calls:
            module._compiled_call_impl = None
        for module, name, child in children:
            module._modules[name] = child.get_submodule("_orig_mod")
        yield
    finally:
        for module, call in calls:
            module._compiled_call_impl = call
        for module, name, child in children:
            module._modules[name] = child


class HeadSearch(ObservingMode):
    """Record, inside the context, the layers that compute what ``network`` returns: its output, or ``.logits`` of it.

    The head is the layer whose output is the network's output, up to views, casts and copies. A layer is a module with
    parameters of its own and none in its children. The mode observes every operation, so that memory which is freed and
    used again is not mistaken for the tensor that it held before.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if isinstance(network, torch.jit.ScriptModule):
            raise InputError("expected the head's name for a ScriptModule, whose layers take no hooks; pass head='...'")
        self.network = network
        self._modules = dict(network.named_modules())  # names outside ``uncompiled``
        self._handles: list[Any] = []
        # storage -> names of the layers nearest to its values, and whether the values are one layer's output, unchanged
        self._origins: dict[int, tuple[frozenset[str], bool]] = {}
        self._returned: list[tuple[frozenset[str], bool]] = []  # one for each call of the network

    def __enter__(self) -> Any:
        for name, module in self._modules.items():
            if _owns_parameters(module) and not isinstance(module, torch.jit.ScriptModule):
                self._handles.append(module.register_forward_hook(self._after_layer(name, module)))
                for parameter in module.parameters(recurse=False):
                    self._set(parameter, (frozenset([name]), False))
        self._handles.append(self.network.register_forward_hook(self._after_network))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def head(self) -> str:
        """Return the head's name. InputError if no layer is the head, or more than one is."""
        names = frozenset[str]().union(*(names for names, _ in self._returned))
        names = names - {""} or names  # the whole network only if there is no other
        if len(names) == 1 and all(exact for _, exact in self._returned):
            return next(iter(names))
        if not self._returned:
            found = "loss_fn did not call the model"
        elif all(exact for _, exact in self._returned):
            found = f"got {len(names)}"
        else:
            found = "got none"
        order = [repr(name) for name in self._modules if name in names]
        nearest = f" (the nearest: {', '.join(order[-MAX_NAMED:])})" if order else ""
        raise InputError(
            f"expected one layer whose output is the model's output, {found}{nearest}; name the classifier head: "
            "head='...'"
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = {_storage(tensor): self._get(tensor) for tensor in _tensors((args, kwargs))}
        mixed = (frozenset[str]().union(*(names for names, _ in inputs.values())), False)
        for tensor in _tensors(_written(func, args, kwargs)):
            self._set(tensor, mixed)
        packet = getattr(func, "overloadpacket", None)
        for tensor in _tensors(result):
            if packet in _FRESH:
                self._set(tensor, _NONE)
            elif _storage(tensor) not in inputs:  # else a view, or one of the arguments
                self._set(tensor, next(iter(inputs.values()), _NONE) if packet in _COPIES else mixed)
        return result

    def _after_layer(self, name: str, module: nn.Module) -> Any:
        is_layer = not any(
            child != "parametrizations" and any(True for _ in each.parameters())
            for child, each in module.named_children()
        )

        def hook(_: nn.Module, args: Any, output: Any) -> None:
            for tensor in _tensors(output):
                names, exact = self._get(tensor)
                if not exact:  # else an inner layer's output, returned unchanged
                    self._set(tensor, (frozenset([name]), True) if is_layer else (names | {name}, False))

        return hook

    def _after_network(self, _: nn.Module, args: Any, output: Any) -> None:
        output = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        self._returned.append(next(map(self._get, _tensors(output)), _NONE))

    def _get(self, tensor: Tensor) -> tuple[frozenset[str], bool]:
        return self._origins.get(_storage(tensor), _NONE)

    def _set(self, tensor: Tensor, origin: tuple[frozenset[str], bool]) -> None:
        self._origins[_storage(tensor)] = origin


def head_parameters(model: nn.Module, head: str) -> dict[str, Tensor]:
    """Return the head's trainable parameters by plain name. InputError if the model has no module of this name."""
    network = unwrap(model)
    modules = dict(network.named_modules())
    if head not in modules:
        raise InputError(f"expected head to be a module of the model, got '{head}'; pass one of its names")
    own = {id(parameter) for parameter in modules[head].parameters()}
    return {
        name: parameter
        for name, parameter in model_parameters(network, sharded=True).items()
        if id(parameter) in own and parameter.requires_grad
    }


def _owns_parameters(module: nn.Module) -> bool:
    return is_parametrized(module) or any(True for _ in module.parameters(recurse=False))


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments that an operation writes to, by its schema."""
    schema = getattr(func, "_schema", None)  # operators of higher order have none
    if schema is None or not schema.is_mutable:
        return []
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    writes = [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    return [given.get(name) for name in writes]


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts that have a storage, by which they are identified."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            yield leaf


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
