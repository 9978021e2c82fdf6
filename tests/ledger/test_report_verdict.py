"""The verdict on a request, and the parts of the report that a lawyer reads, on made-up ledgers."""

from __future__ import annotations

import re
from datetime import date
from typing import Any

import pytest

from delfast.ledger.report import make_report
from delfast.ledger.report.history import KEPT_IDS, read_history
from delfast.ledger.report.verdict import forgetting_of, verdict_of
from delfast.ledger.report.wording import CHOSEN
from tests.ledger.histories import RETRAIN, SETTINGS, Writer, example, held, model_of, names
from tests.ledger.pages import changed

TODAY = date(2026, 3, 25)
FEW = "it needs at least 2 examples, the forget set has 1"


def verdict(writer: Writer, number: int, *, is_held: bool = False) -> str:
    """Return the verdict on a request."""
    history = read_history(writer.entries)
    return " ".join(verdict_of(history.requests[number], history, is_held=is_held))


def retrained(writer: Writer, run: int, requests: list[int], excluded: list[int]) -> None:
    """Append an accepted run that retrains and leaves open requests out."""
    other = Writer()
    other.start(run, requests, count=40, attempts=[RETRAIN])
    started, baseline = (entry.payload for entry in other.entries)
    writer("started", {**started, "excluded": excluded}, run)
    writer("baseline", baseline, run)
    checks = writer._attempt(run, 1, RETRAIN, 40, [], 0.4, 1.1)
    tried = [{"attempt": 1, "settings": RETRAIN, "checks": checks}]
    writer("accepted", {"model": {"file": model_of(run), "digest": ""}, "attempts": tried, "checks": checks}, run)


@pytest.fixture
def write() -> Writer:
    writer = Writer()
    writer.create()
    return writer


def test_a_request_that_a_method_carried_out(write: Writer) -> None:
    write.receive(1, names(0, 40))
    write.run(1, [1], count=40)
    assert verdict(write, 1) == (
        "Carried out on 2026-03-01 by run 1: the method del changed the model to forget 40 examples, in 29.9 % of its "
        f"elements. The model in use changed from models/0000.safetensors to {model_of(1)}. "
        "Forgetting: seen in relearning ratio. Held: change of test accuracy; relearning ratio. Held, but undecided "
        "(the interval includes the limit): attack advantage."
    )


def test_a_set_of_few_examples_and_figures_that_were_not_measured_are_named(write: Writer) -> None:
    write.receive(1, ["1"])
    write.run(1, [1], count=1)

    def change(event: str, payload: dict[str, Any]) -> None:
        if event == "accepted":
            payload["checks"][2].update(value=None, low=None, high=None, reason=FEW)

    write.entries = changed(write.entries, change)
    text = verdict(write, 1)
    assert "Not measured: attack advantage." in text and "Held: change of test accuracy; relearning ratio." in text
    assert "The run had 1 example to forget: most figures need more to separate forgotten from remembered." in text
    markdown, _ = make_report(write.entries, [], today=TODAY)
    assert f"Attack advantage: not measured: {FEW}. By --accept-unmeasured it does not count" in markdown
    assert (
        "- The forget set has 1 example. The attack and the relearning ratio need at least 2: not measured." in markdown
    )


def test_runs_that_failed_before_count_in_the_verdict_and_in_the_first_lines(write: Writer) -> None:
    write.receive(1, names(0, 40))
    write.run(1, [1], count=40, ratios=[2.7])
    write.run(2, [1], count=40)
    text = verdict(write, 1)
    assert (
        "It was tried in 2 runs. Run 1 with the same settings and other random numbers did not pass: relearning ratio "
        "2.70, limit 1.50."
    ) in text
    markdown, _ = make_report(write.entries, [], today=TODAY)
    first = markdown.split("## Requests in time")[0]
    assert "Request 1 was tried in 2 runs: run 1 did not pass (relearning ratio 2.70, limit 1.50)." in first
    assert text.endswith(CHOSEN) and first.count(CHOSEN) == 1
    write.receive(2, names(40, 40))
    write.run(3, [2], count=40, before=model_of(2), ratios=[2.2, 1.2])
    assert "In run 3, 1 attempt before the last did not pass." in verdict(write, 2)
    assert SETTINGS["method"] != RETRAIN["method"] and "tried" not in verdict(write, 2)
    assert verdict(write, 2).endswith(CHOSEN)
    write.receive(3, names(80, 40))
    write.run(4, [3], count=40, before=model_of(3, 2))
    assert CHOSEN not in verdict(write, 3)


