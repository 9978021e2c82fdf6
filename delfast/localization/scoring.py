"""score: compute the gradients that a criterion needs over a set, or the scores of a criterion without gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from delfast.arguments import check_count, check_loader, check_seed, describe, function_name
from delfast.batches import LossFn, device_of, warn_about_loader
from delfast.deprecation import renamed
from delfast.errors import InputError
from delfast.execution import ChannelsLast, CudaGraphs, Execution, Precision
from delfast.graphs import check_cuda_graphs
from delfast.groups import Group
from delfast.joint_calls import one_error
from delfast.layer_types import output_dims
from delfast.localization.competing import Patterns, check_patterns, competing_parameters
from delfast.localization.criteria import (
    BY_DEPTH,
    WITHOUT_SET,
    Criterion,
    check_criterion,
)
from delfast.localization.critical_channels import MAX_CHANNELS, critmem
from delfast.localization.gradient import GradientSums, MeanGradient, add_all
from delfast.localization.per_example import PerExampleGradients
from delfast.localization.per_example.contributions import Transform
from delfast.localization.scores import Scores
from delfast.localization.sharded_gradient import ShardedGradient
from delfast.localization.sharded_scores import ShardedScores
from delfast.naming import model_parameters, plain_name, refuse_dtensor, trainable_parameters, unwrap
from delfast.ops.layout import unit_count
from delfast.processes import joined
from delfast.sharding import fsdp_groups, is_laid_out
from delfast.shares import refuse_sharded, share


@renamed(loader="forget")
def score(
    model: nn.Module,
    forget: Iterable[Any] | None = None,
    criterion: Criterion = "weighted_grad",
    *,
    per_example: bool = False,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    max_channels: int = MAX_CHANNELS,
    precision: Precision = "fp32",
    channels_last: ChannelsLast = "auto",
    cuda_graphs: CudaGraphs = "auto",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    sum_dtype: torch.dtype | None = None,
    group: Group = None,
) -> Scores:
    """Score every trainable parameter of a model.

    The model runs in eval mode, without its DDP and compile wrappers, and is left as it was. Batches are summed and
    divided once, so a short last batch has its right weight.

    With ``group`` the processes of a job share the set, and each gets the scores of the whole set; all of them call
    ``score``, with the same arguments. The buffers of the first process are used on all, and restored afterwards: those
    of BatchNorm differ between the processes of DDP. Parameters may be DTensors: of FSDP2 (``fully_shard``), which
    requires ``group``, of HSDP and of tensor parallelism. An error of one process is raised by all, with its rank,
    unless it occurs inside the network's forward or backward pass while the others wait there.

    Parameters
    ----------
    model : torch.nn.Module
        The trained model.
    forget : iterable of batches or None, default None
        The forget set, re-iterable: batches (input, target), (index, input, target), or anything that ``loss_fn``
        accepts. None for the criteria "weight", "random", "shallowest" and "deepest", which read no example.
    criterion : str, default "weighted_grad"
        The score c_j of an element, with G the mean gradient of the loss over ``forget``:

        - "weighted_grad": ``|θ_j G_j|``, the criterion of DEL [1]_.
        - "grad": ``|G_j|``, SalLoc, the localization of SalUn [2]_.
        - "squared_grad": the mean of g_j(x)², with ``per_example`` only. It is the diagonal of the Fisher information
          that SSD divides by [3]_.
        - "weight": ``|θ_j|``.
        - "random": a uniform number per competing unit, keyed by (seed, parameter name, index).
        - "shallowest", "deepest": the position of the parameter in the model, the first or the last highest. Channels
          only.
        - "critmem": the number of examples that need the channel; see ``critmem``. Equal counts are ordered by the mean
          positive first-order score. Channels only, never aggregated. Everything except the channels of convolutions
          and linear layers scores 0, and so does the head.
    per_example : bool, default False
        Score each example by its own gradient g(x): c_j is the mean over ``forget`` of ``|θ_j g_j(x)|``,
        ``|g_j(x)|`` or g_j(x)². Exact, in one backward pass per batch. ``docs/per_example.md`` lists what it requires
        of a model.
    loss_fn : callable or None, default None
        ``loss_fn(model, batch)`` returns per-example losses of shape (N,). None means cross-entropy.
    seed : int, default 0
        The seed of the criterion "random", in [0, 2**64).
    max_channels : int, default 50
        The maximum number of channels per example for the criterion "critmem".
    precision : {"fp32", "bf16"}, default "fp32"
        "bf16" runs the forward passes under ``torch.autocast``. Gradients are added over batches and processes in
        float32, also where ``MixedPrecisionPolicy`` of FSDP2 has a shorter ``reduce_dtype``. The mask's metadata has
        the precision of the passes, the policy's too.
    channels_last : {"auto", True, False}, default "auto"
        Whether images (N, C, H, W) are laid out channels-last. "auto" follows the model's convolution weights.
    cuda_graphs : {"auto", True, False}, default "auto"
        Whether to replay the passes as CUDA graphs. "auto" does so on a GPU for at least 8 batches of a shape, without
        a ``loss_fn``. True states that the ``loss_fn`` is a pure function of tensors. Networks of DTensors run without.
    include : str or sequence of str, optional
        Glob patterns of parameter names: only parameters with a name that matches one of them compete, such as
        ``"*.mlp.*"`` (``*`` stands for any characters, dots included; capitals count). A tied parameter is found under
        each of its names. By default every trainable parameter competes.
    exclude : str or sequence of str, optional
        Patterns of parameters that do not compete, also if ``include`` matches them, such as
        ``["*embed*", "lm_head.*"]``.
        A parameter that does not compete is treated as a frozen one: no gradient of it is computed, it does not count
        in the budget, the mask lacks it, and ``unlearn`` leaves it as it is, even if it belongs to the head.
    sum_dtype : torch.dtype or None, default None
        The dtype in which gradients are summed over batches and processes: torch.float32, which None means, or
        torch.float64, with which G does not depend on the number of processes, except where the rounding of its last
        bit to float32 is a tie to within float64. Refused with ``per_example`` and for FSDP2, whose reduction has a
        dtype of its own (``MixedPrecisionPolicy.reduce_dtype``).
    group : ProcessGroup, DeviceMesh or None, default None
        The processes over which the data differ; a DeviceMesh has one dimension. ``forget`` is the whole set's on every
        process, and process r of W takes the batches r, r + W, and so on; of a DataLoader the indices are shared out. A
        DataLoader with a DistributedSampler of this group is used as it is, without the examples that the sampler
        repeats. None: this process reads the whole set. ``Scores.select`` exchanges nothing afterwards, except for
        DTensors: all processes then call it too.

    Returns
    -------
    Scores
        The parameters and their gradients. ``Scores.select`` makes masks of any budget from them.

    Raises
    ------
    InputError
        For an unknown criterion, a missing or empty set, labels out of range, a pattern that matches no
        parameter, and competing parameters on several devices; with ``per_example`` also for DTensors
        and layers that mix the examples (BatchNorm without running statistics). With ``group`` also for a loader whose
        shares are not the set. For a loader with a DistributedSampler, and for FSDP2, without ``group``.

    Warns
    -----
    UserWarning
        If the loader does not yield every example of its set once, unchanged.
    DeprecationWarning
        If the forget set is passed under its former name ``loader``.

    References
    ----------
    .. [1] Torkzadehmahani et al., "Improved Localized Machine Unlearning Through the Lens of Memorization",
       TMLR 2025, arXiv 2412.02432, section 3 and table 4.
    .. [2] Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency", ICLR 2024.
    .. [3] Foster et al., "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening", AAAI 2024.

    Examples
    --------
    >>> import torch, delfast
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(8, 3)
    >>> forget = [(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))]
    >>> scores = delfast.score(model, forget)
    >>> scores.examples, scores.total
    (4, 27)
    >>> [scores.select(budget).selected for budget in (0.4, 0.8)]
    [8, 16]
    """
    with one_error(group, model):
        check_criterion(criterion, per_example, loss_fn)
        per_example = bool(per_example)  # numpy's too
        patterns = check_patterns(include, exclude)
        if criterion == "critmem" and patterns:
            raise InputError(
                "expected no include and no exclude for criterion 'critmem', which searches all channels, got "
                "patterns; leave them out, or freeze the parameters"
            )
        max_channels = check_count("max_channels", max_channels)
        seed = check_seed(seed)
        execution = Execution(precision, channels_last, cuda_graphs)
        execution.check()
        device = device_of(unwrap(model))
        check_cuda_graphs(cuda_graphs, device)
        _check_sums(sum_dtype, per_example, model)
        if forget is not None:
            check_loader(forget, "forget set")
        network = unwrap(model)
        parameters = trainable_parameters(network, sharded=True)
        if not parameters:
            raise InputError(
                "expected a model with trainable parameters, got none; set requires_grad on those to score"
            )
        parameters = competing_parameters(network, parameters, patterns)
        dims = output_dims(network)
        is_sharded = is_laid_out(network)
        computed_in = execution.computed_in(device, network)  # a caller's autocast counts, and a policy of FSDP2
        settings = f"{criterion} {per_example} {seed} {execution} {computed_in} {sum_dtype} {patterns}"
        make = ShardedScores if is_sharded else Scores
        if criterion in WITHOUT_SET:
            processes = joined(network, group, parameters, settings, reads_data=False)
            units = _by_depth(parameters, dims, criterion == "deepest") if criterion in BY_DEPTH else None
            return make(
                parameters, None, criterion, 0, seed, units=units, dims=dims, patterns=patterns, processes=processes
            )
        if forget is None:
            raise InputError(f"expected a forget set for criterion '{criterion}', got none; pass forget=")
        if is_sharded and (per_example or criterion == "critmem"):
            for name, parameter in network.named_parameters():
                refuse_dtensor(plain_name(name), parameter, "per_example" if per_example else "criterion 'critmem'")
        if criterion == "critmem":
            if group is not None:
                raise InputError("expected no group for criterion 'critmem', got one; pass every process the whole set")
            refuse_sharded(forget)
            found = critmem(model, forget, max_channels=max_channels, precision=precision, channels_last=channels_last)
            return Scores(
                parameters,
                None,
                criterion,
                len(found.examples),
                seed,
                units=found.unit_scores(),
                dims=dims,
                precision=computed_in,
            )
        processes = joined(network, group, parameters, f"{settings} {function_name(loss_fn)}")
        shared = None
        if processes is None:
            refuse_sharded(forget)
            warn_about_loader(forget, "forget set", stacklevel=4)  # past the frame of the decorator
        else:
            processes.check_same_values(model_parameters(network, sharded=True))
            shared = share(forget, processes, loss_fn)
        if is_sharded:
            assert processes is not None and shared is not None
            sharded = ShardedGradient(network, parameters, loss_fn, execution, processes, sum_dtype)
            mean, examples = sharded.mean_over(shared, "forget set")
        else:
            batches = forget if shared is None else shared.batches
            sums = gradient_sums(network, parameters, criterion, per_example, loss_fn, execution, batches, sum_dtype)
            finish = None if shared is None else shared.finish
            examples = add_all(sums, network, batches, "forget set", processes, finish)
            mean = sums.mean(examples, last=True)
        return make(
            parameters,
            mean,
            criterion,
            examples,
            seed,
            per_example,
            dims=dims,
            precision=computed_in,
            patterns=patterns,
            processes=processes,
        )


def _check_sums(sum_dtype: torch.dtype | None, per_example: bool, model: nn.Module) -> None:
    """Raise InputError for a dtype that sums cannot have."""
    if sum_dtype not in (None, torch.float32, torch.float64):
        raise InputError(
            f"expected sum_dtype to be torch.float32, torch.float64 or None, got {describe(sum_dtype)}; pass one"
        )
    if sum_dtype is not None and per_example:
        raise InputError(
            f"expected no sum_dtype for per_example=True, got {sum_dtype}; its kernels sum in float32, so omit it"
        )
    if sum_dtype is not None and fsdp_groups(model):
        raise InputError(
            f"expected no sum_dtype for FSDP2, got {sum_dtype}; its own reduction adds the processes' gradients, in "
            "the reduce_dtype of its MixedPrecisionPolicy, so omit it"
        )


def _by_depth(parameters: Mapping[str, Tensor], dims: Mapping[str, int], deepest: bool) -> dict[str, Tensor]:
    """Score every unit by its parameter's position in the model, from 1 up; the end to select first has the highest."""
    positions = range(1, len(parameters) + 1) if deepest else range(len(parameters), 0, -1)
    return {
        name: torch.full((unit_count(parameter.shape, dims.get(name, 0)),), float(position), dtype=torch.float32)
        for (name, parameter), position in zip(parameters.items(), positions, strict=True)
    }


def gradient_sums(
    network: nn.Module,
    parameters: Mapping[str, Tensor],
    criterion: Criterion,
    per_example: bool,
    loss_fn: LossFn | None,
    execution: Execution,
    loader: object,
    sum_dtype: torch.dtype | None = None,
) -> GradientSums:
    """Return the accumulator of a criterion that has a gradient, for the batches of ``loader``."""
    if not per_example:
        return MeanGradient(network, parameters, loss_fn, execution, loader, sum_dtype)
    transform: Transform = "square" if criterion == "squared_grad" else "abs"
    return PerExampleGradients(network, parameters, loss_fn, transform, execution, loader)
