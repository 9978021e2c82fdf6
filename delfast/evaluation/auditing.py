"""The audit of an unlearned network: what it still shows of every set that it was to forget, with intervals."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from delfast.arguments import check_function, check_loader, check_seed, check_type, describe
from delfast.batches import LossFn
from delfast.errors import InputError
from delfast.evaluation.attack import threshold_attack
from delfast.evaluation.audit_result import Audit, LiraFigures, SetFigures
from delfast.evaluation.intervals import Figure, auc, mean, proportion
from delfast.evaluation.lira import offline_lira, tpr_at_fpr
from delfast.evaluation.measuring import Measured, measure, same_examples
from delfast.evaluation.outputs import Loader
from delfast.evaluation.relearning import Network, NeverSeen, Relearning, RelearningCurve, Sets, loaded, run_relearning
from delfast.overlap import check_disjoint

DEFAULT_RELEARNING = Relearning()
FIXED = ("forget", "retain", "test", "control")  # names that no earlier set may have
LIRA_FPR = 1.0  # percent


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference model, trained as the audited model on a part of the training set: for the offline LiRA.

    Parameters
    ----------
    model : torch.nn.Module or callable
        The network, or a function without arguments that returns it, so that one at a time is in memory.
    members : mapping of str to Tensor
        For "forget" and for each earlier set, bool (examples,) in the loader's order: whether the network was trained
        on the example.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import Reference
    >>> Reference(torch.nn.Linear(2, 2), {"forget": torch.tensor([True, False])}).members["forget"].sum()
    tensor(1)
    """

    model: Network
    members: Mapping[str, Tensor]


