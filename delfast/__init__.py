"""delfast: fast localized machine unlearning for PyTorch.

    mask = delfast.localize(model, forget_loader, budget=0.3)   # the channels that hold the forget set
    delfast.reset_(model, mask, init=factory, seed=1)           # a seed other than that of training
    with delfast.compact(model, mask) as handle:                # only selected rows are trained
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.015, momentum=0.9)

The method is DEL: Torkzadehmahani et al., "Improved Localized Machine Unlearning Through the Lens of Memorization",
TMLR 2025, arXiv 2412.02432.
"""

from delfast import optim
from delfast._version import __version__
from delfast.backend import status
from delfast.compaction import compact
from delfast.errors import InputError
from delfast.evaluation import evaluate
from delfast.layer_types import register_layer
from delfast.localization import (
    STRATEGIES,
    CriticalChannels,
    Scores,
    SignedChannels,
    critmem,
    localize,
    score,
    signed_channels,
)
from delfast.mask import Mask
from delfast.reset import reset_
from delfast.unlearning import unlearn

__all__ = [
    "STRATEGIES",
    "CriticalChannels",
    "InputError",
    "Mask",
    "Scores",
    "SignedChannels",
    "__version__",
    "compact",
    "critmem",
    "evaluate",
    "localize",
    "optim",
    "register_layer",
    "reset_",
    "score",
    "signed_channels",
    "status",
    "unlearn",
]
