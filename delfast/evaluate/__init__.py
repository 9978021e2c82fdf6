"""What a network knows of its forget set: accuracies, membership inference, the gap to an oracle."""

from delfast.evaluate.membership import membership_inference
from delfast.evaluate.metrics import Metrics, SetResult, accuracy_and_loss, evaluate, gaps
from delfast.evaluate.predictions import logit_confidences, predictions

__all__ = [
    "Metrics",
    "SetResult",
    "accuracy_and_loss",
    "evaluate",
    "gaps",
    "logit_confidences",
    "membership_inference",
    "predictions",
]
