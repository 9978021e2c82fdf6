"""The report of a ledger: its answer, its evidence in words, and that it is one page that needs nothing else."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from delfast.cli import main
from delfast.errors import InputError
from delfast.experiments.reports.tables import markdown_text
from delfast.jobs import read_job
from delfast.ledger import Entry, Ledger
from delfast.ledger.report import HTML, MARKDOWN, make_report
from delfast.ledger.report.history import KEPT_IDS, read_history
from delfast.ledger.report.wording import interval, listed
from tests.ledger.histories import Writer, example, held, hexadecimal, model_of, names
from tests.ledger.pages import Page, changed, words

TODAY = date(2026, 3, 25)
NASTY = "<script>alert(1)</script> {{ 7 * 7 }} `*_|\x1b[31m\n\u202e& https://elsewhere.example"
ROOT = Path(__file__).parents[2]
SORT = ROOT / "delfast" / "experiments" / "reports" / "templates" / "sort.js"


@pytest.fixture(scope="module")
def reported() -> tuple[str, str, Page]:
    markdown, page = make_report(example(), held(), today=TODAY)
    return markdown, page, Page(page)


def undrawn(**options: Any) -> list[Entry]:
    """Return the example without audits: drawings take a tenth of a second each."""
    return [entry for entry in example(**options) if entry.event != "audited"]


def test_it_begins_with_the_answer_and_the_head(reported: Any) -> None:
    markdown, _, page = reported
    head = example()[-1].hash
    first = words(page.shown.split("Requests in time")[0])
    for sentence in (
        "6 forget requests: 4 carried out; 1 open, last run did not pass; 1 open, no run yet. Forgetting: trained "
        "without them in 4.",
        "Of the 11 figures of the 3 runs that passed: 3 held; 8 held, undecided.",
        "“held, undecided”: the interval includes the limit.",
        "Run 3 (request 4) did not pass: relearning ratio 2.70, limit 1.50. The model stayed as it was.",
        "Run 4 trained a new network from nothing, without the examples of requests 1 to 3, 5.",
        "Not carried out yet: request 6. The model in use was trained on these examples.",
        "Not carried out yet: request 4. The model in use was retrained without these examples.",
        "Overdue on 2026-03-25: request 4 (due 2026-03-20).",
        "This report is evidence, not a certificate.",
        "Change of test accuracy -2.00 points -1.70 points (run 4) -2.70 to -0.70 held, undecided",
        "Relearning ratio 1.50 1.38 (run 4) 1.08 to 1.68 held, undecided 2 held; 1 held, undecided; 1 did not hold",
        f"Head of the ledger, entry {len(example())}: {head}",
    ):
        assert sentence in first
    for sentence in ("6 forget requests: 4 carried out; 1 open", "evidence, not a certificate", head):
        assert sentence in markdown.split("## Requests in time")[0]


def test_a_figure_whose_interval_includes_its_limit_is_not_called_safe(reported: Any) -> None:
    _, _, page = reported
    shown = words(page.shown)
    assert "Attack advantage 0.030 0.000 to 0.125 (90 %) 0.100 0.400 held, undecided" in shown
    assert "Relearning ratio 1.10 0.80 to 1.40 1.50 4.00 held" in shown
    assert "thresholds held" not in shown, "no headline that the table contradicts"


def test_every_request_has_its_facts_its_evidence_and_its_commands(reported: Any) -> None:
    markdown, _, page = reported
    head = example()[-1].hash
    parts = re.split(r"Request \d: ", words(page.shown))[1:]
    assert len(parts) == 6 and {f"request-{number}" for number in range(1, 7)} <= set(page.ids)
    second, fourth, fifth, sixth = (parts[number - 1] for number in (2, 4, 5, 6))
    for text in (
        "Run 2: passed on 2026-03-01 19:43 UTC",
        "Carried out on 2026-03-01 by run 2: the method del changed the model to forget 40 examples, in 29.9 % of its",
        "Together with request 3",
        "Examples to forget 40, and 4,420 to keep",
        "method del, budget 0.3, epochs 10, learning rate 0.015",
        f"{model_of(1)}, SHA-256 {hexadecimal(model_of(1))}",
        f"{model_of(2)}, SHA-256 {hexadecimal(model_of(2))}",
        "Accuracy before forget set 71.0 %, retain set 97.4 %, test set 84.1 %, reference models that never saw the "
        "forget set 65.0 % of it",
        "Accuracy after forget set 67.0 %, retain set 96.8 %, test set 83.3 %, reference models that never saw",
        "this run's forget set, before the run 40 71.0",
        "210,000 of 701,466 elements (29.9 %), chosen by the examples of this run's requests",
        hexadecimal("runs/0002/1/mask.safetensors"),
        "changed outside the mask and the last layer: compare with runs/0002/1/allowed.safetensors",
        "209,871 elements changed, 0 outside the mask and the last layer",
        "Trained further on retained examples alone: ratio 1.10 [0.80, 1.40].",
        "Trained further on retained examples and 10 % of the forget set (4 examples): ratio 1.10",
        "107.4 (audit before 12.0, localized 2.4, unlearned 61.7, verified 0.3, audited 31.0)",
        "Accuracy on the test set is 1.10 points below that of the ledger's first model.",
        "forget set of run 1",
        "Relearning on forget 1 % was not measured",
        f"delfast ledger verify . --head {head}",
        f"delfast verify {model_of(1)} {model_of(2)} runs/0002/1/allowed.safetensors",
    ):
        assert text in second, text
    assert "open, last run did not pass" in fourth and "did not hold" in fourth and "a larger budget" in fourth
    assert model_of(3) in fourth
    # an escalated run: both attempts are told apart
    assert (
        "Tried before method del, budget 0.3, epochs 10, learning rate 0.015: relearning ratio 2.20, limit 1.50"
        in fifth
    )
    assert "Settings method retrain, epochs 30, learning rate 0.1, weight decay 0.0" in fifth and "Mask" not in fifth
    assert "200.4 (audit before 12.0, attempts before 95.4, unlearned 61.7, verified 0.3, audited 31.0)" in fifth
    assert (
        "209,871 elements changed; no mask" in fifth
        and "Changes outside the mask and the last layer does not apply" in fifth
    )
    assert "Not carried out yet: no run has taken up this request." in sixth
    # the model before run 1 was purged, so it can no longer be compared
    assert "delfast verify models/0000" not in page.shown
    assert "What still holds this request (3)" in fifth and "What still holds this request (1)" in second
    assert (
        "### Request 4: open, last run did not pass" in markdown
        and "What failed, and what may help: a larger budget" in markdown
    )
    assert f"```sh\ndelfast ledger verify . --head {head}\ndelfast verify {model_of(1)}" in markdown


def test_files_that_still_hold_a_request_and_those_deleted(reported: Any) -> None:
    markdown, _, page = reported
    part = words(page.shown.split("What still holds requested examples")[1])
    assert "references/0001.safetensors 1 to 6 reference model 1, trained on some of them" in part
    assert "Files that were deleted (1)" in part and "models/0000.safetensors" in part
    assert "| references/0001.safetensors | 1 to 6 | reference model 1, trained on some of them |" in markdown


def test_a_run_that_failed_and_one_that_was_abandoned() -> None:
    write = Writer()
    write.create()
    write.receive(1, ["1"])
    write.start(1, [1], count=1)
    write.resume(1)
    write.fail(1, "the loss is not finite")
    write.receive(2, ["2"])
    write.start(2, [1, 2], count=2)
    write("rejected", {"attempts": [], "checks": [], "advice": ["it was abandoned"]}, 2)
    _, text = make_report(write.entries, [], today=TODAY)
    shown = words(Page(text).shown)
    assert "The method failed: the loss is not finite." in shown and "stopped and continued" in shown
    assert "Run 2 (requests 1, 2) did not pass: it was stopped and then abandoned." in shown
    assert "it runs, or it was stopped" not in shown


def test_figure_of_an_attack_on_a_part_of_the_set_is_not_drawn() -> None:
    def change(event: str, payload: dict[str, Any]) -> None:
        if event == "audited":
            sets = payload["figures"]["sets"]
            sets["forget"].update(attack_advantage={"value": 0.9, "low": 0.8, "high": 1.0}, attack_left_out=20)

    run = read_history(changed(example(), change)).runs[2]
    assert run.largest_attack is not None and run.largest_attack["value"] == 0.03, "that of the earlier set"


def test_the_page_needs_nothing_else(reported: Any) -> None:
    _, text, page = reported
    assert page.scripts == [SORT.read_text(encoding="utf-8").strip()]
    assert "http://" not in text and "https://" not in text and "@import" not in text and "src=" not in text
    assert all(link.startswith(("#", "data:,")) for link in page.links)
    assert {link.removeprefix("#") for link in page.links if link.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))  # the drawings' too
    assert text.count("<svg") == 4 + 2 * 4  # along the ledger, and two curves of each run


def test_free_text_is_shown_as_it_is() -> None:
    markdown, text = make_report(undrawn(reason=NASTY), held(), today=TODAY)
    page = Page(text)
    assert page.scripts == [SORT.read_text(encoding="utf-8").strip()]
    plain = r"<script>alert(1)</script> {{ 7 * 7 }} `*_|\x1b[31m\n\u202e& https://elsewhere.example"
    assert page.shown.count(plain) == 2  # in the timeline and in the request
    assert "<script>alert" not in text and "<script" not in markdown and "\x1b" not in markdown + text
    assert markdown.count(markdown_text(NASTY)) >= 1 and "](" not in markdown


def test_hashed_identifiers_are_not_shown() -> None:
    markdown, text = make_report(undrawn(hash_ids=True), held(), today=TODAY)
    for name in names(0, 40):
        assert hexadecimal("key" + name) not in text + markdown
    assert "hmac-sha256:" not in text + markdown and "The identifiers are stored as keyed hashes" in text
    _, plain = make_report(undrawn(), held(), today=TODAY)
    assert "IMG_00019.jpg and 20 more" in words(Page(plain).shown) and "IMG_00020" not in plain


def test_an_empty_ledger() -> None:
    write = Writer()
    write.create()
    markdown, text = make_report(write.entries, [], today=TODAY)
    assert "No request has been received." in Page(text).shown and "No request has been received." in markdown
    assert write.entries[-1].hash in text and "<svg" not in text


def test_a_run_without_a_verdict_is_running() -> None:
    entries = [entry for entry in undrawn() if not (entry.run == 4 and entry.event == "accepted")]
    markdown, text = make_report(entries, held(), today=TODAY)
    assert "3 carried out; 1 open, last run did not pass; 1 open, run without a result; 1 open, no run yet." in markdown
    assert "The run has no result yet" in text


def test_figures_that_the_model_before_a_run_held_too_are_said_to_show_nothing() -> None:
    def change(event: str, payload: dict[str, Any]) -> None:
        if event == "accepted":
            payload["checks"][-1].update(before=1.0)

    said = "Held, but shows nothing (the model before the run was within the limit too, so nothing is seen of"
    assert said not in words(Page(make_report(undrawn(), held(), today=TODAY)[1]).shown)
    _, text = make_report(changed(undrawn(), change), held(), today=TODAY)
    shown = words(Page(text).shown)
    assert f"{said} forgetting): relearning ratio." in shown
    assert "1.50 1.00 held, shows nothing" in shown and "; 3 held, shows nothing" in shown


def test_figures_that_a_run_accepted_unmeasured_are_not_called_held() -> None:
    def change(event: str, payload: dict[str, Any]) -> None:
        if event == "accepted":
            payload["checks"][-1].update(value=None, held=True, low=None, high=None)

    _, text = make_report(changed(undrawn(), change), held(), today=TODAY)
    shown = words(Page(text).shown)
    assert "Of the 11 figures of the 3 runs that passed:" in shown and "; 3 not measured" in shown
    assert "Relearning ratio: not measured. By --accept-unmeasured it does not count against the run." in shown
    assert "Relearning ratio 1.50 3 not measured; 1 did not hold" in shown


def test_figures_that_were_not_measured_are_named() -> None:
    def change(event: str, payload: dict[str, Any]) -> None:
        if event == "audited":
            found = payload["figures"]
            found.update(classes=None, relearning={}, relearn_ratio=None)
            for values in found["sets"].values():
                values.update(accuracy=None, attack_advantage=None, lira=None, kl=None)
                values["loss"].update(low=None, high=None)
        if event in ("accepted", "rejected"):
            for check in payload["checks"]:
                if check["name"] in ("attack_advantage", "relearn_ratio"):
                    check.update(value=None, held=False, low=None, high=None)

    _, text = make_report(changed(example(), change), held(), today=TODAY)
    shown = words(Page(text).shown)
    for sentence in (
        "Relearning ratio 1.50 4.00 not measured",
        "The attack was not measured",
        "No reference models: the attack on each example (LiRA) was not made.",
        "Relearning was not compared with networks that never saw the examples.",
        "[no interval]",
    ):
        assert sentence in shown
    assert "Accuracy of each class" not in shown


def test_a_method_without_a_mask_has_no_comparison_by_mask() -> None:
    entries = [entry for entry in undrawn() if entry.event not in ("localized", "unlearned", "verified")]
    _, text = make_report(entries, held(), today=TODAY)
    assert "delfast verify" not in text and "Compared bit by bit" not in text


def test_many_requests_keep_a_bounded_page() -> None:
    write = Writer()
    write.create()
    for number in range(1, KEPT_IDS + 31):
        write.receive(number, [f"id-{number}"])
    history = read_history(write.entries)
    assert history.requests[30].ids == () and history.requests[31].ids == ["id-31"]
    _, text = make_report(write.entries, [], today=TODAY)
    assert f"The newest {KEPT_IDS} requests. For the 30 before them" in text
    assert 'id="request-30"' not in text and 'id="request-31"' in text and 'href="#request-30"' not in text


def test_numbers_and_intervals_in_words() -> None:
    assert listed([1, 2, 3, 5, 6, 9]) == "1 to 3, 5, 6, 9"
    assert interval({"value": 1.25, "low": 0.5, "high": 2.0}, 1) == "1.2 [0.5, 2.0]"
    assert interval({"value": 1.0, "low": None, "high": None}, 2) == "1.00 [no interval]" and interval(None, 2) == ""


JOB = """
import torch

