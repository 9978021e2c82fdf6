"""The commands: what they take, and what they print. The work is in the modules beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import torch
import typer

from delfast.cli import doctor
from delfast.cli.console import output, print_line, print_mask, print_methods, start_log, watching
from delfast.cli.options import (
    DataDir,
    Device,
    OptionalOutputDir,
    OutputDir,
    RunDir,
    Seed,
    StepSeed,
    channels_last_for,
    hyperparameters,
    parse_top_h,
    resolved,
)
from delfast.errors import InputError
from delfast.evaluation import gaps
from delfast.experiments import demo, pipeline, profile, verification
from delfast.experiments import grid as grids
from delfast.experiments.interrupts import Stopped
from delfast.experiments.networks import NAMES, check_model
from delfast.experiments.recipes import method_recipe, recipe
from delfast.experiments.reports import terminal_table
from delfast.experiments.run import (
    SUMMARY,
    Config,
    check_own_directory,
    choose_device,
    load_model,
    open_run,
    start,
)
from delfast.experiments.stages import Request
from delfast.files import make_output_dir, write_json
from delfast.localization import STRATEGIES, Criterion
from delfast.provenance import provenance
from delfast.unlearning import METHODS, make_method

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
# UsageError, of click or of the copy of it that newer typers carry; a BadParameter is one
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])


def run(arguments: Sequence[str] | None) -> int:
    """Run one command line; returns its exit code. Usage errors become InputError."""
    start_log()
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="delfast", standalone_mode=False)
    except typer.Abort:  # what older typers make of a KeyboardInterrupt, outside the main thread
        raise KeyboardInterrupt from None
    except _UsageError as error:
        raise InputError(f"{error.format_message()} (see `delfast --help`)") from None
    if code == Stopped.INTERRUPTED:  # what newer ones make of it
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


@app.callback()
def _app() -> None:
    """Find the channels that hold what a network memorised of a forget set, and make it unlearn them."""


@app.command()
def train(
    output_dir: OutputDir,
    data: Annotated[
        str, typer.Option(help="digits, fashion-mnist, cifar10, cifar100, svhn, folder:PATH or hub:NAME")
    ] = "digits",
    model: Annotated[str, typer.Option(help=", ".join(NAMES))] = "resnet18-thin",
    forget: Annotated[
        str, typer.Option(help="iid, non-iid:2,5 (the classes), mislabelled or file:PATH")
    ] = "non-iid:2,5",
    forget_ratio: Annotated[float, typer.Option(help="part of the training set to forget, in (0, 1]")] = 0.1,
    epochs: Annotated[int | None, typer.Option(help="default: as published for the data and model")] = None,
    lr: Annotated[float | None, typer.Option(help="default: as published for the data and model")] = None,
    batch_size: int = 128,
    weight_decay: float = 0.0,
    image_size: Annotated[int | None, typer.Option(help="side in pixels, for folder:PATH and hub:NAME alone")] = None,
    train_examples: Annotated[int | None, typer.Option(help="use only so many training images")] = None,
    test_examples: Annotated[int | None, typer.Option(help="use only so many test images")] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16: the forward pass under autocast")] = "fp32",
    channels_last: Annotated[
        str, typer.Option(help="on, off, or auto: the layout that convolutions like, where there are any")
    ] = "auto",
    data_dir: DataDir = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Train a network on the whole training set, forget set included; write a run directory."""
    published = recipe(data, model)
    data, forget = resolved(data), resolved(forget)
    config = Config(
        data=data,
        model=model,
        forget=forget,
        forget_ratio=forget_ratio,
        epochs=published.epochs if epochs is None else epochs,
        lr=published.lr if lr is None else lr,
        batch_size=batch_size,
        weight_decay=weight_decay,
        seed=seed,
        data_dir=None if data_dir is None else os.path.realpath(data_dir),
        image_size=image_size,
        train_examples=train_examples,
        test_examples=test_examples,
        precision=precision,
        channels_last=channels_last_for(channels_last, model),
    )
    result = pipeline.train(start(config, choose_device(device)), output_dir)
    print_methods("trained", {"original": {**result.metrics.as_dict(), "seconds": result.seconds}})


