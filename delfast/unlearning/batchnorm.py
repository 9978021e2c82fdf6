"""Batches that are too small for BatchNorm in training mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from delfast.errors import InputError
from delfast.loaders import batch_sizes

REMEDY = 'choose another batch size or drop_last=True, or keep the running statistics: batchnorm="frozen"'


class BatchNormInputs:
    """Record, inside the context, the BatchNorms in training mode that get one value per channel and example.

    Inputs (N, C, L) are not recorded: L may be the length of sequences, which may vary from batch to batch.
    SyncBatchNorm is not recorded: it uses the values of all processes, which one process cannot count.
    frozen: whether training will use ``batchnorm="frozen"``. A BatchNorm without running statistics normalizes by the
    batch even then.
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
        self.single: dict[tuple[str, int], None] = {}  # name and number of examples

    def __enter__(self) -> BatchNormInputs:
        self._handles = [layer.register_forward_pre_hook(self._record(name)) for name, layer in self.layers.items()]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not (args and isinstance(args[0], Tensor) and args[0].ndim in (2, 4, 5)):
                return
            examples, channels = args[0].shape[:2]
            if args[0].numel() == examples * channels:
                self.single[name, examples] = None

        return hook

    def check(self, loader: Any, what: str) -> None:
        """Raise InputError if the loader's smallest batch certainly gives a BatchNorm one value per channel.

        That is unknown if only iterating over the loader shows the sizes of its batches, or if the BatchNorm's input is
        not one row per example. ``batchnorm_explained`` then gives the same advice during training.
        """
        first, smallest = batch_sizes(loader) or (0, 0)
        for name, examples in self.single:
            if smallest == 1 and examples == first:
                raise InputError(
                    f"expected more than one value a channel for the BatchNorm '{name}' to train on, got one from a "
                    f"batch of 1 example of the {what} set; {REMEDY}"
                )


@contextmanager
def batchnorm_explained() -> Iterator[None]:
    """Turn torch's error for a batch that is too small into an InputError with advice."""
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise InputError(f"a batch is too small for BatchNorm to train on ({_torchs(error)}); {REMEDY}") from error


def _torchs(error: ValueError) -> str:
    """Return the line that torch wrote; DataParallel puts the replica's traceback before it."""
    return next(line for line in str(error).splitlines()[::-1] if "Expected more than 1 value" in line).strip()
