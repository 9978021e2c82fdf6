"""The mask's file: the same bytes every time, older formats readable, and everything in it checked."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from delfast import InputError, Mask
from delfast.ops.layout import pack
from delfast.parameter_mask import ParameterMask, from_flags


def sample_mask() -> Mask:
    """Rows, elements, channels along other dimensions, empty and scalar parameters, nested metadata."""
    generator = torch.Generator().manual_seed(0)

    def flags(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < 0.5

    parts = {
        "conv.weight": ParameterMask((5, 2, 3), "row", pack(flags(5))),
        "fc.weight": from_flags((3, 7), flags(3, 7)),
        "gpt.weight": ParameterMask((4, 11), "row", pack(flags(11)), 1),
        "gpt.elements": ParameterMask((4, 11), "element", pack(flags(44)), 1),
        "bias": from_flags((9,), flags(9)),
        "scale": from_flags((), torch.tensor(True)),
        "none": from_flags((3, 0), flags(3, 0)),
        'line\n"quoted" ü': from_flags((8,), flags(8)),
    }
    return Mask(parts, {"budget": 0.3, "criterion": "grad", "of": [{"seed": 1}, None], "per_example": True})


def contents(mask: Mask) -> Any:
    """Everything in a mask, in a form that == compares."""
    parts = [(n, p.shape, p.unit, p.dim, p.bits.dtype, p.bits.tolist()) for n, p in mask.parameters.items()]
    return parts, dict(mask.metadata)


def split(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The safetensors header, the mask's header within it, and the tensors' bytes."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["delfast_mask"]), data[8 + size :]


def joined(header: dict[str, Any], inner: Any, body: bytes, text: str | None = None) -> bytes:
    """The inverse of ``split``, with the digest that such a file should have."""
    text = json.dumps(inner) if text is None else text
    header = {name: entry for name, entry in header.items() if name != "__metadata__"}
    total = hashlib.sha256(text.encode())
    for name in sorted(header):
        entry = header[name]
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        try:
            piece = body[slice(*offsets)]
        except TypeError:
            piece = b""
        total.update(f"\0{name} torch.uint8\0".encode() + piece)
    start = json.dumps({"__metadata__": {"delfast_mask": text, "digest": total.hexdigest()}, **header}).encode()
    return len(start).to_bytes(8, "little") + start + body


def loaded(path: Path, data: bytes) -> Mask | None:
    """Return the mask that ``Mask.load`` reads; None for an InputError of one line. Any other error fails the test."""
    path.write_bytes(data)
    try:
        return Mask.load(path)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 800, str(error)
        return None


@pytest.fixture
def saved(tmp_path: Path) -> bytes:
    sample_mask().save(tmp_path / "sample.safetensors")
    return (tmp_path / "sample.safetensors").read_bytes()


def test_round_trip_and_the_format_that_others_read(tmp_path: Path, saved: bytes) -> None:
    mask = loaded(tmp_path / "m", saved)
    assert mask is not None and contents(mask) == contents(sample_mask())
    assert mask.digest == sample_mask().digest
    with safe_open(tmp_path / "m", framework="pt") as stream:
        assert set(stream.metadata()) == {"delfast_mask", "digest"}
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (no mapping)
    assert all(torch.equal(bits, mask[name].bits) for name, bits in tensors.items())
    assert set(mask.names) - set(tensors) == {"none"}
    _, inner, body = split(saved)
    assert (len(saved) - len(body)) % 8 == 0  # the format aligns the tensors
    assert inner["version"] == 2 and inner["parameters"]["gpt.weight"] == {"shape": [4, 11], "unit": "row", "dim": 1}
    assert "dim" not in inner["parameters"]["conv.weight"]


def test_saves_of_one_mask_are_byte_equal(tmp_path: Path, saved: bytes) -> None:
    mask = sample_mask()
    turned = Mask(mask.parameters, dict(reversed(mask.metadata.items())))
    for number, each in enumerate((mask, sample_mask(), turned, *(Mask.load(tmp_path / "sample.safetensors"),) * 5)):
        each.save(tmp_path / str(number))
        assert (tmp_path / str(number)).read_bytes() == saved


@pytest.mark.slow
def test_saves_in_other_processes_are_byte_equal(tmp_path: Path, saved: bytes) -> None:
    script = "import sys; from delfast import Mask; Mask.load(sys.argv[1]).save(sys.argv[2])"
    for seed in ("1", "2"):
        arguments = [sys.executable, "-c", script, str(tmp_path / "sample.safetensors"), str(tmp_path / seed)]
        subprocess.run(arguments, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        assert (tmp_path / seed).read_bytes() == saved


def test_a_file_of_format_1_loads(tmp_path: Path) -> None:
    """Written as format 1 was: by the safetensors library, in its order, without "dim"."""
    bits = {"conv.weight": torch.tensor([0b101], dtype=torch.uint8), "fc.weight": torch.tensor([0xFF, 1]).byte()}
    text = json.dumps(
        {
            "version": 1,
            "parameters": {
                "fc.weight": {"shape": [3, 3], "unit": "element"},
                "conv.weight": {"shape": [3, 2, 2], "unit": "row"},
                "empty": {"shape": [0], "unit": "row"},
            },
            "metadata": {"budget": 0.3, "criterion": "grad"},
        }
    )
    total = hashlib.sha256(text.encode())
    for name in sorted(bits):
        total.update(f"\0{name} {bits[name].dtype}\0".encode() + bits[name].numpy().tobytes())
    save_file(bits, tmp_path / "one", metadata={"delfast_mask": text, "digest": total.hexdigest()})
    mask = Mask.load(tmp_path / "one")
    assert mask.names == ["fc.weight", "conv.weight", "empty"] and mask.metadata == {"budget": 0.3, "criterion": "grad"}
    assert {part.dim for part in mask.parameters.values()} == {0}
    assert mask["conv.weight"].flags.tolist() == [True, False, True] and bool(mask["fc.weight"].dense().all())
    mask.save(tmp_path / "two")
    assert contents(Mask.load(tmp_path / "two")) == contents(mask)
    header, inner, body = split((tmp_path / "one").read_bytes())
    inner["parameters"]["conv.weight"]["dim"] = 0  # a field that format 1 has not
    assert loaded(tmp_path / "m", joined(header, inner, body)) is None


Change = Callable[[dict[str, Any], dict[str, Any], bytearray], None]


def set_inner(*keys: str, value: Any) -> Change:
    def change(header: dict[str, Any], inner: dict[str, Any], body: bytearray) -> None:
        *path, last = keys
        for key in path:
            inner = inner[key]
        inner[last] = value

    return change


def set_tensor(key: str, value: Any, name: str = "bias") -> Change:
    return lambda header, inner, body: header[name].__setitem__(key, value)


def set_bit_past_the_end(name: str) -> Change:
    def change(header: dict[str, Any], inner: dict[str, Any], body: bytearray) -> None:
        body[header[name]["data_offsets"][1] - 1] |= 0x80

    return change


FORGED: dict[str, Change] = {
    **{
        f"{name} {key} {value!r:.30}": set_inner("parameters", name, key, value=value)
        for name, key, values in (
            ("conv.weight", "unit", ("column", "Row", "", None, 0, [], ["row"], {}, True)),
            (
                "conv.weight",
                "shape",
                (
                    [-5, 2, 3],
                    [5.0, 2, 3],
                    [2**200, 2, 3],
                    [5, 2**200, 0],
                    [5, 2**62, 2**62],
                    [5, 3_000_000_000],
                    [True, 2, 3],
                    ["5", 2, 3],
                    "523",
                    {"0": 5},
                    None,
                    5,
                    [],
                    [5, None],
                    [5] + [1] * 64,
                    [float("nan")],
                    [13, 2, 3],
                    [3_000_000_000, 2, 3],
                    [24_000_000_000],
                    [2**40, 0, 2**40],
                ),
            ),
            ("gpt.weight", "dim", (0, 2, -1, 1.0, True, "1", None, 2**70, [1])),
            ("gpt.elements", "dim", (2, -1, 1.0, None)),
            ("bias", "dim", (1, False)),
            ("scale", "dim", (1,)),
            ("bias", "bits", (1,)),
        )
        for value in values
    },
    **{f"bit past the end of {name}": set_bit_past_the_end(name) for name in ("conv.weight", "fc.weight", "bias")},
    **{f"parameters {v!r}": set_inner("parameters", value=v) for v in ([], None, "x", {}, {"bias": None}, 5)},
    **{f"entry {v!r}": set_inner("parameters", "bias", value=v) for v in ([], None, "row", {}, 5, {"shape": [9]})},
    **{f"metadata {v!r}": set_inner("metadata", value=v) for v in ([1, 2], None, "x", 5, True)},
    **{f"version {v!r:.30}": set_inner("version", value=v) for v in (0, 3, -1, 2.0, "2", True, None, [], 10**1000)},
    **{f"dtype {v!r}": set_tensor("dtype", v) for v in ("BF16", "F8_E4M3", "F8_E5M2", "F4", "I8", "BOOL", None, [])},
    **{f"tensor shape {v!r:.30}": set_tensor("shape", v) for v in ([3], [2, 1], [], [2.0], [-2], [2**200], 2, None)},
    **{
        f"offsets {v!r:.30}": set_tensor("data_offsets", v)
        for v in ([0, 2], [0, 3_000_000_000], [2**200, 2**200 + 2], [-2, 0], [5], [], None, [1.0, 3.0], [5, 3])
    },
    "unknown key of the file": set_inner("extra", value=1),
    "no version": lambda header, inner, body: inner.pop("version"),
    "no metadata": lambda header, inner, body: inner.pop("metadata"),
    "unlisted bits": lambda header, inner, body: inner["parameters"].pop("bias"),
    "unlisted parameter": set_inner("parameters", "other", value={"shape": [9], "unit": "row"}),
    "no bits": lambda header, inner, body: header.pop("bias"),
    "unknown key of a tensor": set_tensor("stride", [1]),
    "no tensor": lambda header, inner, body: header.__setitem__("bias", [1, 2]),
    "bytes left over": lambda header, inner, body: body.extend(b"\0" * 8),
    "half of a surrogate pair": set_inner("parameters", "\ud800", value={"shape": [0], "unit": "row"}),
    "an empty tensor": lambda header, inner, body: header.__setitem__(
        "none", {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_files_with_a_right_digest_are_refused(name: str, tmp_path: Path, saved: bytes) -> None:
    header, inner, raw = split(saved)
    body = bytearray(raw)
    FORGED[name](header, inner, body)
    assert loaded(tmp_path / "m", joined(header, inner, bytes(body))) is None


def test_duplicate_names_odd_headers_and_deep_ones_are_refused(tmp_path: Path, saved: bytes) -> None:
    header, inner, body = split(saved)
    text = json.dumps(inner)
    for old, new in (
        ('"bias": {', '"bias": {"shape": [9], "unit": "row"}, "bias": {'),
        ('"unit": "row"', '"unit": "row", "unit": "row"'),
        ('"budget": 0.3', '"budget": 0.3, "budget": 0.3'),
        ('"budget": 0.3', '"budget": ' + "9" * 5000),
        ('"budget": 0.3', '"budget": ' + "[" * 100_000 + "]" * 100_000),
        (text, "[1]"),
        (text, ""),
        (text, "null"),
        (text, "﻿" + text),
    ):
        assert old in text
        assert loaded(tmp_path / "m", joined(header, inner, body, text.replace(old, new, 1))) is None, new[:60]
    start = saved[8 : len(saved) - len(body)]
    for changed in (
        b"[" * 100_000,
        start.replace(b'"bias": {', b'"bias": 1, "bias": {', 1),
        start.decode().encode("utf-16"),
        start.replace(b'"digest"', b'"digestion"'),
        b"\xff" + start,
        b"null",
    ):
        assert loaded(tmp_path / "m", len(changed).to_bytes(8, "little") + changed + body) is None, changed[:60]
    for length in (3_000_000_000, 2**63, 2**64 - 1):
        assert loaded(tmp_path / "m", length.to_bytes(8, "little") + saved[8:]) is None


def test_other_orders_and_spaces_are_the_same_mask(tmp_path: Path, saved: bytes) -> None:
    header, inner, body = split(saved)
    expected = contents(sample_mask())
    for text in (json.dumps(inner, indent=3), json.dumps(dict(reversed(inner.items()))), json.dumps(inner) + " \n"):
        mask = loaded(tmp_path / "m", joined(dict(reversed(header.items())), inner, body, text))
        assert mask is not None and contents(mask) == expected


JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 8, 9, 64, 2**31, 2**63, 2**64, 2**200, 3_000_000_000, 0.5),
    *(float("nan"), float("inf"), "", "row", "element", "column", "U8", "BF16", "F8_E5M2", "F64", "\0", "bias"),
    *([], {}, [[]], [1], [9], [3, 7], [0, 2], {"shape": [9], "unit": "row"}),
]


def replace_node(tree: Any, generator: random.Random) -> None:
    """Change one random node of nested dicts and lists: replace, remove, add or swap."""
    nodes = [tree]
    for node in nodes:
        nodes += [
            child for child in (node.values() if isinstance(node, dict) else node) if isinstance(child, (dict, list))
        ]
    node = generator.choice([node for node in nodes if node] or [tree])
    junk = copy.deepcopy(generator.choice(JUNK))
    if isinstance(node, dict):
        key = generator.choice(list(node))
        action = generator.randrange(4)
        if action == 0:
            del node[key]
        elif action == 1:
            node[generator.choice(["", "dim", "unit", "shape", "bias", "dtype", "x"])] = junk
        elif action == 2:
            node[f"{key}'"] = node.pop(key)
        else:
            node[key] = junk
    else:
        node[generator.randrange(len(node))] = junk


def mutated(data: bytes, generator: random.Random) -> bytes:
    """Damage of any kind: bytes, or the headers' JSON with the digest computed again."""
    kind = generator.randrange(8)
    where = generator.randrange(len(data))
    if kind == 0:
        return data[:where]
    if kind == 1:
        return data[:where] + generator.randbytes(generator.randrange(1, 20)) + data[where:]
    if kind == 2:
        return data[:where] + data[where + generator.randrange(1, 20) :]
    if kind == 3:
        changed = bytearray(data)
        for _ in range(generator.randrange(1, 4)):
            changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        return bytes(changed)
    header, inner, body = split(data)
    changed = bytearray(body)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        if kind == 4:
            replace_node(inner, generator)
        elif kind == 5:
            replace_node({name: entry for name, entry in header.items() if name != "__metadata__"}, generator)
        elif kind == 6:
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        else:
            replace_node(generator.choice((header, inner)), generator)
    return joined(header, inner, bytes(changed))


