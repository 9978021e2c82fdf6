"""Every example runs, is short, forgets the wrong labels, and changes nothing outside the mask."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests import ROOT, cases

EXAMPLES = ROOT / "examples"
NEEDS = {
    "plain_pytorch": "sklearn",
    "mislabelled": "sklearn",
    "torchrun_fsdp2": "sklearn",
    "lightning_job": "lightning",
    "hf_trainer": "transformers",
    "accelerate_job": "accelerate",
}
COLUMNS = ("perplexity", "forget_loss", "exposure")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize("name", NEEDS)
def test_example(name):
    pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed: pip install -r requirements-dev.txt")
    path = EXAMPLES / f"{name}.py"
    source = path.read_text()
    assert len(source.splitlines()) < 60 and "Callback" not in source
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *(TORCHRUN if name.startswith("torchrun") else []), path],
        **{"capture_output": True, "text": True, "env": environment, "timeout": cases.PATIENCE},
    )
    assert result.returncode == 0, result.stderr
    kept = (EXAMPLES / f"output/{name}.txt").read_text()  # what docs/examples shows; the figures differ by machine
    lines = result.stdout.splitlines()[-len(kept.splitlines()) :]
    assert without_figures("\n".join(lines)) == without_figures(kept)
    *_, before, after, changed = lines
    assert changed == "changed outside the mask: 0"
    remembered = [int(line.split()[1]) for line in (before, after)]
    assert remembered[0] >= 30 and remembered[1] <= 10


def without_figures(text):
    return re.sub(r"[\d.]+", "N", " ".join(text.split()))


def causal_lm(folder, name, launch=()):
    """Run the example from the kept original, which a first run keeps; return the lines it prints, and its numbers."""
    result = subprocess.run(
        [
            *(sys.executable, *launch, EXAMPLES / "causal_lm.py", "--fast"),
            *("--original", folder / "original.pt", "--json", folder / name),
        ],
        **{"capture_output": True, "text": True, "timeout": cases.PATIENCE},
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines(), json.loads((folder / name).read_text())


def test_the_language_model_example(tmp_path):
    """The original has memorised the passages, the oracle has not; unlearning changes the mask alone.

    Two processes with FSDP2 find the mask of one, and the same numbers apart from the rounding of sums.
    """
    pytest.importorskip("transformers", reason="transformers is missing: pip install -r requirements-dev.txt")
    lines, result = causal_lm(tmp_path, "one.json")
    heading, *rows, mask, changed = lines
    kept = (EXAMPLES / "output/causal_lm.txt").read_text()
    assert without_figures("\n".join([heading, *rows])) == without_figures(kept)
    models = result["models"]
    assert mask == f"mask: {result['mask']['digest']}" and changed == "changed outside the mask: 0"
    assert [row.split()[0] for row in rows] == list(models)
    original, unlearned, oracle = (models[name] for name in ("original", "unlearned", "oracle"))
    assert original["exposure"] > 5 and oracle["exposure"] < 3 and original["exposure"] >= unlearned["exposure"]
    assert original["forget_loss"] < unlearned["forget_loss"] < oracle["forget_loss"]

    sharded_lines, sharded = causal_lm(tmp_path, "two.json", TORCHRUN)
    assert sharded_lines[-2:] == [mask, changed] and sharded["mask"] == result["mask"]
    for name, row in models.items():
        assert sharded["models"][name]["perplexity"] == pytest.approx(row["perplexity"], rel=1e-2)
        assert sharded["models"][name]["forget_loss"] == pytest.approx(row["forget_loss"], rel=1e-2)


def test_the_kept_table_of_the_language_model_is_that_of_the_kept_result():
    table = (EXAMPLES / "output/causal_lm.txt").read_text().splitlines()[1:]
    models = json.loads((ROOT / "benchmarks/results/causal_lm.json").read_text())["models"]
    rows = [[name, *(f"{row[key]:.2f}" for key in COLUMNS)] for name, row in models.items()]
    assert [line.split() for line in table] == rows


def test_every_example_is_tested_and_has_a_page():
    names = {*NEEDS, "causal_lm"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*names, "common"}
    assert {path.stem for path in (ROOT / "docs/examples").glob("*.md")} == {*names, "index"}
    assert {path.stem for path in (EXAMPLES / "output").iterdir()} == names
