"""Tables and a paragraph from the records of sequential requests, and the packed form of the records."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delfast.errors import InputError
from delfast.experiments.grid.summary import mean, origins
from delfast.experiments.reports import markdown_table
from delfast.experiments.run import ORIGIN, SECONDS
from delfast.experiments.schema import Each, check_record
from delfast.experiments.sequential.cells import CELLS
from delfast.experiments.sequential.definition import ORIGINAL
from delfast.files import make_output_dir, read_json, read_json_lines, write_text

PACKED, REPORT = f"{CELLS}.jsonl", "report.md"
RETRAIN = "retrain"
KINDS = {"iid": "random examples", "non-iid": "one class", "mislabelled": "wrong labels"}
RECORD: dict[str, Any] = {
    "sequence": str, "seed": int, "request": int, "provenance": {**ORIGIN, "threads": int}
}  # fmt: skip
MEASURED: dict[str, Any] = {"seconds": SECONDS, "audit": {"sets": Each(dict)}}

Record = dict[str, Any]


def read_records(directory: Path) -> list[Record]:
    """Return the records of a run's directory, or of a directory with packed results. InputError for a damaged one."""
    packed = directory / PACKED
    if packed.is_file():
        named = [(f"line {number} of '{packed}'", record) for number, record in enumerate(read_json_lines(packed), 1)]
    else:
        named = [(f"'{path}'", read_json(path)) for path in sorted((directory / CELLS).glob("*.json"))]
    if not named:
        raise InputError(
            f"expected '{directory}' to hold records of sequential requests, there is none; run them first"
        )
    for name, record in named:
        check_record(record, RECORD if "failed" in record else {**RECORD, **MEASURED}, name, "; restore it")
    return [record for _, record in named]


def pack(directory: Path, target: Path, report: str) -> None:
    """Write the records, one a line, and the report to ``target``."""
    make_output_dir(target, "--pack")
    write_text(target / PACKED, "".join(json.dumps(record) + "\n" for record in read_records(directory)))
    write_text(target / REPORT, report)


@dataclass(frozen=True)
class Course:
    """One sequence with one seed that served every request: its records by request, and the original's record."""

    original: Record
    records: dict[int, Record]

    @property
    def last(self) -> Record:
        """The record after the last request."""
        return self.records[max(self.records)]

    @property
    def earlier(self) -> list[int]:
        """The numbers of all requests except the last."""
        return sorted(self.records)[:-1]

    def of_kind(self, kind: str) -> list[int]:
        """The numbers of the earlier requests of a kind."""
        return [number for number in self.earlier if self.records[number]["forget"]["spec"].partition(":")[0] == kind]


def courses_of(records: Sequence[Record]) -> dict[str, list[Course]]:
    """Return the courses of each sequence that are whole, by name in the order of the records; the seeds ascend."""
    originals = {record["seed"]: record for record in records if record["sequence"] == ORIGINAL}
    last = max(record["request"] for record in records)
    grouped: dict[str, dict[int, dict[int, Record]]] = {}
    for record in records:
        if record["sequence"] != ORIGINAL and "failed" not in record:
            grouped.setdefault(record["sequence"], {}).setdefault(record["seed"], {})[record["request"]] = record
    return {
        name: [
            Course(originals[seed], found)
            for seed, found in sorted(seeds.items())
            if seed in originals and len(found) == last
        ]
        for name, seeds in grouped.items()
    }


# The measures of one course


def _accuracy(record: Record, name: str) -> float:
    return float(record["audit"]["sets"][name]["accuracy"]["value"])


def _change(course: Course) -> float:
    return _accuracy(course.last, "test") - _accuracy(course.original, "test")


def _worst_class(course: Course) -> float:
    """Return the change of test accuracy of the class that loses most, in points."""
    pairs = zip(course.last["audit"]["classes"]["test"], course.original["audit"]["classes"]["test"], strict=True)
    return min(after["value"] - before["value"] for after, before in pairs if after is not None)


def _seconds(course: Course) -> float:
    return sum(sum(record["seconds"].values()) for record in course.records.values())


