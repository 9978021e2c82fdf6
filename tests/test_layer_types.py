"""Layers whose weight is (in, out): everything by output channel, as for the same network with nn.Linear."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import profile
from transformers.pytorch_utils import Conv1D

import delfast
from delfast import layer_types
from delfast.compaction.layers import _new, compact_type
from delfast.errors import InputError
from delfast.localization.per_example import PerExampleGradients
from delfast.mask import Mask
from delfast.naming import trainable_parameters
from delfast.ops import BACKEND
from delfast.optim import MaskedAdamW, MaskedOptimizer, MaskedSGD
from tests.localization.per_example.loop import assert_parity

TRANSPOSED = ("fc.weight", "proj.weight")


class Network(nn.Module):
    """Tokens (N, T, 6) -> logits (N, 3), with the layers of GPT-2's MLP."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.fc: nn.Module = Conv1D(24, 6) if transposed else nn.Linear(6, 24)
        self.proj: nn.Module = Conv1D(6, 24) if transposed else nn.Linear(24, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.proj(functional.gelu(self.fc(x)))).mean(dim=1))


def transposed(name: str, value: Tensor) -> Tensor:
    return value.t() if name in TRANSPOSED else value


def pair(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The network with Conv1D and with nn.Linear, of the same values."""
    linear, conv = Network(False).to(dtype), Network(True).to(dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_()
    conv.load_state_dict({name: transposed(name, value) for name, value in linear.state_dict().items()})
    return conv, linear


def batches(dtype: torch.dtype = torch.float64) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 5, 6, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator))
        for n in (6, 6, 3)
    ]


def assert_same_masks(conv: Mask, linear: Mask) -> None:
    dense = linear.to_dense()
    assert conv.selected == linear.selected > 0 and conv.channels == linear.channels
    for name, flags in conv.to_dense().items():
        assert torch.equal(transposed(name, flags), dense[name]), name


CHOICES = [
    *({"criterion": c, "aggregate": a} for c in ("weighted_grad", "grad", "weight") for a in ("topk_mean", "mean")),
    {"aggregate": "max", "policy": "exact"},
    {"aggregate": "sum", "top_h": "published", "policy": "exact"},
    {"per_example": True},
    {"criterion": "squared_grad", "per_example": True},
    {"criterion": "random"},
    {"criterion": "critmem"},
    {"criterion": "shallowest"},
    {"criterion": "grad", "granularity": "param"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(map(str, choice.values())))
@pytest.mark.parametrize("budget", [0.1, 0.3, 0.7])
def test_masks_are_those_of_the_same_network_with_linear_layers(choice: dict[str, Any], budget: float) -> None:
    conv, linear = (delfast.localize(network, batches(), budget, **choice) for network in pair())
    assert_same_masks(conv, linear)


def test_a_mask_by_columns_is_saved_and_loaded(tmp_path: Any) -> None:
    mask = delfast.localize(pair()[0], batches())
    mask.save(tmp_path / "mask.safetensors")
    loaded = Mask.load(tmp_path / "mask.safetensors")
    assert loaded.digest == mask.digest and loaded["fc.weight"].dim == 1 and loaded["head.weight"].dim == 0
    assert loaded["fc.weight"].units == 24


def test_reset_changes_the_selected_columns_alone() -> None:
    conv, _ = pair()
    mask = delfast.localize(conv, batches())
    before, fresh = copy.deepcopy(conv.state_dict()), pair()[0].state_dict()
    delfast.reset_(conv, mask, init=fresh)
    for name, flags in mask.to_dense().items():
        assert torch.equal(conv.state_dict()[name], torch.where(flags, fresh[name], before[name])), name


@pytest.mark.parametrize("make", [MaskedSGD, MaskedAdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_optimizers_step_the_columns_as_they_step_rows(make: type[MaskedOptimizer], dtype: torch.dtype) -> None:
    networks = pair(dtype)
    settings: dict[str, Any] = {"momentum": 0.9} if make is MaskedSGD else {}
    for network in networks:
        mask = delfast.localize(network, batches(dtype))
        optimizer = make(network.named_parameters(), mask, lr=0.01, weight_decay=0.1, **settings)  # type: ignore[call-arg]
        for x, y in batches(dtype):
            optimizer.zero_grad()
            functional.cross_entropy(network(x), y).backward()
            optimizer.step()
        optimizer.replace_mask(delfast.localize(network, batches(dtype), budget=0.5))
        optimizer.step()
    expected = networks[1].state_dict()
    for name, value in networks[0].state_dict().items():
        torch.testing.assert_close(transposed(name, value), expected[name])


@pytest.mark.skipif(BACKEND.module is None, reason="the reference copies")
def test_a_step_copies_no_parameter() -> None:
    conv, _ = pair(torch.float32)
    optimizer = MaskedSGD(conv.named_parameters(), delfast.localize(conv, batches(torch.float32)), lr=0.01)
    x, y = batches(torch.float32)[0]
    functional.cross_entropy(conv(x), y).backward()
    optimizer.step()  # the first one lays out the state
    with profile() as found:
        optimizer.step()
    names = [event.name for event in found.events()]
    assert any("masked_sgd_" in name for name in names)
    assert not [name for name in names if name in ("aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy")]


@pytest.mark.parametrize("budget", [0.2, 0.6, 1.0])
def test_compact_training_by_columns_equals_that_by_rows(budget: float) -> None:
    networks = pair()
    for network in networks:
        mask = delfast.localize(network, batches(), budget)
        with delfast.compact(network, mask) as handle:
            selected = {name for name, part in mask.parameters.items() if 0 < part.selected < part.numel}
            assert all(handle.modes[name] == "rows" for name in selected.intersection(TRANSPOSED))
            optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01)
            for x, y in batches():
                optimizer.zero_grad()
                functional.cross_entropy(network(x), y).backward()
                optimizer.step()
    expected = networks[1].state_dict()
    for name, value in networks[0].state_dict().items():
        torch.testing.assert_close(transposed(name, value), expected[name], rtol=1e-12, atol=1e-12)


def test_compact_keeps_optimizer_state_for_the_selected_columns_alone() -> None:
    conv, _ = pair()
    mask = delfast.localize(conv, batches())
    with delfast.compact(conv, mask) as handle:
        shapes = {name: tuple(parameter.shape) for name, parameter in handle.named_parameters()}
        for name in TRANSPOSED:
            count = mask[name].channels
            assert shapes.get(name + "_rows") == (conv.get_parameter(name).shape[0], count) or not count
        assert "fc.weight_rows" not in conv.state_dict()


def test_unlearn_moves_the_selected_columns_alone() -> None:
    conv, _ = pair(torch.float32)
    before = copy.deepcopy(conv.state_dict())
    data = {"forget": batches(torch.float32)[:1], "retain": batches(torch.float32)[1:]}
    result = delfast.unlearn(conv, **data, init=lambda: Network(True), epochs=2, lr=0.05)
    for name, flags in result.mask.to_dense().items():
        moved = conv.state_dict()[name] != before[name]
        assert bool(moved[flags].any()) and not bool(moved[~flags].any()), name


def test_per_example_gradients_take_one_pass() -> None:
    assert_parity(pair()[0], batches())


def test_signed_channels_are_those_of_the_same_network_with_linear_layers() -> None:
    conv, linear = (delfast.signed_channels(network, batches()) for network in pair())
    assert conv.layers == linear.layers == {"fc.weight": 24, "proj.weight": 6, "head.weight": 3}
    torch.testing.assert_close(torch.from_numpy(conv.matrix), torch.from_numpy(linear.matrix))


@pytest.mark.long
def test_gpt2_per_example_gradients_equal_the_loop() -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, num_labels=3, pad_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    data = [(torch.randint(1, 11, (n, 6)), torch.randint(3, (n,))) for n in (5, 5, 2)]

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(model(batch[0]).logits, batch[1], reduction="none")

    assert_parity(model, data, losses, unknown=["transformer.wpe.weight"], bound=1e-10)  # one row for all examples
    mask = delfast.localize(model, data, loss_fn=losses)
    assert {name: part.dim for name, part in mask.parameters.items() if part.dim} == {
        f"transformer.h.{layer}.{name}.weight": 1
        for layer, name in itertools.product(range(2), ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
    }


def own_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.overrides.has_torch_function((x, weight)):
        return torch.overrides.handle_torch_function(own_product, (x, weight), x, weight, bias)  # type: ignore[no-any-return]
    product = x @ weight
    return product if bias is None else product + bias


class Own(nn.Module):
    """A user's layer with its weight as (in, out)."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return own_product(x, self.weight, self.bias)


@pytest.fixture(autouse=True)
def _registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test with registrations of its own."""
    monkeypatch.setattr(layer_types, "_registered", dict(layer_types._registered))


@pytest.mark.parametrize("function", [None, own_product])
def test_a_users_layer_is_scored_and_trained_by_its_outputs(function: Any) -> None:
    delfast.register_layer(Own, output_dim=1, function=function)
    model = nn.Sequential(Own(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    like = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    like.load_state_dict({n: v.t() if n == "0.weight" else v for n, v in model.state_dict().items()})
    data = [(x[:, 0], y) for x, y in batches()]
    masks = [delfast.localize(network, data, 0.4, per_example=True) for network in (model, like)]
    assert masks[0]["0.weight"].dim == 1 and masks[0]["0.weight"].channels == masks[1]["0.weight"].channels > 0
    assert torch.equal(masks[0]["0.weight"].flags, masks[1]["0.weight"].flags)
    assert_parity(model, data, unknown=[] if function else ["0.weight", "0.bias"])
    for network, mask in zip((model, like), masks, strict=True):
        with delfast.compact(network, mask) as handle:
            assert handle.modes["0.weight"] == "rows"
            optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
            for x, y in data:
                optimizer.zero_grad()
                functional.cross_entropy(network(x), y).backward()
                optimizer.step()
    torch.testing.assert_close(model[0].weight.t(), like[0].weight)


def test_a_function_that_computes_something_else_is_refused() -> None:
    class Product(Own):
        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(x, self.weight)

    delfast.register_layer(Product, output_dim=0, function=torch.matmul)  # its outputs lie along dim 1
    model = nn.Sequential(Product(6, 6), nn.Linear(6, 3)).double()
    sums = PerExampleGradients(model, trainable_parameters(model), None, "abs")
    with pytest.raises(InputError, match=r"expected the function registered for '0.weight' .* computes something else"):
        sums.add((batches()[0][0][:, 0], batches()[0][1]))


@pytest.mark.parametrize(
    "arguments, settings, text",
    [
        ((5,), {"output_dim": 1}, "layer_type to be a subclass"),
        ((Own,), {"output_dim": 2}, "output_dim to be 0 or 1"),
        ((Own,), {"output_dim": True}, "output_dim to be 0 or 1"),
        ((Own,), {"output_dim": 1, "function": "addmm"}, "function to be a function or None"),
        ((Conv1D,), {"output_dim": 0}, "Conv1D to be registered once"),
    ],
)
def test_a_wrong_registration_is_refused(arguments: Any, settings: Any, text: str) -> None:
    layer_types.output_dims(nn.Linear(1, 1))  # transformers is there
    with pytest.raises(InputError, match=text):
        delfast.register_layer(*arguments, **settings)


class Scaled(Conv1D):
    """A subclass of a registered layer that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Same(Conv1D):
    """One that computes the same."""


@pytest.mark.parametrize("layer_type", [Scaled, Same])
def test_a_subclass_keeps_its_own_forward_pass(layer_type: type[Conv1D]) -> None:
    model = nn.Sequential(layer_type(8, 6), nn.ReLU(), nn.Linear(8, 3)).double()
    dense, mask = copy.deepcopy(model), delfast.localize(model, [(x[:, 0], y) for x, y in batches()], 0.4)
    x = batches()[0][0][:, 0]
    dense(x).square().sum().backward()
    with delfast.compact(model, mask) as handle:
        assert handle.modes["0.weight"] == "rows"
        torch.testing.assert_close(model(x), dense(x))
        model(x).square().sum().backward()
        columns = mask["0.weight"].flags.nonzero().flatten()
        torch.testing.assert_close(model[0].weight_rows.grad, dense[0].weight.grad[:, columns])
    assert type(model[0]) is layer_type


def test_compact_models_with_registered_layers_are_pickled_and_copied() -> None:
    delfast.register_layer(Own, output_dim=1)
    for layer in (Own(6, 8), Conv1D(8, 6)):
        model = nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 3)).double()
        x = batches()[0][0][:, 0]
        with delfast.compact(model, delfast.localize(model, [(x, batches()[0][1])], 0.4)):
            with torch.no_grad():
                model[0].weight_rows.add_(1)  # not yet in the weight
            for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
                assert type(other[0]) is type(model[0]) and other[0].weight_rows is not model[0].weight_rows
                assert torch.equal(other(x), model(x))
                with torch.no_grad():
                    other[0].weight.fill_(5)
                assert bool((other[0].weight == 5).all()) and not bool((model[0].weight == 5).any())


