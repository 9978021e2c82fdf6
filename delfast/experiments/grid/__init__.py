"""``delfast compare``: a grid of methods, strategies and budgets, its results and its report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from delfast.errors import InputError
from delfast.execution import CudaGraphs
from delfast.experiments.grid.cells import check_data, check_networks, finished, run_grid
from delfast.experiments.grid.definition import Grid, read_grid
from delfast.experiments.grid.records import (
    cell_path,
    check_packable,
    has_record,
    pack,
    recorded_cells,
    recorded_data,
)
from delfast.experiments.grid.report import FIGURES, make_report
from delfast.experiments.grid.summary import origins, rows_of, to_csv
from delfast.experiments.run import check_own_directory, choose_device
from delfast.files import make_output_dir, write_json, write_text
from delfast.graphs import check_cuda_graphs
from delfast.provenance import provenance

RESULTS, MARKDOWN, HTML, SUMMARY = "results.csv", "report.md", "report.html", "summary.json"


def compare(
    path: Path,
    output_dir: Path,
    workers: int | None,
    threads: int,
    device: str,
    watch: Callable[[str, int, int], None],
    data: str | None = None,
    report_only: bool = False,
    pack_dir: Path | None = None,
    cuda_graphs: CudaGraphs = "auto",
    job: Path | None = None,
) -> Grid:
    """Run the cells of a grid that ``output_dir`` does not hold, and write results and report to ``output_dir``.

    path: the grid, a TOML file. workers: number of processes (default: CPUs / threads), each of ``threads`` threads;
    with one thread the results are bit-identical from run to run. device: "auto" (CUDA if there is one, else the CPU)
    or a device's name. data: replaces the grid's data. report_only: run nothing and report the finished cells; the
    grid that is returned has only these. pack_dir: a directory for a copy to keep in git: results.csv, report.md, the
    figures, and the records packed into cells.jsonl and networks.jsonl. It may not hold a run's own files.
    cuda_graphs: whether passes are captured on CUDA devices. job: a job file in place of the grid's; it is executed.

    Raises InputError for a bad grid or device, or nothing to report, before anything is written.
    """
    check_cuda_graphs(cuda_graphs, choose_device(device))  # both raise before anything is written
    whole = grid = read_grid(path, data, data_is_read=not report_only, job_path=job)
    if report_only:
        grid = replace(whole, cells=[cell for cell in whole.cells if has_record(cell_path(output_dir, cell))])
        if not grid.cells:
            raise InputError(_why_none(output_dir, path, whole))
        check_networks(output_dir, grid)
        check_data(output_dir, grid, report_only=True)
    if pack_dir is not None:
        check_own_directory(pack_dir, output_dir, option="--pack")
        check_packable(pack_dir)
    make_output_dir(output_dir)
    count = max(1, (os.cpu_count() or 1) // threads) if workers is None else workers
    if report_only:
        results = finished(output_dir, grid)
    else:
        results = run_grid(grid, output_dir, count, threads, device, watch, cuda_graphs)
    rows = rows_of(grid, results, output_dir)
    some = "" if len(grid.cells) == len(whole.cells) else f" of {len(whole.cells)}"
    footer = f"{len(grid.cells)}{some} cells of {path.name}, by {origins(results)}."
    failed = [result for result in results if "failed" in result]
    markdown, page, figures = make_report(grid, rows, failed, output_dir, footer)
    write_text(output_dir / RESULTS, to_csv(rows))
    write_text(output_dir / MARKDOWN, markdown)
    write_text(output_dir / HTML, page)
    content = {"command": "compare", "title": grid.title, "rows": rows, "failed": failed, "provenance": provenance()}
    write_json(output_dir / SUMMARY, content)
    if pack_dir is not None:
        pack(grid, output_dir, pack_dir)
        make_output_dir(pack_dir / FIGURES, "--pack")
        for source in (output_dir / RESULTS, output_dir / MARKDOWN, *figures):
            shutil.copyfile(source, pack_dir / source.relative_to(output_dir))
    return grid


def _why_none(directory: Path, path: Path, grid: Grid) -> str:
    """Return the message for a directory that holds no finished cell of a grid."""
    expected, count = f"expected '{directory}' to hold finished cells of '{path}', it holds", recorded_cells(directory)
    if not count:
        return f"{expected} none; run it first"
    wanted, found = sorted({cell.config.data for cell in grid.cells}), recorded_data(directory)
    kinds = {cell.config.without_paths().data for cell in grid.cells}
    if found and not any(data.startswith(kind) for data in found for kind in kinds):
        names = [", ".join(f"'{data}'" for data in each) for each in (found, wanted)]
        return f"{expected} {count} cells of the data {names[0]}, the grid has {names[1]}; pass the --data of the run"
    return f"{expected} {count} cells of other settings; restore the grid as it was run, or run it"


__all__ = ["HTML", "MARKDOWN", "RESULTS", "SUMMARY", "compare"]
