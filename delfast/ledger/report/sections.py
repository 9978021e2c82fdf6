"""The part of the page on one request: the request, its runs, the evidence, and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from delfast.ledger.report import plots, wording
from delfast.ledger.report.history import History, Run, TakenRequest
from delfast.ledger.results import HeldFile
from delfast.ledger.words import check_sentence, failure

SHOWN_IDS = 20  # identifiers of a request
Rows = list[list[str]]


@dataclass(frozen=True)
class Section:
    """The part of the page on one request."""

    number: int
    status: str
    facts: list[tuple[str, str]]
    ids: list[str]
    ids_left_out: int
    runs: list[dict[str, Any]]
    is_held: bool
    """Whether the model in use was trained on the request's examples and did not unlearn them."""
    holders: Rows
    commands: list[str]


def section_of(request: TakenRequest, history: History, holding: Sequence[HeldFile], drawn: set[int]) -> Section:
    """Return the part on one request; ``drawn``: numbers of the runs whose relearning curves are drawn."""
    hashed = history.created is not None and history.created.payload["hash_ids"]
    return Section(
        number=request.number,
        status=request.status,
        facts=[
            ("Received", f"{wording.date(request.time)} UTC"),
            ("Examples", f"{request.count:,}"),
            ("Reason", request.reason or "none was given"),
            ("Due", request.due or "no date was given"),
        ],
        ids=[] if hashed else list(request.ids[:SHOWN_IDS]),
        ids_left_out=0 if hashed else max(0, request.count - SHOWN_IDS),
        runs=[_run(run, request, run.number in drawn) for run in reversed(request.runs)],
        is_held=any(held.file == history.model and request.number in held.requests for held in holding),
        holders=[[held.file, held.why] for held in holding if request.number in held.requests],
        commands=[f"delfast ledger verify . --head {history.head}", *_commands(request, history)],
    )


def _commands(request: TakenRequest, history: History) -> list[str]:
    """Return the commands that compare the models before and after each of the request's runs."""
    commands = []
    for run in request.runs:
        parts = [run.started["model"], run.artefact("unlearned", "model"), run.artefact("unlearned", "allowed")]
        files = [part["file"] for part in parts if part is not None]
        if len(files) == len(parts) and not history.purged.keys() & set(files):
            commands.append(f"delfast verify {' '.join(files)}")
    return commands


def _run(run: Run, request: TakenRequest, is_drawn: bool) -> dict[str, Any]:
    """Return the page's content on one run of a request."""
    figures = run.figures
    return {
        "number": run.number,
        "status": run.status,
        "facts": _facts(run, request),
        "decided": wording.date(run.decided) if run.decided else "",
        "sentences": [check_sentence(check) for check in run.checks],
        "missing": [] if figures is None else wording.missing(figures),
        "advice": run.result.get("advice", []),
        "sets": [] if figures is None else _set_rows(figures),
        "classes": _class_rows((figures or {}).get("classes") or {}),
        "curves": _curves(run) if is_drawn and request.number == run.requests[0] else [],
    }


def _facts(run: Run, request: TakenRequest) -> list[tuple[str, str]]:
    """Return the facts of one run, each with its name."""
    started = run.started
    others = [number for number in run.requests if number != request.number]
    facts = [
        ("Started", f"{wording.date(run.time)} UTC" + (", stopped and continued" if run.resumed else "")),
        ("Together with", wording.requests(others) if others else "no other request"),
        ("Examples to forget", f"{started['forget']:,}, and {started['retain']:,} to keep"),
    ]
    for settings, checks in run.earlier_checks:
        failed = "; ".join(failure(check) for check in checks if not check.held)
        facts.append(("Tried before", f"{_settings(settings)}: {failed}"))
    facts.append(("Settings", _settings(run.settings)))
    known = {name: value for name, value in started["before"].items() if value is not None}
    if known:
        names = ((SET_NAMES[name].removeprefix("this run's "), value) for name, value in known.items())
        facts.append(("Accuracy before", ", ".join(f"{name} {value:.1f} %" for name, value in names)))
    facts.append(("Model before", _artefact(started["model"])))
    facts.append(("Model after", _artefact(run.artefact("unlearned", "model"))))
    mask, verified = run.last.get("localized"), run.last.get("verified")
    if mask is not None:
        share = 100 * mask["selected"] / mask["total"]
        size = f"{mask['selected']:,} of {mask['total']:,} elements ({share:.1f} %)"
        examples = "all requests so far" if started["localize_on"] == "all" else "this run's requests"
        facts.append(("Mask", f"{size}, localized on the examples of {examples}; {_artefact(mask['mask'])}"))
    if verified is not None:
        changed = f"{verified['changed']:,} elements changed, {verified['outside']:,} outside the mask and the head"
        facts.append(("Compared bit by bit", changed))
    taken = {"baseline": run.baseline, **run.last}
    steps = [f"{name} {payload['seconds']:.1f}" for name, payload in taken.items() if "seconds" in payload]
    facts.append(("Seconds", f"{run.seconds:.1f} ({', '.join(steps)})"))
    facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in started["versions"].items())))
    return facts