def _when_unlearned(course: Course, numbers: Sequence[int]) -> float:
    return _average(_accuracy(course.records[number], f"request {number}") for number in numbers)


def _at_the_end(course: Course, numbers: Sequence[int]) -> float:
    return _average(_accuracy(course.last, f"request {number}") for number in numbers)


def _attack_when_unlearned(course: Course) -> float:
    return _average(_advantage(record, f"request {number}") for number, record in course.records.items())


def _attack_at_the_end(course: Course) -> float:
    return _average(_advantage(course.last, f"request {number}") for number in course.records)


def _advantage(record: Record, name: str) -> float:
    figure = record["audit"]["sets"][name]["attack_advantage"]
    return math.nan if figure is None else float(figure["value"])


def _average(values: Any) -> float:
    """Return the mean of the values that were measured; NaN if none was."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


# The tables


def make_report(records: Sequence[Record], title: str) -> str:
    """Return the whole report in Markdown."""
    return f"# {title}\n\n{tables(records)}"


def tables(records: Sequence[Record]) -> str:
    """Return a paragraph, the tables of erosion, of what comes back and of attacks, and what computed them."""
    courses = {name: found for name, found in courses_of(records).items() if found}
    if not courses:
        raise InputError("expected a sequence that served every request, there is none; run to the end")
    parts = [paragraph(courses), _erosion(courses), _reversal(courses), _attacks(courses), _remarks(records, courses)]
    return "\n".join(parts)


def _erosion(courses: Mapping[str, Sequence[Course]]) -> str:
    numbers = sorted(next(iter(courses.values()))[0].records)
    shown = sorted({numbers[0], numbers[(len(numbers) - 1) // 2], numbers[-1]})
    columns = ("method", "seeds", "test acc before", *(f"after {number}" for number in shown), "change",
               "worst class", "retain acc", "seconds")  # fmt: skip
    rows = [
        [
            name,
            str(len(found)),
            _mean(found, lambda course: _accuracy(course.original, "test")),
            *(_mean(found, lambda course, n=number: _accuracy(course.records[n], "test")) for number in shown),
            _mean(found, _change),
            _mean(found, _worst_class),
            _mean(found, lambda course: _accuracy(course.last, "retain")),
            _mean(found, _seconds, digits=0),
        ]
        for name, found in courses.items()
    ]
    head = f"**Erosion.** Test accuracy before the first request and after some; its change over all {numbers[-1]}, in "
    head += "points, also of the class that loses most; accuracy on what is retained; seconds of all requests.\n\n"
    return head + markdown_table(columns, rows)


def _reversal(courses: Mapping[str, Sequence[Course]]) -> str:
    columns = ("method", *(f"{words}, {when}" for words in KINDS.values() for when in ("unlearned", "at the end")))
    first = next(iter(courses.values()))
    before = [_mean(first, lambda c, k=kind: _before(c, k)) for kind in KINDS]
    rows = [["before the first request", *(cell for each in before for cell in ("", each))]]
    for name, found in courses.items():
        row = [name]
        for kind in KINDS:
            row.append(_mean(found, lambda course, k=kind: _when_unlearned(course, course.of_kind(k))))
            row.append(_mean(found, lambda course, k=kind: _at_the_end(course, course.of_kind(k))))
        rows.append(row)
    head = (
        "**What comes back.** Accuracy on the forget sets of all requests except the last, by kind: right after each "
    )
    head += "was unlearned, and after the last request. With wrong labels it is the part that gets the wrong label.\n\n"
    return head + markdown_table(columns, rows)


def _before(course: Course, kind: str) -> float:
    return _average(_accuracy(course.original, f"request {number}") for number in course.of_kind(kind))


def _attacks(courses: Mapping[str, Sequence[Course]]) -> str:
    first = next(iter(courses.values()))[0]
    numbers = (min(first.records), max(first.records))
    columns = ("method", "attack, unlearned", "attack at the end", *(f"relearning, request {n}" for n in numbers))
    before = _mean(next(iter(courses.values())), lambda course: _attack_at_the_end(_as_original(course)), digits=3)
    rows = [["before the first request", "", before, *[""] * len(numbers)]]
    rows += [
        [
            name,
            _mean(found, _attack_when_unlearned, digits=3),
            _mean(found, _attack_at_the_end, digits=3),
            *(_ratios(found, f"request {number}") for number in numbers),
        ]
        for name, found in courses.items()
    ]
    head = (
        "**Attack and relearning.** The confidence attack's advantage (0 to 1), mean over the forget sets. After the "
    )
    head += (
        "last request, how much more of the first and of the last forget set comes back by finetuning than in networks "
    )
    head += "that never saw it: the audit's ratio of odds, 1 for as much; geometric mean over seeds, with the least and the "
    head += "greatest.\n\n"
    return head + markdown_table(columns, rows)


def _as_original(course: Course) -> Course:
    """Return the course as if no request had changed the original."""
    return Course(course.original, dict.fromkeys(course.records, course.original))


def _ratios(courses: Sequence[Course], name: str) -> str:
    found = [course.last["relearning"][name]["ratio"] for course in courses]
    values = [each["value"] for each in found if each is not None]
    if not values:
        return "none"
    middle = math.exp(sum(map(math.log, values)) / len(values))
    return f"{middle:.2f} ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else f"{middle:.2f}"


def _mean(courses: Sequence[Course], measure: Callable[[Course], float], digits: int = 1) -> str:
    """Return the mean over seeds ± half of its 95 % interval."""
    values = [measure(course) for course in courses]
    if any(math.isnan(value) for value in values):
        return "none"
    found = mean(values)
    return f"{found.value:.{digits}f}" + ("" if math.isnan(found.half) else f" ± {found.half:.{digits}f}")


def _remarks(records: Sequence[Record], courses: Mapping[str, Sequence[Course]]) -> str:
    """Return what failed or is unfinished, and the versions and machines."""
    lines = [
        f"- {record['sequence']}, seed {record['seed']}, failed at request {record['request']}: {record['failed']}"
        for record in records
        if "failed" in record
    ]
    seeds = {record["seed"] for record in records}
    for name in dict.fromkeys(record["sequence"] for record in records):
        missing = len(seeds) - len(courses.get(name, ()))
        if name != ORIGINAL and missing:
            lines.append(f"- {name}: {missing} of {len(seeds)} seeds did not serve every request and are left out")
    return "\n".join([*lines, f"- {len(seeds)} seeds; {origins(records)}", ""])


def paragraph(courses: Mapping[str, Sequence[Course]]) -> str:
    """Return the largest and the smallest figures in words, without a choice of a method."""
    others = {name: found for name, found in courses.items() if name != RETRAIN}
    last = max(next(iter(courses.values()))[0].records)
    change = f"{_extremes(others, _change, 'points')}{_beside(courses, _change)}"
    lines = [f"After {last} requests the change of test accuracy is {change}."]
    for kind, words in KINDS.items():
        if all(course.of_kind(kind) for found in courses.values() for course in found):

            def end(course: Course, kind: str = kind) -> float:
                return _at_the_end(course, course.of_kind(kind))

            lines.append(
                f"On earlier forget sets of {words} the accuracy at the end is {_extremes(others, end, '%')}"
                f"{_beside(courses, end)}."
            )

            def rise(course: Course, kind: str = kind) -> float:
                numbers = course.of_kind(kind)
                return _at_the_end(course, numbers) - _when_unlearned(course, numbers)

            lines.append(
                f"Since they were unlearned it changed by {_extremes(others, rise, 'points')}{_beside(courses, rise)}."
            )
    lines.append(f"The requests took {_extremes(others, _seconds, 'seconds')}{_beside(courses, _seconds)}.")
    return " ".join(lines) + "\n"


def _extremes(courses: Mapping[str, Sequence[Course]], measure: Callable[[Course], float], unit: str) -> str:
    values = {name: _average(map(measure, found)) for name, found in courses.items()}
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return f"from {values[low]:.1f} ({low}) to {values[high]:.1f} {unit} ({high})"


def _beside(courses: Mapping[str, Sequence[Course]], measure: Callable[[Course], float]) -> str:
    if RETRAIN not in courses:
        return ""
    return f", with retraining {_average(map(measure, courses[RETRAIN])):.1f}"
