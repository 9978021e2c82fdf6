"""Mask: a value, packed, saved whole or not at all, and never loaded damaged."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from delfast import InputError, Mask
from delfast.ops.layout import pack
from delfast.parameter_mask import ParameterMask, from_flags
from tests import cases


def dense_mask(seed: int = 0, by_rows: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for i, shape in enumerate(cases.SHAPES):
        flags = torch.rand(shape, generator=generator) < 0.4
        if by_rows and len(shape) > 1 and flags.numel():
            flags = (torch.rand(shape[0], generator=generator) < 0.4).view(-1, *[1] * (len(shape) - 1)).expand(shape)
        masks[f"layer{i}.weight"] = flags.clone()
    return masks


@pytest.mark.parametrize("by_rows", [False, True])
def test_dense_round_trip_and_counts(by_rows: bool) -> None:
    dense = dense_mask(by_rows=by_rows)
    mask = Mask.from_dense(dense)
    assert all(torch.equal(value, dense[name]) for name, value in mask.to_dense().items())
    assert mask.selected == sum(int(d.sum()) for d in dense.values())
    assert mask.total == sum(d.numel() for d in dense.values())
    rows = sum(int(d.reshape(d.shape[0], -1).all(1).sum()) for d in dense.values() if d.ndim > 1 and d.numel())
    assert mask.channels == rows
    if by_rows:
        assert all(part.unit == "row" for part in mask.parameters.values())
    for dtype in (torch.int64, torch.float32):  # SalUn's files hold int64
        assert Mask.from_dense(mask.to_dense(dtype)).digest == mask.digest


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_any_shape_round_trips(shape: list[int], seed: int) -> None:
    flags = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    part = from_flags(tuple(shape), flags)
    assert torch.equal(part.dense(), flags)
    assert part.selected == int(flags.sum()) and part.numel == flags.numel()
    assert torch.equal(part.elements().dense(), flags)


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 3), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_channels_along_any_dimension(shape: list[int], dim: int, whole: bool, seed: int) -> None:
    """Every property of a ParameterMask equals that of the mask of the parameter with ``dim`` moved to the front."""
    dim %= max(1, len(shape))
    generator = torch.Generator().manual_seed(seed)
    flags = torch.rand(shape, generator=generator) < 0.5
    if whole and len(shape) > 1:
        sizes = [n if i == dim else 1 for i, n in enumerate(shape)]
        flags = (torch.rand(sizes, generator=generator) < 0.5).expand(shape).clone()
    part = from_flags(tuple(shape), flags, dim)
    front = flags.movedim(dim, 0) if shape else flags
    expected = from_flags(tuple(front.shape), front)
    assert (part.unit, part.units, part.by_row) == (expected.unit, expected.units, expected.by_row)
    assert torch.equal(part.dense(), flags) and torch.equal(part.elements().dense(), flags)
    assert part.elements().dim == dim and torch.equal(part.elements().flags, flags.flatten())
    assert part.selected == expected.selected == part.elements().selected == int(flags.sum())
    assert part.channels == expected.channels == part.elements().channels
    assert part.channel_count == expected.channel_count == (shape[dim] if len(shape) > 1 else 0)
    if part.unit == "row":
        assert torch.equal(part.flags, expected.flags)
        assert part.unit != "row" or not whole or len(part.bits) == (part.units + 7) // 8


def test_masks_of_other_dims(tmp_path: Path) -> None:
    """A transposed weight: the mask by columns equals, element for element, the same selection by rows or elements."""
    columns = torch.tensor([True, False, True, True, False])
    dense = {"w": columns.expand(3, 5).clone(), "b": torch.tensor([True, False])}
    along = Mask.from_dense(dense, dims={"w": 1})
    flat = Mask.from_dense(dense)
    assert (along["w"].unit, along["w"].dim, along["w"].units) == ("row", 1, 5) and along["w"].by_row
    assert flat["w"].unit == "element" and flat["w"].dim == 0
    assert along.digest == flat.digest and along.selected == flat.selected == 10
    assert along.channels == 3 and flat.channels == 0
    rows = Mask.from_dense({"w": torch.tensor([[True], [False], [True]]).expand(3, 5).clone(), "b": dense["b"]})
    for first, second in ((along, flat), (flat, along), (along, rows), (rows, along)):
        for how, combine in (("union", torch.logical_or), ("intersection", torch.logical_and)):
            both = getattr(first, how)(second)
            assert both["w"].dim == first["w"].dim
            for name, flags in both.to_dense().items():
                assert torch.equal(flags, combine(first.to_dense()[name], second.to_dense()[name]))
    assert along.jaccard(flat) == 1.0 and along.jaccard(rows) == 7 / 14  # the bias is in both
    assert along.union(along)["w"].unit == "row" and along.to("cpu")["w"].dim == 1
    assert along.widen(["w"], {"w": (3, 5)})["w"].dim == 1 and along.widen(["w"], {"w": (3, 5)}).channels == 5
    widened = along.widen(["new"], {"new": (2, 4)}, {"new": 1})["new"]
    assert (widened.dim, widened.units, widened.selected) == (1, 4, 8)
    assert [(row.channels, row.channel_count) for row in along.table()] == [(3, 5), (0, 0)]
    with pytest.warns(DeprecationWarning, match="'of_channels' is now 'channel_count'"):
        assert [row.of_channels for row in along.table()] == [5, 0]
    along.save(tmp_path / "m")
    loaded = Mask.load(tmp_path / "m")
    assert loaded["w"].dim == 1 and loaded.digest == along.digest and loaded["w"].unit == "row"
    with pytest.raises(InputError, match=r"mask for 'w' has 5 channels, the parameter has 6"):
        along.match({"w": torch.ones(3, 6), "b": torch.ones(2)})
    with pytest.raises(InputError, match=r"dim of 'w' in \[0, 2\), got 2"):
        Mask.from_dense(dense, dims={"w": 2})


def test_a_bit_stands_for_a_row_or_an_element() -> None:
    assert ParameterMask((4, 3), "row", pack(torch.tensor([True, False, True, False]))).by_row
    assert not from_flags((4, 3), torch.arange(12).view(4, 3) < 4).by_row
    assert not from_flags((5,), torch.arange(5) < 2).by_row and not from_flags((), torch.tensor(True)).by_row


def test_set_operations() -> None:
    a, b = dense_mask(1), dense_mask(2, by_rows=True)
    first, second = Mask.from_dense(a), Mask.from_dense(b)
    either, both = first.union(second), first.intersection(second)
    for name in a:
        assert torch.equal(either.to_dense()[name], a[name] | b[name])
        assert torch.equal(both.to_dense()[name], a[name] & b[name])
    assert first.jaccard(second) == both.selected / either.selected
    assert first.jaccard(first) == 1.0
    empty = Mask.from_dense({name: torch.zeros_like(value) for name, value in a.items()})
    assert empty.jaccard(empty) == 1.0 and empty.jaccard(first) == 0.0
    with pytest.raises(InputError, match="same parameters, got masks that differ in"):
        first.union(Mask.from_dense({"other": torch.ones(3)}))


def test_from_dense_removes_prefixes_and_refuses_other_values() -> None:
    mask = Mask.from_dense({"module._orig_mod.conv.weight": torch.ones(2, 2), "module.fc.bias": torch.zeros(2)})
    assert mask.names == ["conv.weight", "fc.bias"]
    with pytest.raises(InputError, match=r"zeros and ones for 'w'.*threshold"):
        Mask.from_dense({"w": torch.tensor([0.0, 0.5])})


def test_from_dense_takes_arrays_and_sparse_tensors() -> None:
    flags = torch.tensor([[True, False], [True, True], [False, False]])
    array = flags.numpy()
    read_only = array.astype(numpy.uint8)
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Sparse CSR")  # torch says that its own layout is new
        for value in (
            array, array.astype(numpy.float64), array.astype(numpy.int64), read_only, array[::-1][::-1],
            numpy.asfortranarray(array), flags.tolist(), flags.to_sparse(), flags.float().to_sparse(),
            flags.float().to_sparse_csr(), flags.long().to_sparse_csc(), flags.t().contiguous().t(),
            nn.Parameter(flags.float()),
        ):  # fmt: skip
            assert torch.equal(Mask.from_dense({"w": value})["w"].dense(), flags), value
    for value, message in (
        (None, "for 'w', got a NoneType"),
        ("mask", "for 'w', got a str"),
        (numpy.array([None, 1]), "for 'w', got a ndarray"),
        (object(), "for 'w', got a object"),
        (torch.ones(2, device="meta"), "for 'w', got a Tensor"),
        (numpy.array([0.0, 0.5]), "got other values"),
        (torch.tensor([2]).to_sparse(), "got other values"),
        (torch.tensor([float("nan")]), "got other values"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            Mask.from_dense({"w": value})
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"expected a dict \(name -> 0/1 tensor\), got list"):
        Mask.from_dense([torch.ones(2)])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one mask for 'w', got two"):
        Mask.from_dense({"w": torch.ones(2), "module.w": torch.zeros(2)})


def test_table_lists_every_parameter() -> None:
    dense = dense_mask(by_rows=True)
    table = Mask.from_dense(dense).table()
    assert [row.name for row in table] == list(dense)
    assert sum(row.selected for row in table) == Mask.from_dense(dense).selected
    row = next(row for row in table if row.shape == (33, 1000))
    assert row.channel_count == 33 and row.selected == row.channels * 1000


def test_save_and_load(tmp_path: Path) -> None:
    mask = Mask(Mask.from_dense(dense_mask()).parameters, {"criterion": "weighted_grad", "budget": 0.3, "seed": 0})
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    loaded = Mask.load(path)
    assert loaded.digest == mask.digest and loaded.metadata == mask.metadata and loaded.shapes == mask.shapes
    assert all(torch.equal(value, mask.to_dense()[name]) for name, value in loaded.to_dense().items())
    assert [p.unit for p in loaded.parameters.values()] == [p.unit for p in mask.parameters.values()]


def test_digest_is_of_the_selection_alone() -> None:
    dense = dense_mask(by_rows=True)
    mask = Mask.from_dense(dense)
    unpacked = Mask({name: part.elements() for name, part in mask.parameters.items()}, {"other": "metadata"})
    assert unpacked.digest == mask.digest
    dense["layer8.weight"] = ~dense["layer8.weight"]
    assert Mask.from_dense(dense).digest != mask.digest


@pytest.mark.long
def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    dense = {"conv.weight": torch.ones(3, 2, dtype=torch.bool), "bias": torch.tensor([True, False, True])}
    Mask(Mask.from_dense(dense).parameters, {"budget": 0.3}).save(path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(bytes(damaged))
            with pytest.raises(InputError) as caught:
                Mask.load(path)
            assert "\n" not in str(caught.value)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            Mask.load(path)


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is none; check the path"):
        Mask.load(tmp_path / "absent.safetensors")
    pickle = tmp_path / "mask.pt"
    torch.save({"w": torch.ones(3)}, pickle)
    with pytest.raises(InputError, match="no whole mask file"):
        Mask.load(pickle)
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, tmp_path / "state.safetensors")
    with pytest.raises(InputError, match="no delfast mask"):
        Mask.load(tmp_path / "state.safetensors")


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delfast.mask.FORMAT_VERSION", 99)
    Mask.from_dense({"w": torch.ones(3)}).save(tmp_path / "m.safetensors")
    monkeypatch.undo()
    with pytest.raises(InputError, match="format version 99, this delfast reads 1"):
        Mask.load(tmp_path / "m.safetensors")


@pytest.mark.long
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """The file-size limit stands for the disk: the write fails half-way, after the first kilobyte."""
    path = tmp_path / "mask.safetensors"
    small = Mask.from_dense({"w": torch.ones(3)})
    small.save(path)
    script = f"""