def audit(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    test: Loader,
    control: Loader | None = None,
    earlier: Mapping[str, Loader] | None = None,
    oracle: nn.Module | None = None,
    references: Sequence[Reference] | None = None,
    never_seen: Sequence[nn.Module | Callable[[], nn.Module]] | None = None,
    relearn: Relearning | None = DEFAULT_RELEARNING,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> Audit:
    """Measure what an unlearned network still shows of the examples that it was to forget.

    It is evidence, and no certificate: an audit can find what is left, and never that nothing is.

    The model and every other network are left as they were: weights, buffers and modes to the bit, and gradients. Each
    network runs on its own device. The same arguments and seed give the same figures, if loaders yield the same order.

    Parameters
    ----------
    model : torch.nn.Module
        The unlearned classifier or causal language model, as for ``delfast.evaluate``; with ``loss_fn`` any network.
    forget : iterable
        Batches of the forget set, as for ``delfast.evaluate``. With ``references`` the same in every pass, since
        ``members`` follow its order: no shuffle, no random transform.
    retain : iterable
        Batches of the rest of the training set.
    test : iterable
        Batches of examples that no network was trained on.
    control : iterable, optional
        Batches of never-seen examples that the forget sets are compared with; with ``references`` the same in every
        pass. Default: ``test``.
    earlier : mapping of str to iterable, optional
        Batches of every earlier forget set, by name.
    oracle : torch.nn.Module, optional
        A network that was retrained without the forget set: adds KL, and its own figures beside.
    references : sequence of Reference, optional
        Reference models for the offline LiRA. At least two must not have seen an example; else the example is left out
        and counted.
    never_seen : sequence of torch.nn.Module or callable, optional
        Networks that never saw any example of the forget set, which relearning is compared with; or functions that
        return one. Default: the oracle; without it every reference model, each on the forget examples that it was
        not trained on, at least two.
    relearn : Relearning or None
        Settings of relearning; None leaves it out. Default: those of ``Relearning()``.
    loss_fn : callable, optional
        ``loss_fn(model, batch)``, which returns losses (N,) in nats. There are then no accuracies, and attacks and
        relearning read the losses.
    seed : int, default 0
        Chooses the folds of the attack, and the examples and batches of relearning.

    Returns
    -------
    Audit
        Figures with 95 % intervals, curves, and seconds. ``as_dict`` gives plain values.

    Raises
    ------
    InputError
        For arguments of another type, an empty set, and sets that have examples in common where their loaders show it.
        With ``references`` also for a set that changes from pass to pass, and members that do not fit a set. Also for
        labels that the model has no output for, and outputs that are not finite.

    Notes
    -----
    **Intervals.** Accuracies: Wilson's score interval (1927). Means of losses and KL, and accuracies over tokens:
    Student's, of the examples' sums. They are about other examples of the same kind, for this network; a network
    trained from another seed can differ by more.

    **Attack.** ``threshold_attack`` on logit-scaled confidences, or on negative losses. Control examples are weighted
    so that their labels are as frequent as in the forget set; otherwise the attack would find an easy class, and no
    memory.

    **LiRA.** ``offline_lira`` with one variance per set; the control examples, which no reference model saw, are
    its negatives. Area: Newcombe's interval (2006). Rate at 1 %: Wilson's, for the threshold as it is.

    **Relearning.** A copy is finetuned on retained examples alone, where Siddiqui et al. saw "forgotten" examples
    come back from about 50 % to nearly 100 %, and on the retained examples with 1 % and 10 % of the forget set in every
    batch, at most half of it: the attack of Hu et al. with a part of the forget set. The parts are mixed because a
    handful of examples alone makes any network predict their labels. The rest of the forget set is measured. Each
    never-seen network has the same finetuning on the same batches.

    The ratio is that of the odds of a correct answer, averaged over the steps after 0: with A the mean accuracy on the
    measured examples, A / (1 - A) of the model over the geometric mean of A / (1 - A) of the never-seen networks, with
    Haldane's 1/2 added to each count. It follows the Anamnesis index of Chundawat et al., the ratio of the steps in
    which both come near the original's accuracy; odds stay defined where a never-seen network is near from the
    beginning (iid examples) or never comes near (wrong labels). 1: the model regains as much as a network that never
    saw the examples. Far above 1: they are hidden, not gone. A network that begins below the never-seen networks is
    measured from where it begins: the ratio of the odds at the beginning is divided out, since what comes back had been
    there. If the model also has better odds than the never-seen networks on control examples, before the finetuning,
    since reference models may be trained on less, this advantage is divided out, as far as the ratio goes towards 1.
    With ``loss_fn`` the ratio is that of the mean losses, the never-seen networks' over the model's; there is none if a
    mean is not above 0.

    ``relearn_ratio`` is the ratio whose lower limit is highest, the best evidenced one: the highest value of several
    would be above 1 by chance, most of all where few examples are right.

    A ratio above 1 is no proof. A network that unlearning has damaged, also on the test set, regains a part of the
    forget set with the rest; finetune it until it no longer changes, and audit it again. A ratio of 1 is none either:
    what a finetuning of these steps does not bring back may come back in another.

    The interval of the ratio has the variance of the paired differences between examples, with Haldane's 1/2 as an
    example more, and that between the never-seen networks, s² (1 + 1/K), for K >= 2 (Student's t with Satterthwaite's
    degrees of freedom, 1946). With one never-seen network the second is missing, and the interval is too narrow.

    References
    ----------
    Hu et al., "Jogging the Memory of Unlearned Models Through Targeted Relearning Attacks", 2024, arXiv 2406.13356.
    Siddiqui et al., "From Dormant to Deleted: Tamper-Resistant Unlearning Through Weight-Space Regularization", 2025,
    arXiv 2505.22310. Chundawat et al., "Zero-Shot Machine Unlearning", IEEE TIFS 2023, arXiv 2201.05629.
    Haldane, "The Estimation and Significance of the Logarithm of a Ratio of Frequencies", Annals of Human Genetics,
    1956. Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022, arXiv 2112.03570.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import Relearning, audit
    >>> numbers = torch.Generator().manual_seed(0)
    >>> batches = [(torch.randn(20, 2, generator=numbers), torch.arange(20) % 2) for _ in range(3)]
    >>> forget, retain, test = ([batch] for batch in batches)
    >>> found = audit(
    ...     torch.nn.Linear(2, 2),
    ...     forget=forget,
    ...     retain=retain,
    ...     test=test,
    ...     never_seen=[torch.nn.Linear(2, 2)],
    ...     relearn=Relearning(steps=2, every=1, batch_size=8),
    ... )
    >>> found.relearning["forget 1 %"], found.relearning["forget 10 %"].trained_on
    ('1 % of 20 forget examples are less than one example', 2)
    """
    seed = check_seed(seed)
    check_function("loss_fn", loss_fn)
    check_type("model", model, nn.Module, "a torch.nn.Module")
    check_type("oracle", oracle, (nn.Module, type(None)), "a torch.nn.Module or None")
    check_type("relearn", relearn, (Relearning, type(None)), "a Relearning or None")
    loaders = _loaders(forget, retain, test, control, earlier)
    references = _references(references)
    _check_never_seen(never_seen)
    reread = {"forget": forget, "retain": retain, "control": test if control is None else control}
    started = time.perf_counter()
    networks = [model] if oracle is None else [model, oracle]
    passes = {name: measure(networks, loader, name, loss_fn) for name, loader in loaders.items()}
    if control is None:
        passes["control"] = passes["test"]
    measured = {name: results for name, (results, _) in passes.items()}
    _check_one_form({name: results[0] for name, results in measured.items()})
    inferred = time.perf_counter()
    attacked = [name for name in passes if name not in FIXED or name == "forget"]
    scores = _lira_scores(references, loaders | {"control": reread["control"]}, measured, attacked, loss_fn)
    compared = time.perf_counter()
    sets = [
        {
            name: _figures(
                results[k],
                divergence if k == 0 else None,
                measured["control"][k] if name in attacked else None,
                (scores[k][name], scores[k]["control"]) if name in attacked and references else None,
                seed,
            )
            for name, (results, divergence) in passes.items()
        }
        for k in range(len(networks))
    ]
    counts = {name: results[0].count for name, results in measured.items()}
    others = _never_seen(never_seen, oracle, references)  # members have been checked
    curves: dict[str, RelearningCurve | str] = {}
    begun = time.perf_counter()
    if relearn is not None:
        curves = run_relearning(model, others, Sets(reread, counts, loss_fn, seed), relearn)
    ended = time.perf_counter()
    ratios = [curve.ratio for curve in curves.values() if not isinstance(curve, str) and curve.ratio is not None]
    return Audit(
        sets=sets[0],
        classes=_classes({name: measured[name][0] for name in ("retain", "test")}),
        relearning=curves,
        relearn_ratio=max(ratios, key=lambda ratio: ratio.low or 0.0, default=None),
        oracle=sets[1] if oracle is not None else None,
        seconds={"inference": inferred - started, "lira": compared - inferred, "relearning": ended - begun},
        settings={"seed": seed, "relearning": None if relearn is None else asdict(relearn)},
    )


def _loaders(
    forget: Loader, retain: Loader, test: Loader, control: Loader | None, earlier: Mapping[str, Loader] | None
) -> dict[str, Loader]:
    """Return the loaders by their sets' names.

    InputError for other types, for names that are taken, and for sets that share examples.
    """
    check_type("earlier", earlier, (Mapping, type(None)), "a mapping of names to loaders, or None")
    loaders: dict[str, Loader] = {"forget": forget}
    for name, loader in (earlier or {}).items():
        if not isinstance(name, str) or name in FIXED:
            raise InputError(f"expected names of earlier sets other than {', '.join(FIXED)}, got {describe(name)}")
        loaders[name] = loader
    loaders |= {"retain": retain, "test": test}
    if control is not None:
        loaders["control"] = control
    for name, loader in loaders.items():
        check_loader(loader, f"{name} set")
    forgotten = {name: loader for name, loader in loaders.items() if name == "forget" or name not in FIXED}
    never_seen: dict[str, Loader] = {name: loaders[name] for name in ("test", "control") if name in loaders}
    check_disjoint(forgotten, {"retain": retain, **never_seen})
    check_disjoint({"retain": retain}, never_seen)
    return loaders


def _references(references: Sequence[Reference] | None) -> list[Reference]:
    check_type("references", references, (Sequence, type(None)), "a list of Reference, or None")
    for number, reference in enumerate(references or []):
        check_type(f"references[{number}]", reference, Reference, "a Reference")
        _check_network(f"references[{number}].model", reference.model)
        check_type(f"references[{number}].members", reference.members, Mapping, "a mapping of set names to tensors")
    return list(references or [])


def _check_never_seen(never_seen: Sequence[Network] | None) -> None:
    check_type("never_seen", never_seen, (Sequence, type(None)), "a list of networks, or None")
    for number, network in enumerate(never_seen or []):
        _check_network(f"never_seen[{number}]", network)


def _never_seen(
    never_seen: Sequence[Network] | None, oracle: nn.Module | None, references: Sequence[Reference]
) -> list[NeverSeen]:
    """Return the networks to compare relearning with: the caller's, else the oracle, else the reference models."""
    if never_seen is not None:
        return [NeverSeen(network) for network in never_seen]
    if oracle is not None:
        return [NeverSeen(oracle)]
    return [NeverSeen(reference.model, reference.members["forget"].cpu()) for reference in references]


def _check_network(name: str, network: object) -> None:
    if not isinstance(network, nn.Module) and (isinstance(network, type) or not callable(network)):
        raise InputError(
            f"expected {name} to be a torch.nn.Module or a function that returns one, got {describe(network)}; pass one"
        )


def _check_one_form(measured: Mapping[str, Measured]) -> None:
    """Raise InputError for sets of classes beside sets of tokens, and for other numbers of classes."""
    forms = {(each.right is None, each.classes) for each in measured.values()}
    if len(forms) > 1:
        raise InputError(
            "expected all sets of one form, got batches with 'input_ids' and others; pass one model's sets"
        )


def _lira_scores(
    references: Sequence[Reference],
    loaders: Mapping[str, Loader],
    measured: Mapping[str, Sequence[Measured]],
    attacked: Sequence[str],
    loss_fn: LossFn | None,
) -> list[dict[str, Tensor]]:
    """Return for each network the offline LiRA's scores of every attacked set and of the control, float64 (N,)."""
    if not references:
        return []
    members = {name: _members(references, name, measured[name][0].count) for name in attacked}
    members["control"] = torch.zeros(len(references), measured["control"][0].count, dtype=torch.bool)
    confidences: dict[str, list[Tensor]] = {name: [] for name in members}
    for number, reference in enumerate(references):
        network = loaded(reference.model, f"references[{number}].model")
        for name in confidences:
            (found,), _ = measure([network], loaders[name], name, loss_fn)
            same_examples(measured[name][0], found, name)
            confidences[name].append(found.confidences)
    return [
        {
            name: offline_lira(measured[name][k].confidences, torch.stack(values), members[name])
            for name, values in confidences.items()
        }
        for k in range(len(measured["forget"]))
    ]


def _members(references: Sequence[Reference], name: str, count: int) -> Tensor:
    """Return bool (references, examples). InputError, by name, for members that do not fit the set."""
    rows = []
    for number, reference in enumerate(references):
        known = reference.members.get(name)
        if not isinstance(known, Tensor) or known.dtype is not torch.bool or known.shape != (count,):
            got = f"{known.dtype} {tuple(known.shape)}" if isinstance(known, Tensor) else describe(known)
            raise InputError(
                f"expected references[{number}].members['{name}'] to be bool ({count},), got {got}; pass whether the "
                "reference model was trained on each example of the set"
            )
        rows.append(known.cpu())
    return torch.stack(rows)


def _figures(
    own: Measured, divergence: Tensor | None, control: Measured | None, scores: tuple[Tensor, Tensor] | None, seed: int
) -> SetFigures:
    """Return a network's figures on a set; with a control, and LiRA's scores of both, also the attacks'."""
    attack, left_out = (None, 0) if control is None else _attack(own, control, seed)
    return SetFigures(
        count=own.count,
        accuracy=None if own.right is None else _accuracy(own.right, own.units),
        loss=mean(own.losses * own.units, own.units),
        attack_advantage=attack,
        attack_left_out=left_out,
        lira=None if scores is None else _lira(*scores),
        kl=None if divergence is None else mean(divergence).mapped(lambda x: max(x, 0.0)),
    )


def _accuracy(right: Tensor, units: Tensor) -> Figure:
    """Return the percentage of units that are right: Wilson's interval if an example is one unit."""
    if bool((units == 1).all()):
        return proportion(right.sum().item(), len(right)).scaled(100)
    return mean(right, units).mapped(lambda x: 100 * min(max(x, 0.0), 1.0))


def _attack(own: Measured, control: Measured, seed: int) -> tuple[Figure | None, int]:
    """Return the confidence attack's advantage, and how many examples it leaves out: of labels without a control."""
    members, others, weights, left_out = own.confidences, control.confidences, None, 0
    if own.targets is not None and control.targets is not None:
        classes = int(max(own.targets.max(), control.targets.max())) + 1
        theirs = control.targets.bincount(minlength=classes)
        known = theirs[own.targets] > 0
        members, left_out = members[known], int((~known).sum())
        wanted = own.targets[known].bincount(minlength=classes)
        used = wanted[control.targets] > 0
        others, weights = others[used], (wanted / theirs)[control.targets][used].double()
    if len(members) < 2 or len(others) < 2:
        return None, left_out
    return threshold_attack(members, others, weights, seed=seed), left_out


def _lira(scores: Tensor, control: Tensor) -> LiraFigures:
    """Return the figures of LiRA's scores; without areas if no example has enough reference models."""
    positives, negatives = scores[~scores.isnan()], control[~control.isnan()]
    left_out = len(scores) - len(positives)
    if not len(positives) or not len(negatives):
        return LiraFigures(None, None, 0, left_out)
    caught = tpr_at_fpr(positives, negatives, LIRA_FPR)
    rate = proportion(round(caught / 100 * len(positives)), len(positives)).scaled(100)
    return LiraFigures(auc(positives, negatives), rate, len(positives), left_out)


def _classes(measured: Mapping[str, Measured]) -> dict[str, list[Figure | None]] | None:
    """Return the accuracy of each class by set, in percent; None unless the networks are classifiers."""
    found: dict[str, list[Figure | None]] = {}
    for name, each in measured.items():
        if each.classes is None or each.targets is None or each.right is None:
            return None
        counts = each.targets.bincount(minlength=each.classes).tolist()
        right = each.targets.bincount(each.right, minlength=each.classes).tolist()
        found[name] = [proportion(r, n).scaled(100) if n else None for r, n in zip(right, counts, strict=True)]
    return found
