"""Accuracy, loss and confidence on the forget, retain and test sets, and the gap to an oracle.

Classifiers are measured over examples, causal language models over tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from delfast.arguments import check_flag, check_loader, check_seed, check_type
from delfast.batches import IGNORED
from delfast.device_checks import refuse_if
from delfast.errors import InputError
from delfast.evaluation.membership import import_svc, membership_inference
from delfast.evaluation.outputs import Loader, check_examples, collect, join, predict, predict_tokens, true_class
from delfast.execution import ChannelsLast, CudaGraphs, Execution, Precision
from delfast.groups import Group
from delfast.joint_calls import one_error
from delfast.language import is_token_batch
from delfast.overlap import check_disjoint
from delfast.processes import Processes

MAX_EXPONENT = 709.0  # about the largest x with a finite exp(x) in float64


@dataclass(frozen=True)
class SetResult:
    """Measurements of a network on one set of examples.

    Parameters
    ----------
    accuracy : float
        Percentage (0-100) of examples that are classified as their target. For a language model, of counted tokens that
        are predicted.
    loss : float
        Mean cross-entropy in nats over the examples. For a language model, over the counted tokens.
    confidences : Tensor
        Softmax probability of the true class of each example: float32 (N,), on the CPU. For a language model the
        geometric mean of its tokens' probabilities, exp(-losses).
    losses : Tensor, optional
        For a language model the mean cross-entropy over the counted tokens of each example: float32 (N,), on the CPU.
        None for a classifier.
    perplexity : float, optional
        For a language model exp(loss); None for a classifier.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import SetResult
    >>> SetResult(accuracy=50.0, loss=0.7, confidences=torch.tensor([0.6, 0.4])).accuracy
    50.0
    """

    accuracy: float
    loss: float
    confidences: Tensor
    losses: Tensor | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class Metrics:
    """Measurements of a network on the forget, retain and test sets.

    Accuracies and ``mia`` are percentages (0-100). Deltas are oracle - method in percentage points; the smaller their
    absolute value, the better (DEL paper, section 3). A delta is None without an oracle. Accuracies and losses are
    means over examples, for a language model over counted tokens.

    Parameters
    ----------
    forget_acc : float
        Accuracy on the forget set.
    retain_acc : float
        Accuracy on the retain set.
    test_acc : float
        Accuracy on the test set.
    forget_loss : float
        Mean cross-entropy on the forget set, in nats.
    retain_loss : float
        Mean cross-entropy on the retain set, in nats.
    test_loss : float
        Mean cross-entropy on the test set, in nats.
    mia : float, optional
        Percentage of the forget set that membership inference calls non-member; None if it was not run.
    delta_forget : float, optional
        Oracle's minus method's forget accuracy.
    delta_mia : float, optional
        Oracle's minus method's ``mia``; None if either is None.
    delta_test : float, optional
        Oracle's minus method's test accuracy.
    forget_perplexity : float, optional
        A language model's exp(``forget_loss``); None for a classifier.
    retain_perplexity : float, optional
        Its exp(``retain_loss``).
    test_perplexity : float, optional
        Its exp(``test_loss``).

    References
    ----------
    Torkzadehmahani et al., "Improved Localized Machine Unlearning Through the Lens of Memorization", TMLR 2025,
    arXiv 2412.02432.

    Examples
    --------
    >>> from delfast.evaluation import Metrics
    >>> Metrics(90.0, 99.0, 80.0, 0.3, 0.1, 0.6).as_dict()["test_acc"]
    80.0
    """

    forget_acc: float
    retain_acc: float
    test_acc: float
    forget_loss: float
    retain_loss: float
    test_loss: float
    mia: float | None = None
    delta_forget: float | None = None
    delta_mia: float | None = None
    delta_test: float | None = None
    forget_perplexity: float | None = None
    retain_perplexity: float | None = None
    test_perplexity: float | None = None

    def as_dict(self) -> dict[str, float]:
        """Return the values by name, except those that are None.

        Returns
        -------
        dict of str to float
            Plain values, ready for JSON.
        """
        return {name: value for name, value in asdict(self).items() if value is not None}


def evaluate(
    model: nn.Module,
    forget: Loader,
    retain: Loader,
    test: Loader,
    *,
    oracle: Metrics | None = None,
    seed: int = 0,
    mia: bool = True,
    precision: Precision = "fp32",
    channels_last: ChannelsLast = "auto",
    cuda_graphs: CudaGraphs = "auto",
    group: Group = None,
) -> Metrics:
    """Measure a network on its forget, retain and test sets, in eval mode without gradients.

    The model is left as it was.

    With ``group`` the processes of a job share the sets; all of them make the call, with the same arguments. The model
    runs without its DDP and compile wrappers, with the buffers of the group's first process, as in DDP. Parameters may
    be DTensors: of FSDP2 (``fully_shard``), which requires ``group``, of HSDP and of tensor parallelism. An error of
    one process is raised by all, unless it occurs inside the network's forward pass while the others wait there.

    Parameters
    ----------
    model : torch.nn.Module
        Classifier: ``model(input)`` returns logits (B, classes). Or a causal language model, as for ``causal_lm_loss``.
    forget : iterable
        Batches of the forget set: (input, target) or (index, input, target), with integer targets (B,). For a language
        model mappings with ``input_ids``, as ``causal_lm_loss`` accepts them.
    retain : iterable
        Batches of the rest of the training set.
    test : iterable
        Batches of examples that no network was trained on. Sets that have examples in common are refused, where their
        loaders show it.
    oracle : Metrics, optional
        Metrics of a network that was retrained without the forget set; with them, the gaps are computed.
    seed : int, default 0
        Chooses the examples on which membership inference is fitted.
    mia : bool, default True
        Whether to run membership inference. It needs scikit-learn (``delfast[experiments]``).
    precision : {"fp32", "bf16"}, default "fp32"
        "bf16" runs the forward passes under ``torch.autocast``.
    channels_last : {"auto", True, False}, default "auto"
        Whether images (N, C, H, W) are laid out channels-last. "auto" follows the model's convolution weights.
    cuda_graphs : {"auto", True, False}, default "auto"
        Whether to replay the passes as CUDA graphs; "auto" does so on a GPU, for at least 8 batches of a shape.
    group : ProcessGroup, DeviceMesh or None, default None
        The processes over which the data differ; a DeviceMesh has one dimension. The loaders are the whole sets' on
        every process, and are shared out as for ``delfast.score``. Every process gets the result of one process: to
        the bit if the batches are the same. None: this process reads the whole sets.

    Returns
    -------
    Metrics
        Accuracies, losses, ``mia`` and the gaps; for a language model also perplexities.

    Raises
    ------
    InputError
        For arguments of another type, an empty set, labels that the model has no output for, outputs that are not
        finite, and sets of classes beside sets of tokens. Also for an example without a counted token.
        With ``group`` also for a loader whose shares are not the set, and for parameters that differ between processes.
        For a loader with a DistributedSampler, and for FSDP2, without ``group``.
    ImportError
        If ``mia`` is True and scikit-learn is missing; raised before anything is measured.

    Notes
    -----
    Accuracy and loss of a language model are means over all counted tokens of a set. Membership inference then reads
    each example's own mean loss in nats, where it reads a classifier's confidence.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> model = torch.nn.Linear(2, 2)
    >>> forget, retain, test = ([(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))] for _ in range(3))
    >>> metrics = delfast.evaluate(model, forget=forget, retain=retain, test=test, mia=False)
    >>> 0 <= metrics.forget_acc <= 100
    True
    """
    with one_error(group, model):
        sets = {"forget": forget, "retain": retain, "test": test}
        for name, loader in sets.items():
            check_loader(loader, f"{name} set")
        check_disjoint({"forget": forget}, {"retain": retain, "test": test})
        check_disjoint({"retain": retain}, {"test": test})
        check_type("oracle", oracle, (Metrics, type(None)), "the Metrics of evaluate(oracle, ...), or None")
        seed = check_seed(seed)
        execution = Execution(precision, channels_last, cuda_graphs)
        execution.check()
        if check_flag("mia", mia):
            import_svc()  # so that a missing package is reported before the sets are measured
        (network,), processes = join(group, f"evaluate {seed} {mia}", execution, model=model)
        results = {name: _measure(network, loader, name, execution, processes) for name, loader in sets.items()}
        forgotten, retained, tested = results.values()
        if len({each.losses is None for each in results.values()}) > 1:
            raise InputError(
                "expected three sets of one form, got batches with 'input_ids' and others; pass one model's sets"
            )
        metrics = Metrics(
            forget_acc=forgotten.accuracy,
            retain_acc=retained.accuracy,
            test_acc=tested.accuracy,
            forget_loss=forgotten.loss,
            retain_loss=retained.loss,
            test_loss=tested.loss,
            mia=membership_inference(_feature(retained), _feature(tested), _feature(forgotten), seed) if mia else None,
            forget_perplexity=forgotten.perplexity,
            retain_perplexity=retained.perplexity,
            test_perplexity=tested.perplexity,
        )
        return metrics if oracle is None else Metrics(**{**asdict(metrics), **gaps(metrics, oracle)})


def gaps(metrics: Metrics, oracle: Metrics) -> dict[str, float]:
    """Return the gaps oracle - method in forget accuracy, test accuracy and membership inference.

    Parameters
    ----------
    metrics : Metrics
        Metrics of the unlearned network.
    oracle : Metrics
        Metrics of a network that was retrained without the forget set.

    Returns
    -------
    dict of str to float
        Percentage points by the names of the gaps in ``Metrics``; without "delta_mia" if either ``mia`` is None.

    Raises
    ------
    InputError
        If an argument is no Metrics.

    Examples
    --------
    >>> from delfast.evaluation import Metrics, gaps
    >>> gaps(Metrics(90.0, 99.0, 80.0, 0.3, 0.1, 0.6), oracle=Metrics(85.0, 99.0, 81.0, 0.5, 0.1, 0.6))
    {'delta_forget': -5.0, 'delta_test': 1.0}
    """
    for name, value in (("metrics", metrics), ("oracle", oracle)):
        check_type(name, value, Metrics, "the Metrics that evaluate() returns")
    pairs = {
        "delta_forget": (oracle.forget_acc, metrics.forget_acc),
        "delta_mia": (oracle.mia, metrics.mia),
        "delta_test": (oracle.test_acc, metrics.test_acc),
    }
    return {name: theirs - own for name, (theirs, own) in pairs.items() if theirs is not None and own is not None}


def accuracy_and_loss(
    model: nn.Module,
    loader: Loader,
    *,
    precision: Precision = "fp32",
    channels_last: ChannelsLast = "auto",
    cuda_graphs: CudaGraphs = "auto",
    group: Group = None,
) -> SetResult:
    """Measure accuracy, mean cross-entropy and true-class confidences on one set, in eval mode without gradients.

    The model is left as it was.

    With ``group`` the processes of a job share the set, as in ``delfast.evaluate``.

    Parameters
    ----------
    model : torch.nn.Module
        Classifier: ``model(input)`` returns logits (B, classes). Or a causal language model, as for ``causal_lm_loss``.
    loader : iterable
        Batches (input, target) or (index, input, target), with integer targets (B,). For a language model mappings with
        ``input_ids``.
    precision : {"fp32", "bf16"}, default "fp32"
        "bf16" runs the forward passes under ``torch.autocast``.
    channels_last : {"auto", True, False}, default "auto"
        Whether images (N, C, H, W) are laid out channels-last. "auto" follows the model's convolution weights.
    cuda_graphs : {"auto", True, False}, default "auto"
        Whether to replay the passes as CUDA graphs; "auto" does so on a GPU, for at least 8 batches of a shape.
    group : ProcessGroup, DeviceMesh or None, default None
        The processes over which the data differ. The loader is the whole set's on every process, and is shared out as
        for ``delfast.score``. Every process gets the result of all. None: this process reads the whole set.

    Returns
    -------
    SetResult
        The loss is a mean over examples, or over a language model's counted tokens, accumulated in float64.

    Raises
    ------
    InputError
        For an empty set, labels that the model has no output for, and outputs that are not finite.
        With ``group`` also for a loader whose shares are not the set, and for parameters that differ between processes.
        For a loader with a DistributedSampler, and for FSDP2, without ``group``.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import accuracy_and_loss
    >>> accuracy_and_loss(torch.nn.Identity(), [(torch.eye(2), torch.tensor([0, 0]))]).accuracy
    50.0
    """
    with one_error(group, model):
        check_loader(loader, "data set")
        execution = Execution(precision, channels_last, cuda_graphs)
        execution.check()
        (network,), processes = join(group, "accuracy_and_loss", execution, model=model)
        return _measure(network, loader, "data", execution, processes)


def _feature(result: SetResult) -> Tensor:
    """Return what membership inference reads of each example (N,)."""
    return result.confidences if result.losses is None else result.losses


def _measure(
    model: nn.Module, loader: Loader, name: str, execution: Execution, processes: Processes | None
) -> SetResult:
    """Measure a set, of classes or of tokens as its batches are."""

    def measure(batch: Any) -> tuple[Tensor, ...]:
        return _tokens(model, batch, execution) if is_token_batch(batch) else _classes(model, batch, execution)

    found = collect((model,), loader, f"{name} set", measure, execution, processes)
    check_examples(sum(len(each) for _, _, each, *_ in found), f"{name} set")
    if len({len(parts) for parts in found}) > 1:
        raise InputError(f"{name} set: expected all batches with 'input_ids' or none, got both; pass one form")
    correct, logs, each, *counts = zip(*found, strict=True)
    # an example of a classifier counts as one token
    count = int(torch.stack(counts[0]).sum()) if counts else sum(map(len, each))
    accuracy, loss = 100 * sum(torch.stack(correct).tolist()) / count, -sum(torch.stack(logs).tolist()) / count
    values = torch.cat(each)
    if not counts:
        return SetResult(accuracy, loss, values)
    return SetResult(accuracy, loss, (-values).exp(), values, math.exp(loss) if loss < MAX_EXPONENT else math.inf)


def _classes(model: nn.Module, batch: Any, execution: Execution) -> tuple[Tensor, ...]:
    """Return the number of correct examples, the sum of their log-probabilities, and each one's confidence (B,)."""
    targets, log_probabilities = predict(model, batch, execution)
    truth = true_class(log_probabilities, targets)
    return (log_probabilities.argmax(1) == targets).sum(), truth.double().sum(), truth.exp()


def _tokens(model: nn.Module, batch: Any, execution: Execution) -> tuple[Tensor, ...]:
    """Return the number of correct tokens, the sum of their log-probabilities, each example's mean loss (B,), and the
    number of counted tokens.
    """
    predicted, targets, losses = predict_tokens(model, batch, execution)
    counts = (targets != IGNORED).sum(1)
    refuse_if((counts == 0).any(), "expected a counted token in every example, got an example without; leave it out")
    # an ignored target is negative, so it equals no prediction
    return (predicted == targets).sum(), -losses.double().sum(), losses.sum(1) / counts.clamp(min=1), counts.sum()
