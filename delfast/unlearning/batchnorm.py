"""BatchNorm in training mode and batches that are too small for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from delfast.errors import InputError
from delfast.unlearning.loaders import batch_sizes

REMEDY = 'choose another batch size or drop_last=True, or keep the running statistics: batchnorm="frozen"'


class BatchNormInputs:
    """Record, inside the context, which BatchNorms that would train on a batch get one value a channel and example.

    Inputs (N, C, L) are left out: L may be the length of the sequences, which may vary from batch to batch.
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
        self.single: dict[tuple[str, int], None] = {}  # names and numbers of examples

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
        """InputError if the loader's smallest batch would certainly leave a BatchNorm one value a channel.

        Nothing where only iterating over the loader would show its batches' sizes, or where the BatchNorm's input is
        not one row for each example: ``batchnorm_explained`` then names the same way out.
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
    """Turn torch's error for such a batch into an InputError that names the way out."""
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise InputError(f"a batch is too small for BatchNorm to train on ({_torchs(error)}); {REMEDY}") from error


def _torchs(error: ValueError) -> str:
    """Torch's own line; DataParallel puts the replica's traceback before it."""
    return next(line for line in str(error).splitlines()[::-1] if "Expected more than 1 value" in line).strip()