def test_a_pickle_of_a_type_that_is_not_registered_here_is_refused() -> None:
    class Unknown(nn.Linear):
        pass

    with pytest.raises(InputError, match="expected Unknown to be registered"):
        _new(Unknown)


def test_threads_get_one_compact_class_of_a_type() -> None:
    delfast.register_layer(Own, output_dim=1)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(50):
            layer_type, barrier = type("Fresh", (Own,), {}), threading.Barrier(4)

            def make(_: int, layer_type: type[nn.Module] = layer_type, barrier: threading.Barrier = barrier) -> Any:
                barrier.wait()
                return compact_type(layer_type)

            with ThreadPoolExecutor(4) as pool:
                made = set(pool.map(make, range(4)))
            assert len(made) == 1 and made.pop().plain_type is layer_type
    finally:
        sys.setswitchinterval(interval)


class Addmm(nn.Module):
    """A network with one call of addmm, as ``call(bias, x, weight)``."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.bias, x, self.weight).relu())


@pytest.mark.parametrize(
    "call, is_known",
    [
        (lambda b, x, w: torch.addmm(b, x, w), True),
        (lambda b, x, w: torch.addmm(mat2=w, input=b, mat1=x), True),
        (lambda b, x, w: torch.addmm(b, x, mat2=w, beta=1, alpha=1.0), True),
        (lambda b, x, w: b.addmm(x, w), True),
        (lambda b, x, w: torch.addmm(b, x, w, beta=0.5), False),
        (lambda b, x, w: torch.addmm(0.5, b, x, w), False),
        (lambda b, x, w: torch.addmm(1, b, 1, x, w), False),
        (lambda b, x, w: torch.addmm(2, b, 0.5, x, w), False),
    ],
)
@pytest.mark.filterwarnings("ignore:This overload of addmm is deprecated")
def test_every_form_of_addmm(call: Any, is_known: bool) -> None:
    unknown = [] if is_known else ["weight", "bias"]
    assert_parity(Addmm(call).double(), [(x[:, 0], y) for x, y in batches()], unknown=unknown)


def test_a_registered_function_may_give_another_dtype_than_linear_in_autocast() -> None:
    """Its sum with the bias is float32 there; that of functional.linear has 16 bits."""

    def losses(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return functional.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")

    delfast.register_layer(Own, output_dim=1, function=own_product)
    model = nn.Sequential(Own(6, 8), nn.ReLU(), nn.Linear(8, 3))
    data = [(x[:, 0], y) for x, y in batches(torch.float32)]
    found = delfast.score(model, data, per_example=True, loss_fn=losses).gradients
    exact = delfast.score(model, data, per_example=True).gradients
    assert found is not None and exact is not None
    for name, expected in exact.items():
        assert (found[name] - expected).norm() <= 0.05 * expected.norm(), name
