"""Losses of causal language models, for batches of token ids as Hugging Face's data collators make them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from delfast.arguments import check_loader, check_number, describe, form_of
from delfast.batches import IGNORED, class_indices, device_of, move, plain
from delfast.errors import InputError
from delfast.naming import unwrap
from delfast.sharding import whole
from delfast.shares import refuse_sharded


def causal_lm_loss(model: nn.Module, batch: Any, *, per_token: float | None = None) -> Tensor:
    """Return the next-token loss of each example of a batch: the ``loss_fn`` for causal language models.

    The loss of an example is the mean cross-entropy over its counted tokens, in nats. A token is counted if its label
    is not -100; the first of a sequence is never counted, since nothing predicts it. An example without a counted token
    has the loss 0, and a gradient of 0.

    Parameters
    ----------
    model : torch.nn.Module
        The model. It is called as ``model(**batch)`` without the labels, and with ``use_cache=False`` if its forward
        pass has this argument. It returns logits (N, T, V): a tensor, or an object or mapping with ``logits``.
    batch : Mapping
        ``input_ids``, integers (N, T); optionally ``labels``, integers (N, T) in [0, V) or -100, not shifted; and
        whatever else the model's forward pass accepts. Without ``labels`` they are the ``input_ids``: a token is then
        counted unless ``attention_mask`` (N, T) is 0 for it or for the token before it.
    per_token : float, optional
        The mean number of counted tokens per example of the whole set, which ``tokens_per_example`` counts. The loss of
        an example is then the sum over its tokens divided by this number, so that the mean over the set's examples is
        the mean over its tokens. Pass it by ``functools.partial``. By default each example counts alike.

    Returns
    -------
    Tensor
        Losses (N,), float32, or float64 for float64 logits.

    Raises
    ------
    InputError
        For a batch that is no mapping, shapes and dtypes other than above, labels out of range, a model that returns
        something else, and a ``per_token`` that is no positive number.

    See Also
    --------
    tokens_per_example : Count the tokens for ``per_token``.

    Notes
    -----
    The two weightings give different gradients, hence different masks, unless all examples have equally many counted
    tokens. By default a short example weighs as much as a long one. With ``per_token`` every token weighs alike, as in
    the loss that ``transformers.Trainer`` minimizes.

    ``per_token`` divides by a number of the set and not of the batch. So an example's loss depends on this example
    alone, and scores do not depend on how the set is cut into batches.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> class Bigrams(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.table = torch.nn.Embedding(5, 5)
    ...
    ...     def forward(self, input_ids):
    ...         return self.table(input_ids)
    >>> batch = {"input_ids": torch.tensor([[0, 1, 2], [3, 4, 0]]), "labels": torch.tensor([[0, 1, 2], [3, 4, -100]])}
    >>> delfast.causal_lm_loss(Bigrams(), batch).shape
    torch.Size([2])
    >>> mask = delfast.localize(Bigrams(), [batch], budget=0.5, loss_fn=delfast.causal_lm_loss)
    >>> mask.names
    ['table.weight']
    """
    if per_token is not None and (isinstance(per_token, bool) or not 0 < check_number("per_token", per_token) < inf):
        raise InputError(
            f"expected per_token to be the set's mean number of counted tokens per example, got {describe(per_token)}; "
            "pass delfast.tokens_per_example(loader)"
        )
    logits, targets = next_token_logits(model, batch)
    losses = next_token_losses(logits, targets).sum(1)
    if per_token is not None:
        return losses / float(per_token)
    return losses / (targets != IGNORED).sum(1).clamp(min=1)  # no token: 0 / 1, with a gradient of 0


causal_lm_loss.is_pure = True  # type: ignore[attr-defined]  # a function of tensors, as a CUDA graph requires


def tokens_per_example(loader: Iterable[Any]) -> float:
    """Return the mean number of tokens per example that ``causal_lm_loss`` counts in a set.

    Parameters
    ----------
    loader : iterable of batches
        The set's batches, as ``causal_lm_loss`` accepts them. They are read once.

    Returns
    -------
    float
        Above 0.

    Raises
    ------
    InputError
        For batches of another form, for a set without a counted token, and for a loader that yields the share of one of
        several processes, since the number must be the same on all of them.

    Examples
    --------
    >>> import functools
    >>> import torch
    >>> import delfast
    >>> ids, attended = torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    >>> forget = [{"input_ids": ids, "attention_mask": attended}]
    >>> delfast.tokens_per_example(forget)
    1.5
    >>> loss_fn = functools.partial(delfast.causal_lm_loss, per_token=delfast.tokens_per_example(forget))
    """
    check_loader(loader, "loader")
    refuse_sharded(loader)
    examples, tokens = 0, 0
    for batch in loader:
        targets = _next_tokens(_checked(plain(batch)))
        examples += len(targets)
        tokens += int((targets != IGNORED).sum())
    if not tokens:
        raise InputError(f"expected a set with counted tokens, got none in {examples} examples; check its labels")
    return tokens / examples


def is_token_batch(batch: Any) -> bool:
    """Return whether a batch is a mapping of a language model's inputs."""
    return isinstance(batch, Mapping) and "input_ids" in batch


def next_token_logits(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return logits (N, T, V), float32 or wider, and the token that follows each position: int64 (N, T), or IGNORED.

    Raises InputError as ``causal_lm_loss``; on a GPU labels out of range are found later, see ``refuse_if``.
    """
    batch = _checked(move(batch, device_of(model)))
    targets = _next_tokens(batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    network: Any = unwrap(model)
    if hasattr(network, "get_base_model"):  # peft's wrapper, whose own signature lacks what it passes on
        network = network.get_base_model()
    if "use_cache" in inspect.signature(network.forward).parameters:
        inputs.setdefault("use_cache", False)  # keys and values for a generation that does not follow
    output = model(**inputs)
    logits = whole(output if isinstance(output, Tensor) else _named_logits(output))
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != targets.shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(output).__name__} without them"
        raise InputError(
            f"expected the model to return logits ({len(targets)}, {targets.shape[1]}, V) for these input_ids, got "
            f"{found}; return a tensor, or an object or mapping with `logits`"
        )
    checked = class_indices(targets.flatten(), logits.flatten(0, 1)).view(targets.shape)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), checked


def next_token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy (N, T) of what ``next_token_logits`` returns; 0 where a target is IGNORED."""
    # The labels are shifted, not the logits: a slice of these would be copied
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape)


def _checked(batch: Any) -> Mapping[str, Any]:
    """Return the batch. InputError unless it is a mapping whose token ids, labels and mask fit together."""
    if not is_token_batch(batch):
        raise InputError(
            f"expected batches as mappings with 'input_ids', got {describe(batch)}; pass dicts (or a BatchEncoding) of "
            "tensors"
        )
    ids, labels, attended = (batch.get(name) for name in ("input_ids", "labels", "attention_mask"))
    if not _is_integer(ids) or ids.ndim != 2 or not ids.shape[1]:
        raise InputError(f"expected input_ids as integers (N, T), got {form_of(ids)}; collate examples into batches")
    if labels is not None and not (_is_integer(labels) and labels.shape == ids.shape):
        raise InputError(
            f"expected labels as integers {tuple(ids.shape)}, as the input_ids, got {form_of(labels)}; pass a label "
            "for each token (-100: not counted), not shifted"
        )
    if labels is None and attended is not None and not (isinstance(attended, Tensor) and attended.shape == ids.shape):
        raise InputError(
            f"expected an attention_mask {tuple(ids.shape)}, as the input_ids, got {form_of(attended)}; pass labels, "
            "which then decide which tokens count"
        )
    return batch  # type: ignore[no-any-return]


def _next_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Return the label of the token after each position, int64 (N, T); IGNORED for the last, and where none counts."""
    labels, attended = batch.get("labels"), batch.get("attention_mask")
    following = (batch["input_ids"] if labels is None else labels)[:, 1:].to(torch.int64)
    if labels is None and attended is not None:
        # also not the first token after padding on the left, which is predicted from padding
        counted = (attended[:, 1:] != 0) & (attended[:, :-1] != 0)
        following = torch.where(counted, following, IGNORED)
    return functional.pad(following, (0, 1), value=IGNORED)


def _named_logits(output: Any) -> Any:
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)


def _is_integer(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.dtype is torch.bool:
        return False
    return not (value.is_floating_point() or value.is_complex())
