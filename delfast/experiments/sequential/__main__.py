"""``python -m delfast.experiments.sequential``: run a definition; see ``delfast.experiments.sequential``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from delfast.errors import InputError
from delfast.experiments.run import check_own_directory
from delfast.experiments.sequential.cells import run_definition
from delfast.experiments.sequential.definition import read_definition
from delfast.experiments.sequential.report import REPORT, make_report, pack, read_records
from delfast.files import write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute what the output directory lacks and write the report; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m delfast.experiments.sequential",
        description="Serve forget requests one after the other by several methods, and measure what holds.",
    )
    parser.add_argument("definition", type=Path, help="a TOML file, such as experiments/sequential/digits.toml")
    parser.add_argument("--output-dir", type=Path, required=True, help="results are kept there; a run goes on there")
    parser.add_argument("--data", help="replaces the definition's data, as for delfast compare")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the computation (default: 1)")
    parser.add_argument("--report-only", action="store_true", help="run nothing; report what is there")
    parser.add_argument("--pack", type=Path, help="a directory for the report and the records, one a line, to keep")
    options = parser.parse_args(arguments)
    try:
        if options.threads < 1:
            raise InputError(f"expected --threads of at least 1, got {options.threads}")
        if options.pack is not None:
            check_own_directory(options.pack, options.output_dir, option="--pack")
        definition = read_definition(options.definition, options.data, data_is_read=not options.report_only)
        if not options.report_only:
            torch.set_num_threads(options.threads)
            run_definition(definition, options.output_dir, options.device, lambda line: print(line, flush=True))
        report = make_report(read_records(options.output_dir), definition.title)
        write_text(options.output_dir / REPORT, report)
        if options.pack is not None:
            pack(options.output_dir, options.pack, report)
    except (InputError, OSError) as error:
        print(f"sequential: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
