"""Tables and a paragraph from the records of sequential requests, and the packed form of the records."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
RETRAIN, RELEARNING = "retrain", "relearning"
MIN_SEEDS = 3  # of an interval
KINDS = {"iid": "random examples", "non-iid": "one class", "mislabelled": "wrong labels"}
RECORD: dict[str, Any] = {
    "sequence": str, "seed": int, "request": int, "data?": str, "provenance": {**ORIGIN, "threads": int}
}  # fmt: skip
MEASURED: dict[str, Any] = {"seconds": SECONDS, "audit": {"sets": Each(dict)}}
RELEARNED: dict[str, Any] = {RELEARNING: Each(dict)}

EROSION = """\
**Erosion.** Test accuracy before the first request and after some; its change over all {last}, in points, also of the
class that loses most; accuracy on what is retained; seconds of all requests, of the seed with the fewest.

"""
REVERSAL = """\
**What comes back.** Accuracy on the forget sets of all requests except the last, by kind: right after each was
unlearned, and after the last request. With wrong labels it is the part that gets the wrong label.

"""
ATTACKS = """\
**Attack and relearning.** The confidence attack's advantage (0 to 1), mean over the forget sets. After the last
request, how much more of the first and of the last forget set comes back by finetuning than in networks that never saw
it: the audit's ratio of odds, 1 for as much. The geometric mean over seeds, with the least and the greatest; one seed
has its 95 % interval.

"""

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
        check_record(record, RECORD, name, "; restore it")
        if "failed" not in record:
            check_record(record, RELEARNED if RELEARNING in record else MEASURED, name, "; restore it")
    return [record for _, record in named]


def pack(directory: Path, target: Path, report: str) -> None:
    """Write the records, one a line, and the report to ``target``."""
    make_output_dir(target, "--pack")
    write_text(target / PACKED, "".join(json.dumps(record) + "\n" for record in read_records(directory)))
    write_text(target / REPORT, report)


@dataclass(frozen=True)
class Course:
    """One sequence with one seed that served every request: its records by request, and the original's record.

    ``relearning``: by the names of two requests.
    """

    original: Record
    records: dict[int, Record]
    relearning: Mapping[str, Any]

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


Measure = Callable[[Course], float]
OverSeeds = Callable[[Iterable[float]], float]


def courses_of(records: Sequence[Record]) -> dict[str, list[Course]]:
    """Return the courses of each sequence that are whole, by name, retraining last; the seeds ascend."""
    originals = {record["seed"]: record for record in records if record["sequence"] == ORIGINAL}
    relearning = {
        (record["sequence"], record["seed"]): record[RELEARNING] for record in records if RELEARNING in record
    }
    last = max(record["request"] for record in records)
    grouped: dict[str, dict[int, dict[int, Record]]] = {}
    for record in records:
        if record["sequence"] != ORIGINAL and "audit" in record:
            grouped.setdefault(record["sequence"], {}).setdefault(record["seed"], {})[record["request"]] = record
    return {
        name: [
            Course(originals[seed], found, relearning[name, seed])
            for seed, found in sorted(seeds.items())
            if seed in originals and len(found) == last and (name, seed) in relearning
        ]
        for name, seeds in sorted(grouped.items(), key=lambda item: (item[0] == RETRAIN, item[0]))
    }


# The measures of one course


def _accuracy(record: Record, name: str) -> float:
    return float(record["audit"]["sets"][name]["accuracy"]["value"])


def _test_after(course: Course, number: int) -> float:
    return _accuracy(course.records[number], "test")


def _test_before(course: Course) -> float:
    return _accuracy(course.original, "test")


def _change(course: Course) -> float:
    return _accuracy(course.last, "test") - _test_before(course)


def _worst_class(course: Course) -> float:
    """Return the change of test accuracy of the class that loses most, in points."""
    pairs = zip(course.last["audit"]["classes"]["test"], course.original["audit"]["classes"]["test"], strict=True)
    return min(float(after["value"] - before["value"]) for after, before in pairs if after is not None)


def _retained(course: Course) -> float:
    return _accuracy(course.last, "retain")


def _seconds(course: Course) -> float:
    return sum(float(sum(record["seconds"].values())) for record in course.records.values())


def _before(course: Course, kind: str) -> float:
    return _average(_accuracy(course.original, f"request {number}") for number in course.of_kind(kind))


def _when_unlearned(course: Course, kind: str) -> float:
    return _average(_accuracy(course.records[number], f"request {number}") for number in course.of_kind(kind))


def _at_the_end(course: Course, kind: str) -> float:
    return _average(_accuracy(course.last, f"request {number}") for number in course.of_kind(kind))


def _rise(course: Course, kind: str) -> float:
    return _at_the_end(course, kind) - _when_unlearned(course, kind)


def _advantage(record: Record, name: str) -> float:
    figure = record["audit"]["sets"][name]["attack_advantage"]
    return math.nan if figure is None else float(figure["value"])


def _attack_before(course: Course) -> float:
    return _average(_advantage(course.original, f"request {number}") for number in course.records)


def _attack_when_unlearned(course: Course) -> float:
    return _average(_advantage(record, f"request {number}") for number, record in course.records.items())


def _attack_at_the_end(course: Course) -> float:
    return _average(_advantage(course.last, f"request {number}") for number in course.records)


def _average(values: Iterable[float]) -> float:
    """Return the mean of the values that were measured; NaN if none was."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _least(values: Iterable[float]) -> float:
    """Return the least of the seeds' seconds: other work on a machine only adds to them."""
    return min(values)


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
    measures: dict[str, Measure] = {"test acc before": _test_before}
    measures |= {f"after {number}": partial(_test_after, number=number) for number in shown}
    measures |= {"change": _change, "worst class": _worst_class, "retain acc": _retained}
    columns = ["method", "seeds", *measures, "seconds"]
    rows = [
        [
            name,
            str(len(found)),
            *(_mean(found, each) for each in measures.values()),
            f"{_least(map(_seconds, found)):.0f}",
        ]
        for name, found in courses.items()
    ]
    return EROSION.format(last=numbers[-1]) + markdown_table(columns, rows)


