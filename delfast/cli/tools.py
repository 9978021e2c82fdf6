"""The commands beside a run: compare, sequence, verify, bench, doctor, demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from delfast.cli.console import log, print_line, print_methods, print_table, watching
from delfast.cli.names import BUDGET, NETWORKS
from delfast.cli.options import (
    DataDir,
    Device,
    Graphs,
    JobFile,
    OptionalOutputDir,
    OutputDir,
    Seed,
    channels_last_for,
    cuda_graphs_for,
    resolved,
)


def compare(
    grid: Annotated[Path, typer.Argument(metavar="GRID", help="a TOML file; examples are in experiments/")],
    output_dir: OutputDir,
    data: Annotated[str | None, typer.Option(help="data to use instead of the grid's, as --data of train")] = None,
    job: JobFile = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="number of worker processes (default: CPUs / threads)")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="threads of each process; with 1 every run gives the same bits")
    ] = 1,
    device: Device = "auto",
    cuda_graphs: Graphs = "auto",
    report_only: Annotated[
        bool, typer.Option("--report-only", help="run nothing; report the cells that are finished")
    ] = False,
    pack: Annotated[
        Path | None,
        typer.Option(help="directory for a copy of the results to keep in git: records as JSON lines, no weights"),
    ] = None,
) -> None:
    """Run a grid of methods, strategies and budgets; write results.csv, report.md and report.html.

    Cells that the output directory already holds are not run again: after a crash, repeat the command.
    """
    from delfast.experiments import grid as grids

    with watching() as watch:
        source = None if data is None else resolved(data)
        graphs = cuda_graphs_for(cuda_graphs)
        found = grids.compare(grid, output_dir, workers, threads, device, watch, source, report_only, pack, graphs, job)
    print_line(f"{len(found.cells)} cells: see {output_dir / grids.HTML}")


def sequence(
    definition: Annotated[
        Path, typer.Argument(metavar="DEFINITION", help="a TOML file; examples are in experiments/sequential/")
    ],
    output_dir: OutputDir,
    data: Annotated[
        str | None, typer.Option(help="data to use instead of the definition's, as --data of train")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="threads of the computation; with 1 every run gives the same bits")
    ] = 1,
    device: Device = "auto",
    report_only: Annotated[
        bool, typer.Option("--report-only", help="run nothing; report the records that are there")
    ] = False,
    pack: Annotated[
        Path | None,
        typer.Option(help="directory for a copy of the results to keep in git: records as JSON lines, no weights"),
    ] = None,
) -> None:
    """Serve forget requests one after the other by several methods, and measure after each what holds; write report.md.

    Records that the output directory already holds are not computed again: after a crash, repeat the command.
    """
    from delfast.experiments import sequential

    source = None if data is None else resolved(data)
    sequential.sequence(definition, output_dir, threads, device, log.info, source, report_only, pack)
    print_line(f"report: {output_dir / sequential.REPORT}")


def init_job(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="the file to write, such as job.py")],
) -> None:
    """Write a job file with comments, which runs as it stands: a small network on scikit-learn's digits."""
    from delfast.errors import InputError
    from delfast.files import write_text

    if path.exists():
        raise InputError(f"expected a path at which there is no file, '{path}' exists; choose another")
    write_text(path, Path(__file__).with_name("example_job.py").read_text(encoding="utf-8"))
    print_line(f"{path}: edit it, then `delfast train --job {path} --output-dir run`")


def verify(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="state file or run directory before unlearning")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="state file or run directory after unlearning")],
    mask: Annotated[
        Path,
        typer.Argument(
            metavar="MASK",
            help="the mask outside which nothing may change, a file or a directory that holds mask.safetensors",
        ),
    ],
    head: Annotated[list[str] | None, typer.Option(help="module or parameter that may change too; repeatable")] = None,
    buffer: Annotated[list[str] | None, typer.Option(help="tensor that is a buffer, no parameter; repeatable")] = None,
    output_dir: OptionalOutputDir = None,
) -> None:
    """Compare two networks bit by bit: exit code 1 if an element outside the mask changed, else 0.

    BatchNorm's running statistics and the tensors named by --buffer are listed apart and not counted.
    """
    from delfast.experiments import verification
    from delfast.experiments.run import SUMMARY
    from delfast.files import make_output_dir, write_json
    from delfast.provenance import provenance

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
    print_table("parameters", verification.COLUMNS, [row.cells() for row in result.parameters])
    if result.buffers:
        print_table("buffers (not counted)", verification.COLUMNS, [row.cells() for row in result.buffers])
    print_line(
        f"{result.changed} elements changed, {result.outside} of them outside the mask: "
        + ("NOT kept to the mask" if result.outside else "kept to the mask")
    )
    if result.outside:
        raise typer.Exit(1)


def bench(
    output_dir: OutputDir,
    run_dir: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="a run directory, for its network and data (default: random images)"),
    ] = None,
    model: Annotated[
        str, typer.Option(help=f"the network, without RUN, on random images of 32 pixels: {', '.join(NETWORKS)}")
    ] = "resnet18",
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    budget: Annotated[float, typer.Option(help="fraction of all elements that the mask selects")] = BUDGET,
    channels_last: Annotated[str, typer.Option(help="on, off or auto")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="default: torch's")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="of each stage; the median counts")] = 5,
    data_dir: DataDir = None,
    device: Device = "auto",
) -> None:
    """Time every stage of an unlearning job on a batch, for each backend and precision; print a table, draw a plot."""
    import torch

    from delfast.experiments import profile
    from delfast.experiments.networks import check_model
    from delfast.experiments.run import check_own_directory, choose_device, open_run
    from delfast.experiments.stages import Request

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
    print_table(title, ("stage", *found), profile.rows(found))


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable, on standard output")] = False,
) -> None:
    """Report which backend runs and why, what is installed, and how to install what is missing."""
    from delfast.cli import doctor as examination

    found = examination.examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    rows = [[name, str(value)] for name, value in examination.flatten(found["facts"])]
    print_table("delfast doctor", ("fact", "value"), rows)
    for advice in found["advice"] or ["nothing is missing"]:
        print_line(f"- {advice}")


def demo(
    output_dir: OutputDir = Path("demo-output"),
    quick: Annotated[
        bool, typer.Option("--quick", help="a tenth of the epochs: shows the steps, not the result")
    ] = False,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Unlearn two forget sets of scikit-learn's digits and compare with oracles, networks retrained without them."""
    from delfast.experiments import demo as demonstration
    from delfast.experiments.run import choose_device

    summary = demonstration.run(output_dir, choose_device(device), seed, quick=quick)
    for name, scenario in summary["scenarios"].items():
        print_methods(demonstration.title(name, scenario), scenario["methods"])
    print_line(f"report: {output_dir / demonstration.REPORT}")