def _settings(settings: Mapping[str, Any]) -> str:
    """Return settings in words, the method first."""
    return ", ".join(f"{name} {settings[name]}" for name in sorted(settings, key=lambda name: (name != "method", name)))


def _artefact(found: Mapping[str, Any] | None) -> str:
    return "not recorded" if found is None else f"{found['file']}, SHA-256 {found['digest']}"


SET_COLUMNS = [
    "set",
    "examples",
    "accuracy, %",
    "loss, nats",
    "attack advantage",
    "LiRA AUC",
    "TPR at 1 %, %",
    "KL, nats",
]

SET_NAMES = {
    "forget": "this run's forget set",
    "retain": "retain set",
    "test": "test set",
    "control": "never-seen examples",
}


def _set_rows(figures: Mapping[str, Any]) -> Rows:
    """A row for each set, and for each set of the oracle if there is one."""
    oracle = (figures.get("oracle") or {}).get("sets", {})
    return [
        _set_row(start + SET_NAMES.get(name, f"earlier: {name}"), sets[name])
        for start, sets in (("", figures["sets"]), ("oracle: ", oracle))
        for name in _in_order(sets)
    ]


def _in_order(sets: Mapping[str, Any]) -> list[str]:
    """Return the names of sets: the forget set, the earlier ones by number, then the sets to compare with."""
    first, *last = SET_NAMES
    earlier = sorted(sets.keys() - SET_NAMES.keys(), key=lambda name: (len(name), name))
    return [name for name in (first, *earlier, *last) if name in sets]


def _set_row(name: str, values: Mapping[str, Any]) -> list[str]:
    lira = values.get("lira") or {}
    return [
        name,
        f"{values['count']:,}",
        wording.interval(values["accuracy"], 1),
        wording.interval(values["loss"], 2),
        wording.interval(values.get("attack_advantage"), 3),
        wording.interval(lira.get("auc"), 2),
        wording.interval(lira.get("tpr_at_1_percent"), 1),
        wording.interval(values.get("kl"), 2),
    ]


def _class_rows(classes: Mapping[str, list[Mapping[str, float | None] | None]]) -> Rows:
    pairs = zip(classes.get("retain", ()), classes.get("test", ()), strict=True)
    return [
        [str(label), *(wording.interval(each, 1) for each in pair)] for label, pair in enumerate(pairs) if any(pair)
    ]


def _curves(run: Run) -> list[tuple[Markup, str]]:
    """Return drawings of the relearning curves, with captions. The first of the run's requests shows them."""
    assert run.figures is not None  # the caller's run is audited
    return [
        (
            plots.draw_relearning(run, name, curves),
            f"Finetuned on {_trained_on(name, curves)}: {_ratio(curves)}.",
        )
        for name, curves in sorted(run.figures["relearning"].items(), key=lambda item: (item[0] != "retain", item[0]))
        if "left_out" not in curves
    ]


def _ratio(curves: Mapping[str, Any]) -> str:
    return f"ratio {wording.interval(curves['ratio'], 2)}" if curves["ratio"] else "the ratio was not measured"


def _trained_on(name: str, curves: Mapping[str, Any]) -> str:
    if name == "retain":
        return "retained examples alone"
    part = f"{name.removeprefix('forget ')} of the forget set ({wording.counted(curves['trained_on'], 'example')})"
    return f"retained examples and {part}"
