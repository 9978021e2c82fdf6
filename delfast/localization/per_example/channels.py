"""Signed channel sums: how much each example depends on each channel, without any weight gradient."""

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
from delfast.batches import LossFn, device_of, split_batch, warn_about_loader
from delfast.errors import InputError
from delfast.eval_mode import evaluating
from delfast.execution import ChannelsLast, CudaGraphs, Execution, Precision
from delfast.feeding import feed
from delfast.files import directory_for, read_json, write_json
from delfast.layer_types import output_dims
from delfast.localization.per_example.batch import BatchRun
from delfast.localization.per_example.capture import Layer, Use
from delfast.localization.per_example.contributions import channel_dot, wide, widened
from delfast.localization.per_example.passes import ExamplePasses
from delfast.localization.per_example.trial import Trial
from delfast.naming import trainable_parameters, unwrap
from delfast.ops.layout import channels_first

MATRIX_FILE, EXAMPLES_FILE, LAYERS_FILE = "matrix.npy", "examples.npy", "layers.json"


class SignedChannels:
    """Signed channel sums: Σ_j θ_ij g_ij(x) of every example x and channel i.

    ``result["conv1.weight"]`` is the float32 numpy array (N, C) of that weight; KeyError for a weight without sums.

    Parameters
    ----------
    matrix : numpy.ndarray
        Float32 (N, ΣC): the arrays of all weights side by side. Memory-mapped if it is on disk.
    examples : numpy.ndarray
        Int64 (N,): the number of the example in each row; see ``signed_channels``.
    layers : mapping of str to int
        Weight name -> C, in the model's order.

    Examples
    --------
    >>> import torch, delfast
    >>> sums = delfast.signed_channels(torch.nn.Linear(4, 3), [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))])
    >>> sums.layers, sums["weight"].shape, sums.examples.tolist()
    ({'weight': 3}, (5, 3), [0, 1, 2, 3, 4])
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
        """Open the directory that ``signed_channels(..., path=path)`` wrote.

        Parameters
        ----------
        path : str or pathlib.Path
            The directory.

        Returns
        -------
        SignedChannels
            The sums, memory-mapped.

        Raises
        ------
        InputError
            If the directory does not exist or is damaged.

        Examples
        --------
        >>> import tempfile, torch, delfast
        >>> batches = [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = delfast.signed_channels(torch.nn.Linear(4, 3), batches, path=directory + "/sums")
        ...     delfast.SignedChannels.load(directory + "/sums").matrix.shape
        (5, 3)
        """
        path = Path(check_path("path", path))
        layers = read_json(path / LAYERS_FILE)
        try:
            matrix: Any = npy.open_memmap(path / MATRIX_FILE, mode="r")
            return SignedChannels(matrix, numpy.load(path / EXAMPLES_FILE, allow_pickle=False), layers)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read '{path}' as signed channels: {error}; write it again") from None


def signed_channels(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    path: str | Path | None = None,
    precision: Precision = "fp32",
    channels_last: ChannelsLast = "auto",
    cuda_graphs: CudaGraphs = "auto",
) -> SignedChannels:
    """Compute Σ_j θ_ij g_ij(x) for every example x and every channel i of the convolutions and linear layers.

    Setting channel i's weights to zero changes the loss of x by about minus this sum, to first order [1]_. It equals
    Σ_t δ_it z_it, with δ the output gradient and z the layer's output before its bias; see docs/per_example.md. The
    channels of a transposed convolution are its input channels. The sum is zero, except for rounding, in front of a
    layer that removes the scale of a channel (InstanceNorm, or GroupNorm with one channel per group). Do not rank
    the channels in front of such a layer.

    Parameters
    ----------
    model : torch.nn.Module
        The trained model. It runs in eval mode and is left as it was.
    loader : iterable of batches
        Batches (input, target), (index, input, target), or anything that ``loss_fn`` accepts.
    loss_fn : callable or None, default None
        ``loss_fn(model, batch)`` returns per-example losses of shape (N,). None means cross-entropy.
    path : str, pathlib.Path or None, default None
        A directory to create. Batches are written to it one after another, and the result is memory-mapped.
    precision : {"fp32", "bf16"}, default "fp32"
        "bf16" runs the forward passes under ``torch.autocast``.
    channels_last : {"auto", True, False}, default "auto"
        Whether images (N, C, H, W) are laid out channels-last. "auto" follows the model's convolution weights.
    cuda_graphs : {"auto", True, False}, default "auto"
        Whether to replay the passes as CUDA graphs. "auto" does so on a GPU for at least 8 batches of a shape, without
        a ``loss_fn``. True states that the ``loss_fn`` is a pure function of tensors.

    Returns
    -------
    SignedChannels
        Rows in the loader's order. Their numbers are the index of (index, input, target) batches, else 0 to N-1.

    Raises
    ------
    InputError
        As ``score(per_example=True)``, and if ``path`` exists already.

    References
    ----------
    .. [1] Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023.

    Examples
    --------
    >>> import torch, delfast
    >>> sums = delfast.signed_channels(torch.nn.Linear(4, 3), [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))])
    >>> sums["weight"].shape
    (5, 3)
    """
    check_function("loss_fn", loss_fn)
    execution = Execution(precision, channels_last, cuda_graphs)
    execution.check()
    check_loader(loader, "loader")
    path = None if path is None else check_path("path", path)
    warn_about_loader(loader, "set")
    network = unwrap(model)
    sums = ChannelSums(network)
    passes = ExamplePasses(network, trainable_parameters(network), loss_fn, sums, execution, loader)
    if path is not None and Path(path).exists():
        raise InputError(f"expected '{path}' not to exist, it is to be written; choose another path")
    if path is not None and not Path(path).parent.is_dir():
        raise InputError(f"expected the directory of '{path}' to exist, it does not; make it first")
    directory = None if path is None else Path(path)
    if directory is None:
        rows = _Rows(None, [])
        layers, examples = _fill(rows, sums, passes, loader)
        return SignedChannels(numpy.concatenate(rows.kept), examples, layers)
    with directory_for(directory) as (work, _):
        partial = work / "partial"
        partial.mkdir()
        layers, examples = _fill(_Rows(partial / MATRIX_FILE, []), sums, passes, loader)
        numpy.save(partial / EXAMPLES_FILE, examples)
        write_json(partial / LAYERS_FILE, layers)
        os.replace(partial, directory)
    return SignedChannels.load(directory)


def _fill(rows: _Rows, sums: ChannelSums, passes: ExamplePasses, loader: Iterable[Any]) -> tuple[dict[str, int], Any]:
    """Write every batch's rows. Return weight name -> C, and the numbers of the examples in the rows."""
    examples: list[Any] = []
    counted = 0
    try:
        with evaluating(passes.network, gradients=True), passes.checks:
            for batch in feed(loader, device_of(passes.network)):
                count = passes.add(batch)
                if count:
                    rows.write(sums.matrix())
                    examples.append(identifiers(batch, passes.loss_fn, counted, count))
                    counted += count
            passes.checks.read()
    finally:
        rows.close()
    if not counted:
        raise InputError("expected a set of at least one example, got none; check its loader")
    return sums.channel_counts(passes.parameters), numpy.concatenate(examples)


