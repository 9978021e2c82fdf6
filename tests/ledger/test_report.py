"""The report of a ledger: its answer, its evidence in words, and that it is one page that needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
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

NASTY = "<script>alert(1)</script> {{ 7 * 7 }} `*_|\x1b[31m\n\u202e& https://elsewhere.example"
ROOT = Path(__file__).parents[2]
SORT = ROOT / "delfast" / "experiments" / "reports" / "templates" / "sort.js"


class Page(HTMLParser):
    """The text, links, scripts and ids of a page, whose tags must be closed in order."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.shown, self.links, self.scripts, self.ids, self.tables = "", [], [], [], 0
        self.open_tags: list[str] = []
        self.feed(text)
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        assert tag not in ("iframe", "object", "embed", "form")
        for name, value in attributes:
            assert not name.startswith("on")  # scripts in attributes
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)
        self.tables += tag == "table"
        if tag not in self.VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag
        self.shown += " " if tag in ("dt", "dd", "th", "td", "li", "p", "code") else ""

    def handle_data(self, data: str) -> None:
        if self.open_tags[-1:] == ["script"]:
            self.scripts.append(data.strip())
        elif self.open_tags[-1:] != ["style"]:
            self.shown += data


@pytest.fixture(scope="module")
def reported() -> tuple[str, str, Page]:
    markdown, page = make_report(example(), held())
    return markdown, page, Page(page)


def words(text: str) -> str:
    """Return text with single spaces."""
    return re.sub(r"\s+", " ", text)


def undrawn(**options: Any) -> list[Entry]:
    """Return the example without audits: drawings take a tenth of a second each."""
    return [entry for entry in example(**options) if entry.event != "audited"]


def test_it_begins_with_the_answer_and_the_head(reported: Any) -> None:
    markdown, _, page = reported
    head = example()[-1].hash
    first = words(page.shown.split("Requests in time")[0])
    for sentence in (
        "6 forget requests: 4 accepted, 1 rejected, 1 pending.",
        "In the 3 accepted runs, all thresholds held.",
        "Run 3 (request 4) was rejected: relearning ratio 2.70, limit 1.50. The model from before it was kept.",
        "Not carried out: request 6. The model in use was trained on these examples.",
        "Not carried out: request 4. The model in use was retrained without these examples.",
        "Worst figure of an accepted run: fall of test accuracy 1.70 points, limit 2.00 points, in run 4.",
        "This report is evidence, not a certificate.",
        "Relearning ratio 1.50 3 of 4 runs 1.38 (run 4)",
        f"Head of the ledger, entry {len(example())}: {head}",
    ):
        assert sentence in first
    for sentence in ("6 forget requests: 4 accepted, 1 rejected, 1 pending.", "evidence, not a certificate", head):
        assert sentence in markdown.split("## Requests in time")[0]


def test_a_figure_whose_interval_passes_its_limit_is_not_called_safe(reported: Any) -> None:
    _, _, page = reported
    shown = words(page.shown)
    # of three accepted runs, those of three attacks, one ratio and two drops of accuracy
    assert "For 6 of the 12 figures of these runs, the 95 % interval reaches above the limit" in shown
    assert "Limit 0.100: held. 95 % interval 0.000 to 0.125, which reaches above the limit." in shown
    assert "Limit 1.50: held. 95 % interval 0.80 to 1.40." in shown


