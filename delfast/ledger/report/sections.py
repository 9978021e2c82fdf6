"""The part of the page on one request: the request, its runs, the evidence, and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from delfast.ledger.report import plots, wording
from delfast.ledger.report.history import History, Holder, Run, TakenRequest
from delfast.ledger.requests import REJECTED

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
    holders: Rows
    commands: list[str]


def section_of(request: TakenRequest, history: History, holders: list[Holder], drawn: set[int]) -> Section:
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
        holders=[[holder.file, holder.kind, holder.why] for holder in holders if request.number in holder.requests],
        commands=[f"delfast ledger verify . --head {history.head}", *_commands(request, history)],
    )


def _commands(request: TakenRequest, history: History) -> list[str]:
    """Return the commands that compare the models before and after each of the request's runs."""
    commands = []
    for run in request.runs:
        parts = [
            run.artefact("started", "model"),
            run.artefact("unlearned", "model"),
            run.artefact("localized", "mask"),
        ]
        files = [part["file"] for part in parts if part is not None]
        if len(files) == len(parts) and not history.purged.intersection(files):
            commands.append(f"delfast verify {' '.join(files)}")
    return commands


def _run(run: Run, request: TakenRequest, is_drawn: bool) -> dict[str, Any]:
    """Return what the page says on one run of a request."""
    started, figures = run.steps["started"], run.figures
    others = [number for number in run.requests if number != request.number]
    mask = run.steps.get("localized")
    before, after = run.artefact("started", "model"), run.artefact("unlearned", "model")
    settings = (run.steps.get("unlearned") or started).get("settings", started["settings"])
    verified = run.steps.get("verified")
    facts = [
        ("Started", f"{wording.date(run.time)} UTC"),
        ("Together with", wording.requests(others) if others else "no other request"),
        ("Examples to forget", f"{started['forget']:,}, and {started['retain']:,} to keep"),
        (
            "Settings",
            ", ".join(f"{name} {settings[name]}" for name in sorted(settings, key=lambda n: (n != "method", n))),
        ),
        ("Model before", _artefact(before)),
        ("Model after", _artefact(after)),
    ]
    if mask is not None:
        share = 100 * mask["selected"] / mask["total"]
        size = f"{mask['selected']:,} of {mask['total']:,} parameters ({share:.1f} %)"
        examples = "all requests so far" if started["localize_on"] == "all" else "this run's requests"
        facts.append(("Mask", f"{size}, localized on the examples of {examples}; {_artefact(mask['mask'])}"))
    if verified is not None:
        facts.append(
            (
                "Compared bit by bit",
                f"{verified['changed']:,} entries changed, {verified['outside']:,} outside the mask",
            )
        )
    steps = [
        f"{name} {payload['seconds']:.1f}" for name, payload in run.steps.items() if payload.get("seconds") is not None
    ]
    facts.append(("Seconds", f"{run.seconds:.1f} ({', '.join(steps)})"))
    facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in started["versions"].items())))
    return {
        "number": run.number,
        "status": run.status,
        "facts": facts,
        "decided": wording.date(run.times[run.status]) if run.status in run.times else "",
        "sentences": [wording.check_sentence(check, run.measured(check)) for check in run.checks],
        "missing": [] if figures is None else wording.missing(figures),
        "advice": run.steps.get(REJECTED, {}).get("advice", []),
        "sets": [] if figures is None else _set_rows(figures),
        "classes": _class_rows((figures or {}).get("classes") or {}),
        "curves": _curves(run) if is_drawn and request.number == run.requests[0] else [],
    }


def _method_first(settings: Mapping[str, Any]) -> list[str]:
    return sorted(settings, key=lambda name: (name != "method", name))


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
    """A row for each set, and for each set of the retrained network if there is one."""
    retrained = (figures.get("oracle") or {}).get("sets", {})
    return [
        _set_row(start + SET_NAMES.get(name, f"earlier: {name}"), sets[name])
        for start, sets in (("", figures["sets"]), ("retrained network: ", retrained))
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
            f"Finetuned on {_trained_on(name, curves)}: ratio {wording.interval(curves['ratio'], 2)}.",
        )
        for name, curves in sorted(run.figures["relearning"].items(), key=lambda item: (item[0] != "retain", item[0]))
        if "left_out" not in curves
    ]


def _trained_on(name: str, curves: Mapping[str, Any]) -> str:
    if name == "retain":
        return f"{curves['trained_on']:,} retained examples alone"
    return f"{name.removeprefix('forget ')} of the forget set ({wording.counted(curves['trained_on'], 'example')})"
