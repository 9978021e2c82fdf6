"""Measurements of forgetting: accuracies, membership inference, relearning, the gap to an oracle, and the cost."""

from delfast.evaluation.attack import threshold_attack
from delfast.evaluation.audit_result import Audit, LiraFigures, SetFigures
from delfast.evaluation.auditing import Reference, audit
from delfast.evaluation.cost import changed_fraction, relative_time
from delfast.evaluation.divergence import kl_divergence, kl_to_oracle
from delfast.evaluation.intervals import Figure
from delfast.evaluation.lira import ULira, offline_lira, tpr_at_fpr, u_lira, u_lira_leave_one_out
from delfast.evaluation.membership import membership_inference, modified_entropy, svc_attacks
from delfast.evaluation.metrics import Metrics, SetResult, accuracy_and_loss, evaluate, gaps
from delfast.evaluation.outputs import logit_confidences, predictions
from delfast.evaluation.relearning import Relearning, RelearningCurve

__all__ = [
    "Audit",
    "Figure",
    "LiraFigures",
    "Metrics",
    "Reference",
    "Relearning",
    "RelearningCurve",
    "SetFigures",
    "SetResult",
    "ULira",
    "accuracy_and_loss",
    "audit",
    "changed_fraction",
    "evaluate",
    "gaps",
    "kl_divergence",
    "kl_to_oracle",
    "logit_confidences",
    "membership_inference",
    "modified_entropy",
    "offline_lira",
    "predictions",
    "relative_time",
    "svc_attacks",
    "threshold_attack",
    "tpr_at_fpr",
    "u_lira",
    "u_lira_leave_one_out",
]
