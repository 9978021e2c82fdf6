"""``delfast compare``: a grid of methods, strategies and budgets, its results and its report."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from delfast.errors import InputError
from delfast.experiments.grid.cells import cell_path, check_networks, run_grid
from delfast.experiments.grid.definition import Grid, read_grid
from delfast.experiments.grid.report import make_report
from delfast.experiments.grid.summary import origins, rows_of, to_csv
from delfast.experiments.run import choose_device
from delfast.files import make_output_dir, write_json, write_text
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
) -> Grid:
    """Run the grid of ``path``, or what of it ``output_dir`` does not hold yet, and write results and report there.
    ``report_only``: run nothing, and report what is there; the grid returned has only those cells.

    workers: processes (default: CPUs / threads); ``threads`` of each. With one thread the results are bit-identical
    from run to run. ``device``: "auto" (CUDA if there is one, else the CPU), or one by name. ``data``: where the data
    come from, if not from where the grid says.

    Raises InputError for a bad grid or device, or nothing to report, before anything is written.
    """
    choose_device(device)  # raises before anything is written
    whole = grid = read_grid(path, data)
    if report_only:
        grid = replace(whole, cells=[cell for cell in whole.cells if cell_path(output_dir, cell).is_file()])
        if not grid.cells:
            raise InputError(f"expected '{output_dir}' to hold finished cells of '{path}', there is none; run it first")
        check_networks(output_dir, grid)
    make_output_dir(output_dir)
    count = max(1, (os.cpu_count() or 1) // threads) if workers is None else workers
    results = run_grid(grid, output_dir, count, threads, device, watch)
    rows = rows_of(grid, results, output_dir)
    some = "" if len(grid.cells) == len(whole.cells) else f" of {len(whole.cells)}"
    footer = f"{len(grid.cells)}{some} cells of {path.name}, by {origins(results)}."
    failed = [result for result in results if "failed" in result]
    markdown, page = make_report(grid, rows, failed, output_dir, footer)
    write_text(output_dir / RESULTS, to_csv(rows))
    write_text(output_dir / MARKDOWN, markdown)
    write_text(output_dir / HTML, page)
    content = {"command": "compare", "title": grid.title, "rows": rows, "failed": failed, "provenance": provenance()}
    write_json(output_dir / SUMMARY, content)
    return grid


__all__ = ["HTML", "MARKDOWN", "RESULTS", "SUMMARY", "compare"]