def test_requests_of_the_same_runs_have_one_sentence_on_them(write: Writer) -> None:
    for number in (1, 2, 3):
        write.receive(number, names(40 * number, 40))
    write.run(1, [1, 2, 3], count=120, ratios=[2.7])
    write.run(2, [1, 2, 3], count=120)
    markdown, _ = make_report(write.entries, [], today=TODAY)
    first = markdown.split("## Requests in time")[0]
    assert first.count("tried in 2 runs") == 1
    assert "Requests 1 to 3 were tried in 2 runs: run 1 did not pass (relearning ratio 2.70, limit 1.50)." in first


def test_retraining_is_said_of_every_request_that_it_left_out(write: Writer) -> None:
    for number in (1, 2, 3):
        write.receive(number, names(50 * number, 40))
    write.run(1, [1], count=40)
    retrained(write, 2, [2], excluded=[3])
    new = "a new network was trained from nothing on the 4,420 examples left, without the 40 examples to forget"
    assert f"by run 2: {new}." in verdict(write, 2) and "outside the mask" not in verdict(write, 2)
    assert "Forgetting: trained without them. The model in use is the network of run 2. Held:" in verdict(write, 2)
    other = (
        "Run 2 trained a new network from nothing on the 4,420 examples left: the examples of this request were not "
        "among them. The model in use is the network of run 2"
    )
    assert f"Forgetting: trained without them. {other}. Held:" in verdict(write, 1)
    assert verdict(write, 3).endswith(f"{other}.")
    assert verdict(write, 3).startswith("Not carried out yet: no run has taken up this request.")
    write.run(3, [3], count=40, before=model_of(2))
    assert f"{other}, changed by run 3 since. Held:" in verdict(write, 1)
    assert verdict(write, 3).startswith("Carried out on") and "changed by run 3 since. Held:" in verdict(write, 3)
    write.receive(4, ["late"])
    assert verdict(write, 4, is_held=True).endswith("The model in use was trained on its examples.")
    markdown, _ = make_report(write.entries, [], today=TODAY)
    first = markdown.split("## Requests in time")[0]
    assert "Run 2 trained a new network from nothing, without the examples of requests 1 to 3. Run 3 changed" in first
    # the bits outside a mask count in the two runs that had one
    assert (
        "| Changes outside the mask and the last layer | 0 | 0 (run 3) |  | held | 2 held; 1 does not apply |" in first
    )
    assert "Changes outside the mask and the last layer: does not apply, since the run had no mask" in markdown


@pytest.mark.parametrize(
    ("attack", "ratio", "words"),
    [
        ({}, {}, "seen in relearning ratio"),  # the attack's interval includes the limit
        ({"high": 0.05}, {}, "seen in attack advantage and relearning ratio"),
        ({}, {"before": 1.2}, "undecided"),
        ({"before": 0.05}, {"before": 1.2}, "nothing to see before the run"),
        ({"value": None}, {"before": None}, "not measured"),
        ({"value": None}, {"before": 1.2}, "nothing to see before the run"),
    ],
)
def test_forgetting_is_seen_only_by_a_figure_that_was_above_its_limit(
    write: Writer, attack: dict[str, Any], ratio: dict[str, Any], words: str
) -> None:
    def change(event: str, payload: dict[str, Any]) -> None:
        if event == "accepted":
            payload["checks"][2].update(attack)
            payload["checks"][3].update(ratio)

    write.receive(1, names(0, 40))
    write.run(1, [1], count=40)
    write.receive(2, names(40, 40))
    history = read_history(changed(write.entries, change))
    assert forgetting_of(history.requests[1], history) == words
    assert forgetting_of(history.requests[2], history) == "", "open"
    retrained(write, 2, [2], excluded=[])
    history = read_history(write.entries)
    assert {forgetting_of(each, history) for each in history.requests.values()} == {"trained without them"}


def test_figures_of_several_requests_together_are_not_said_of_each(write: Writer) -> None:
    write.receive(1, names(0, 39))
    write.receive(2, names(39, 1))
    write.receive(3, names(40, 40))
    write.run(1, [1, 2], count=40)
    write.run(2, [3], count=40, before=model_of(1))
    said = "of them this request's; they do not show what became of"
    assert f"The figures are of 40 examples together, 39 {said} these alone." in verdict(write, 1)
    assert f"The figures are of 40 examples together, 1 {said} this one alone." in verdict(write, 2)
    assert said not in verdict(write, 3), "alone in its run"
    markdown, _ = make_report(write.entries, [], today=TODAY)
    first = "3 forget requests: 3 carried out. Forgetting, measured of all examples of a run together: seen in 3."
    assert f"**{first}**" in markdown


