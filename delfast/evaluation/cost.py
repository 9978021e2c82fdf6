"""What unlearning costs: its time beside retraining, and how much of the network it changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from delfast.arguments import check_number, check_tensors, check_type, describe, is_scalar
from delfast.bits import bits
from delfast.errors import InputError


def relative_time(seconds: float, retrain_seconds: float) -> float:
    """RTE, the run time relative to retraining's: below 1, unlearning is the faster.

    SalUn's run-time efficiency (Fan et al., ICLR 2024, arXiv 2310.12508) is the time itself; as a ratio it does not
    depend on the machine, if the same one took both times. Raises InputError for times that are not finite, a negative
    one, and a retraining of no time.
    """
    seconds = check_number("seconds", seconds)
    retrain_seconds = check_number("retrain_seconds", retrain_seconds)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise InputError(f"expected the method's seconds, finite and at least 0, got {seconds}")
    if not (math.isfinite(retrain_seconds) and retrain_seconds > 0):
        raise InputError(f"expected the retraining's seconds, finite and above 0, got {retrain_seconds}")
    return seconds / retrain_seconds


def changed_fraction(before: Mapping[str, Tensor], after: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """The fraction (0-1) of the scalars of the parameters ``names`` whose bits differ between two states.

    Bit by bit, NaN equals itself and 0 is not -0. A name counts once; a complex number is two scalars. Pass
    ``[name for name, _ in model.named_parameters()]``: a state dict also holds buffers, and tied parameters twice.
    Raises InputError for a name that a state lacks, for other shapes or dtypes, and where there is no scalar.
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
        raise InputError("expected names of parameters with at least one scalar, got none")
    return changed / count
