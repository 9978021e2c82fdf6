"""score(per_example=True) end to end: precision, checkpointing, the fallback and its log line, errors, model state."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import delfast
from delfast import InputError
from delfast.experiments.networks import build
from delfast.localization.per_example import PerExampleGradients
from delfast.localization.per_example.contributions import Convolution
from delfast.naming import trainable_parameters
from tests import cases
from tests.localization.per_example.loop import assert_parity, cross_entropy, example_gradients, in_double, summed
from tests.networks import Checkpointed, DeadAtFirst, Interleaved, Odd


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.WARNING, "delfast")
    yield caplog


def relative(result: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 error of each parameter that has a gradient."""
    return {
        name: float((result[name].double() - value).norm() / value.norm())
        for name, value in exact.items()
        if value.any()
    }


# Scores


@pytest.mark.parametrize("criterion", ["weighted_grad", "grad", "squared_grad"])
def test_scores_are_means_over_the_examples(criterion: Any) -> None:
    model, batches = in_double(cases.SmallNet(), cases.image_batches(10, 4))
    expected = summed(example_gradients(model, batches), "square" if criterion == "squared_grad" else "abs")
    scores = delfast.score(model, batches, criterion, per_example=True)
    assert scores.gradients is not None and scores.examples == 10
    for name, value in scores.gradients.items():
        torch.testing.assert_close(value, expected[name] / 10, rtol=1e-11, atol=1e-14)
        assert value.shape == scores.parameters[name].shape and value.dtype == torch.float64


def test_masks_say_that_they_are_per_example() -> None:
    model, batches = cases.SmallNet(), cases.image_batches()
    mask = delfast.localize(model, batches, per_example=True)
    assert mask.metadata["per_example"] is True and mask.metadata["examples"] == 40
    assert delfast.localize(model, batches).metadata["per_example"] is False
    scores = delfast.score(model, batches, "squared_grad", per_example=True)
    assert scores.select(0.3).metadata["criterion"] == "squared_grad"
    assert scores.gradients is not None
    by_hand = delfast.Scores(scores.parameters, {n: g.sqrt() for n, g in scores.gradients.items()}, "grad", 40)
    assert scores.select(0.3, "param").digest == by_hand.select(0.3, "param").digest  # the same ranking


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet18-thin", "vit", "everything"])
def test_float32_within_the_error_budget(name: str) -> None:
    torch.manual_seed(0)
    if name == "everything":
        model: nn.Module = cases.Everything().eval()
        batches = cases.everything_batches(6)
    else:
        model = build(name, 10, 3, 16).eval()
        batches = [(torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,)))]
    same = summed(example_gradients(model, batches), "abs")
    scores = delfast.score(model, batches, "grad", per_example=True)
    assert scores.gradients is not None
    sums = {n: g * scores.examples for n, g in scores.gradients.items()}
    exact = summed(example_gradients(*in_double(copy.deepcopy(model), batches)), "abs")
    ours, theirs = relative(sums, exact), relative(same, exact)
    # the passes round differently: a single layer may have a larger error than the loop, the whole network may not
    eps = torch.finfo(torch.float32).eps
    assert all(sums[n].dtype == torch.float32 for n in sums)
    assert max(ours.values()) <= 2 * max(theirs.values()) + eps


@pytest.mark.long
def test_autocast_in_bfloat16() -> None:
    model = build("vit", 10, 3, 16).eval()
    images, targets = torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")

    exact = summed(example_gradients(*in_double(copy.deepcopy(model), [(images, targets)])), "abs")
    theirs = relative(summed(example_gradients(model, [(images, targets)], loss_fn), "abs"), exact)
    inside = delfast.score(model, [(images, targets)], "grad", per_example=True, loss_fn=loss_fn)
    with torch.autocast("cpu", torch.bfloat16):
        around = delfast.score(model, [(images, targets)], "grad", per_example=True)
    for scores in (inside, around):
        assert scores.gradients is not None
        ours = relative({n: g * 4 for n, g in scores.gradients.items()}, exact)
        assert max(ours.values()) <= 2 * max(theirs.values())


