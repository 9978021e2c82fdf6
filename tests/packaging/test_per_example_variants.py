"""The table from which the CUDA launcher of the per-example sums chooses, and the times it is made of."""

import json
import re

import pytest
import torch

from benchmarks import per_example_variants as variants
from delfast.ops import BACKEND

HEADER = variants.ROOT / "csrc" / "cuda" / "per_example_variants.h"
TIMES = json.loads(variants.TIMES.read_text(encoding="utf-8"))


def test_the_table_is_made_of_the_kept_times() -> None:
    kept = variants.TABLE.read_text(encoding="utf-8")
    assert kept == variants.table(TIMES), "make it again: python -m benchmarks.per_example_variants"
    assert variants.TIMES.read_text(encoding="utf-8") == variants.dump(TIMES)


def test_variants_are_those_of_the_kernels() -> None:
    names = re.search(r"kVariantNames\[\] = {(.*?)}", HEADER.read_text(encoding="utf-8"))
    assert names and tuple(re.findall(r'"(\w+)"', names[1])) == variants.VARIANTS


def test_every_card_has_times_of_every_variant_and_layer() -> None:
    layers = [layer["name"] for layer in TIMES["layers"]]
    assert TIMES["cards"] and len(set(layers)) == len(layers)
    for card in TIMES["cards"]:
        assert card["provenance"] and set(card["milliseconds"]) == set(variants.TOLERANCE)
        for by_layer in card["milliseconds"].values():
            assert list(by_layer) == layers
            assert all(set(by_variant) == set(variants.VARIANTS) for by_variant in by_layer.values())


def test_geometry_is_torchs() -> None:
    for layer in TIMES["layers"]:
        convolution = torch.nn.Conv2d if len(layer["in"]) == 2 else torch.nn.Conv1d
        geometry = [layer[key] for key in ("kernel", "stride", "padding")]
        out = convolution(1, 1, *geometry, device="meta")(torch.empty(1, 1, *layer["in"], device="meta"))
        assert list(out.shape[2:]) == variants.out_sizes(layer)
        assert variants.is_direct(layer) == (set(layer["kernel"]) == set(layer["stride"]) == {1})


@pytest.mark.skipif(not BACKEND.build_info.get("cuda"), reason="the extension has no CUDA kernels")
def test_a_variant_can_be_forced_and_nonsense_is_refused() -> None:
    assert BACKEND.module is not None
    for name in (*variants.VARIANTS, "measured"):
        BACKEND.module.force_per_example_variant(name)
    with pytest.raises(ValueError, match="expected a variant of the per-example kernels or 'measured', got '256x256'"):
        BACKEND.module.force_per_example_variant("256x256")
