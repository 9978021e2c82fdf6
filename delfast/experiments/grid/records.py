"""The records of a grid as JSON: one for each cell, two for each network.

A run writes each record to a file of its own as soon as it is measured: ``cells/KEY.json``,
``networks/KEY/summary.json`` and ``networks/KEY/membership.json``. Results that are kept in git are packed into one
line for each cell (``cells.jsonl``) and for each network (``networks.jsonl``). A record without a file of its own is
read from its line, so a run continues from packed results, and its own records are read first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from delfast.errors import InputError
from delfast.experiments.grid.definition import Cell, Grid, NetworkSpec
from delfast.experiments.run import SUMMARY, check_summary
from delfast.files import make_output_dir, read_json, read_json_lines, write_text

CELLS, NETWORKS = "cells", "networks"  # folders; with the suffix .jsonl, the packed form of each
MEMBERSHIP = "membership.json"  # the membership inference on a network


def cell_path(directory: Path, cell: Cell) -> Path:
    """The file of a cell's result."""
    return directory / CELLS / f"{cell.key}.json"


def network_path(directory: Path, network: NetworkSpec) -> Path:
    """The run directory of a network."""
    return directory / NETWORKS / network.key


def has_record(path: Path) -> bool:
    """Return whether the record of this path exists, as a file or packed."""
    return path.is_file() or _packed(path) is not None


def read_record(path: Path) -> Any:
    """Read the record of this path, from its file or its packed form. InputError if there is none, or no JSON."""
    packed = None if path.is_file() else _packed(path)
    return read_json(path) if packed is None else packed


def read_network(directory: Path, network: NetworkSpec) -> dict[str, Any]:
    """Read a network's summary. InputError if it is missing or damaged."""
    path = network_path(directory, network)
    return check_summary(read_record(path / SUMMARY), path)


def place(path: Path) -> str:
    """Name the place of the record of this path for a message: its file or its line."""
    if path.is_file() or _packed(path) is None:
        return f"'{path}'"
    folder = _folder(path)
    return f"the line '{path.relative_to(folder).parts[0].removesuffix('.json')}' of '{folder.with_suffix('.jsonl')}'"


def check_packable(target: Path) -> None:
    """Raise InputError if ``target`` holds files of records, which would be read instead of the packed ones."""
    for name in (CELLS, NETWORKS):
        folder = target / name
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(
                f"expected a directory for packed results, '{folder}' holds the results of a run, which would be read "
                "instead; choose another --pack"
            )


def pack(grid: Grid, directory: Path, target: Path) -> None:
    """Write the records of the grid that ``directory`` holds to ``target``, packed and without the paths of data."""
    cells = {cell.key: read_record(cell_path(directory, cell)) for cell in grid.cells}
    networks = {}
    for network in grid.trained:
        path = network_path(directory, network)
        files = [SUMMARY] if network.shadow else [SUMMARY, MEMBERSHIP]
        records = {name.removesuffix(".json"): read_record(path / name) for name in files}
        summary, config = records["summary"], network.config.without_paths()
        kind = {"data": config.data, "data_dir": config.data_dir}
        records["summary"] = {**summary, "config": {**summary["config"], **kind}}
        networks[network.key] = records
    make_output_dir(target, "--pack")
    for name, records in ((CELLS, cells), (NETWORKS, networks)):
        lines = (json.dumps({"key": key, **record}) + "\n" for key, record in records.items())
        write_text(target / f"{name}.jsonl", "".join(lines))


def recorded_cells(directory: Path) -> int:
    """Return the number of cells that ``directory`` has a record of, of any grid."""
    return len(_names(directory, CELLS))


def recorded_data(directory: Path) -> list[str]:
    """Return the data of the networks that ``directory`` has a summary of, as configured, each once."""
    paths = [directory / NETWORKS / name.removesuffix(f"/{SUMMARY}") for name in _names(directory, NETWORKS)]
    found = [check_summary(read_record(path / SUMMARY), path)["config"].get("data") for path in paths]
    return sorted({str(data) for data in found})


def _names(directory: Path, kind: str) -> list[str]:
    """Return the names in the folder ``kind`` of the records of cells, or of the summaries of networks."""
    folder = directory / kind
    pattern = "*.json" if kind == CELLS else f"*/{SUMMARY}"
    own = {path.relative_to(folder).as_posix() for path in folder.glob(pattern) if not path.name.startswith(".")}
    packed = _packed_records(folder)
    return sorted(own | {name for name in packed if kind == CELLS or name.endswith(f"/{SUMMARY}")})


def _packed(path: Path) -> Any | None:
    """Return the packed record of this path; None if there is none."""
    folder = _folder(path)
    return _packed_records(folder).get(path.relative_to(folder).as_posix())


def _packed_records(folder: Path) -> Mapping[str, Any]:
    """Return the packed records of a folder, by the path of their own file in it."""
    file = folder.with_suffix(".jsonl")
    if not file.is_file():
        return {}
    status = file.stat()
    return _records(file, status.st_mtime_ns, status.st_size)


def _folder(path: Path) -> Path:
    """Return the folder of all cells, or of all networks, that the record of this path is in."""
    return next(each for each in path.parents if each.name in (CELLS, NETWORKS))


@lru_cache(maxsize=2)
def _records(file: Path, *_: int) -> Mapping[str, Any]:
    """Records of a packed file by the path of their own file in the folder."""
    found: dict[str, Any] = {}
    for number, line in enumerate(read_json_lines(file), 1):
        if not isinstance(line, dict) or not isinstance(line.get("key"), str) or not _is_name(line["key"]):
            raise InputError(f"expected line {number} of '{file}' to be a table with a 'key'; restore the file")
        key = line.pop("key")
        found.update(_files(key, line) if file.stem == NETWORKS else {f"{key}.json": line})
    return found


def _files(key: str, line: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    return [(f"{key}/{name}.json", record) for name, record in line.items() if _is_name(name)]


def _is_name(text: str) -> bool:
    """Return whether a key can be a file's name, which is then inside the folder."""
    return text == Path(text).name and "\0" not in text
