"""float64: models of it run through every op and every public function; as torch's default dtype it changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import delfast
from delfast.localization.criteria import WITHOUT_SET
from delfast.ops import OPS
from delfast.optim import MaskedAdamW, MaskedSGD
from delfast.unlearning import METHODS
from delfast.unlearning.one_shot import Dampening
from tests import cases
from tests.localization.per_example.loop import cross_entropy, example_gradients, in_double, summed
from tests.ops.calls import sample_calls

FORGET, RETAIN = cases.image_batches(12, seed=1), cases.image_batches(20, seed=2)
REFERENCE = {op.name: op.reference for op in OPS}
FLOAT32_ALWAYS = {"steps"}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def widened(value: Any, name: str = "") -> Any:
    if isinstance(value, list):
        return [widened(v) for v in value]
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float and name not in FLOAT32_ALWAYS else copy.deepcopy(value)


@pytest.mark.parametrize("number", range(len(OPS)))
def test_every_op_takes_float64(number: int) -> None:
    packet, args, kwargs = sample_calls()[number]
    names = [argument.name for argument in packet.default._schema.arguments]
    runs = []
    for function in (packet, REFERENCE[packet.default.name().removeprefix("delfast::")]):
        these = [widened(value, name) for value, name in zip(args, names, strict=False)]
        result = function(*these, **copy.deepcopy(kwargs))
        runs.append([t for t in torch.utils._pytree.tree_leaves((result, these)) if isinstance(t, Tensor)])
        results = [t for t in torch.utils._pytree.tree_leaves(result) if t is not None and t.is_floating_point()]
        assert all(t.dtype == torch.float64 for t in results)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*runs, strict=True))


def float64_model() -> tuple[nn.Module, list[Any], list[Any]]:
    torch.manual_seed(0)
    model, forget = in_double(cases.SmallNet(), FORGET)
    return model, forget, in_double(model, RETAIN)[1]


@pytest.mark.parametrize("criterion", ["weighted_grad", "grad", "weight", "random", "shallowest", "deepest", "critmem"])
def test_scores_of_float64_models_select(criterion: Any) -> None:
    model, forget, _ = float64_model()
    scores = delfast.score(model, None if criterion in WITHOUT_SET else forget, criterion)
    mask = scores.select(0.3)
    assert 0 < mask.fraction <= 0.3
    if criterion in ("weighted_grad", "grad", "weight"):
        assert scores.channel_scores().dtype == torch.float64
        elements = scores.select(0.3, "param").to_dense()
        exact = {
            name: (p.detach() * (0 if scores.gradients is None else scores.gradients[name])).abs()
            if criterion == "weighted_grad"
            else (p.detach() if scores.gradients is None else scores.gradients[name]).abs()
            for name, p in model.named_parameters()
        }
        least = min(float(exact[name][flags].min()) for name, flags in elements.items() if flags.any())
        assert all(bool((exact[name][~flags] <= least).all()) for name, flags in elements.items())


@pytest.mark.parametrize("criterion", ["grad", "squared_grad"])
def test_per_example_scores_are_the_loops_in_float64(criterion: Any) -> None:
    model, forget, _ = float64_model()
    scores = delfast.score(model, forget, criterion, per_example=True)
    expected = summed(example_gradients(model, forget, cross_entropy), "abs" if criterion == "grad" else "square")
    assert scores.gradients is not None
    for name, total in expected.items():
        assert scores.gradients[name].dtype == torch.float64
        torch.testing.assert_close(scores.gradients[name], total / 12, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("granularity", ["channel", "param"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_masked_optimizers_step_float64_as_torchs(granularity: Any, optimizer: str) -> None:
    model, forget, _ = float64_model()
    mask = delfast.score(model, forget).select(0.4, granularity)
    delfast.reset_(model, mask, init=cases.SmallNet, seed=3)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    named = list(ours.named_parameters())
    masked: Any = (
        MaskedSGD(named, mask, lr=0.05, momentum=0.9, weight_decay=0.01)
        if optimizer == "sgd"
        else MaskedAdamW(named, mask, lr=0.01)
    )
    plain: Any = (
        torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        if optimizer == "sgd"
        else torch.optim.AdamW(theirs.parameters(), lr=0.01)
    )
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, dtype=torch.float64, generator=generator)
            b.grad = a.grad.clone()
        masked.step()
        plain.step()
        masked.load_state_dict(copy.deepcopy(masked.state_dict()))
    chosen, before = mask.to_dense(), dict(model.named_parameters())
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a[chosen[name]], b[chosen[name]], rtol=1e-12, atol=1e-14)
        assert torch.equal(a[~chosen[name]], before[name][~chosen[name]])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_unlearns_in_float64(method: str) -> None:
    model, forget, retain = float64_model()
    before = copy.deepcopy(model.state_dict())
    chosen_method = Dampening(alpha=1.5) if method == "ssd" else METHODS[method]()
    epochs: Any = {"epochs": 1} if chosen_method.epochs else {}
    result = delfast.unlearn(model, forget=forget, retain=retain, method=chosen_method, init=cases.SmallNet, **epochs)
    chosen = result.mask.to_dense()
    moved = {name: parameter != before[name] for name, parameter in model.named_parameters()}
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    assert any(flags.any() for flags in moved.values())
    assert not any(bool((flags & ~chosen[name]).any()) for name, flags in moved.items())


def test_compact_gradients_of_float64_models_are_the_dense_ones() -> None:
    model, forget, _ = float64_model()
    mask = delfast.localize(model, forget)
    cross_entropy(model, forget[0]).sum().backward()
    dense = {name: parameter.grad for name, parameter in model.named_parameters()}
    chosen = mask.to_dense()
    with delfast.compact(model, mask) as handle:
        cross_entropy(model, forget[0]).sum().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert any(name.endswith("weight_rows") for name in found), handle.mask
        for name, gradient in found.items():
            whole = dense[name.removesuffix("_rows")]
            if name.endswith("_rows"):
                rows = chosen[name.removesuffix("_rows")].flatten(1).any(dim=1)
                torch.testing.assert_close(gradient, whole[rows], rtol=1e-10, atol=1e-14)


def whole_job(optimizer: type[MaskedSGD] | type[MaskedAdamW]) -> list[Any]:
    """Masks and weights of a job on a float32 model."""
    with default_dtype(torch.float32):
        torch.manual_seed(0)
        model, fresh = cases.SmallNet(), cases.SmallNet()
    masks = [delfast.score(model, FORGET, per_example=True).select(0.3)]
    masks += [
        delfast.score(model, criterion="deepest").select(0.2),
        delfast.score(model, FORGET, "critmem").select(0.2),
    ]
    masks += [delfast.score(model, FORGET).select(0.3, granularity) for granularity in ("channel", "param")]
    delfast.reset_(model, masks[-1], init=fresh)
    stepping = optimizer(model.named_parameters(), mask=masks[-1], lr=0.01)
    for batch in RETAIN:
        cross_entropy(model, batch).sum().backward()
        stepping.step()
    delfast.unlearn(model, forget=FORGET, retain=RETAIN, mask=masks[-2], init=fresh, epochs=1)
    return [[mask.digest for mask in masks], *[parameter.detach() for parameter in model.parameters()]]


@pytest.mark.parametrize("optimizer", [MaskedSGD, MaskedAdamW])
def test_float64_as_the_default_dtype_changes_nothing(optimizer: Any) -> None:
    expected = whole_job(optimizer)
    with default_dtype(torch.float64):
        result = whole_job(optimizer)
    assert result[0] == expected[0]
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(result[1:], expected[1:], strict=True))


@pytest.mark.parametrize("number", range(len(OPS)))
def test_ops_and_their_fake_kernels_ignore_the_default_dtype(number: int) -> None:
    packet, args, kwargs = sample_calls()[number]
    expected = packet(*copy.deepcopy(args), **kwargs)
    with default_dtype(torch.float64):
        reference = REFERENCE[packet.default.name().removeprefix("delfast::")](*copy.deepcopy(args), **kwargs)
        meta = torch.utils._pytree.tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
        fake = packet(*meta[0], **meta[1])
    leaves = [torch.utils._pytree.tree_leaves(result) for result in (expected, reference, fake)]
    for a, b, c in zip(*leaves, strict=True):
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype == c.dtype and a.shape == b.shape == c.shape
