"""seeded: the numbers of torch.manual_seed, and no generator of torch's is read or changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from delfast import InputError
from delfast.seeding import _generator_position, _is_random, _with_generator, seeded
from tests import cases

SHORT = ["mnasnet0_5", "shufflenet_v2_x0_5", "squeezenet1_0"]
LARGE = ("vit_h_14", "vit_l_16", "vit_l_32", "regnet_y_128gf", "convnext_large", "swin_b", "swin_v2_b")
NETWORKS = [name for name in torchvision.models.list_models(module=torchvision.models) if name not in LARGE]


def both(seed: int, make: Callable[[], Any]) -> tuple[Any, Any]:
    """Return ``make``'s values after manual_seed and under ``seeded``, which must leave torch's generator alone."""
    torch.manual_seed(seed)
    expected = make()
    before = torch.get_rng_state()
    with seeded(seed):
        found = make()
    assert torch.equal(torch.get_rng_state(), before)
    return expected, found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.slow) for name in NETWORKS]
)
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_torchvision_s_networks(name: str) -> None:
    networks = both(5, lambda: torchvision.models.get_model(name, weights=None))
    expected, found = (network.state_dict() for network in networks)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def truncated(std: float) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(300), std=std)


CHANCE = torch.full((50,), 0.3)
DRAWS: dict[str, Callable[[], Tensor]] = {
    "trunc_normal_": lambda: truncated(0.02),
    "uniform_": lambda: torch.empty(300).uniform_(-1, 2),
    "normal_": lambda: torch.empty(301).normal_(),
    "kaiming_uniform_": lambda: nn.init.kaiming_uniform_(torch.empty(9, 7)),
    "orthogonal_": lambda: nn.init.orthogonal_(torch.empty(9, 7)),
    "sparse_": lambda: nn.init.sparse_(torch.empty(9, 7), 0.4),
    "rand": lambda: torch.rand(3, 5),
    "rand, out": lambda: torch.rand(3, 5, out=torch.empty(3, 5)),
    "randn": lambda: torch.randn(301, dtype=torch.float64),
    "randn, out": lambda: torch.randn(35, out=torch.empty(35)),
    "randint": lambda: torch.randint(9, (40,)),
    "randint, low": lambda: torch.randint(-5, 9, (40,)),
    "randint, out": lambda: torch.randint(-5, 9, (40,), out=torch.empty(40, dtype=torch.int64)),
    "randperm": lambda: torch.randperm(60),
    "randperm, out": lambda: torch.randperm(60, out=torch.empty(60, dtype=torch.int64)),
    "random_": lambda: torch.empty(40).random_(3, 9),
    "bernoulli": lambda: torch.bernoulli(CHANCE),
    "bernoulli_": lambda: torch.empty(40).bernoulli_(0.4),
    "bernoulli_, tensor": lambda: torch.empty(50).bernoulli_(CHANCE),
    "dropout": lambda: functional.dropout(torch.ones(60), 0.4),
    "dropout, in place": lambda: functional.dropout(torch.ones(60), 0.4, inplace=True),
    "dropout2d": lambda: functional.dropout2d(torch.ones(3, 20, 2, 2), 0.4),
    "alpha_dropout": lambda: functional.alpha_dropout(torch.ones(60), 0.4, training=True),
    "rrelu": lambda: functional.rrelu(-torch.ones(60), training=True),
    "gumbel_softmax": lambda: functional.gumbel_softmax(torch.ones(6, 7)),
    "attention with dropout": lambda: functional.scaled_dot_product_attention(*torch.rand(3, 1, 6, 4), dropout_p=0.5),
    "attention": lambda: functional.scaled_dot_product_attention(*torch.rand(3, 1, 2, 6, 4)),
    "multinomial": lambda: torch.multinomial(CHANCE, 30, replacement=True),
    "normal": lambda: torch.normal(CHANCE, 2 * CHANCE),
    "normal, mean": lambda: torch.normal(CHANCE, 2.0),
    "normal, std": lambda: torch.normal(0.5, CHANCE),
    "normal, numbers": lambda: torch.normal(0.5, 2.0, (40,)),
    "poisson": lambda: torch.poisson(9 * CHANCE),
    "binomial": lambda: torch.binomial(9 + torch.zeros(50), CHANCE),
    "exponential_": lambda: torch.empty(40).exponential_(2),
    "cauchy_": lambda: torch.empty(40).cauchy_(),
    "geometric_": lambda: torch.empty(40).geometric_(0.3),
    "log_normal_": lambda: torch.empty(40).log_normal_(),
    "gamma": lambda: torch.distributions.Gamma(CHANCE, CHANCE).sample(),
    "dirichlet": lambda: torch.distributions.Dirichlet(CHANCE).sample(),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 6)).weight.detach(),
    "multi-head attention": lambda: nn.MultiheadAttention(8, 2).in_proj_weight.detach(),
    "all at once": lambda: torch.cat([truncated(0.1), torch.randperm(9) * 1.0, torch.randn(17), torch.rand(5)]),
}


@pytest.mark.parametrize("name", DRAWS)
def test_operations_that_draw(name: str) -> None:
    for seed in (0, 3, -1, 2**63 - 1):
        expected, found = both(seed, DRAWS[name])
        assert torch.equal(expected, found) and expected.numel() > 1


LIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 9),
    "randint_like, low": lambda x: torch.randint_like(x, -5, 9),
    "dropout kernel": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "recurrent dropout": lambda x: nn.LSTM(4, 4, num_layers=2, dropout=0.5)(x.expand(6, 4))[0],
}


@pytest.mark.parametrize("name", LIKE)
def test_operations_without_a_generator_are_right_or_refused_by_name(name: str) -> None:
    """The version of torch determines which operations accept a generator."""
    before = torch.get_rng_state()
    try:
        with seeded(3):
            found = LIKE[name](torch.ones(4))
    except InputError as error:
        assert "aten." in str(error) and "\n" not in str(error)
        assert torch.equal(torch.get_rng_state(), before)
    else:
        assert torch.equal(found, both(3, lambda: LIKE[name](torch.ones(4)))[0])


def test_a_dropout_kernel_is_refused_only_where_it_draws() -> None:
    x = torch.ones(4)
    with seeded(0):
        with pytest.raises(InputError, match=r"got aten\.native_dropout\.default, which draws from torch's own"):
            torch.native_dropout(x, 0.5, True)
        for p, train in ((0.0, True), (0.5, False)):
            assert torch.equal(torch.native_dropout(x, p, train)[0], x)


def test_every_random_operation_of_torch_is_known() -> None:
    """A generator is passed by name, or in the last position; whatever accepts none is refused or draws nothing."""
    operations = []
    for name in torch._C._dispatch_get_all_op_names():
        packet, _, overload = name.removeprefix("aten::").partition(".")
        if name.startswith("aten::") and hasattr(torch.ops.aten, packet):
            operation = getattr(getattr(torch.ops.aten, packet), overload or "default", None)
            if operation is not None and _is_random(operation):
                operations.append(operation)
    assert len(operations) > 100
    for operation in operations:
        taking = _with_generator(operation)
        if taking is None:
            continue
        arguments = taking._schema.arguments
        names = [argument.name for argument in arguments]
        assert [name for name in names if name != "generator"] == [
            argument.name for argument in operation._schema.arguments if argument.name != "generator"
        ]
        positional = [argument.name for argument in arguments if not argument.kwarg_only]
        assert "generator" not in positional[:-1] and _generator_position(taking) in (
            len(positional) - 1,
            len(positional),
        )


def test_a_generator_of_the_caller_s_is_used() -> None:
    def draw() -> Tensor:
        return torch.rand(5, generator=torch.Generator().manual_seed(1)) + torch.rand(5)

    expected, found = both(3, draw)
    assert torch.equal(expected, found)


def test_nested_seeds_and_what_follows() -> None:
    with seeded(3):
        first = torch.rand(2)
        with seeded(4):
            inner = torch.rand(2)
        second = torch.rand(2)
    assert torch.equal(torch.cat([first, second]), both(3, lambda: torch.cat([torch.rand(2), torch.rand(2)]))[0])
    assert torch.equal(inner, both(4, lambda: torch.rand(2))[0])


def test_a_network_on_the_meta_device_is_made() -> None:
    with seeded(3), torch.device("meta"):
        assert all(parameter.is_meta for parameter in cases.SmallNet().parameters())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
def test_a_generator_for_each_cuda_device() -> None:
    def draw() -> Tensor:
        return torch.cat([torch.rand(9, device="cuda"), torch.empty(9, device="cuda").normal_(), torch.rand(9).cuda()])

    torch.manual_seed(3)
    expected, before = draw(), torch.cuda.get_rng_state()
    with seeded(3):
        found = draw()
    assert torch.equal(found, expected) and torch.equal(torch.cuda.get_rng_state(), before)
    with seeded(3), pytest.raises(InputError, match="native_dropout"):
        functional.dropout(torch.ones(9, device="cuda"), 0.5)