@app.command()
def oracle(
    run_dir: RunDir,
    output_dir: OutputDir,
    data_dir: DataDir = None,
    device: Device = "auto",
    seed: StepSeed = None,
) -> None:
    """Train a fresh network (its own initialization) on the run's retain set alone; write a run directory."""
    check_own_directory(output_dir, run_dir)
    opened = open_run(run_dir, choose_device(device), data_dir)
    result = pipeline.oracle(opened, output_dir, seed)
    print_methods("retrained", {"oracle": {**result.metrics.as_dict(), "seconds": result.seconds}})


@app.command()
def localize(
    run_dir: RunDir,
    output_dir: OutputDir,
    budget: Annotated[float, typer.Option(help="part of all parameters to select, in (0, 1]")] = 0.3,
    preset: Annotated[str, typer.Option(help="paper or published-code")] = "paper",
    strategy: Annotated[
        str | None, typer.Option(help=f"criterion and granularity by name: {', '.join(STRATEGIES)}")
    ] = None,
    criterion: Annotated[str | None, typer.Option(help=f"{', '.join(get_args(Criterion))}")] = None,
    granularity: Annotated[str | None, typer.Option(help="channel or param (default: the preset's)")] = None,
    aggregate: Annotated[str | None, typer.Option(help="topk_mean, mean, sum or max (default: the preset's)")] = None,
    top_h: Annotated[str | None, typer.Option(help="a count (16) or a fraction (0.1), for topk_mean")] = None,
    policy: Annotated[str | None, typer.Option(help="whole or exact (default: the preset's)")] = None,
    per_example: Annotated[
        bool, typer.Option("--per-example", help="score each example by itself: the mean of |θ g(x)| or |g(x)|")
    ] = False,
    stop_when_stable: Annotated[
        float | None, typer.Option(help="take examples only until masks overlap by this, as 0.99")
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    seed: StepSeed = None,
) -> None:
    """Find the channels that hold what the network memorised of its forget set; write mask.safetensors."""
    chosen: dict[str, Any] = {
        "criterion": criterion,
        "granularity": granularity,
        "aggregate": aggregate,
        "policy": policy,
        "top_h": parse_top_h(top_h),
    }
    options = {name: value for name, value in chosen.items() if value is not None}
    if strategy is not None:
        if not STRATEGIES.keys() >= {strategy} or options.keys() & STRATEGIES["del"].keys():
            raise InputError(
                f"expected --strategy to be one of {', '.join(STRATEGIES)}, without --criterion and --granularity, "
                f"got '{strategy}'"
            )
        options["strategy"] = strategy
    check_own_directory(output_dir, run_dir)
    opened = open_run(run_dir, choose_device(device), data_dir)
    network = load_model(opened, run_dir)
    found = pipeline.localize(
        opened,
        network,
        output_dir,
        budget=budget,
        preset=preset,
        per_example=per_example,
        stop_when_stable=stop_when_stable,
        seed=seed,
        **options,
    )
    print_mask(found.mask)


@app.command()
def unlearn(
    run_dir: RunDir,
    output_dir: OutputDir,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="mask.safetensors of `delfast localize`, or a dense .pt mask; else all may change (del needs one)"
        ),
    ] = None,
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "del",
    epochs: Annotated[int | None, typer.Option(help="default: as published for the method")] = None,
    lr: Annotated[float | None, typer.Option(help="default: as published for the method")] = None,
    batch_size: Annotated[int | None, typer.Option(help="default: the run's")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="default: as published for the method")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="a hyperparameter of the method; repeatable")
    ] = None,
    head: Annotated[str | None, typer.Option(help="the classifier's module name (default: found)")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16 (default: the run's)")] = None,
    channels_last: Annotated[str | None, typer.Option(help="on, off or auto (default: the run's)")] = None,
    batchnorm: Annotated[str, typer.Option(help="train, or frozen: running statistics stay as they are")] = "train",
    patience: Annotated[
        int | None, typer.Option(min=1, help="stop after so many epochs without a lower loss on examples held out")
    ] = None,
    held_out: Annotated[float, typer.Option(help="that part of the retain set, in (0, 1), with --patience")] = 0.1,
    compile_model: Annotated[bool, typer.Option("--compile", help="train through torch.compile")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the checkpoint in the output directory")] = False,
    data_dir: DataDir = None,
    device: Device = "auto",
    seed: StepSeed = None,
) -> None:
    """Unlearn the run's forget set: by default, reset what the mask selects, finetune it and the head on the retain
    set. Writes a run directory.
    """
    check_own_directory(output_dir, run_dir, *([] if mask is None else [mask.parent]))
    loaded = None if mask is None else verification.load_mask(mask)
    opened = open_run(run_dir, choose_device(device), data_dir)
    opened = opened.with_config(
        precision=opened.config.precision if precision is None else precision,
        channels_last=channels_last_for(channels_last, opened.config.model)
        if channels_last is not None
        else opened.config.channels_last,
    )
    changes = hyperparameters(method, settings or [])
    given = {"epochs": epochs, "lr": lr, "weight_decay": weight_decay}
    changes |= {name: value for name, value in given.items() if value is not None}
    chosen = make_method(method, method_recipe(opened.config.data, opened.config.model, method) | changes)
    result = pipeline.unlearn(
        opened,
        load_model(opened, run_dir),
        loaded,
        output_dir,
        method=chosen,
        batch_size=opened.config.batch_size if batch_size is None else batch_size,
        head=head,
        seed=seed,
        batchnorm=batchnorm,
        patience=patience,
        held_out=held_out,
        compile_model=compile_model,
        resume=resume,
    )
    print_methods("unlearned", {method: {**result.metrics.as_dict(), "seconds": result.seconds}})


@app.command()
def evaluate(
    run_dir: RunDir,
    model_from: Annotated[Path | None, typer.Option(help="measure this run's network on RUN's sets")] = None,
    oracle: Annotated[
        Path | None, typer.Option(help="run directory of the oracle, for the gaps Δ = oracle - method")
    ] = None,
    output_dir: OptionalOutputDir = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    seed: StepSeed = None,
) -> None:
    """Measure a network on the run's forget, retain and test sets, and its gaps to an oracle."""
    source = run_dir if model_from is None else model_from
    if output_dir is not None:
        check_own_directory(output_dir, run_dir, source, *([oracle] if oracle else []))
    opened = open_run(run_dir, choose_device(device), data_dir)
    networks = {str(source): load_model(opened, source)}
    if oracle is not None:
        networks["oracle"] = load_model(opened, oracle)
    if output_dir is not None:
        make_output_dir(output_dir)
    measured = {name: opened.measure(network, seed) for name, network in networks.items()}
    methods: dict[str, dict[str, Any]] = {name: metrics.as_dict() for name, metrics in measured.items()}
    if oracle is not None:
        methods = {name: {**methods[name], **gaps(metrics, measured["oracle"])} for name, metrics in measured.items()}
    print_methods(f"{run_dir}", methods)
    if output_dir is not None:
        summary = {
            "command": "evaluate",
            "options": {"seed": opened.config.seed if seed is None else seed},
            "config": asdict(opened.config),
            "forget": opened.describe_forget(),
            "methods": methods,
            "provenance": provenance(device=str(opened.device)),
        }
        write_json(output_dir / SUMMARY, summary)


@app.command()
def compare(
    grid: Annotated[Path, typer.Argument(help="a TOML file: see experiments/ and the README")],
    output_dir: OutputDir,
    data: Annotated[str | None, typer.Option(help="the grid's data from elsewhere, as --data of train")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes (default: CPUs / threads)")] = None,
    threads: Annotated[int, typer.Option(min=1, help="of each process; 1: the same bits in every run")] = 1,
    device: Device = "auto",
    report_only: Annotated[bool, typer.Option("--report-only", help="run nothing; report what is finished")] = False,
) -> None:
    """Run a grid of methods, strategies and budgets; write results.csv, report.md and report.html.

    What the output directory holds already is not run again: after a crash, call it once more.
    """
    with watching() as watch:
        source = None if data is None else resolved(data)
        found = grids.compare(grid, output_dir, workers, threads, device, watch, source, report_only)
    print_line(f"{len(found.cells)} cells: see {output_dir / grids.HTML}")


@app.command()
def verify(
    before: Annotated[Path, typer.Argument(help="state file or run directory before unlearning")],
    after: Annotated[Path, typer.Argument(help="state file or run directory after it")],
    mask: Annotated[Path, typer.Argument(help="the mask that unlearning was to keep to")],
    head: Annotated[list[str] | None, typer.Option(help="module or parameter that may change too; repeatable")] = None,
    buffer: Annotated[list[str] | None, typer.Option(help="entry that is a buffer, no parameter; repeatable")] = None,
    output_dir: OptionalOutputDir = None,
) -> None:
    """Compare two networks bit by bit: exit code 1 if an entry outside the mask changed, else 0.

    BatchNorm's running statistics, and what --buffer names, are listed apart and not counted.
    """
    result = verification.compare(
        verification.load_network(before),
        verification.load_network(after),
        verification.load_mask(mask),
        heads=head or (),
        buffers=buffer or (),
    )
    if output_dir is not None:
        make_output_dir(output_dir)
        write_json(output_dir / SUMMARY, {"command": "verify", **result.as_dict(), "provenance": provenance()})
    console = output()
    console.print(terminal_table("parameters", verification.COLUMNS, [row.cells() for row in result.parameters]))
    if result.buffers:
        console.print(
            terminal_table("buffers (not counted)", verification.COLUMNS, [r.cells() for r in result.buffers])
        )
    print_line(
        f"{result.changed} entries changed, {result.outside} of them outside the mask: "
        + ("NOT kept to the mask" if result.outside else "kept to the mask")
    )
    if result.outside:
        raise typer.Exit(1)


@app.command("bench")
def bench_command(
    output_dir: OutputDir,
    run_dir: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="a run directory: its network and data; else a preset")
    ] = None,
    model: Annotated[
        str, typer.Option(help=f"the preset, on random images of 32 pixels: {', '.join(NAMES)}")
    ] = "resnet18",
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    budget: Annotated[float, typer.Option(help="part of all parameters that the mask selects")] = 0.3,
    channels_last: Annotated[str, typer.Option(help="on, off or auto")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="default: torch's")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="of each stage; the median counts")] = 5,
    data_dir: DataDir = None,
    device: Device = "auto",
) -> None:
    """Time every stage of an unlearning job on one batch, for each backend and precision; write a table and a plot."""
    check_model(model, None)
    if run_dir is not None:
        check_own_directory(output_dir, run_dir)
        model = open_run(run_dir, choose_device(device), data_dir).config.model
    request = Request(
        run_dir=None if run_dir is None else str(run_dir),
        data_dir=None if data_dir is None else str(data_dir),
        model=model,
        batch_size=batch_size,
        budget=budget,
        precision="fp32",
        channels_last=channels_last_for(channels_last, model),
        device=device,
        threads=torch.get_num_threads() if threads is None else threads,
        repeats=repeats,
    )
    found = profile.profile(request, output_dir)
    title = f"milliseconds a batch of {batch_size}: {model}, budget {budget:g}, {request.threads} threads"
    output().print(terminal_table(title, ("stage", *found), profile.rows(found)))


@app.command("doctor")
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable, on standard output")] = False,
) -> None:
    """Say which backend runs and why, what is installed, and how to mend what is missing."""
    found = doctor.examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    rows = [[name, str(value)] for name, value in doctor.flatten(found["facts"])]
    output().print(terminal_table("delfast doctor", ("fact", "value"), rows))
    for advice in found["advice"] or ["nothing is missing"]:
        print_line(f"- {advice}")


@app.command("demo")
def demo_command(
    output_dir: OutputDir = Path("demo-output"),
    quick: Annotated[
        bool, typer.Option("--quick", help="a tenth of the epochs: shows the way, not the result")
    ] = False,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Unlearn two forget sets of scikit-learn's digits and compare with networks retrained without them."""
    summary = demo.run(output_dir, choose_device(device), seed, quick=quick)
    for name, scenario in summary["scenarios"].items():
        print_methods(demo.title(name, scenario), scenario["methods"])
    print_line(f"report: {output_dir / demo.REPORT}")