import resource, signal, torch
from delfast import Mask
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
try:
    Mask.from_dense({{"w": torch.rand(100_000) < 0.5}}).save({str(path)!r})
except Exception as error:
    print(type(error).__name__)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip(), "the write was expected to fail"
    assert Mask.load(path).digest == small.digest
    assert [p.name for p in tmp_path.iterdir()] == ["mask.safetensors"]


@pytest.mark.parametrize(("granularity", "limit"), [("channel", 100_000), ("param", 1_500_000)])
def test_file_size_of_a_resnet18_mask(tmp_path: Path, granularity: str, limit: int) -> None:
    import delfast

    mask = delfast.score(cases.resnet18(), criterion="weight").select(0.3, granularity=granularity)
    mask.save(tmp_path / "mask.safetensors")
    size = (tmp_path / "mask.safetensors").stat().st_size
    print(f"{granularity}: {size} bytes")
    assert size < limit


def test_match_refuses_another_architecture() -> None:
    mask = Mask.from_dense({"0.weight": torch.ones(64, 3)})
    with pytest.raises(InputError, match=r"mask for '0.weight' has 64 channels, the parameter has 128"):
        mask.match(dict(nn.Sequential(nn.Linear(3, 128)).named_parameters()))
    with pytest.raises(InputError, match=r"has shape \(64, 3\), the parameter has \(64, 5\)"):
        mask.match(dict(nn.Sequential(nn.Linear(5, 64)).named_parameters()))
    with pytest.raises(InputError, match=r"'0.weight', which the model does not have"):
        mask.match({"1.weight": torch.ones(64, 3)})


def test_metadata_is_plain_json() -> None:
    import delfast

    mask = delfast.score(cases.SmallNet(), criterion="weight").select(0.5)
    assert json.loads(json.dumps(mask.metadata)) == mask.metadata
    assert {"criterion", "granularity", "aggregate", "top_h", "policy", "budget", "delfast", "torch"} <= set(
        mask.metadata
    )