class ChannelSums:
    """The consumer that computes signed channel sums. ``rows``: weight name -> (N, C), of the last batch."""

    def __init__(self, network: nn.Module) -> None:
        self.rows: dict[str, Tensor] = {}
        self.rewritten: set[str] = set()
        self.channelwise: set[str] = set()  # weights of convolutions and linear layers in the trials so far
        self.parameters: dict[str, Tensor] = {}  # those of ``channelwise``
        self.dims = output_dims(network)

    def channel_counts(self, parameters: Mapping[str, Tensor]) -> dict[str, int]:
        """Return weight name -> C, in the model's order."""
        return {name: int(p.shape[self.dims.get(name, 0)]) for name, p in parameters.items()}

    def wanted(self, trial: Trial, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.channelwise |= self._channelwise(trial)
        # weights in reentrant checkpoints are seen in the backward pass only
        names = self.channelwise.union(trial.capture.repeats)
        return {name: p for name, p in parameters.items() if name in names}

    def learn(self, trial: Trial, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.channelwise |= self._channelwise(trial)
        for name in trial.channelwise & trial.otherwise:
            trial.capture.unknown.setdefault(name, "is used by layers of more than one kind")
        self.rewritten |= trial.rewritten
        self.parameters = {name: p for name, p in parameters.items() if name in self.channelwise}
        return self.parameters

    def reported(self, unknown: Mapping[str, str]) -> dict[str, str]:
        return {name: reason for name, reason in unknown.items() if name in self.channelwise}

    def receiver(self) -> ChannelReceiver:
        return ChannelReceiver(self)

    def accumulate(self, name: str, example: int, gradient: Tensor) -> None:
        products = self.parameters[name].detach() * widened(gradient)
        by_row = channels_first(products, self.dims.get(name, 0)).flatten(1)
        self.rows[name][example] = by_row.sum(dim=1)

    def state(self) -> dict[str, Tensor]:
        return {}  # every batch has rows of its own

    def result(self) -> dict[str, Tensor]:
        return self.rows

    def take(self, result: dict[str, Tensor]) -> None:
        self.rows = result

    def matrix(self) -> Any:
        """Return the batch's rows side by side: a float32 numpy array (N, ΣC)."""
        if not self.rows:
            raise InputError(
                "expected losses of a model with a convolution or linear layer that trains, got none; unfreeze one, "
                "since only these have channels"
            )
        return torch.cat(list(self.rows.values()), dim=1).float().cpu().numpy()  # one copy to the host

    def _channelwise(self, trial: Trial) -> set[str]:
        """Return the weights whose channels, along the dimension of a mask's channels, are outputs of a layer."""
        return {name for name in trial.channelwise if trial.output_dims[name] == self.dims.get(name, 0)}


class ChannelReceiver:
    """The receiver of δ and z, the layer's output before its bias (a transposed convolution's input).

    ``zero`` gets each use, its z and the pass, and returns z with channels set to zero; None changes nothing.
    """

    def __init__(self, sums: ChannelSums, zero: Callable[[Use, Tensor, BatchRun], Tensor] | None = None) -> None:
        self._consumer = sums
        self._zero = zero
        self._sums: dict[str, Tensor] = {}

    def compute(self, use: Use, layer: Layer, inputs: Tensor, run: BatchRun) -> Tensor:
        call: dict[str, Any] = {**use.call, "input": inputs}
        if use.weight is None or not use.rule.is_channelwise:
            return layer(call)
        tap = run.capture.tap
        if use.rule.rows_are_inputs:
            inputs = self._zeroed(use, inputs, run)
            return layer({**call, "input": tap(use, inputs.clone(), inputs)})
        output, bias = self._zeroed(use, layer({**call, "bias": None}), run), call["bias"]
        if bias is None:
            return tap(use, output, output.clone() if use.weight in self._consumer.rewritten else output)
        if bias.dtype != output.dtype:
            bias = bias.to(output.dtype)
        after = output.ndim - 1 - use.rule.channel_dim(output.ndim)
        return tap(use, output + (bias.view(-1, *[1] * after) if after else bias), output)

    def receive(self, use: Use, saved: Tensor | None, output_grad: Tensor, run: BatchRun) -> None:
        axis = None if use.weight is None else run.axis(use.weight, output_grad, use.leading)
        if use.weight is None or saved is None or axis is None:
            return
        split = [use.rule.output_grad_by_channel(use.call, t, axis) for t in (output_grad, saved)]
        sums = channel_dot(*split)
        self._sums[use.weight] = self._sums[use.weight] + sums if use.weight in self._sums else sums

    def finish(self, run: BatchRun) -> None:
        """Set the batch's rows. Parameters that are missing or have no gradient get zeros."""
        missing, consumer = run.missing, self._consumer
        consumer.rows = {}
        for name, count in consumer.channel_counts(consumer.parameters).items():
            sums = None if name in missing else self._sums.get(name)
            if sums is None:
                parameter = consumer.parameters[name]
                sums = parameter.new_zeros(run.examples, count, dtype=wide(parameter.dtype))
            consumer.rows[name] = sums

    def _zeroed(self, use: Use, values: Tensor, run: BatchRun) -> Tensor:
        return values if self._zero is None else self._zero(use, values, run)


class _Rows:
    """A writer that appends (n, C) arrays to a list, or to a .npy file whose length is known only at the end."""

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
            self._header()  # numpy pads the header so that the first dim can grow
            self.stream.flush()
            os.fsync(self.stream.fileno())
            self.stream.close()

    def _header(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.count, self.width)}
        npy.write_array_header_1_0(self.stream, header)  # type: ignore[arg-type]


def identifiers(batch: Any, loss_fn: object, counted: int, count: int) -> Any:
    """Return int64 (count,): the index of an (index, input, target) batch, else ``counted``, ``counted`` + 1, …"""
    index = split_batch(batch)[0] if loss_fn is None else None
    if index is not None:
        return torch.as_tensor(index, dtype=torch.int64).cpu().numpy()
    return numpy.arange(counted, counted + count, dtype=numpy.int64)