def test_every_request_has_its_facts_its_evidence_and_its_commands(reported: Any) -> None:
    markdown, _, page = reported
    head = example()[-1].hash
    parts = re.split(r"Request \d: ", words(page.shown))[1:]
    assert len(parts) == 6 and {f"request-{number}" for number in range(1, 7)} <= set(page.ids)
    second, fourth, fifth, sixth = (parts[number - 1] for number in (2, 4, 5, 6))
    for text in (
        "Run 2: accepted on 2026-03-01 19:43 UTC",
        "Together with request 3",
        "Examples to forget 40, and 4,420 to keep",
        "method del, budget 0.3, epochs 10, lr 0.015",
        f"{model_of(1)}, SHA-256 {hexadecimal(model_of(1))}",
        f"{model_of(2)}, SHA-256 {hexadecimal(model_of(2))}",
        "Accuracy before forget set 100.0 %, retain set 98.2 %, test set 84.3 %",
        "210,000 of 701,466 elements (29.9 %), localized on the examples of this run's requests",
        hexadecimal("runs/0002/1/mask.safetensors"),
        "209,871 elements changed, 0 outside the mask and the head",
        "Finetuned on retained examples alone: ratio 1.10 [0.80, 1.40].",
        "Finetuned on retained examples and 10 % of the forget set (4 examples): ratio 1.10",
        "107.4 (baseline 12.0, localized 2.4, unlearned 61.7, verified 0.3, audited 31.0)",
        "Accuracy on the test set is 1.10 points below that of the ledger's first model. Limit 2.00 points: held.",
        "earlier: run 1",
        "There is no oracle, a network retrained without the forget set, to compare with (KL).",
        "Relearning on forget 1 % was not measured",
        f"delfast ledger verify . --head {head}",
        f"delfast verify {model_of(1)} {model_of(2)} runs/0002/1/allowed.safetensors",
    ):
        assert text in second, text
    assert "rejected" in fourth and "did not hold" in fourth and "a larger budget" in fourth
    assert model_of(3) in fourth
    # an escalated run: both attempts are told apart
    assert "Tried before method del, budget 0.3, epochs 10, lr 0.015: relearning ratio 2.20, limit 1.50" in fifth
    assert "Settings method retrain, epochs 30, lr 0.1, weight_decay 0.0" in fifth and "Mask" not in fifth
    assert "184.0 (baseline 12.0, unlearned 61.7, verified 0.3, audited 31.0)" not in fifth
    assert "200.4 (baseline 12.0, unlearned 61.7, verified 0.3, audited 31.0)" in fifth
    assert "No run has taken this request" in sixth
    # the model before run 1 was purged, so it can no longer be compared
    assert "delfast verify models/0000" not in page.shown
    assert "What still holds this request (3)" in fifth and "What still holds this request (1)" in second
    assert "### Request 4: rejected" in markdown and "What failed, and what may help: a larger budget" in markdown
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
    _, text = make_report(write.entries, [])
    shown = words(Page(text).shown)
    assert "The method failed: the loss is not finite." in shown and "stopped and continued" in shown
    assert "Run 2 (requests 1, 2) was rejected: it was stopped and then abandoned." in shown
    assert "it runs, or it was stopped" not in shown


def test_figure_of_an_attack_on_a_part_of_the_set_is_not_drawn() -> None:
    def change(event: str, payload: dict[str, Any]) -> None:
        if event == "audited":
            sets = payload["figures"]["sets"]
            sets["forget"].update(attack_advantage={"value": 0.9, "low": 0.8, "high": 1.0}, attack_left_out=20)

    run = read_history(without(example(), change)).runs[2]
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
    markdown, text = make_report(undrawn(reason=NASTY), held())
    page = Page(text)
    assert page.scripts == [SORT.read_text(encoding="utf-8").strip()]
    plain = r"<script>alert(1)</script> {{ 7 * 7 }} `*_|\x1b[31m\n\u202e& https://elsewhere.example"
    assert page.shown.count(plain) == 2  # in the timeline and in the request
    assert "<script>alert" not in text and "<script" not in markdown and "\x1b" not in markdown + text
    assert markdown.count(markdown_text(NASTY)) >= 1 and "](" not in markdown


def test_hashed_identifiers_are_not_shown() -> None:
    markdown, text = make_report(undrawn(hash_ids=True), held())
    for name in names(0, 40):
        assert hexadecimal("key" + name) not in text + markdown
    assert "hmac-sha256:" not in text + markdown and "The identifiers are stored as keyed hashes" in text
    _, plain = make_report(undrawn(), held())
    assert "IMG_00019.jpg and 20 more" in words(Page(plain).shown) and "IMG_00020" not in plain


