"""delfast: fast localized machine unlearning for PyTorch.

The three steps::

    mask = delfast.localize(model, forget_loader, budget=0.3)   # the channels that hold the forget set
    delfast.reset_(model, mask, init=factory, seed=1)           # a seed other than that of training
    with delfast.compact(model, mask) as handle:                # only selected channels are trained
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.015, momentum=0.9)

The method is DEL: Torkzadehmahani et al., "Improved Localized Machine Unlearning Through the Lens of Memorization",
TMLR 2025, arXiv 2412.02432.

The names below, and torch with them, are imported when they are first used (PEP 562), so that the command line answers
at once. ``import delfast.ops`` registers ``torch.ops.delfast`` without using a name.
"""

import importlib
from typing import TYPE_CHECKING

from delfast._version import __version__
from delfast.errors import InputError

__all__ = [
    "STRATEGIES",
    "CriticalChannels",
    "InputError",
    "Mask",
    "Scores",
    "SignedChannels",
    "TrainingOptions",
    "__version__",
    "causal_lm_loss",
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
    "tokens_per_example",
    "unlearn",
]

if TYPE_CHECKING:
    from delfast import compaction as compaction
    from delfast import evaluation as evaluation
    from delfast import jobs as jobs
    from delfast import ledger as ledger
    from delfast import localization as localization
    from delfast import optim as optim
    from delfast import unlearning as unlearning
    from delfast.backend import status
    from delfast.compaction import compact
    from delfast.evaluation import evaluate
    from delfast.language import causal_lm_loss, tokens_per_example
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
    from delfast.unlearning import TrainingOptions, unlearn
else:
    _NAMES = {
        "delfast.backend": ["status"],
        "delfast.compaction": ["compact"],
        "delfast.evaluation": ["evaluate"],
        "delfast.language": ["causal_lm_loss", "tokens_per_example"],
        "delfast.layer_types": ["register_layer"],
        "delfast.localization": [
            *("STRATEGIES", "CriticalChannels", "Scores", "SignedChannels"),
            *("critmem", "localize", "score", "signed_channels"),
        ],
        "delfast.mask": ["Mask"],
        "delfast.reset": ["reset_"],
        "delfast.unlearning": ["TrainingOptions", "unlearn"],
    }
    _MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
    _PACKAGES = ("compaction", "evaluation", "jobs", "ledger", "localization", "optim", "unlearning")

    def __getattr__(name):
        """Import a public name or package when it is first used, and keep it for the next use."""
        if name in _PACKAGES:
            return _imported(f"delfast.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'delfast' has no attribute '{name}'")
        value = globals()[name] = getattr(_imported(_MODULE_OF[name]), name)
        return value

    def _imported(module):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ImportError("delfast needs torch 2.10 or newer, and finds none; pip install torch") from None

    def __dir__():
        return sorted({*__all__, *_PACKAGES, *(name for name in globals() if name.startswith("__"))})
