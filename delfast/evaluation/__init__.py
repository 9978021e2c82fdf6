"""Measurements of forgetting: accuracies, membership inference, the gap to an oracle, and the cost."""

from delfast.evaluation.cost import changed_fraction, relative_time
from delfast.evaluation.divergence import kl_divergence, kl_to_oracle
from delfast.evaluation.lira import ULira, tpr_at_fpr, u_lira, u_lira_leave_one_out
from delfast.evaluation.membership import membership_inference, modified_entropy, svc_attacks
from delfast.evaluation.metrics import Metrics, SetResult, accuracy_and_loss, evaluate, gaps
from delfast.evaluation.outputs import logit_confidences, predictions

__all__ = [
    "Metrics",
    "SetResult",
    "ULira",
    "accuracy_and_loss",
    "changed_fraction",
    "evaluate",
    "gaps",
    "kl_divergence",
    "kl_to_oracle",
    "logit_confidences",
    "membership_inference",
    "modified_entropy",
    "predictions",
    "relative_time",
    "svc_attacks",
    "tpr_at_fpr",
    "u_lira",
    "u_lira_leave_one_out",
]