@pytest.mark.parametrize("kind", [nn.Linear, lambda i, o: nn.Conv2d(i, o, 1)])
def test_autocast_lends_the_kernels_what_the_layer_computed_with(kind: Any) -> None:
    """The input after the cast, not the wider one before it, which has other values and twice the memory."""
    dtypes: list[tuple[torch.dtype, torch.dtype]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.delfast.per_example_accumulate_.default:
                dtypes.append((args[1].dtype, args[2].dtype))
            return func(*args, **(kwargs or {}))

    shape = (5, 4) if kind is nn.Linear else (5, 4, 3, 3)
    model = nn.Sequential(kind(4, 6), nn.ReLU(), kind(6, 3), nn.Flatten())
    with torch.autocast("cpu", torch.bfloat16), Watch():
        delfast.score(model, [(torch.randn(shape), torch.zeros(5, dtype=torch.int64))], per_example=True)
    assert dtypes == [(torch.bfloat16, torch.bfloat16)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_sum_in_float32(dtype: torch.dtype) -> None:
    model = cases.SmallNet().to(dtype)
    scores = delfast.score(model, [(x.to(dtype), y) for x, y in cases.image_batches()], per_example=True)
    assert scores.gradients is not None and all(g.dtype == torch.float32 for g in scores.gradients.values())
    assert 0 < scores.select(0.3).selected <= 0.3 * scores.total


def test_batches_may_have_any_form_and_size() -> None:
    model, batches = in_double(cases.SmallNet(), cases.image_batches(9, 4))
    expected = delfast.score(model, batches, per_example=True).gradients

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch["image"]), batch["label"], reduction="none")

    whole = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    dicts = [{"image": x, "label": y, "name": "kept"} for x, y in batches]
    for loader, options in (
        (whole, {}),
        ([(torch.arange(len(y)), x, y) for x, y in batches], {}),
        ([(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(y))], {}),
        (dicts, {"loss_fn": loss_fn}),
    ):
        got = delfast.score(model, loader, per_example=True, **options).gradients
        assert expected is not None and got is not None
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-14)


# Passes


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, logged: pytest.LogCaptureFixture) -> None:
    model, batches = in_double(
        Checkpointed(reentrant), [(torch.randn(n, 3, 5, 5), torch.arange(n) % 4) for n in (5, 1)]
    )
    plain = copy.deepcopy(model)
    plain.reentrant = False  # the loop uses autograd.grad, which does not support reentrant checkpoints
    expected = summed(example_gradients(plain, batches), "abs")
    sums = PerExampleGradients(model, trainable_parameters(model), cross_entropy, "abs")
    for batch in batches:
        sums.add(batch)
    assert not logged.records
    for name, value in expected.items():
        torch.testing.assert_close(sums.sums[name], value, rtol=1e-10, atol=1e-14)


def test_no_weight_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = cases.SmallNet().eval(), cases.image_batches(8, 8)
    wanted = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution_backward.default:
                wanted.append(args[-1])
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(Convolution, "add", lambda *_: None)  # the reference uses this operator too
    sums = PerExampleGradients(model, trainable_parameters(model), None, "abs")
    with Spy():
        sums.add(batches[0])
    assert wanted and all(not weight and not bias for _, weight, bias in wanted)


def test_compiled_and_wrapped_models() -> None:
    model, batches = in_double(cases.SmallNet(), cases.image_batches(6, 4))
    expected = delfast.score(model, batches, per_example=True).gradients
    model.features[3] = torch.compile(model.features[3], backend="eager")
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    got = delfast.score(wrapped, batches, per_example=True).gradients
    assert expected is not None and got is not None
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def test_the_model_is_left_as_it_was(logged: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"net": cases.SmallNet(), "rnn": nn.LSTM(3, 4, batch_first=True)})
    model.train()
    model["net"].features[1].eval()
    fired = []
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
        parameter.register_post_accumulate_grad_hook(lambda p: fired.append(p))
    model["net"].head.weight.requires_grad_(False)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        extra = model["rnn"](batch[0].flatten(2).transpose(1, 2))[0].mean(dim=(1, 2))
        return nn.functional.cross_entropy(model["net"](batch[0]), batch[1], reduction="none") + extra

    def check() -> None:
        assert [m.training for m in model.modules()] == modes and not fired
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(bool((p.grad == 7).all()) for p in model.parameters())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())

    images, targets = cases.image_batches(4, 4)[0]
    leaf = images.clone().requires_grad_()
    delfast.score(model, [(leaf, targets)], per_example=True, loss_fn=loss_fn)
    assert leaf.grad is None
    check()
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        delfast.score(model, [(images, targets), (images[:, :2], targets)], per_example=True, loss_fn=loss_fn)
    check()


# Fallback


def test_what_no_rule_covers_goes_example_by_example_and_is_logged_once(logged: pytest.LogCaptureFixture) -> None:
    model, batches = in_double(Odd(), [(torch.randn(n, 6, 4), torch.arange(n) % 3) for n in (4, 3, 1)])
    odd = {n for n, _ in model.named_parameters() if n.startswith(("rnn", "normed", "inside"))}
    assert_parity(model, batches, unknown=odd)
    assert len(logged.records) == 2  # one a pass over the set: assert_parity makes two
    assert "'rnn.weight_ih_l0'" in logged.text and "(each is used by lstm, for which there is no rule)" in logged.text
    assert "'inside' (each is used by an operation that cannot be captured)" in logged.text


def test_rows_in_unknown_order_go_example_by_example(logged: pytest.LogCaptureFixture) -> None:
    model, batches = in_double(Interleaved(), [(torch.randn(4, 6, 4), torch.arange(4) % 3)])
    assert_parity(model, batches, unknown={"mixed.weight", "mixed.bias"})
    assert "'mixed.weight', 'mixed.bias' (each mixes the examples" in logged.text