def test_an_empty_ledger() -> None:
    write = Writer()
    write.create()
    markdown, text = make_report(write.entries, [])
    assert "No request has been received." in Page(text).shown and "No request has been received." in markdown
    assert write.entries[-1].hash in text and "<svg" not in text


def test_a_run_without_a_verdict_is_running() -> None:
    entries = [entry for entry in undrawn() if not (entry.run == 4 and entry.event == "accepted")]
    markdown, text = make_report(entries, held())
    assert "6 forget requests: 3 accepted, 1 rejected, 1 running, 1 pending." in markdown
    assert "The run has no result yet" in text


def without(entries: Sequence[Entry], change: Any) -> list[Entry]:
    """Return entries with changed payloads; the chain of hashes does not hold then, and is not read."""
    writer = Writer()
    for entry in entries:
        payload = entry.payload
        change(entry.event, payload)
        writer(entry.event, payload, entry.run)
    return writer.entries


def test_figures_that_the_model_before_a_run_held_too_are_said_to_show_nothing() -> None:
    def change(event: str, payload: dict[str, Any]) -> None:
        if event == "accepted":
            payload["checks"][3].update(before=1.0)

    said = "this figure does not show that anything was forgotten"
    assert said not in words(Page(make_report(undrawn(), held())[1]).shown)
    _, text = make_report(without(undrawn(), change), held())
    shown = words(Page(text).shown)
    assert f"Before the run: 1.00. The model before the run held it too: {said}." in shown
    assert "For 3 of the 12 figures, the model before the run was within the limit too" in shown


def test_figures_that_a_run_accepted_unmeasured_are_not_called_held() -> None:
    def change(event: str, payload: dict[str, Any]) -> None:
        if event == "accepted":
            payload["checks"][3].update(value=None, held=True, low=None, high=None)

    _, text = make_report(without(undrawn(), change), held())
    shown = words(Page(text).shown)
    assert "In the 3 accepted runs, all thresholds held that were measured; 3 of 12 figures were not." in shown
    assert "Relearning ratio: not measured. The run accepts this by --accept-unmeasured." in shown
    assert "Relearning ratio 1.50 0 of 4 runs" in shown


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

    _, text = make_report(without(example(), change), held())
    shown = words(Page(text).shown)
    for sentence in (
        "Relearning ratio: not measured. Limit 1.50: did not hold.",
        "The attack was not measured",
        "No reference models: the per-example attack (LiRA) was not made.",
        "Relearning was not compared with networks that never saw the examples.",
        "[no interval]",
    ):
        assert sentence in shown
    assert "Accuracy of each class" not in shown


def test_a_method_without_a_mask_has_no_comparison_by_mask() -> None:
    entries = [entry for entry in undrawn() if entry.event not in ("localized", "unlearned", "verified")]
    _, text = make_report(entries, held())
    assert "delfast verify" not in text and "Compared bit by bit" not in text


def test_many_requests_keep_a_bounded_page() -> None:
    write = Writer()
    write.create()
    for number in range(1, KEPT_IDS + 31):
        write.receive(number, [f"id-{number}"])
    history = read_history(write.entries)
    assert history.requests[30].ids == () and history.requests[31].ids == ["id-31"]
    _, text = make_report(write.entries, [])
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
    assert "1 forget request: 0 accepted, 0 rejected, 1 pending." in (out / MARKDOWN).read_text(encoding="utf-8")
    with Ledger.open(tmp_path / "ledger") as ledger:
        ledger.store._connection.execute("DROP TRIGGER entries_stay")
        ledger.store._connection.execute("UPDATE entries SET time = '2020' WHERE number = 2")
        with pytest.raises(InputError, match="expected a ledger that holds"):
            ledger.report(tmp_path / "other")
    assert not (tmp_path / "other").exists()
