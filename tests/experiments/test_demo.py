"""The demo: what it writes, and what it must show."""

import json

import pytest
import torch
from PIL import Image

from delfast.cli import main
from delfast.experiments.reports import selection_words
from delfast.mask import LayerRow, Mask


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out, threads = tmp_path_factory.mktemp("demo"), torch.get_num_threads()
    assert main(["demo", "--output-dir", str(out)]) == 0
    assert torch.get_num_threads() == threads  # it uses one, and puts back what was set
    return out, json.loads((out / "summary.json").read_text())


def test_del_forgets_the_wrong_labels(demo):
    methods = demo[1]["scenarios"]["mislabelled"]["methods"]
    original, oracle, unlearned = (methods[name] for name in ("original", "oracle", "del"))
    assert original["forget_acc"] > 99  # without memorised labels there is nothing to unlearn
    assert abs(unlearned["delta_forget"]) <= 0.2 * abs(original["delta_forget"])
    assert unlearned["test_acc"] >= oracle["test_acc"] - 3
    assert abs(unlearned["delta_mia"]) < abs(original["delta_mia"])


def test_the_summary_holds_what_it_promises(demo):
    _, summary = demo
    assert summary["backend"]["backend"] in ("native", "torch")
    assert set(summary["scenarios"]) == {"non-iid", "mislabelled"}
    for scenario in summary["scenarios"].values():
        assert scenario["forget"]["examples"] == 144
        assert {"budget", "selected", "total", "channels", "bytes"} <= scenario["mask"].keys()
        assert scenario["mask"]["budget"] == 0.3
        assert 0.29 < scenario["mask"]["selected"] / scenario["mask"]["total"] <= 0.3
        oracle = scenario["methods"]["oracle"]
        for values in scenario["methods"].values():
            assert all(0 <= values[name] <= 100 for name in ("forget_acc", "retain_acc", "test_acc", "mia"))
            assert values["delta_forget"] == oracle["forget_acc"] - values["forget_acc"]
            assert values["delta_mia"] == oracle["mia"] - values["mia"]
            assert values["delta_test"] == oracle["test_acc"] - values["test_acc"]
        assert set(scenario["methods"]["del"]["seconds"]) == {"localize", "prepare", "finetune"}
    json.dumps(summary, allow_nan=False)


def test_the_report_shows_the_same_figures(demo):
    out, summary = demo
    report = (out / "report.md").read_text()
    for name, scenario in summary["scenarios"].items():
        assert f"## {name}\n" in report
        for method, values in scenario["methods"].items():
            assert f"| {method} | {values['forget_acc']:.2f} | {values['retain_acc']:.2f} |" in report
        percent = {method: f"{values['forget_acc']:.1f} %" for method, values in scenario["methods"].items()}
        line = report.split("\n## ")[0].partition(f"- **{name}**")[2].partition("\n- ")[0]
        assert line.index(percent["original"]) < line.index(percent["del"]) and percent["oracle"] in line
        assert selection_words(Mask.load(out / name / "mask" / "mask.safetensors").table()) in report.replace(
            "\\_", "_"
        )
        for plot in ("accuracies.png", "selection.png"):
            assert f"({name}/{plot})" in report
            with Image.open(out / name / plot) as image:
                assert image.width > 1000 and len(image.convert("RGB").getcolors(2**24)) > 10  # not blank


def test_a_selection_in_words():
    def layer(name, channels, channel_count):
        return LayerRow(name, (channel_count, 3), 3 * channels, 3 * channel_count, channels, channel_count)

    rows = [
        layer("stem", 4, 4),
        layer("one", 8, 8),
        LayerRow("bias", (4,), 1, 4, 0, 0),
        layer("two", 2, 12),
        layer("head", 0, 2),
    ]
    assert selection_words(rows) == (
        "Of 4 layers, 2 are selected whole: stem, one. From the input on, 100 % of the channels of the first half of "
        "the layers are selected, and 14 % of the second half. So it is mainly the early layers that are selected. "
        "They have fewer parameters than the late ones, and the budget counts parameters: all of their channels take "
        "little of it. A layer that is selected whole is reset and trained again entirely."
    )
    late = selection_words([layer("stem", 1, 4), layer("head", 2, 2)])
    assert late.startswith("Of 2 layers, 1 is selected whole: head. ") and "mainly" not in late


def test_its_networks_kept_to_their_masks(demo):
    out, summary = demo
    for name, scenario in summary["scenarios"].items():
        before, after = str(out / name / "original"), str(out / name / "del")
        assert main(["verify", before, after, str(out / name / "del" / "mask.safetensors")]) == 0
        mask = Mask.load(out / name / "mask" / "mask.safetensors")
        assert mask.digest == scenario["mask"]["digest"]
        assert (out / name / "mask" / "mask.safetensors").stat().st_size == scenario["mask"]["bytes"]