def as_written(data: bytes) -> Any:
    """Read a file naively, into the same form as ``contents``."""
    header, inner, body = split(data)
    parts = []
    for name, entry in inner["parameters"].items():
        piece = list(body[slice(*header[name]["data_offsets"])]) if name in header else []
        parts.append((name, tuple(entry["shape"]), entry["unit"], entry.get("dim", 0), torch.uint8, piece))
    return parts, inner["metadata"]


def fuzz(tmp_path: Path, saved: bytes, count: int) -> dict[str, int]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    generator = random.Random(17)
    seen = {"refused": 0, "identical": 0, "another": 0}
    for _ in range(count):
        data = mutated(saved, generator)
        mask = loaded(tmp_path / "m", data)
        if mask is None:
            seen["refused"] += 1
        elif contents(mask) == contents(sample_mask()):
            seen["identical"] += 1
        else:  # a forged file of the schema: the mask is the one that it says, whole and usable
            seen["another"] += 1
            assert data == joined(*split(data)), "accepted with a digest that is not the file's"
            assert repr(contents(mask)) == repr(as_written(data))
            for part in mask.parameters.values():
                last = numpy.unpackbits(part.bits.numpy(), bitorder="little")[part.units :]
                assert not last.any() and part.selected <= part.numel
            mask.save(tmp_path / "again")
            assert repr(contents(Mask.load(tmp_path / "again"))[0]) == repr(contents(mask)[0])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 150, f"peak memory grew by {grown:.0f} MiB"
    return seen


