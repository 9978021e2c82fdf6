"""The mask's file: packed bits and a JSON header in the safetensors format, checked in full before it is used.

This module writes and parses the file itself, because the safetensors library writes metadata in an order that varies
from call to call, and accepts dtypes, duplicate names and shapes that no mask has. Any safetensors reader opens the
file: https://github.com/huggingface/safetensors#format

``__metadata__`` has two fields. "delfast_mask" is a JSON text: ``{"version": 2, "parameters": {name: {"shape": [...],
"unit": "row" or "element", "dim": 0}}, "metadata": {...}}``; "dim" is left out if it is 0, and format 1 lacks it.
"digest" is the SHA-256 of that text and of every tensor. The tensors are the packed bits, uint8, of every parameter
that has any.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from delfast.errors import InputError, one_line
from delfast.files import write_atomically
from delfast.ops.layout import packed_bytes, row_length, unit_count
from delfast.plain import as_json

FORMAT_VERSION = 2
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_NDIM = 64  # torch's own limit
MAX_NUMEL = 2**63 - 1
MAX_ROW_LENGTH = 2**31 - 1  # one bit of the file then stands for at most 8 GiB of float32
METADATA = "__metadata__"
UNITS = ("row", "element")

Part = tuple[tuple[int, ...], Any, Tensor, int]
"""Fields of a ParameterMask: shape, unit, bits, dim."""


def write_mask(path: Path, version: int, parts: Mapping[str, Part], metadata: Mapping[str, Any]) -> None:
    """Write a mask's file, whole or not at all. The same mask gives the same bytes.

    Raises InputError for a mask that ``read_mask`` would refuse, and for metadata without a JSON form.
    """
    bits = {name: part.cpu().numpy().tobytes() for name, (_, _, part, _) in parts.items() if part.numel()}
    parameters = {
        name: {"shape": [int(size) for size in shape], "unit": unit, **({"dim": int(dim)} if dim else {})}
        for name, (shape, unit, _, dim) in parts.items()
    }
    try:
        _check_parameters(parameters, bits, with_dim=True)
        if METADATA in bits:
            raise ValueError(f"a parameter called '{METADATA}'")
    except ValueError as error:
        raise InputError(f"expected a mask that can be saved, got one with {error}; build it by from_dense()") from None
    facts = as_json(dict(metadata), "a mask's metadata")
    text = json.dumps({"version": version, "parameters": parameters, "metadata": facts})
    header: dict[str, Any] = {METADATA: {"delfast_mask": text, "digest": _digest(text, bits)}}
    end = 0
    for name, piece in bits.items():
        header[name] = {"dtype": "U8", "shape": [len(piece)], "data_offsets": [end, end + len(piece)]}
        end += len(piece)
    start = json.dumps(header).encode()
    start += b" " * (-len(start) % 8)  # the format aligns the tensors
    if len(start) > MAX_HEADER_BYTES:
        raise InputError(
            f"expected a mask whose header takes at most {MAX_HEADER_BYTES} bytes, got {len(start)}; "
            "save it in several files"
        )

    def write(partial: Path) -> None:
        with open(partial, "wb") as stream:
            stream.write(len(start).to_bytes(8, "little") + start)
            stream.writelines(bits.values())

    write_atomically(path, write)


def read_mask(path: Path) -> tuple[dict[str, Part], dict[str, Any]]:
    """Read a file that ``write_mask`` wrote, in this format or an older one: the fields by name, and the metadata.

    The file is not trusted: sizes are compared with the file's size before anything is allocated, and types, ranges and
    names are checked against the schema above. Time and memory are linear in the file's size. Raises InputError, in one
    line, for any other file.
    """
    if not path.is_file():
        raise InputError(f"expected a mask file at '{path}', there is none; check the path")
    try:
        with open(path, "rb") as stream:
            header, bits = _read_container(stream)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is no whole mask file ({one_line(error)}); make the mask again") from None
    written = header.get(METADATA)
    if not isinstance(written, dict) or not {"delfast_mask", "digest"} <= written.keys():
        raise InputError(f"'{path}' is a safetensors file, but no delfast mask; pass a file of Mask.save()")
    try:
        return _read_mask(written, header, bits)
    except _UnknownVersion as error:
        raise InputError(
            f"mask file '{path}' has format version {error}, this delfast reads 1 and {FORMAT_VERSION}; "
            "make the mask again, or install a delfast that reads it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"mask file '{path}' was altered or damaged ({one_line(error)}); make the mask again"
        ) from None


class _UnknownVersion(Exception):
    """The version of a format that this delfast does not read."""


def _read_container(stream: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """Return the header and the tensors' bytes of a safetensors file."""
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"{size} bytes cannot hold its header")
    header = _parse(stream.read(length).decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, stream.read(size - 8 - length)


def _read_mask(written: dict[str, Any], header: dict[str, Any], body: bytes) -> tuple[dict[str, Part], dict[str, Any]]:
    text, digest = written["delfast_mask"], written["digest"]
    if written.keys() != {"delfast_mask", "digest"} or not isinstance(text, str):
        raise ValueError("its metadata is not that of a mask")
    bits = _tensors(header, body)
    if digest != _digest(text, bits):
        raise ValueError("its digest does not match")
    content = _parse(text)
    if not isinstance(content, dict) or content.keys() != {"version", "parameters", "metadata"}:
        raise ValueError("its header is not that of a mask")
    version, parameters, metadata = content["version"], content["parameters"], content["metadata"]
    if type(version) is not int or version not in (1, FORMAT_VERSION):
        raise _UnknownVersion(f"{version!r:.40}")
    if not isinstance(parameters, dict) or not isinstance(metadata, dict):
        raise ValueError("its parameters or its metadata are no JSON object")
    _check_parameters(parameters, bits, with_dim=version > 1)
    parts = {}
    for name, entry in parameters.items():
        piece = torch.frombuffer(bytearray(bits[name]), dtype=torch.uint8) if name in bits else torch.empty(0).byte()
        parts[name] = (tuple(entry["shape"]), entry["unit"], piece, entry.get("dim", 0))
    return parts, metadata


def _tensors(header: dict[str, Any], body: bytes) -> dict[str, bytes]:
    """Return each tensor's bytes; ValueError unless all are uint8 vectors that fill the body exactly."""
    spans = {}
    for name, entry in header.items():
        if name == METADATA:
            continue
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"} or entry["dtype"] != "U8":
            raise ValueError(f"no packed bits for {name!r:.80}")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
            raise ValueError(f"no packed bits for {name!r:.80}")
        start, stop = offsets
        if shape != [stop - start] or start == stop:
            raise ValueError(f"bytes {start} to {stop} for {shape!r:.80} packed bytes of {name!r:.80}")
        spans[name] = start, stop
    end = 0
    for start, stop in sorted(spans.values()):
        if start != end:
            raise ValueError("its tensors do not lie side by side")
        end = stop
    if end != len(body):
        raise ValueError(f"its tensors take {end} bytes, it has {len(body)}")
    return {name: body[start:stop] for name, (start, stop) in spans.items()}


def _check_parameters(parameters: dict[str, Any], bits: Mapping[str, bytes], *, with_dim: bool) -> None:
    """Raise ValueError, with the parameter's name, unless each of them fits the schema and has its packed bits."""
    used = 0
    for name, entry in parameters.items():
        name.encode()  # UnicodeEncodeError, a ValueError, for half of a surrogate pair, which has no digest
        if not isinstance(entry, dict) or entry.keys() - ({"dim"} if with_dim else set()) != {"shape", "unit"}:
            raise ValueError(f"other fields than a mask's for {name!r:.80}")
        shape, unit, dim = entry["shape"], entry["unit"], entry.get("dim", 0)
        if not isinstance(unit, str) or unit not in UNITS:
            raise ValueError(f"the unit {unit!r:.40} for {name!r:.80}")
        if not _are_sizes(shape) or len(shape) > MAX_NDIM or math.prod(n for n in shape if n) > MAX_NUMEL:
            raise ValueError(f"the shape {shape!r:.80} for {name!r:.80}")
        if type(dim) is not int or not 0 <= dim < max(1, len(shape)):
            raise ValueError(f"channels along dimension {dim!r:.40} of {len(shape)} for {name!r:.80}")
        if unit == "row" and row_length(shape, dim) > MAX_ROW_LENGTH:
            raise ValueError(f"the shape {shape!r:.80} for rows of {name!r:.80}")
        units = unit_count(shape, dim) if unit == "row" else math.prod(shape)
        piece = bits.get(name, b"")
        if len(piece) != packed_bytes(units) or (units % 8 and piece[-1] >> units % 8):
            raise ValueError(f"other packed bits than {units} for {name!r:.80}")
        used += name in bits
    if used != len(bits):
        raise ValueError("packed bits of a parameter that it does not list")


def _are_sizes(value: Any) -> bool:
    """Return whether this is a list of integers of at least 0, each within 63 bits."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= MAX_NUMEL for n in value)


def _parse(text: str) -> Any:
    """Parse JSON; ValueError for an object that has a key twice."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is there twice")
    return result


def _digest(text: str, bits: Mapping[str, bytes]) -> str:
    """Return the SHA-256 (hex) of the header's text and of each tensor's name, dtype and bytes."""
    total = hashlib.sha256(text.encode())
    for name in sorted(bits):
        total.update(f"\0{name} torch.uint8\0".encode() + bits[name])
    return total.hexdigest()