def model():
    return torch.nn.Linear(4, 2)

def train_set():
    return torch.utils.data.TensorDataset(torch.eye(4), torch.tensor([0, 1, 0, 1]))

test_set = train_set
"""


def test_the_command_writes_the_report_of_a_ledger_that_holds(tmp_path: Path, capsys: Any) -> None:
    path, model, out = tmp_path / "job.py", tmp_path / "model.safetensors", tmp_path / "out"
    path.write_text(JOB, encoding="utf-8")
    torch.manual_seed(0)
    job = read_job(path)
    job.save(job.model(), model)
    with Ledger.create(tmp_path / "ledger", job=path, model=model) as ledger:
        ledger.add(["1", "2"], reason=NASTY)
        head = ledger.head
    assert main(["ledger", "report", str(tmp_path / "ledger"), "--output-dir", str(out)]) == 0
    assert capsys.readouterr().out == f"see {out / HTML}\nhead: {head}\n"
    assert head in (out / HTML).read_text(encoding="utf-8") and head in (out / MARKDOWN).read_text(encoding="utf-8")
    assert "1 forget request: 0 carried out; 1 open, no run yet." in (out / MARKDOWN).read_text(encoding="utf-8")
    with Ledger.open(tmp_path / "ledger") as ledger:
        ledger.store._connection.execute("DROP TRIGGER entries_stay")
        ledger.store._connection.execute("UPDATE entries SET time = '2020' WHERE number = 2")
        with pytest.raises(InputError, match="expected a ledger that holds"):
            ledger.report(tmp_path / "other")
    assert not (tmp_path / "other").exists()
