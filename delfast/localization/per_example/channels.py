"""Signed channel sums: which examples lean on which channels, without any weight gradient."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from numpy.lib import format as npy
from torch import Tensor, nn

from delfast.arguments import check_function, check_loader, check_path
from delfast.batches import LossFn, evaluating, split_batch, warn_about_loader
from delfast.errors import InputError
from delfast.files import directory_for, read_json, write_json
from delfast.layer_types import output_dims
from delfast.localization.per_example.capture import Use
from delfast.localization.per_example.contributions import channel_dot, widened
from delfast.localization.per_example.layers import Linear, TransposedConv
from delfast.localization.per_example.passes import ExampleCapture, ExamplePasses
from delfast.localization.per_example.trial import Trial
from delfast.naming import trainable_parameters, unwrap

MATRIX_FILE, EXAMPLES_FILE, LAYERS_FILE = "matrix.npy", "examples.npy", "layers.json"


class SignedChannels:
    """``result["conv1.weight"]``: float32 (N, C), Σ_j θ_ij g_ij(x) of every example x and channel i of that weight, a
    numpy array, like ``matrix`` and ``examples``. KeyError for a weight that has none.

    ``layers``: weight name -> C, in the model's order. ``matrix``: (N, ΣC), all of them side by side; memory-mapped
    if it is on disk. ``examples``: int64 (N,), which example each row is.
    """

    def __init__(self, matrix: Any, examples: Any, layers: Mapping[str, int]) -> None:
        self.matrix, self.examples, self.layers = matrix, examples, dict(layers)

    def __getitem__(self, name: str) -> Any:
        if name not in self.layers:
            raise KeyError(f"expected a weight among {', '.join(self.layers)}, got '{name}'")
        names = list(self.layers)
        start = sum(self.layers[before] for before in names[: names.index(name)])
        return self.matrix[:, start : start + self.layers[name]]

    @staticmethod
    def load(path: str | Path) -> SignedChannels:
        """Open what ``signed_channels(..., path=path)`` wrote. InputError if it is not there or damaged."""
        path = Path(check_path("path", path))
        layers = read_json(path / LAYERS_FILE)
        try:
            matrix: Any = npy.open_memmap(path / MATRIX_FILE, mode="r")
            return SignedChannels(matrix, numpy.load(path / EXAMPLES_FILE, allow_pickle=False), layers)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read '{path}' as signed channels: {error}; write it anew") from None


def signed_channels(
    model: nn.Module, loader: Iterable[Any], *, loss_fn: LossFn | None = None, path: str | Path | None = None
) -> SignedChannels:
    """Σ_j θ_ij g_ij(x) for every example x of ``loader`` and every channel i of the convolutions and linear layers.

    Zeroing channel i's weights changes the loss of x by about minus this, to first order (CritMem: Maini et al., ICML
    2023). It is Σ_t δ_it z_it, with z the layer's output before its bias: see docs/per_example.md. A transposed
    convolution's channels are its input channels. It is zero, or rounding, before anything that undoes the scale of a
    channel: InstanceNorm, or GroupNorm of one channel a group. Do not rank such layers by it.

    path: a directory to be made; batches are streamed to disk there, and the result is memory-mapped.
    Rows are in the loader's order. Their identifiers are the index of (index, input, target) batches, else 0 to N-1.
    The model is left as it was. Raises InputError as ``score(per_example=True)``, and if ``path`` is there already.
    """
    check_function("loss_fn", loss_fn)
    check_loader(loader, "loader")
    path = None if path is None else check_path("path", path)
    warn_about_loader(loader, "set")
    network = unwrap(model)
    passes = ChannelPasses(network, trainable_parameters(network), loss_fn)
    if path is not None and Path(path).exists():
        raise InputError(f"expected '{path}' not to exist, it is to be written; choose another path")
    if path is not None and not Path(path).parent.is_dir():
        raise InputError(f"expected the directory of '{path}' to exist, it does not; make it first")
    directory = None if path is None else Path(path)
    if directory is None:
        rows = _Rows(None, [])
        layers, examples = _fill(rows, passes, network, loader, loss_fn)
        return SignedChannels(numpy.concatenate(rows.kept), examples, layers)
    with directory_for(directory) as (work, _):
        partial = work / "partial"
        partial.mkdir()
        layers, examples = _fill(_Rows(partial / MATRIX_FILE, []), passes, network, loader, loss_fn)
        numpy.save(partial / EXAMPLES_FILE, examples)
        write_json(partial / LAYERS_FILE, layers)
        os.replace(partial, directory)
    return SignedChannels.load(directory)


def _fill(
    rows: _Rows, passes: ChannelPasses, network: nn.Module, loader: Iterable[Any], loss_fn: LossFn | None
) -> tuple[dict[str, int], Any]:
    """Write every batch's rows; the layers, and which examples the rows are."""
    examples: list[Any] = []
    counted = 0
    try:
        with evaluating(network, gradients=True):
            for batch in loader:
                count = passes.add(batch)
                if count:
                    rows.write(passes.matrix())
                    examples.append(identifiers(batch, loss_fn, counted, count))
                    counted += count
    finally:
        rows.close()
    if not counted:
        raise InputError("expected a set of at least one example, got none; check its loader")
    return passes.channel_counts, numpy.concatenate(examples)


