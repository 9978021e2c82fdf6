"""The rule of multi-head attention: the function's own values, and gradients equal to the loop over examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import delfast
from delfast.localization.per_example.rules.attention import multi_head_attention
from tests.localization.per_example.loop import assert_parity, in_double

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "other sizes": {"kdim": 6, "vdim": 5},
    "other sizes, no bias": {"kdim": 6, "vdim": 5, "bias": False},
    "one more key": {"add_bias_kv": True},
    "one key of zeros": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
}


class Attends(nn.Module):
    """Self- or cross-attention of (N, T, 8), then a linear layer."""

    def __init__(self, how: str, batch_first: bool = True, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.how, self.need_weights, self.batch_first = how, need_weights, batch_first
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        for bias in (self.attention.out_proj.bias, self.attention.in_proj_bias):
            if bias is not None:
                nn.init.normal_(bias)
        # a bias of the keys would have no gradient: softmax removes it
        self.key = nn.Linear(8, options.get("kdim", 8), bias=False)
        self.value = nn.Linear(8, options.get("vdim", 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        masks: dict[str, Tensor] = {}
        if self.how == "causal":
            masks["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(t, dtype=x.dtype)
        if self.how == "padded":
            masks["key_padding_mask"] = (torch.arange(t) == t - 1).expand(len(x), t)
            masks["attn_mask"] = torch.ones(t, t).triu(1).bool()
        x = x if self.batch_first else x.transpose(0, 1)
        key, value = self.key(x), self.value(x)
        if self.how in ("self", "causal", "padded") and key.shape == value.shape == x.shape:
            key = value = x
        elif self.how == "keys" and key.shape == value.shape:
            value = key
        y, weights = self.attention(x, key, value, need_weights=self.need_weights, **masks)
        y = self.head(y.mean(dim=1 if self.batch_first else 0))
        return y if weights is None else y * weights.square().sum(dim=(1, 2)).unsqueeze(1)


def tokens(n: int = 5, t: int = 4) -> list[Any]:
    return [(torch.randn(n, t, 8), torch.arange(n) % 3)]


@pytest.mark.parametrize("how", ["self", "causal", "padded", "keys", "cross"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_is_exact_in_one_pass(options: str, how: str) -> None:
    torch.manual_seed(0)
    need_weights, batch_first = how in ("self", "cross"), how != "keys"
    model, batches = in_double(Attends(how, batch_first, need_weights, **OPTIONS[options]), tokens())
    if how in ("self", "causal", "padded") and "kdim" not in OPTIONS[options]:
        for layer in (model.key, model.value):  # not used
            layer.requires_grad_(False)
    assert_parity(model, batches)


@pytest.mark.parametrize("batch_first", [False, True])
def test_decoders_take_one_pass(batch_first: bool) -> None:
    class Decodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=batch_first)
            self.memory, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            return self.head(self.layer(x, self.memory(x)).mean(dim=1 if batch_first else 0))

    model, batches = in_double(Decodes(), tokens())
    assert_parity(model, batches)
    assert delfast.signed_channels(model, batches).layers["layer.multihead_attn.in_proj_weight"] == 24


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    options=st.sampled_from(list(OPTIONS)),
    batched=st.booleans(),
    need_weights=st.booleans(),
    average=st.booleans(),
    masks=st.sampled_from(["none", "numbers", "booleans", "of each head", "padding", "both", "causal"]),
    cross=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_rule_computes_what_the_function_computes(
    options: str, batched: bool, need_weights: bool, average: bool, masks: str, cross: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    n, t, s = 3, 4, 5 if cross else 4
    layer = nn.MultiheadAttention(8, 2, **OPTIONS[options]).double().eval()
    query = torch.randn(t, n, 8).double()
    key = torch.randn(s, n, layer.kdim).double() if cross or layer.kdim != 8 else query
    value = torch.randn(s, n, layer.vdim).double() if cross or layer.vdim != 8 else query
    given: dict[str, Any] = {"need_weights": need_weights, "average_attn_weights": average}
    if masks == "numbers":
        given["attn_mask"] = torch.randn(t, s).double()
    elif masks in ("booleans", "both"):
        given["attn_mask"] = torch.ones(t, s).triu(1).bool()
    elif masks == "of each head" and batched:
        given["attn_mask"] = torch.randn(n * 2, t, s).double()
    elif masks == "causal":
        given |= {"attn_mask": torch.ones(t, s).triu(1).bool(), "is_causal": True}
    if masks in ("padding", "both"):
        given["key_padding_mask"] = (torch.arange(s) == s - 1).expand(n, s)
    if not batched:
        is_same = key is query, value is query
        query = query[:, 0]
        key, value = (query if same else data[:, 0] for same, data in zip(is_same, (key, value), strict=True))
        given |= {"key_padding_mask": given["key_padding_mask"][0]} if "key_padding_mask" in given else {}
    arguments = (
        8, 2, layer.in_proj_weight, layer.in_proj_bias, layer.bias_k, layer.bias_v, layer.add_zero_attn, 0.1,
        layer.out_proj.weight, layer.out_proj.bias, False,
    )  # fmt: skip
    separate = {
        "use_separate_proj_weight": layer.in_proj_weight is None, "q_proj_weight": layer.q_proj_weight,
        "k_proj_weight": layer.k_proj_weight, "v_proj_weight": layer.v_proj_weight,
    }  # fmt: skip
    expected = functional.multi_head_attention_forward(query, key, value, *arguments, **separate, **given)
    found = multi_head_attention(query, key, value, *arguments, **separate, **given)
    assert (found[1] is None) == (expected[1] is None)
    for mine, theirs in zip(found, expected, strict=True):
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
            assert mine.is_contiguous() or mine is found[1]


def test_an_empty_batch_adds_nothing() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()

    def loss_fn(network: nn.Module, batch: Any) -> Tensor:
        return network(batch[0]).square().flatten(1).sum(dim=1)

    full, empty = (torch.randn(5, 3, 8),), (torch.zeros(0, 3, 8),)
    expected = delfast.score(model, [full], "grad", per_example=True, loss_fn=loss_fn).gradients
    found = delfast.score(model, [full, empty], "grad", per_example=True, loss_fn=loss_fn).gradients
    assert expected is not None and found is not None
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_gradients_of_a_shared_input_are_added_as_under_autocast() -> None:
    """Layers on one float32 input: each converts its own gradient back before they are added."""
    torch.manual_seed(0)
    norm, layers = nn.LayerNorm(16), nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
    model = nn.ModuleDict({"norm": norm, "layers": layers})
    x = torch.randn(1, 16)

    def loss_fn(network: Any, batch: Any) -> Tensor:
        y = network["norm"](batch[0])
        return torch.stack([layer(y).float() for layer in network["layers"]]).square().sum(dim=(0, 2))

    with torch.autocast("cpu", torch.bfloat16):
        (expected,) = torch.autograd.grad(loss_fn(model, (x,)).sum(), [norm.bias])
    found = delfast.score(model, [(x,)], "grad", per_example=True, loss_fn=loss_fn, precision="bf16").gradients
    assert found is not None and torch.equal(found["norm.bias"], expected.abs())
