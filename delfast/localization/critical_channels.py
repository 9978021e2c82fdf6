"""CritMem: find the channels that a network needs for its prediction of each example. See docs/critmem.md.

The method is by Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023. Their search edits a copy of
the network for each example. Here all examples of a batch are searched together. An example's edited network is the
common network with the example's own channels set to zero in every layer's output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from delfast.arguments import check_count, check_flag, check_function, check_loader, check_number
from delfast.batches import device_of, warn_about_loader
from delfast.errors import InputError
from delfast.eval_mode import evaluating
from delfast.execution import ChannelsLast, Execution, Precision
from delfast.feeding import feed
from delfast.localization.critical_search import LogitsFn, Search
from delfast.localization.per_example.channels import identifiers
from delfast.naming import trainable_parameters, unwrap

MAX_CHANNELS = 50


@dataclass(frozen=True)
class CriticalExample:
    """The channels that were zeroed for one example, in this order.

    Parameters
    ----------
    example : int
        The example's number; see ``CriticalChannels``.
    channels : tuple of (str, int)
        (weight name, channel) in the order in which they were zeroed.
    flipped : bool
        Whether the prediction is no longer the label. Without channels: whether it was wrong from the start. False
        means that zeroing these channels was not enough.

    Examples
    --------
    >>> from delfast.localization import CriticalExample
    >>> CriticalExample(example=3, channels=(("0.weight", 7),), flipped=True).channels[0]
    ('0.weight', 7)
    """

    example: int
    channels: tuple[tuple[str, int], ...]
    flipped: bool


@dataclass(frozen=True)
class CriticalChannels:
    """The channels that each example needs, and how many examples need each channel.

    Parameters
    ----------
    examples : tuple of CriticalExample
        In the loader's order. The numbers are the index of (index, input, target) batches, else 0 to N-1.
    counts : mapping of str to Tensor
        Weight name -> int64 (C,): the number of examples for which each channel was zeroed.
    first : mapping of str to Tensor
        Weight name -> float64 (C,): the mean over all N examples of the positive first-order scores in the unedited
        network. Examples that the network gets wrong count as 0.

    Examples
    --------
    >>> import torch, delfast
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> found = delfast.critmem(model, [(torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 0]))])
    >>> len(found.examples), found.counts["0.weight"].shape
    (5, torch.Size([16]))
    """

    examples: tuple[CriticalExample, ...]
    counts: Mapping[str, Tensor]
    first: Mapping[str, Tensor]

    def unit_scores(self) -> dict[str, Tensor]:
        """Return one score per channel: its count, with equal counts in the order of ``first``.

        Returns
        -------
        dict[str, Tensor]
            Weight name -> float32 (C,): the count plus m / (1 + m), m from ``first``. The fraction never raises a
            channel to the next count.

        Examples
        --------
        >>> import torch
        >>> from delfast import CriticalChannels
        >>> counts, first = {"weight": torch.tensor([2, 2])}, {"weight": torch.tensor([0.0, 1.0]).double()}
        >>> CriticalChannels((), counts, first).unit_scores()["weight"].tolist()
        [2.0, 2.5]
        """
        scores = {}
        for name, count in self.counts.items():
            count, mean = count.float(), self.first[name]
            limit = torch.nextafter(count + 1, count)  # float32 would round a large count's sum up to the next count
            scores[name] = torch.minimum(count + (mean / (1 + mean)).float(), limit)
        return scores


def critmem(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    max_channels: int = MAX_CHANNELS,
    preserve: float = 0.0,
    include_head: bool = False,
    logits_fn: LogitsFn | None = None,
    precision: Precision = "fp32",
    channels_last: ChannelsLast = "auto",
) -> CriticalChannels:
    """Find, for every example, the channels without which the network gets the example wrong, by greedy search.

    Each step zeroes the channel i with the largest score s_i(x) = -Σ_j θ_ij g_ij(x), which is to first order the
    increase of the example's cross-entropy [1]_. Channels are those of trainable convolutions and linear layers (of a
    transposed convolution, its input channels). They are zeroed before the bias, in every use that has a gradient. The
    search of an example ends once its prediction is not its label, no s_i is positive, or ``max_channels`` channels
    are zeroed. Ties fall to the lower (parameter, index).

    A step costs one forward and one backward pass over the examples still searched, without weight gradients. The model
    is left as it was.

    Parameters
    ----------
    model : torch.nn.Module
        The trained model.
    loader : iterable of batches
        Batches (input, target) or (index, input, target). With ``logits_fn`` any batch whose tensors have the examples
        along dim 0.
    max_channels : int, default 50
        The maximum number of channels for an example.
    preserve : float, default 0.0
        The weight w of the other examples of the batch, at least 0: channels are ranked by
        s_i(x) - w (1/B) Σ s_i(x') over the B - 1 other examples, which spares the channels that they need. The original
        has w = 1, takes the others' scores in the network edited for x, at the cost of a pass over the batch for each
        example and channel, and adds noise to the inputs. Here the others' scores are those in the unedited network,
        and no noise is added. With 0 the result for an example does not depend on its batch.
    include_head : bool, default False
        Whether the channels of the head compete: the last trainable convolution or linear layer to run, if it has a
        channel per class. Channel c of the head computes the logit of class c, so zeroing the label's channel alone
        nearly always changes the prediction. The original zeroes single weights of linear layers.
    logits_fn : callable or None, default None
        ``logits_fn(model, batch)`` returns logits (N, classes) and int64 labels (N,).
    precision : {"fp32", "bf16"}, default "fp32"
        "bf16" runs the forward passes under ``torch.autocast``.
    channels_last : {"auto", True, False}, default "auto"
        Whether images (N, C, H, W) are laid out channels-last. "auto" follows the model's convolution weights.

    Returns
    -------
    CriticalChannels
        The channels of each example, and counts per channel.

    Raises
    ------
    InputError
        As ``signed_channels``, and for a layer whose examples cannot be separated or whose weight other kinds of
        layers share (naming it), scores that are not finite (naming the parameter), and arguments out of range.

    References
    ----------
    .. [1] Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023.

    Examples
    --------
    >>> import torch, delfast
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> inputs = torch.randn(6, 4)
    >>> found = delfast.critmem(model, [(inputs, model(inputs).argmax(dim=1))], max_channels=3)
    >>> max(len(example.channels) for example in found.examples) <= 3
    True
    """
    max_channels = check_count("max_channels", max_channels)
    preserve = check_number("preserve", preserve)
    if not 0 <= preserve < float("inf"):
        raise InputError(f"expected preserve to be at least 0, got {preserve}; pass a finite number")
    check_flag("include_head", include_head)
    check_function("logits_fn", logits_fn)
    execution = Execution(precision, channels_last, False)
    execution.check()
    check_loader(loader, "loader")
    warn_about_loader(loader, "set")
    network = unwrap(model)
    search = Search(network, trainable_parameters(network), logits_fn, include_head, execution)
    examples: list[CriticalExample] = []
    first: Tensor | float = 0.0
    with evaluating(network, gradients=True), search.checks:
        for batch in feed(loader, device_of(network)):
            found, added = search.search(batch, max_channels, preserve)
            numbers = identifiers(batch, logits_fn, len(examples), len(found)).tolist()
            examples += [CriticalExample(n, tuple(c), flipped) for n, (c, flipped) in zip(numbers, found, strict=True)]
            first = first + added
        search.checks.read()
    if not examples:
        raise InputError("expected a set of at least one example, got none; check its loader")
    counts = {name: torch.zeros(count, dtype=torch.int64) for name, count in search.channel_counts.items()}
    for example in examples:
        for name, row in example.channels:
            counts[name][row] += 1
    assert isinstance(first, Tensor)
    means = torch.split((first / len(examples)).cpu(), [len(count) for count in counts.values()])
    return CriticalChannels(tuple(examples), counts, dict(zip(counts, means, strict=True)))
