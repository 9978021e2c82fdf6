"""``delfast sequence``: serve forget requests one after the other by several methods, and measure what holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from delfast.errors import InputError
from delfast.experiments.run import check_own_directory, choose_device
from delfast.experiments.sequential.cells import check_data, run_definition
from delfast.experiments.sequential.definition import Definition, read_definition
from delfast.experiments.sequential.report import REPORT, make_report, pack, read_records
from delfast.experiments.sequential.stream import Stream
from delfast.files import write_text


def sequence(
    path: Path,
    output_dir: Path,
    threads: int,
    device: str,
    watch: Callable[[str], None],
    data: str | None = None,
    report_only: bool = False,
    pack_dir: Path | None = None,
) -> None:
    """Compute the records of a definition that ``output_dir`` lacks, and write the report there.

    path: the definition, a TOML file. threads: of the computation; with one thread the results are bit-identical from
    run to run. device: see ``choose_device``. watch: called with a line for each record. data: replaces the
    definition's data. report_only: run nothing and report the records that are there; a folder of images is
    read only if it exists, to compare it with the records. pack_dir: a directory for a copy to keep in git: the report,
    and the records as JSON lines.

    Raises InputError for a bad definition or device, or nothing to report, before anything is written.
    """
    if pack_dir is not None:
        check_own_directory(pack_dir, output_dir, option="--pack")
    definition = read_definition(path, data, data_is_read=not report_only)
    choose_device(device)  # raises before anything is written
    if not report_only:
        torch.set_num_threads(threads)
        run_definition(definition, output_dir, device, watch)
    records = read_records(output_dir)
    if report_only:
        _check_reported(records, output_dir, definition)
    report = make_report(records, definition.title)
    write_text(output_dir / REPORT, report)
    if pack_dir is not None:
        pack(output_dir, pack_dir, report)


def _check_reported(records: Sequence[Mapping[str, Any]], directory: Path, definition: Definition) -> None:
    """Raise InputError for records of several data, or of others than the definition's path holds, if it exists.

    Records that were kept before they had a digest of their data are not compared.
    """
    found = {record["data"] for record in records if "data" in record}
    if len(found) > 1:
        raise InputError(
            f"expected '{directory}' to hold records of one data set, it holds records of {len(found)}; separate them"
        )
    config = definition.configs[0]  # those of all seeds have the same data
    if found and config.data_path is not None and config.data_path.exists():
        stream = Stream.load(config, definition.requests, torch.device("cpu"))
        check_data(directory, config, stream.data.digests()["data"], found)


__all__ = ["REPORT", "sequence"]
