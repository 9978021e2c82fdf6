"""BatchNorm in training mode and batches that are too small for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from delfast.errors import InputError
from delfast.unlearn.loaders import batch_sizes

WAY_OUT = 'choose another batch size or drop_last=True, or keep the running statistics: batchnorm="frozen"'


class SmallestMaps:
    """Inside the context, record how many values a channel each BatchNorm that would train on a batch gets.

    frozen: whether ``batchnorm="frozen"`` will hold. A BatchNorm without running statistics needs the batch either way.
    SyncBatchNorm counts the values of all processes, which one process cannot: it is left out.
    """

    def __init__(self, network: nn.Module, frozen: bool) -> None:
        everything_trains = not network.training  # ``train`` then puts every module into training mode
        self.layers = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, _BatchNorm)
            and not isinstance(module, nn.SyncBatchNorm)
            and (module.running_mean is None or ((everything_trains or module.training) and not frozen))
        }
        self.values: dict[str, int] = {}

    def __enter__(self) -> SmallestMaps:
        self._handles = [layer.register_forward_pre_hook(self._look(name)) for name, layer in self.layers.items()]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].ndim > 1 and args[0].numel():
                values = args[0].numel() // args[0].shape[1]
                self.values[name] = min(values, self.values.get(name, values))

        return hook

    def check(self, loader: Any, what: str) -> None:
        """InputError if the loader's smallest batch would leave a BatchNorm one value a channel. Nothing where only
        iterating over the loader would show its batches' sizes: ``batchnorm_explained`` then names the same way out.
        """
        sizes = batch_sizes(loader)
        if sizes is None:
            return
        first, smallest = sizes
        for name, values in self.values.items():
            if values * smallest <= first:  # values / first of them come from each example
                examples = f"{smallest} example{'s' * (smallest != 1)}"
                raise InputError(
                    f"expected more than one value a channel for the BatchNorm '{name}' to train on, got one from a "
                    f"batch of {examples} of the {what} set; {WAY_OUT}"
                )


@contextmanager
def batchnorm_explained() -> Iterator[None]:
    """Turn torch's error for such a batch into an InputError that names the way out."""
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise InputError(f"a batch is too small for BatchNorm to train on ({_torchs(error)}); {WAY_OUT}") from error


def _torchs(error: ValueError) -> str:
    """Torch's own line; DataParallel puts the replica's traceback before it."""
    return next(line for line in str(error).splitlines()[::-1] if "Expected more than 1 value" in line).strip()
