"""Unlearning: methods that run within a mask, on the forget and retain sets."""

from delfast.unlearning.api import UnlearnResult, unlearn
from delfast.unlearning.loop import Diverged, train
from delfast.unlearning.method import Method
from delfast.unlearning.methods import Del, Finetune, GradientAscent, L1Sparse, NegGradPlus, Relabel, Retrain, Scrub
from delfast.unlearning.one_shot import Dampening, Influence
from delfast.unlearning.options import TrainingOptions
from delfast.unlearning.registry import METHODS, make_method
from delfast.unlearning.stopping import EarlyStop

__all__ = [
    "METHODS",
    "Dampening",
    "Del",
    "Diverged",
    "EarlyStop",
    "Finetune",
    "GradientAscent",
    "Influence",
    "L1Sparse",
    "Method",
    "NegGradPlus",
    "Relabel",
    "Retrain",
    "Scrub",
    "TrainingOptions",
    "UnlearnResult",
    "make_method",
    "train",
    "unlearn",
]
