"""How far a network's predictions are from an oracle's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from delfast.arguments import check_loader, check_tensors
from delfast.batches import evaluating
from delfast.errors import InputError
from delfast.evaluation.outputs import Loader, check_examples, check_log_probabilities, predict


def kl_divergence(log_probabilities: Tensor, oracle_log_probabilities: Tensor) -> float:
    """Mean over examples of KL(oracle || method), in nats: 0 where they predict the same, never below.

    Kullback & Leibler, "On Information and Sufficiency", 1951: the sum over classes of q (log q - log p), q the
    oracle's probabilities, p the method's. Both: (N, classes) finite log-probabilities, of the same examples in the
    same order. Raises InputError for shapes that differ, no example, and what are no log-probabilities.
    """
    check_tensors(log_probabilities=log_probabilities, oracle_log_probabilities=oracle_log_probabilities)
    return _divergences(log_probabilities, oracle_log_probabilities).mean().item()


def kl_to_oracle(model: nn.Module, oracle: nn.Module, loader: Loader) -> float:
    """``kl_divergence`` of what the two predict for the loader's examples, in eval mode without gradients.

    Each batch goes through both, so that the loader may shuffle. Both networks are left as they were, each on its
    device. Loaders and errors as for ``evaluate``; and InputError where the networks' classes differ in number.
    """
    check_loader(loader, "data set")
    total, count = 0.0, 0
    with evaluating(model), evaluating(oracle), torch.no_grad():
        for batch in loader:
            rows = [
                predict(network, batch, f"data set, {name}")[1].cpu()
                for name, network in (("the model", model), ("the oracle", oracle))
            ]
            count += len(rows[0])
            if len(rows[0]):
                total += _divergences(*rows).sum().item()
    check_examples(count, "data set")
    return total / count


def _divergences(log_probabilities: Tensor, oracle_log_probabilities: Tensor) -> Tensor:
    """(N,) float64."""
    if log_probabilities.shape != oracle_log_probabilities.shape:
        raise InputError(
            "expected log-probabilities of the same examples and classes, got "
            f"{tuple(log_probabilities.shape)} of the model and {tuple(oracle_log_probabilities.shape)} of the oracle"
        )
    check_log_probabilities(log_probabilities, "the model")
    check_log_probabilities(oracle_log_probabilities, "the oracle")
    # normalized anew: rows that sum to 1 but for float32's rounding could give less than 0
    log_p = functional.log_softmax(log_probabilities.double(), dim=1)
    log_q = functional.log_softmax(oracle_log_probabilities.double(), dim=1)
    return functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1).clamp(min=0)
