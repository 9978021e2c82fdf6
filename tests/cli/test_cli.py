"""The command line: the whole way through run directories, exit codes, bad input."""

import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product

import pytest
import torch
from PIL import Image
from torch import nn

from delfast import backend
from delfast.cli import console, doctor, main
from delfast.errors import InputError
from delfast.experiments import progress, verification
from delfast.experiments.verification import compare
from delfast.files import load_state
from delfast.mask import Mask
from delfast.ops import BACKEND
from delfast.provenance import digest_state
from tests import cases

TRAIN = ["train", "--epochs", "2", "--lr", "0.05", "--batch-size", "128"]
UNLEARN = ["unlearn", "--epochs", "2", "--lr", "0.015"]


def run(*arguments, expect=0):
    """Run a command in this process; its exit code must be the expected one."""
    code = main([str(argument) for argument in arguments])
    assert code == expect
    return code


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of a network this small wait for one another more than they work, the more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A trained network, its oracle, a mask and the unlearned network, each by its command."""
    root = tmp_path_factory.mktemp("runs")
    run(*TRAIN, "--forget", "mislabelled", "--output-dir", root / "run")
    run("oracle", root / "run", "--output-dir", root / "oracle")
    run("localize", root / "run", "--output-dir", root / "mask")
    run(*UNLEARN, root / "run", "--mask", root / "mask" / "mask.safetensors", "--output-dir", root / "del")
    return root


# --- the way through ------------------------------------------------------------------------------


def test_train_writes_a_run_directory_with_its_provenance(workspace):
    summary = read(workspace / "run" / "summary.json")
    assert summary["config"]["model"] == "resnet18-thin" and summary["config"]["epochs"] == 2
    assert summary["forget"]["examples"] == 144 and summary["seconds"]["train"] > 0
    assert summary["digests"]["model"] == digest_state(load_state(workspace / "run" / "model.safetensors"))
    assert summary["digests"]["forget"] == read(workspace / "run" / "forget.json")["digest"]
    assert {"torch", "python", "delfast", "backend"} <= summary["provenance"].keys()
    assert 0 <= summary["metrics"]["forget_acc"] <= 100 and len(summary["losses"]) == 2


def test_unlearn_with_frozen_batchnorm_early_stopping_and_bf16(workspace, tmp_path, capsys):
    given = ["--mask", workspace / "mask" / "mask.safetensors", "--precision", "bf16", "--channels-last", "off"]
    given += ["--batchnorm", "frozen", "--patience", 1, "--held-out", 0.2]
    run(*UNLEARN, workspace / "run", *given, "--output-dir", tmp_path / "del")
    summary, trained_on = read(tmp_path / "del" / "summary.json"), read(workspace / "run" / "summary.json")
    assert summary["config"] == {**trained_on["config"], "precision": "bf16", "channels_last": False}
    assert summary["options"]["held_out"] == 0.2 and len(summary["validation"]) == len(summary["losses"])
    before, after = (load_state(path / "model.safetensors") for path in (workspace / "run", tmp_path / "del"))
    statistics = [name for name in before if "running" in name]
    assert statistics and all(torch.equal(before[name], after[name]) for name in statistics)
    run("verify", workspace / "run", tmp_path / "del", tmp_path / "del" / "mask.safetensors")
    for bad, message in (
        (["--patience", 1, "--held-out", 1.0], "held_out to leave examples on both sides"),
        (["--batchnorm", "off"], "batchnorm to be one of train, frozen"),
        (["--channels-last", "maybe"], "--channels-last to be auto, on or off"),
        (["--precision", "fp8"], "precision to be one of fp32, bf16"),
    ):
        run(*UNLEARN, workspace / "run", *given[:2], *bad, "--output-dir", tmp_path / "bad", expect=2)
        assert message in capsys.readouterr().err and not (tmp_path / "bad").exists()


@pytest.mark.slow  # half a minute of compiling; tests/compaction/test_gradients.py compiles a small network
def test_unlearn_compiled_gives_the_same_except_for_rounding(workspace, tmp_path):
    given = ["--mask", workspace / "mask" / "mask.safetensors", "--compile"]
    run(*UNLEARN, workspace / "run", *given, "--output-dir", tmp_path / "del")
    plain, compiled = (load_state(path / "model.safetensors") for path in (workspace / "del", tmp_path / "del"))
    assert plain.keys() == compiled.keys()
    ours, theirs = (torch.cat([value.double().flatten() for value in state.values()]) for state in (compiled, plain))
    assert (ours - theirs).norm() < 0.05 * theirs.norm()  # what a difference of 1e-6 grows to in two epochs


def test_the_oracle_begins_elsewhere_and_sees_no_forget_set(workspace):
    original, oracle = (read(workspace / name / "summary.json") for name in ("run", "oracle"))
    assert (original["options"]["seed"], oracle["options"]["seed"]) == (0, 1)
    assert oracle["digests"]["forget"] == original["digests"]["forget"]
    assert oracle["digests"]["model"] != original["digests"]["model"]


def test_the_same_seed_gives_the_same_weights_and_mask(workspace, tmp_path):
    run(*TRAIN, "--forget", "mislabelled", "--output-dir", tmp_path / "run")
    run("localize", tmp_path / "run", "--output-dir", tmp_path / "mask")
    for name in ("run", "mask"):
        again, before = (read(root / name / "summary.json")["digests"] for root in (tmp_path, workspace))
        assert again == before
    run(*TRAIN, "--forget", "mislabelled", "--seed", 1, "--output-dir", tmp_path / "other")
    other = read(tmp_path / "other" / "summary.json")["digests"]
    assert other["model"] != before["model"] and other["forget"] != before["forget"]


def test_localize_keeps_to_its_budget_and_options(workspace, tmp_path):
    mask = Mask.load(workspace / "mask" / "mask.safetensors")
    assert 0.29 < mask.fraction <= 0.3 and mask.total == 701_178
    described = read(workspace / "mask" / "summary.json")["mask"]
    assert [described[name] for name in ("selected", "channels", "digest")] == [
        mask.selected,
        mask.channels,
        mask.digest,
    ]
    assert described["bytes"] == (workspace / "mask" / "mask.safetensors").stat().st_size
    assert mask.metadata["digests"] == {
        name: read(workspace / "run" / "summary.json")["digests"][name] for name in ("model", "data", "forget")
    }
    run("localize", workspace / "run", "--budget", 0.1, "--granularity", "param", "--output-dir", tmp_path / "param")
    narrow = Mask.load(tmp_path / "param" / "mask.safetensors")
    assert narrow.selected == int(0.1 * narrow.total) and narrow.metadata["examples"] == 144
    options = ["--budget", 0.1, "--strategy", "weighted-grad-all"]
    run("localize", workspace / "run", *options, "--output-dir", tmp_path / "all")
    metadata = Mask.load(tmp_path / "all" / "mask.safetensors").metadata
    assert (metadata["strategy"], metadata["examples"]) == ("weighted-grad-all", 1437)
    assert read(tmp_path / "all" / "summary.json")["options"]["strategy"] == "weighted-grad-all"
    patterns = ["--include", "layer*", "--include", "fc.*", "--exclude", "*.bias"]
    run("localize", workspace / "run", *patterns, "--output-dir", tmp_path / "named")
    mask = Mask.load(tmp_path / "named" / "mask.safetensors")
    assert "fc.weight" in mask and "fc.bias" not in mask and "conv1.weight" not in mask
    assert mask.metadata["include"] == ["layer*", "fc.*"] and mask.metadata["exclude"] == ["*.bias"]
    run("localize", workspace / "run", "--budget", 0.1, "--criterion", "critmem", "--output-dir", tmp_path / "critmem")
    critical = Mask.load(tmp_path / "critmem" / "mask.safetensors")
    assert critical.metadata["criterion"] == "critmem" and 0 < critical.fraction <= 0.1
    options = ["--per-example", "--criterion", "squared_grad", "--stop-when-stable", 0.5]
    run("localize", workspace / "run", *options, "--output-dir", tmp_path / "early")
    early = Mask.load(tmp_path / "early" / "mask.safetensors").metadata
    assert (early["criterion"], early["per_example"], early["examples_available"]) == ("squared_grad", True, 144)
    assert early["examples"] == 144 and early["overlap"] >= 0.5  # 128, then all


def test_unlearn_changes_the_mask_and_the_head_alone(workspace, capsys):
    before, after = workspace / "run", workspace / "del"
    run("verify", before, after, after / "mask.safetensors")
    assert "kept to the mask" in capsys.readouterr().out
    run("verify", before, after, workspace / "mask" / "mask.safetensors", "--head", "fc")


def test_verify_reports_what_changed_outside(workspace, tmp_path, capsys):
    dense = Mask.load(workspace / "del" / "mask.safetensors").to_dense()
    dense["layer1.0.conv1.weight"][3] = False  # this channel was trained, so it is now outside
    torch.save(dense, tmp_path / "dense.pt")
    arguments = [workspace / "run", workspace / "del", tmp_path / "dense.pt", "--output-dir", tmp_path]
    run("verify", *arguments, expect=1)
    assert "NOT kept to the mask" in capsys.readouterr().out
    summary = read(tmp_path / "summary.json")
    outside = {row["name"]: row["outside"] for row in summary["parameters"] if row["outside"]}
    assert outside == {"layer1.0.conv1.weight": 16 * 9} and summary["outside"] == 16 * 9
    assert any(row["name"] == "bn1.running_mean" and row["changed"] for row in summary["buffers"])


def test_evaluate_measures_gaps_to_the_oracle(workspace, tmp_path, capsys):
    arguments = ["--model-from", workspace / "del", "--oracle", workspace / "oracle", "--output-dir", tmp_path]
    run("evaluate", workspace / "run", *arguments)
    assert "Δ forget" in capsys.readouterr().out
    methods = read(tmp_path / "summary.json")["methods"]
    method, oracle = methods[str(workspace / "del")], methods["oracle"]
    assert method["delta_forget"] == oracle["forget_acc"] - method["forget_acc"]
    assert oracle["delta_test"] == 0
    stored = read(workspace / "del" / "summary.json")["metrics"]
    assert {name: method[name] for name in stored} == stored


def test_a_forget_set_may_cover_a_whole_class(tmp_path):
    options = ["--epochs", 1, "--forget", "non-iid:7", "--forget-ratio", 0.5]
    run("train", *options, "--output-dir", tmp_path / "run")
    forget = read(tmp_path / "run" / "forget.json")
    assert set(forget["labels"]) == {7} and 130 < len(forget["indices"]) < 160
    run("localize", tmp_path / "run", "--output-dir", tmp_path / "mask")
    run(*UNLEARN, tmp_path / "run", "--mask", tmp_path / "mask/mask.safetensors", "--output-dir", tmp_path / "del")
    run("verify", tmp_path / "run", tmp_path / "del", tmp_path / "del/mask.safetensors")


def delfast(*arguments):
    """The command in a process of its own."""
    return [sys.executable, "-m", "delfast", *(str(argument) for argument in arguments)]


def test_unlearn_resumes_after_a_kill_to_the_same_weights(workspace, tmp_path, capsys):
    mask = workspace / "mask" / "mask.safetensors"
    command = ["unlearn", workspace / "run", "--mask", mask, "--epochs", 8, "--lr", 0.015, "--output-dir"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # as many threads as here: the weights depend on it
    process = subprocess.Popen(
        delfast(*command, cut),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + cases.PATIENCE
    while not (cut / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (cut / "model.safetensors").exists() and not (cut / "summary.json").exists()

    capsys.readouterr()
    run(*command, cut, "--lr", 0.02, "--resume", expect=2)
    assert "other settings (lr)" in capsys.readouterr().err

    run(*command, cut, "--resume")
    run(*command, whole)
    assert read(cut / "summary.json")["resumed_from"] >= 1 and read(whole / "summary.json")["resumed_from"] == 0
    resumed, uninterrupted = (load_state(path / "model.safetensors") for path in (cut, whole))
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())
    assert read(cut / "summary.json")["losses"] == read(whole / "summary.json")["losses"]
    assert not (cut / "checkpoint.pt").exists()


def test_doctor_reports_what_runs(capsys):
    run("doctor", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["facts"]["backend"] in ("native", "torch") and found["facts"]["torch"] == torch.__version__
    run("doctor")
    assert f"{found['facts']['reason']}"[:20] in capsys.readouterr().out


# --- bad input: exit code 2, one line, nothing written --------------------------------------------


def refused(capsys, *arguments):
    """The one line that a refused command prints."""
    capsys.readouterr()
    run(*arguments, expect=2)
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("delfast: error: ") and shown.out == ""
    return lines[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--forget-ratio", "0"], "forget ratio in (0, 1], got 0"),
        (["--forget-ratio", "1.5"], "forget ratio in (0, 1], got 1.5"),
        (["--forget-ratio", "0.0001"], "is empty"),
        (["--forget-ratio", "1", "--forget", "iid"], "whole training set"),
        (["--forget", "half"], "expected a forget set"),
        (["--forget", "non-iid:12"], "classes 0 to 9"),
        (["--data", "mnist"], "expected data digits"),
        (["--data", "folder:nowhere"], "no such folder"),
        (["--data", "folder:~nobody-of-that-name/x"], "no such folder"),
        (["--forget", "file:~nobody-of-that-name/x"], "cannot read the forget set's indices"),
        (["--model", "alexnet"], "expected a model resnet18"),
        (["--epochs", "0"], "at least 1 epoch, got 0"),
        (["--lr", "-1"], "learning rate above 0, got -1"),
        (["--lr", "nan"], "learning rate above 0, got nan"),
        (["--batch-size", "0"], "batch size of at least 1, got 0"),
        (["--batch-size", "1436"], "leave a batch of one"),
        (["--weight-decay", "-1"], "weight decay of 0 or more"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**40)], "--seed"),
        (["--image-size", "16"], "folder:PATH and hub:NAME alone"),
        (["--device", "tpu9"], "expected a device"),
        (["--epochs", "many"], "--epochs"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_train_refuses(options, message, tmp_path, capsys):
    line = refused(capsys, "train", *options, "--output-dir", tmp_path / "run")
    assert message in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--budget", "0"], "budget in (0, 1], got 0"),
        (["--budget", "1.1"], "budget in (0, 1], got 1.1"),
        (["--preset", "mine"], "paper, published-code"),
        (["--criterion", "taste"], "expected criterion"),
        (["--granularity", "layer"], "expected granularity"),
        (["--criterion", "critmem", "--granularity", "param"], "criterion 'critmem' scores channels"),
        (["--aggregate", "median"], "expected aggregate"),
        (["--policy", "some"], "expected policy"),
        (["--top-h", "0"], "top_h"),
        (["--top-h", "much"], "--top-h as a count"),
        (["--criterion", "squared_grad"], "pass per_example=True"),
        (["--strategy", "luck"], "expected --strategy to be one of del, salloc"),
        (["--strategy", "del", "--criterion", "grad"], "without --criterion and --granularity"),
        (["--criterion", "random", "--per-example"], "expected a criterion with a gradient for per_example"),
        (["--include", "layer9.*"], "which matches none"),
        (["--exclude", "*"], "expected include and exclude to leave a trainable parameter"),
        (["--stop-when-stable", "0"], "stop_when_stable in (0, 1], got 0"),
        (["--stop-when-stable", "0.9", "--criterion", "weight"], "a gradient for stop_when_stable, got 'weight'"),
    ],
)
def test_localize_refuses(options, message, workspace, tmp_path, capsys):
    line = refused(capsys, "localize", workspace / "run", *options, "--output-dir", tmp_path / "mask")
    assert message in line and not (tmp_path / "mask").exists()


def test_unlearn_refuses(workspace, tmp_path, capsys):
    out, mask = tmp_path / "del", workspace / "mask" / "mask.safetensors"

    def line(*options, mask=mask):
        return refused(capsys, "unlearn", workspace / "run", "--mask", mask, *options, "--output-dir", out)

    assert "expected method" in line("--method", "wish")
    assert "expected epochs >= 1 for 'del', got 0" in line("--epochs", 0)
    assert "got 'tail'" in line("--head", "tail")
    assert "there is none" in line(mask=tmp_path / "none.safetensors")
    assert "expected a mask file" in line(mask=workspace / "run")  # a directory without one
    Mask.from_dense({"conv1.weight": torch.ones(64, 3, 3, 3)}).save(tmp_path / "wide.safetensors")
    assert "mask for 'conv1.weight' has 64 channels, the parameter has 16" in line(mask=tmp_path / "wide.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(mask.read_bytes()[:-50])
    assert str(broken) in line(mask=broken)
    assert not out.exists()


def test_missing_and_damaged_runs_are_refused(workspace, tmp_path, capsys):
    out = ["--output-dir", tmp_path / "out"]
    assert "expected a run directory" in refused(capsys, "oracle", tmp_path / "nowhere", *out)
    assert "describes no network" in refused(capsys, "localize", workspace / "mask", *out)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("summary.json", "forget.json"):
        (damaged / name).write_bytes((workspace / "run" / name).read_bytes())
    (damaged / "model.safetensors").write_bytes((workspace / "oracle" / "model.safetensors").read_bytes())
    assert "is not the network" in refused(capsys, "localize", damaged, *out)
    (damaged / "model.safetensors").unlink()
    assert "expected a state file" in refused(capsys, "localize", damaged, *out)
    summary = read(damaged / "summary.json")
    (damaged / "summary.json").write_text(json.dumps({**summary, "config": {}}))
    assert "no whole configuration" in refused(capsys, "evaluate", damaged)
    changed_digest = {**summary["digests"], "forget": "0" * 64}
    (damaged / "summary.json").write_text(json.dumps({**summary, "digests": changed_digest}))
    assert "is not the forget set" in refused(capsys, "evaluate", damaged)
    summary["digests"]["data"] = "0" * 64
    (damaged / "summary.json").write_text(json.dumps(summary))
    assert "are not those that" in refused(capsys, "evaluate", damaged)
    (damaged / "summary.json").write_text("{")
    assert "as JSON" in refused(capsys, "evaluate", damaged)
    assert not (tmp_path / "out").exists()


def test_a_network_of_another_run_is_refused(workspace, tmp_path, capsys):
    for part, label, shade in product(("train", "test"), ("dark", "light"), range(4)):
        folder = tmp_path / "images" / part / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (10 * shade + 200 * (label == "light"),) * 3).save(folder / f"{shade}.png")
    other = tmp_path / "other"
    options = ["--data", f"folder:{tmp_path / 'images'}", "--forget", "iid", "--forget-ratio", 0.3, "--epochs", 1]
    run("train", *options, "--output-dir", other)
    run("evaluate", other)
    assert "is no resnet18-thin" in refused(capsys, "evaluate", workspace / "run", "--model-from", other)
    mask = workspace / "mask" / "mask.safetensors"
    line = refused(capsys, "verify", other, other, mask)
    assert "the mask is for another architecture" in line


def test_an_oracle_of_another_forget_set_is_refused(workspace, tmp_path, capsys):
    run("train", "--epochs", 1, "--forget", "iid", "--output-dir", tmp_path / "iid")
    line = refused(capsys, "evaluate", workspace / "run", "--oracle", tmp_path / "iid")
    assert "is of another forget set" in line


def test_results_never_overwrite_their_input(workspace, capsys):
    there = workspace / "run"
    for command in (["oracle"], ["localize"], ["evaluate"], ["unlearn", "--mask", workspace / "mask/mask.safetensors"]):
        assert "choose another --output-dir" in refused(capsys, *command, there, "--output-dir", there)
    mask = workspace / "mask"
    for given in (mask, mask / "mask.safetensors"):
        line = refused(capsys, "unlearn", there, "--mask", given, "--output-dir", mask)
        assert "choose another --output-dir" in line


def test_an_output_directory_that_cannot_be_written_is_refused(workspace, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for command in (["train"], ["localize", workspace / "run"], ["demo"]):
        line = refused(capsys, *command, "--output-dir", tmp_path / "file" / "out")
        assert "cannot write to the output directory" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only directory")
def test_a_read_only_output_directory_is_refused(tmp_path, capsys):
    tmp_path.chmod(0o555)
    assert "cannot write to the output directory" in refused(capsys, "train", "--output-dir", tmp_path)


class Malice:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_pickle_with_code_is_refused_and_not_run(workspace, tmp_path, capsys):
    evil, marker = tmp_path / "evil.pt", tmp_path / "ran"
    evil.write_bytes(pickle.dumps({"conv1.weight": Malice(marker)}, protocol=2))
    mask = workspace / "mask" / "mask.safetensors"
    for arguments in ([evil, workspace / "run", mask], [workspace / "run", workspace / "run", evil]):
        assert "is refused" in refused(capsys, "verify", *arguments)
    assert not marker.exists()


# --- failures -------------------------------------------------------------------------------------


def test_a_training_that_diverges_fails_in_one_line_and_writes_nothing(tmp_path, capsys):
    run("train", "--epochs", 1, "--lr", 1e30, "--output-dir", tmp_path, expect=1)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and "learning rate" in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("DELFAST_DEBUG", "1")
    with pytest.raises(InputError, match="expected data"):
        main(["train", "--data", "mnist", "--output-dir", str(tmp_path)])


def test_a_process_exits_with_the_code_and_without_a_traceback(tmp_path):
    done = subprocess.run(delfast("oracle", tmp_path, "--output-dir", tmp_path / "o"), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("delfast: error: expected a run directory")
    assert "Traceback" not in done.stderr


def test_a_full_disk_leaves_nothing_half_written(tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # the network takes 2.8 MB
    try:
        run("train", "--epochs", 1, "--output-dir", tmp_path, expect=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len([line for line in capsys.readouterr().err.splitlines() if "error" in line]) == 1
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_the_command_says_what_to_install():
    code = "import sys; sys.modules['rich'] = None; from delfast.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'delfast[experiments]'" in done.stderr.splitlines()[-1]


# --- printed text --------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_passes_everything_on_and_draws_on_terminals_alone(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(progress.Progress()([1, 2, 3], "epoch 1/1", 3)) == [1, 2, 3]
    assert ("epoch 1/1" in sys.stderr.getvalue()) == (stream is Terminal)


def test_progress_off_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    console.start_log()
    bar = progress.Progress()
    list(bar([1], "epoch 1/3", 1))
    monkeypatch.setattr(bar, "EVERY", 0.0)
    list(bar([1], "epoch 2/3", 1))
    assert capsys.readouterr().err == "delfast: epoch 2/3\n"


@pytest.mark.skipif(BACKEND.module is None, reason="no native kernels are here")
def test_doctor_names_a_driver_that_is_too_old_for_the_kernels(monkeypatch):
    class Driver:
        def cuDriverGetVersion(self, version):
            version._obj.value = 12060
            return 0

    monkeypatch.setattr(backend.ctypes, "CDLL", lambda name: Driver())
    info = {"cuda": {"toolkit": "13.0", "architectures": ["9.0"]}, "torch": "2.14.1"}
    monkeypatch.setattr(backend, "BACKEND", replace(BACKEND, build_info=info))
    found = doctor.examine()
    assert found["facts"]["driver_cuda"] == "12.6"
    assert any(
        "the driver supports CUDA 12.6 at most, and the kernels were built with CUDA 13.0" in line
        for line in found["advice"]
    )
    monkeypatch.setattr(Driver, "cuDriverGetVersion", lambda self, version: 3)  # CUDA_ERROR_NOT_INITIALIZED
    assert doctor.examine()["facts"]["driver_cuda"] is None


def test_doctor_advises_how_to_install_what_is_missing(monkeypatch):
    found = {**doctor.status(), "backend": "torch", "reason": "the extension was not built", "cuda_available": False}
    monkeypatch.setattr(doctor, "status", lambda: found)
    monkeypatch.setattr(doctor, "EXPERIMENTS", ("rich", "no-such-package"))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    advice = "\n".join(doctor.examine()["advice"])
    assert "the extension was not built" in advice and "no C++ compiler" in advice
    assert "not installed: no-such-package" in advice and "delfast[experiments]" in advice


# --- compare --------------------------------------------------------------------------------------


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).state_dict()


def changed(state, name, position, value):
    copy = {key: tensor.clone() for key, tensor in state.items()}
    copy[name].view(-1)[position] = value
    return copy


def mask_of(state, **selected):
    dense = {name: torch.zeros_like(t) for name, t in state.items() if "running" not in name and "num_" not in name}
    for name, rows in selected.items():
        dense[name.replace("_", ".")][rows] = 1
    return Mask.from_dense(dense)


def test_compare_is_bitwise(network):
    mask = mask_of(network)
    zero = changed(network, "0.weight", 5, 0.0)
    nan = changed(network, "0.weight", 5, float("nan"))
    assert compare(zero, zero, mask).outside == 0
    assert compare(nan, nan, mask).outside == 0
    assert compare(zero, changed(network, "0.weight", 5, -0.0), mask).outside == 1
    assert compare(network, nan, mask).outside == 1


def test_compare_counts_inside_outside_and_buffers(network):
    after = changed(network, "0.weight", 0, 9.0)
    after = changed(after, "0.weight", 11, 9.0)
    after = changed(after, "1.running_mean", 0, 9.0)
    result = compare(network, after, mask_of(network, **{"0_weight": [0]}))
    assert (result.changed, result.outside) == (2, 1)
    assert [(row.name, row.changed) for row in result.buffers] == [
        ("1.running_mean", 1),
        ("1.running_var", 0),
        ("1.num_batches_tracked", 0),
    ]
    assert compare(network, after, mask_of(network), heads=["0"]).outside == 0


def test_compare_counts_what_the_mask_does_not_know(network):
    """A frozen parameter is in no mask, and must not move; a buffer is one only if it is named."""
    network = {**network, "scale": torch.ones(2)}
    mask = mask_of({name: value for name, value in network.items() if name != "scale"})
    after = changed(network, "scale", 0, 2.0)
    assert compare(network, after, mask).outside == 1
    assert compare(network, after, mask, buffers=["scale"]).outside == 0


def test_compare_judges_a_tied_parameter_by_its_twin(network):
    mask = mask_of(network, **{"0_weight": [0]})
    before = {**network, "tied.weight": network["0.weight"]}
    after = changed(network, "0.weight", 1, 9.0)
    assert compare(before, {**after, "tied.weight": after["0.weight"]}, mask).outside == 0
    assert compare(before, {**network, "tied.weight": after["0.weight"]}, mask).outside == 1


def test_compare_matches_wrapped_names(network):
    wrapped = {f"module._orig_mod.{name}": value for name, value in changed(network, "0.weight", 0, 9.0).items()}
    result = compare(network, wrapped, mask_of(network, **{"0_weight": [0]}))
    assert (result.changed, result.outside) == (1, 0)


def test_compare_refuses_different_networks(network):
    mask = mask_of(network)
    fewer = {name: value for name, value in network.items() if name != "2.bias"}
    with pytest.raises(InputError, match=r"'2\.bias' is in BEFORE alone"):
        compare(network, fewer, mask)
    with pytest.raises(InputError, match=r"'2\.bias' is \(2,\) .* and \(3,\)"):
        compare(network, {**network, "2.bias": torch.zeros(3)}, mask)
    with pytest.raises(InputError, match=r"the network has no '2\.bias'"):
        compare(fewer, fewer, mask)
    with pytest.raises(InputError, match="got 'fc', which it does not have"):
        compare(network, network, mask, heads=["fc"])
    narrow = Mask.from_dense({"2.bias": torch.zeros(5)})
    with pytest.raises(InputError, match=r"'2\.bias' is \(5,\) in the mask, \(2,\) in the network"):
        compare(network, network, narrow)


def test_load_network_takes_files_and_run_directories(workspace):
    path = workspace / "run"
    by_file, by_run = (verification.load_network(p) for p in (path / "model.safetensors", path))
    assert digest_state(by_file) == digest_state(by_run)