def test_damaged_files_are_refused_or_the_same_mask(tmp_path: Path, saved: bytes) -> None:
    seen = fuzz(tmp_path, saved, 600)
    assert seen["refused"] > 300


@pytest.mark.slow
def test_5000_damaged_files_are_refused_or_the_same_mask(tmp_path: Path, saved: bytes) -> None:
    seen = fuzz(tmp_path, saved, 5000)
    print(seen)
    assert seen["refused"] > 2500


def many_names(count: int) -> bytes:
    inner = {
        "version": 2,
        "parameters": {f"p{i}": {"shape": [8], "unit": "row"} for i in range(count)},
        "metadata": {},
    }
    header = {f"p{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(count)}
    return joined(header, inner, bytes(count))


def test_the_time_of_many_names_is_linear(tmp_path: Path) -> None:
    seconds = {}
    for count in (1_000, 4_000):
        path = tmp_path / str(count)
        path.write_bytes(many_names(count))
        times = []
        for _ in range(3):
            start = time.process_time()
            mask = Mask.load(path)
            times.append(time.process_time() - start)
        assert len(mask.parameters) == count
        seconds[count] = min(times)
    assert seconds[4_000] < 10 * seconds[1_000] + 0.1, seconds  # four times as many; quadratic is sixteen


@pytest.mark.slow
def test_a_million_names_are_refused_or_load(tmp_path: Path) -> None:
    """Above the longest header (100 MB): refused at once. The most that fit load in linear time."""
    start = time.process_time()
    assert loaded(tmp_path / "m", many_names(1_000_000)) is None
    (tmp_path / "m").write_bytes(many_names(700_000))
    start = time.process_time()
    assert len(Mask.load(tmp_path / "m").parameters) == 700_000
    print(f"700,000 names: {time.process_time() - start:.1f} s")
    assert time.process_time() - start < 60


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    good = ParameterMask((4, 2), "row", pack(torch.ones(4, dtype=torch.bool)))
    for parts, metadata, message in (
        ({"w": ParameterMask((4, 2), "row", torch.tensor([255], dtype=torch.uint8))}, {}, "other packed bits than 4"),
        ({"w": ParameterMask((4, 2), "row", good.bits, 1)}, {}, "other packed bits than 2"),
        ({"w": ParameterMask((4,), "row", good.bits, 1)}, {}, "dimension 1 of 1"),
        ({"w": ParameterMask((4, 2), "column", good.bits)}, {}, "the unit 'column'"),
        ({"__metadata__": good}, {}, "__metadata__"),
        ({"w": good}, {"when": {1, 2}}, "plain JSON values in a mask's metadata"),
        ({"w": good}, {"model": torch.ones(3)}, "plain JSON values in a mask's metadata"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            Mask(parts, metadata).save(tmp_path / "m")
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_numpys_numbers_in_metadata_are_saved_as_pythons(tmp_path: Path) -> None:
    metadata = {
        "seed": numpy.int64(1), "budget": numpy.float32(0.5), "top_h": numpy.float64(0.1), "ok": numpy.bool_(True),
        "name": numpy.str_("x"), "count": torch.tensor(3), "array": numpy.array(2), "nested": [(numpy.int8(1),)],
    }  # fmt: skip
    Mask(sample_mask().parameters, metadata).save(tmp_path / "m")
    assert Mask.load(tmp_path / "m").metadata == {
        "seed": 1, "budget": 0.5, "top_h": 0.1, "ok": True, "name": "x", "count": 3, "array": 2, "nested": [[1]],
    }  # fmt: skip
