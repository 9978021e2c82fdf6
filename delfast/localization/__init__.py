"""Localization: score the parameters of a model on a forget set, and select a mask from the scores."""

from delfast.localization.criteria import Aggregate, Criterion, Granularity, Policy, check_selection
from delfast.localization.critical_channels import CriticalChannels, CriticalExample, critmem
from delfast.localization.per_example import SignedChannels, signed_channels
from delfast.localization.scores import Scores
from delfast.localization.scoring import score
from delfast.localization.strategies import (
    BUDGET,
    STRATEGIES,
    WHOLE_TRAINING_SET,
    Preset,
    check_localize,
    localize,
    preset_settings,
)

__all__ = [
    "BUDGET",
    "STRATEGIES",
    "WHOLE_TRAINING_SET",
    "Aggregate",
    "Criterion",
    "CriticalChannels",
    "CriticalExample",
    "Granularity",
    "Policy",
    "Preset",
    "Scores",
    "SignedChannels",
    "check_localize",
    "check_selection",
    "critmem",
    "localize",
    "preset_settings",
    "score",
    "signed_channels",
]
