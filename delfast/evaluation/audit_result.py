"""The result of an audit: figures with intervals, and their plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from delfast.evaluation.intervals import Figure
from delfast.evaluation.relearning import RelearningCurve


@dataclass(frozen=True)
class LiraFigures:
    """The offline LiRA's figures of one set against the control.

    Parameters
    ----------
    auc : Figure, optional
        Area under the ROC curve: the probability that a forget example's score is above a control example's. None if
        every forget example is left out, or every control example.
    tpr_at_1_percent : Figure, optional
        Percentage of the forget examples above the threshold that 1 % of the control examples exceed. None with
        ``auc``.
    examples : int
        Number of forget examples that were attacked.
    left_out : int
        Number of forget examples with fewer than two reference models that never saw them.

    Examples
    --------
    >>> from delfast.evaluation import Figure, LiraFigures
    >>> LiraFigures(Figure(0.5, 0.4, 0.6), Figure(1.0, 0.1, 5.4), 100, 0).examples
    100
    """

    auc: Figure | None
    tpr_at_1_percent: Figure | None
    examples: int
    left_out: int


@dataclass(frozen=True)
class SetFigures:
    """The figures of one network on one set.

    Parameters
    ----------
    count : int
        Number of examples.
    accuracy : Figure, optional
        Percentage of examples, or of a language model's counted tokens, that are predicted. None with a ``loss_fn``.
    loss : Figure
        Mean loss in nats, over examples or counted tokens.
    attack_advantage : Figure, optional
        ``threshold_attack`` on the set against the control, in [0, 1]. None for sets that were not to be forgotten, and
        where fewer than two examples of either side have a label in common.
    attack_left_out : int
        Number of examples without a control example of their label.
    lira : LiraFigures, optional
        None without reference models.
    kl : Figure, optional
        Mean KL(oracle || network), in nats. None without an oracle, and for other networks than classifiers.

    Examples
    --------
    >>> from delfast.evaluation import Figure, SetFigures
    >>> SetFigures(10, Figure(50.0, 23.7, 76.3), Figure(0.7, 0.5, 0.9)).accuracy.value
    50.0
    """

    count: int
    accuracy: Figure | None
    loss: Figure
    attack_advantage: Figure | None = None
    attack_left_out: int = 0
    lira: LiraFigures | None = None
    kl: Figure | None = None


@dataclass(frozen=True)
class Audit:
    """The result of ``audit``.

    Parameters
    ----------
    sets : mapping of str to SetFigures
        By name: "forget", "retain", "test", "control" and every earlier forget set.
    classes : mapping of str to list, optional
        Accuracy (percent) of each class in "retain" and "test"; None for a class without an example. None for other
        networks than classifiers.
    relearning : mapping of str to RelearningCurve or str
        By name: "retain", and "forget 1 %" and so on for each fraction. A text is the reason why it was left out.
    relearn_ratio : Figure, optional
        The ratio of ``relearning`` with the highest lower limit; None if there is none.
    oracle : mapping of str to SetFigures, optional
        The oracle's own figures, in the form of ``sets``.
    seconds : mapping of str to float
        Wall-clock time of "inference", "lira" and "relearning".
    settings : mapping of str to object
        The seed, and the settings of relearning or None.

    Examples
    --------
    >>> from delfast.evaluation import Audit
    >>> Audit({}, None, {}, None, None, {"inference": 0.1, "lira": 0.0, "relearning": 0.0}, {}).as_dict()["sets"]
    {}
    """

    sets: Mapping[str, SetFigures]
    classes: Mapping[str, list[Figure | None]] | None
    relearning: Mapping[str, RelearningCurve | str]
    relearn_ratio: Figure | None
    oracle: Mapping[str, SetFigures] | None
    seconds: Mapping[str, float]
    settings: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as plain values, ready for JSON: a Figure is {"value", "low", "high"}.

        Returns
        -------
        dict of str to object
            By the names of the fields; "oracle" is None or {"sets": ...}, and a relearning that was left out is
            {"left_out": reason}.
        """
        return {
            "sets": {name: asdict(figures) for name, figures in self.sets.items()},
            "classes": self.classes
            and {name: [figure and asdict(figure) for figure in figures] for name, figures in self.classes.items()},
            "relearning": {
                name: {"left_out": curve} if isinstance(curve, str) else asdict(curve)
                for name, curve in self.relearning.items()
            },
            "relearn_ratio": self.relearn_ratio and asdict(self.relearn_ratio),
            "oracle": self.oracle and {"sets": {name: asdict(figures) for name, figures in self.oracle.items()}},
            "seconds": dict(self.seconds),
            "settings": dict(self.settings),
        }