class ChannelPasses(ExamplePasses):
    """After ``add``: ``rows``, weight name -> (N, C) of that batch, for convolutions and linear layers."""

    def __init__(self, network: nn.Module, parameters: Mapping[str, Tensor], loss_fn: LossFn | None) -> None:
        super().__init__(network, parameters, loss_fn)
        self.rows: dict[str, Tensor] = {}
        self.rewritten: set[str] = set()
        self.channelwise: set[str] = set()  # those that are known to be wanted
        self.dims = output_dims(network)

    @property
    def channel_counts(self) -> dict[str, int]:
        """Weight name -> C, in the model's order."""
        return {name: int(p.shape[self.dims.get(name, 0)]) for name, p in self.parameters.items()}

    def by_row(self, name: str, values: Tensor) -> Tensor:
        """(C, elements of a row) of values in the shape of this weight."""
        return values.movedim(self.dims.get(name, 0), 0).flatten(1)

    def _channelwise(self, trial: Trial) -> set[str]:
        """Weights whose rows, along the dimension where a mask has them, are outputs of a layer."""
        return {name for name in trial.channelwise if trial.output_dims[name] == self.dims.get(name, 0)}

    def wanted(self, trial: Trial) -> dict[str, Tensor]:
        self.channelwise |= self._channelwise(trial)
        names = self.channelwise.union(trial.repeats)  # reentrant checkpoints show theirs in the backward pass only
        return {name: p for name, p in self.parameters.items() if name in names}

    def after_trial(self, trial: Trial) -> None:
        self.channelwise |= self._channelwise(trial)
        self.parameters = {name: p for name, p in self.parameters.items() if name in self.channelwise}
        for name in trial.channelwise & trial.otherwise:
            trial.unknown.setdefault(name, "is used by layers of more than one kind")
        self.rewritten |= trial.rewritten
        super().after_trial(trial)

    def mark_unknown(self, unknown: Mapping[str, str]) -> None:
        self.parameters = {n: p for n, p in self.parameters.items() if n not in unknown or n in self.channelwise}
        super().mark_unknown({name: reason for name, reason in unknown.items() if name in self.channelwise})

    def capture(self, batch: Any) -> ExampleCapture:
        return ChannelCapture(self, batch)

    def accumulate(self, name: str, example: int, gradient: Tensor) -> None:
        products = self.parameters[name].detach() * widened(gradient)
        self.rows[name][example] = self.by_row(name, products).sum(dim=1)

    def matrix(self) -> Any:
        """(N, ΣC) of the batch, float32."""
        if not self.rows:
            raise InputError(
                "expected losses of a model with a convolution or linear layer that trains, got none; only these have "
                "channels"
            )
        return torch.cat([rows.float().cpu() for rows in self.rows.values()], dim=1).numpy()