def test_losses_that_depend_on_other_examples_are_taken_within_their_batch() -> None:
    class Contrast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        z = model.head(batch[0])
        return nn.functional.cross_entropy(z @ z.t(), torch.arange(len(z)), reduction="none")

    model, x = Contrast().double(), torch.randn(5, 4).double()
    expected = torch.zeros_like(model.head.weight)
    for loss in losses(model, (x,)):
        expected += torch.autograd.grad(loss, model.head.weight, retain_graph=True)[0].abs()
    sums = PerExampleGradients(model, trainable_parameters(model), losses, "abs")
    sums.add((x,))
    torch.testing.assert_close(sums.sums["head.weight"], expected)


def test_layers_that_a_trial_could_not_see() -> None:
    model, [(x, y)] = in_double(DeadAtFirst(), [(torch.randn(6, 4), torch.arange(6) % 3)])
    dead, alive = x.clone(), x.clone()
    dead[:, 0], alive[:, 0] = -1, 1
    half = torch.cat((dead[:2], alive[2:5], dead[5:]))
    assert_parity(model, [(dead, y), (half, y), (alive, y), (half, y)])
    assert_parity(model, [(half, y)] * 5, unknown={"layer.weight", "layer.bias"})


# Errors


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm1d(4, track_running_stats=False), "'1' normalizes by the statistics of the batch"),
        (nn.BatchNorm1d(4, affine=False, track_running_stats=False), "'1' normalizes by the statistics of the batch"),
    ],
)
def test_layers_that_mix_the_examples_are_refused(layer: nn.Module, message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), layer)
    with pytest.raises(InputError, match=message):
        delfast.score(model, [(torch.randn(3, 3), torch.arange(3))], per_example=True)


def test_what_is_refused() -> None:
    class Functional(cases.SmallNet):
        def forward(self, images: Tensor) -> Tensor:
            x = nn.functional.batch_norm(images, None, None, training=True)
            return super().forward(x)

    class Rewrites(cases.SmallNet):
        def forward(self, images: Tensor) -> Tensor:
            x = images.clone()
            y = self.features[0](x)
            x.zero_()
            return super().forward(images) + y.mean()

    def penalized(model: nn.Module, batch: Any) -> Tensor:
        images = batch[0].clone().requires_grad_()
        return torch.autograd.grad(model(images).sum(), images, create_graph=True)[0].flatten(1).norm(dim=1)

    batches = cases.image_batches(4, 4)
    with pytest.raises(InputError, match="'batch_norm' normalizes by the statistics"):
        delfast.score(Functional(), batches, per_example=True)
    with pytest.raises(InputError, match=r"'features.0.weight' needs to stay unchanged, .* changed in place"):
        delfast.score(Rewrites(), batches, per_example=True)
    with pytest.raises(InputError, match="computes no gradients itself"):
        delfast.score(cases.SmallNet(), batches, per_example=True, loss_fn=penalized)
    tokens = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(InputError, match=r"'0.weight' changes its weights as it reads them \(max_norm\)"):
        delfast.score(tokens, [(torch.randint(0, 5, (3, 2)), torch.arange(3))], per_example=True)
    for criterion, per_example, message in (
        ("squared_grad", False, "pass per_example=True"),
        ("weight", True, "expected a criterion with a gradient"),
        ("random", True, "expected a criterion with a gradient"),
    ):
        with pytest.raises(InputError, match=message):
            delfast.score(cases.SmallNet(), batches, criterion, per_example=per_example)
    with pytest.raises(InputError, match="forget set of at least one example"):
        delfast.score(cases.SmallNet(), [], per_example=True)


def _small() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3))
    return model, [(torch.randn(n, 6), torch.arange(n) % 3) for n in (6, 5)]


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize(
    "compute",
    [
        lambda model, data: delfast.score(model, data).channel_scores(),
        lambda model, data: delfast.score(model, data, per_example=True).channel_scores(),
        lambda model, data: delfast.score(model, data, "squared_grad", per_example=True).channel_scores(),
        lambda model, data: delfast.score(model, data, "critmem").channel_scores(),
        lambda model, data: torch.from_numpy(delfast.signed_channels(model, data).matrix),
    ],
    ids=["mean", "abs", "square", "critmem", "signed"],
)
def test_inference_mode_changes_nothing(compute: Callable[..., Tensor], made_inside: bool) -> None:
    model, data = _small()
    expected = compute(model, data)
    with torch.inference_mode():
        found = compute(model, [(x.clone(), y.clone()) for x, y in data] if made_inside else data)
        with pytest.raises(InputError, match=r"made outside torch.inference_mode\(\), got '0.weight' made inside"):
            compute(copy.deepcopy(model), data)
    assert torch.equal(found, expected)
