"""``python -m delfast.experiments.sequential``: run a definition; see ``delfast.experiments.sequential``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from delfast.errors import InputError
from delfast.experiments.sequential.cells import run_definition
from delfast.experiments.sequential.definition import read_definition


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the output directory lacks; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m delfast.experiments.sequential",
        description="Serve forget requests one after the other by several methods, and measure what holds.",
    )
    parser.add_argument("definition", type=Path, help="a TOML file, such as experiments/sequential/digits.toml")
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="where the results are kept; a run continues there"
    )
    parser.add_argument("--data", help="replaces the definition's data, as for delfast compare")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the computation (default: 1)")
    options = parser.parse_args(arguments)
    try:
        torch.set_num_threads(options.threads)
        definition = read_definition(options.definition, options.data)
        run_definition(definition, options.output_dir, options.device, lambda line: print(line, flush=True))
    except (InputError, OSError) as error:
        print(f"sequential: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