class ChannelCapture(ExampleCapture):
    """Receives δ beside z, the layer's output before its bias; a transposed convolution's input is its z."""

    passes: ChannelPasses

    def __init__(self, passes: ChannelPasses, batch: Any) -> None:
        super().__init__(passes, batch)
        self._sums: dict[str, Tensor] = {}

    def compute(self, use: Use, function: Callable[..., Tensor], inputs: Tensor) -> Tensor:
        call: dict[str, Any] = {**use.call, "input": inputs}
        if use.weight is None or not use.rule.is_channelwise:
            return function(call, use.rule)
        if isinstance(use.rule, TransposedConv):  # rows are input channels: δ of the input, through this layer alone
            inputs = self.kept(use, inputs)
            return function({**call, "input": self.tap(use, inputs.clone(), inputs)}, use.rule)
        output, bias = self.kept(use, function({**call, "bias": None}, use.rule)), call["bias"]
        if bias is None:
            return self.tap(use, output, output.clone() if use.weight in self.passes.rewritten else output)
        bias = bias.to(output.dtype).reshape([-1 if d == channel_dim(use, output) else 1 for d in range(output.ndim)])
        return self.tap(use, output + bias, output)

    def kept(self, use: Use, values: Tensor) -> Tensor:
        """What is kept of z: here all of it."""
        return values

    def arrived(self, use: Use, saved: Tensor | None, deltas: Tensor) -> None:
        axis = None if use.weight is None else self.axis(use.weight, deltas, use.leading)
        if use.weight is None or saved is None or axis is None:
            return
        split = [use.rule.channel_deltas(use.call, t, axis) for t in (deltas, saved)]
        sums = channel_dot(*split)
        self._sums[use.weight] = self._sums[use.weight] + sums if use.weight in self._sums else sums

    def finish(self) -> None:
        """Parameters that are missing or have no gradient: zeros."""
        missing = self.missing
        self.passes.rows = {}
        counts = self.passes.channel_counts
        for name, parameter in self.passes.parameters.items():
            zeros = widened(parameter.new_zeros(self.examples, counts[name]))
            self.passes.rows[name] = zeros if name in missing else self._sums.get(name, zeros)


def channel_dim(use: Use, values: Tensor) -> int:
    """Which dim of z has the rows of the weight."""
    return values.ndim - 1 if isinstance(use.rule, Linear) else 1


class _Rows:
    """Appends (n, C) arrays to a .npy file whose length is not known before its end, or to a list."""

    def __init__(self, path: Path | None, kept: list[Any]) -> None:
        self.path, self.kept = path, kept
        self.stream: BinaryIO | None = None
        self.count = self.width = 0

    def write(self, rows: Any) -> None:
        if self.path is None:
            self.kept.append(rows)
            return
        if self.stream is None:
            self.stream = open(self.path, "wb")  # noqa: SIM115  # closed by close()
            self.width = rows.shape[1]
            self._header()
        self.stream.write(numpy.ascontiguousarray(rows, dtype=numpy.float32).tobytes())
        self.count += len(rows)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.seek(0)
            self._header()  # numpy leaves room for the first dim to grow
            self.stream.flush()
            os.fsync(self.stream.fileno())
            self.stream.close()

    def _header(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.count, self.width)}
        npy.write_array_header_1_0(self.stream, header)  # type: ignore[arg-type]


def identifiers(batch: Any, loss_fn: object, counted: int, count: int) -> Any:
    """int64 (count,): the index of (index, input, target) batches, else from ``counted`` on."""
    index = split_batch(batch)[0] if loss_fn is None else None
    if index is not None:
        return torch.as_tensor(index, dtype=torch.int64).cpu().numpy()
    return numpy.arange(counted, counted + count, dtype=numpy.int64)