def _reversal(courses: Mapping[str, Sequence[Course]]) -> str:
    columns = ["method", *(f"{words}, {when}" for words in KINDS.values() for when in ("unlearned", "at the end"))]
    first = next(iter(courses.values()))
    rows = [["before the first request"]]
    for kind in KINDS:
        rows[0] += ["", _mean(first, partial(_before, kind=kind))]
    for name, found in courses.items():
        measures = [partial(measure, kind=kind) for kind in KINDS for measure in (_when_unlearned, _at_the_end)]
        rows.append([name, *(_mean(found, measure) for measure in measures)])
    return REVERSAL + markdown_table(columns, rows)


def _attacks(courses: Mapping[str, Sequence[Course]]) -> str:
    first = next(iter(courses.values()))
    numbers = (min(first[0].records), max(first[0].records))
    columns = ["method", "attack, unlearned", "attack at the end", *(f"relearning, request {n}" for n in numbers)]
    rows = [["before the first request", "", _mean(first, _attack_before, digits=3), *[""] * len(numbers)]]
    for name, found in courses.items():
        attacks = [_mean(found, measure, digits=3) for measure in (_attack_when_unlearned, _attack_at_the_end)]
        rows.append([name, *attacks, *(_ratios(found, f"request {number}") for number in numbers)])
    return ATTACKS + markdown_table(columns, rows)


def _ratios(courses: Sequence[Course], name: str) -> str:
    """Return the geometric mean over seeds with the least and the greatest; for one seed its own interval."""
    found = [course.relearning[name]["ratio"] for course in courses]
    figures = [each for each in found if each is not None]
    if not figures:
        return "none"
    values = [each["value"] for each in figures]
    if len(values) == 1:
        low, high = figures[0]["low"], figures[0]["high"]
    else:
        low, high = min(values), max(values)
    middle = math.exp(sum(map(math.log, values)) / len(values))
    return _short(middle) + (f" ({_short(low)} to {_short(high)})" if low is not None else "")


def _short(value: float) -> str:
    """Return two decimals, or a power of ten for what is far from 1."""
    return f"{value:.2f}" if 0.005 <= value < 1000 else f"{value:.0e}"


def _mean(courses: Sequence[Course], measure: Measure, digits: int = 1) -> str:
    """Return the mean over seeds ± half of its 95 % interval, from three seeds on.

    Student's quantile of two seeds is 12.7: such an interval is often wider than the range of the measure.
    """
    values = [measure(course) for course in courses]
    if any(math.isnan(value) for value in values):
        return "none"
    found = mean(values)
    return f"{found.value:.{digits}f}" + (f" ± {found.half:.{digits}f}" if len(values) >= MIN_SEEDS else "")


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
    return "\n".join([*lines, f"- seeds: {len(seeds)}; {origins(records)}", ""])


def paragraph(courses: Mapping[str, Sequence[Course]]) -> str:
    """Return the least and the greatest figures in words, without a choice of methods."""
    others = {name: found for name, found in courses.items() if name != RETRAIN}
    last = max(next(iter(courses.values()))[0].records)

    def words(measure: Measure, unit: str) -> str:
        return _extremes(others, measure, unit) + _beside(courses, measure)

    lines = [f"After {last} requests the change of test accuracy is {words(_change, 'points')}."]
    for kind, named in KINDS.items():
        if all(course.of_kind(kind) for found in courses.values() for course in found):
            lines.append(
                f"On the earlier forget sets, {named}: the accuracy at the end is "
                f"{words(partial(_at_the_end, kind=kind), '%')}; its change since each was unlearned is "
                f"{words(partial(_rise, kind=kind), 'points')}."
            )
    took = _extremes(others, _seconds, "seconds", _least) + _beside(courses, _seconds, _least)
    lines.append(f"All requests together took {took}.")
    return " ".join(lines) + "\n"


def _extremes(courses: Mapping[str, Sequence[Course]], measure: Measure, unit: str, over: OverSeeds = _average) -> str:
    values = {name: over(map(measure, found)) for name, found in courses.items()}
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    if f"{values[low]:.1f}" == f"{values[high]:.1f}":
        return f"{values[low]:.1f} {unit} with all methods"
    return f"from {values[low]:.1f} ({low}) to {values[high]:.1f} {unit} ({high})"


def _beside(courses: Mapping[str, Sequence[Course]], measure: Measure, over: OverSeeds = _average) -> str:
    return f", with retraining {over(map(measure, courses[RETRAIN])):.1f}" if RETRAIN in courses else ""
