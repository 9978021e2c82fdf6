"""The cost of unlearning: its time relative to retraining, and the fraction of the network that it changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from delfast.arguments import check_number, check_tensors, check_type, describe, is_scalar
from delfast.bits import bits
from delfast.errors import InputError


def relative_time(seconds: float, retrain_seconds: float) -> float:
    """Return RTE, the run time relative to retraining's: below 1, unlearning is faster.

    SalUn's run-time efficiency is the time itself. As a ratio of two times on one machine it depends less on the
    machine.

    Parameters
    ----------
    seconds : float
        Run time of the method, finite and at least 0.
    retrain_seconds : float
        Run time of retraining without the forget set on the same machine, finite and above 0.

    Returns
    -------
    float
        ``seconds / retrain_seconds``.

    Raises
    ------
    InputError
        For a time outside its range.

    References
    ----------
    Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-Based Weight Saliency", ICLR 2024, arXiv 2310.12508.

    Examples
    --------
    >>> from delfast.evaluation import relative_time
    >>> relative_time(30.0, 120.0)
    0.25
    """
    seconds = check_number("seconds", seconds)
    retrain_seconds = check_number("retrain_seconds", retrain_seconds)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise InputError(f"expected the method's seconds, finite and at least 0, got {seconds}")
    if not (math.isfinite(retrain_seconds) and retrain_seconds > 0):
        raise InputError(f"expected the retraining's seconds, finite and above 0, got {retrain_seconds}")
    return seconds / retrain_seconds


def changed_fraction(before: Mapping[str, Tensor], after: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """Return the fraction of elements whose bits differ between two states of one network.

    Values are compared bit by bit, so NaN equals itself and 0 differs from -0. A complex number is two elements.

    Parameters
    ----------
    before : Mapping of str to Tensor
        State dict of the network before unlearning.
    after : Mapping of str to Tensor
        State dict of the network after unlearning.
    names : iterable of str
        Names of the parameters to compare; a repeated name counts once. Pass ``[name for name, _ in
        model.named_parameters()]``, since a state dict also has buffers, and has tied parameters twice.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    InputError
        For a name that a state lacks, different shapes or dtypes, and parameters without any element.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import changed_fraction
    >>> changed_fraction({"bias": torch.tensor([1.0, 2.0])}, {"bias": torch.tensor([1.0, 3.0])}, ["bias"])
    0.5
    """
    for what, states in (("before", before), ("after", after)):
        check_type(what, states, Mapping, "a state dict")
    if not isinstance(names, Iterable) or isinstance(names, str) or is_scalar(names):
        raise InputError(f"expected names to be a list of names, got {describe(names)}; pass a list of str")
    changed, count = 0, 0
    for name in dict.fromkeys(names):
        for where, state in (("before", before), ("after", after)):
            if name not in state:
                raise InputError(f"expected two states of one network, '{name}' is not in the one {where}")
        check_tensors(**{f"before['{name}']": before[name], f"after['{name}']": after[name]})
        old, new = before[name].detach().cpu(), after[name].detach().cpu()
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise InputError(
                f"expected two states of one network, '{name}' is {tuple(old.shape)} {old.dtype} before and "
                f"{tuple(new.shape)} {new.dtype} after"
            )
        differs = bits(old) != bits(new)
        changed += int(differs.sum())
        count += differs.numel()
    if not count:
        raise InputError("expected names of parameters with at least one element, got none")
    return changed / count