def test_the_first_line_has_the_totals_of_forgetting(write: Writer) -> None:
    changes: dict[int, dict[str, Any]] = {1: {}, 2: {"high": 1.6}, 3: {"value": None}, 4: {"before": 1.2}}

    def change(event: str, payload: dict[str, Any]) -> None:
        if event == "accepted":
            number = int(payload["model"]["file"].split("/")[1])
            payload["checks"][2].update(value=None)
            payload["checks"][3].update(changes[number])

    for number in changes:
        write.receive(number, names(40 * number, 40))
        write.run(number, [number], count=40)
    markdown, _ = make_report(changed(write.entries, change), [], today=TODAY)
    assert (
        "**4 forget requests: 4 carried out. Forgetting: seen in 1, undecided in 1, nothing to see before the run in "
        "1, not measured in 1.**"
    ) in markdown


def test_the_worst_of_equal_figures_is_the_one_of_the_widest_interval(write: Writer) -> None:
    highs = iter((2.5, 1.2))

    def change(event: str, payload: dict[str, Any]) -> None:
        if event == "accepted":
            payload["checks"][3].update(high=next(highs))

    for number in (1, 2):
        write.receive(number, names(40 * number, 40))
        write.run(number, [number], count=40)
    markdown, _ = make_report(changed(write.entries, change), [], today=TODAY)
    assert "| Relearning ratio | 1.50 | 1.10 (run 1) | 0.80 to 2.50 |" in markdown


def test_a_due_date_that_passed_is_marked_until_the_request_is_carried_out() -> None:
    def report(today: date) -> str:
        entries = [entry for entry in example() if entry.event != "audited"]
        return make_report(entries, held(), today=today)[0]

    assert "Overdue" not in report(date(2026, 3, 20)) and "| 2026-03-20 |" in report(date(2026, 3, 20))
    late = report(date(2026, 5, 1))
    assert "Overdue on 2026-05-01: request 4 (due 2026-03-20), request 6 (due 2026-04-15)." in late
    assert "| 2026-03-20, overdue |" in late and "| 2026-04-01 |" in late, "request 1 was carried out in time"

    def change(event: str, payload: dict[str, Any]) -> None:
        if payload.get("request") == 1:
            payload["due"] = "2026-02-01"

    entries = changed([entry for entry in example() if entry.event != "audited"], change)
    assert "| 2026-02-01, carried out later |" in make_report(entries, held(), today=TODAY)[0]


def test_comparisons_that_nobody_can_repeat_are_said() -> None:
    markdown, text = make_report([entry for entry in example() if entry.event != "audited"], held(), today=TODAY)
    said = "The models before and after run 1 can no longer be compared bit by bit, by anybody: models/0000.safetensors"
    assert said in text and said in markdown and "delfast verify models/0000" not in text

    def change(event: str, payload: dict[str, Any]) -> None:
        if "model" in payload and event in ("started", "unlearned"):
            payload["model"]["file"] = payload["model"]["file"].replace(".safetensors", ".pt")

    entries = changed([entry for entry in example() if entry.event != "audited"], change)
    markdown, _ = make_report(entries, held(), today=TODAY)
    assert "`delfast verify` cannot compare the models of run 2" in markdown.replace("\\", "")
    assert not re.search(r"^delfast verify", markdown, flags=re.MULTILINE)


def test_every_command_of_the_page_has_the_options_that_it_needs() -> None:
    _, text = make_report([entry for entry in example() if entry.event != "audited"], held(), today=TODAY)
    commands = re.findall(r"<code>(delfast ledger (?:run|add|purge|references)[^<]*)</code>", text)
    assert commands and all("--job JOB.py" in command for command in commands)


def test_a_run_of_many_requests_is_drawn_in_the_first_that_has_a_section(write: Writer) -> None:
    count = KEPT_IDS + 20
    for number in range(1, count + 1):
        write.receive(number, [str(number)])
    write.run(1, list(range(1, count + 1)), count=count)
    _, text = make_report(write.entries, [], today=TODAY)
    assert text.count("Trained further on retained examples alone") == 1


def test_the_markdown_has_the_words_the_evidence_and_the_identifiers() -> None:
    markdown, _ = make_report(example(), held(), today=TODAY)
    assert "## The words and figures" in markdown and "**LiRA**" in markdown and "Below 0.5" in markdown
    assert "Open, last run did not pass: rejected." in markdown
    assert "| this run's forget set | 40 | 69.0" in markdown
    assert "- Identifiers: IMG_00500.jpg, IMG_00501.jpg, IMG_00502.jpg\n" in markdown
    assert (
        "| request | received, UTC | status | forgetting (all examples of the run) | decided, UTC | due | reason |"
        in markdown
    )
    assert "| --- | --- | --- | --- | --- | --- | --- | ---: | ---: |" in markdown
    assert "at most 64 evenly spaced examples" in markdown
