"""score, select, localize: correct and deterministic, and the model stays as it was."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import delfast
from delfast import InputError, Mask
from delfast.experiments.networks import build
from delfast.localization import STRATEGIES, preset_settings
from delfast.localization.criteria import resolve_top_h
from delfast.localization.scores import Scores
from delfast.ops import BACKEND
from tests import cases
from tests.localization.published import published_mask


def loop_gradient(model: nn.Module, batches: list[Any]) -> dict[str, torch.Tensor]:
    """Compute G by its definition in float64, one example at a time."""
    model = copy.deepcopy(model).double().eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    count = 0
    for inputs, targets in batches:
        for x, y in zip(inputs, targets, strict=True):
            x = x.double() if x.is_floating_point() else x
            loss = nn.functional.cross_entropy(model(x[None]), y[None])
            for name, g in zip(
                parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True
            ):
                total[name] += 0 if g is None else g
            count += 1
    return {name: g / count for name, g in total.items()}


@pytest.mark.parametrize("kind", ["images", "everything"])
def test_mean_gradient_is_the_mean_over_every_example_once(kind: str) -> None:
    model, batches = (
        (cases.SmallNet(), cases.image_batches())
        if kind == "images"
        else (cases.Everything(), cases.everything_batches())
    )
    batches_of_doubles = [(x.double() if kind == "images" else x, y) for x, y in batches]
    scores = delfast.score(model.double(), batches_of_doubles)
    gradient, exact = scores.gradients, loop_gradient(model, batches)
    assert gradient is not None and scores.examples == sum(len(y) for _, y in batches) and set(gradient) == set(exact)
    for name, value in gradient.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-10, atol=1e-14)


def test_score_leaves_the_model_as_it_found_it() -> None:
    model = cases.SmallNet()
    model.train()
    model.features[1].eval()
    fired = []
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
        parameter.register_post_accumulate_grad_hook(lambda p: fired.append(p))
    model.head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    delfast.score(model, cases.image_batches())
    assert [m.training for m in model.modules()] == modes and not fired
    assert all(bool((p.grad == 7).all()) for p in model.parameters())
    assert not model.head.weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_kind_of_layer_competes_and_frozen_and_tied_count_right() -> None:
    model = cases.Everything()
    scores = delfast.score(model, cases.everything_batches())
    assert "frozen.weight" not in scores.parameters and "second.weight" not in scores.parameters
    assert scores.total == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for granularity in ("channel", "param"):
        mask = scores.select(0.3, granularity=granularity)
        assert mask.total == scores.total and 0 < mask.selected <= int(0.3 * mask.total)
        assert "temperature" in mask.parameters and mask["temperature"].shape == ()
    whole = scores.select(1.0)
    assert whole.selected == whole.total


def test_wrapped_models_match_by_plain_name() -> None:
    model = cases.SmallNet()
    plain = delfast.localize(model, cases.image_batches(), budget=0.4)
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))  # names: module._orig_mod.*
    assert next(iter(dict(wrapped.named_parameters()))).startswith("module._orig_mod.")
    assert delfast.localize(wrapped, cases.image_batches(), budget=0.4).digest == plain.digest
    delfast.reset_(wrapped, plain, init=cases.SmallNet)
    delfast.optim.MaskedSGD(wrapped.named_parameters(), mask=plain, lr=0.1)


# The published code


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "vit")]


@pytest.fixture(scope="module", params=["everything", "resnet18-thin", *LARGE])
def scored(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    if request.param == "everything":
        scores = delfast.score(cases.Everything(), cases.everything_batches())
    else:
        images, targets = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
        scores = delfast.score(build(request.param, 10, 3, 32), [(images, targets)])
    return scores.parameters, scores.gradients, scores.examples


@pytest.mark.parametrize("criterion", ["weighted_grad", "grad", "weight"])
@pytest.mark.parametrize("granularity", ["channel", "param"])
@pytest.mark.parametrize("budget", [0.1, 0.3])
def test_published_code_preset_element_for_element(
    scored: Any, criterion: Any, granularity: Any, budget: float
) -> None:
    theta, gradient, examples = scored
    gradients = None if criterion == "weight" else gradient
    settings = preset_settings("published-code", granularity=granularity)
    mask = Scores(theta, gradients, criterion, examples).select(budget, **settings)
    expected = published_mask(theta, gradients, criterion, granularity, budget)
    dense = mask.to_dense()
    assert sum(int((dense[name] != expected[name]).sum()) for name in theta) == 0
    assert mask.selected == int(budget * mask.total)


# Determinism


@pytest.mark.long
@pytest.mark.skipif(BACKEND.module is None, reason=f"no native kernels: {BACKEND.reason}")
@pytest.mark.parametrize("granularity", ["channel", "param"])
def test_mask_is_bit_identical_on_any_isa_and_thread_count(
    scored: Any, granularity: Any, one_and_two_threads: tuple[int, int]
) -> None:
    assert BACKEND.module is not None
    theta, gradient, examples = scored
    before, digests = BACKEND.module.isa(), set()
    for isa in BACKEND.module.isas():
        BACKEND.module.force_isa(isa)
        for threads in one_and_two_threads:
            torch.set_num_threads(threads)
            for _ in range(2):
                digests.add(Scores(theta, gradient, "weighted_grad", examples).select(0.3, granularity).digest)
    BACKEND.module.force_isa(before)
    assert len(digests) == 1


@pytest.mark.long
def test_batch_size_order_and_threads_hardly_matter_end_to_end(one_and_two_threads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = build("resnet18-thin", 10, 3, 32)
    images, targets = torch.randn(96, 3, 16, 16), torch.randint(0, 10, (96,))
    order, every = torch.randperm(96), torch.arange(96)
    one, two = one_and_two_threads
    runs = []
    for threads, size, index in ((one, 96, every), (one, 7, every), (one, 32, order), (two, 96, every)):
        torch.set_num_threads(threads)
        batches = list(zip(images[index].split(size), targets[index].split(size), strict=True))
        runs.append(delfast.score(model, batches))
    first = runs[0]
    assert first.gradients is not None
    param, channel = first.select(0.3, "param"), first.select(0.3)
    unit_scores = first.channel_scores()
    for other in runs[1:]:
        assert other.gradients is not None
        assert param.jaccard(other.select(0.3, "param")) >= 0.999
        # channels that differ lie within the gradient's measured rounding of the cut
        difference = channel.union(other.select(0.3)).selected - channel.intersection(other.select(0.3)).selected
        if difference:
            other_scores = other.channel_scores()
            rounding = ((unit_scores - other_scores).abs() / unit_scores.clamp_min(1e-30)).max()
            cut = unit_scores[torch.cat([p.flags for p in channel.parameters.values()])].min()
            differing = torch.cat(
                [
                    a.flags != b.flags
                    for a, b in zip(channel.parameters.values(), other.select(0.3).parameters.values(), strict=True)
                ]
            )
            assert bool(((unit_scores[differing] - cut).abs() <= 4 * rounding * cut).all())


def test_by_depth_parameters_are_taken_from_one_end() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))  # 24 + 6 + 18 + 3 parameters
    taken = {}
    for criterion in ("shallowest", "deepest"):
        mask = delfast.score(model, criterion=criterion).select(32 / 51)
        taken[criterion] = {name: part.flags.int().tolist() for name, part in mask.parameters.items()}
    none, three, six = [0, 0, 0], [1, 1, 1], [1] * 6
    assert taken["shallowest"] == {"0.weight": six, "0.bias": six, "1.weight": none, "1.bias": none}
    assert taken["deepest"] == {"0.weight": [1, 0, 0, 0, 0, 0], "0.bias": six, "1.weight": three, "1.bias": three}
    for criterion in ("shallowest", "deepest"):
        with pytest.raises(InputError, match=f"criterion '{criterion}' scores channels"):
            delfast.localize(model, None, criterion=criterion, granularity="param")


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_a_call_of_localize(name: str) -> None:
    model = cases.SmallNet()
    mask = delfast.localize(model, cases.image_batches(), **STRATEGIES[name])
    assert 0 < mask.selected <= 0.3 * mask.total
    assert {key: mask.metadata[key] for key in ("criterion", "granularity")} == STRATEGIES[name]


def test_random_is_keyed_by_seed_parameter_and_index() -> None:
    model = cases.SmallNet()
    first, again, other = (delfast.score(model, criterion="random", seed=s) for s in (1, 1, 2))
    for granularity in ("channel", "param"):
        assert first.select(0.3, granularity).digest == again.select(0.3, granularity).digest
        assert first.select(0.3, granularity).digest != other.select(0.3, granularity).digest
    # a parameter's uniforms do not depend on which others there are
    alone = Scores({"head.weight": model.head.weight}, None, "random", 0, seed=1)
    assert torch.equal(alone.channel_scores(), first.channel_scores()[-20:-10])
    share = [first.select(0.5, "param").parameters["features.3.weight"].selected / model.features[3].weight.numel()]
    assert 0.45 < share[0] < 0.55


# Selection


def test_smaller_budgets_lie_inside_larger_ones() -> None:
    scores = delfast.score(cases.SmallNet(), cases.image_batches())
    masks = [scores.select(budget) for budget in (0.05, 0.1, 0.3, 0.5, 0.9, 1.0)]
    for small, large in itertools.pairwise(masks):
        assert small.intersection(large).digest == Mask(small.parameters).digest
        assert small.selected <= large.selected


def test_least_budget_is_named_and_works() -> None:
    model = nn.Sequential(nn.Linear(100, 3, bias=False))
    scores = delfast.score(model, criterion="weight")
    with pytest.raises(InputError, match=r"at least 0.3333333\d* \(100 of 300 elements\)"):
        scores.select(0.1)
    assert scores.select(0.3334).selected == 100
    three = delfast.score(nn.Linear(2, 1), criterion="weight")
    with pytest.raises(InputError, match="holds the first parameter") as caught:
        three.select(0.3, granularity="param")
    least = float(str(caught.value).split("at least ")[1].split(" ")[0])
    assert three.select(least, granularity="param").selected == 1
    for frozen in ("weight", "random"):
        with pytest.raises(InputError, match="trainable parameters, got none"):
            delfast.score(nn.Linear(2, 1).requires_grad_(False), criterion=frozen)


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.0001, float("nan")])
def test_budget_outside_its_range(budget: float) -> None:
    with pytest.raises(InputError, match=r"expected a budget in \(0, 1\], got"):
        delfast.localize(cases.SmallNet(), cases.image_batches(), budget=budget)


def test_top_h() -> None:
    assert resolve_top_h(0.1, (64, 3, 3, 3)) == 2 and resolve_top_h(0.1, (4, 5)) == 1
    assert resolve_top_h(1.0, (4, 5)) == 5 and resolve_top_h(100, (4, 5)) == 5 and resolve_top_h(3, (4, 5)) == 3
    assert resolve_top_h("published", (64, 3, 3, 3)) == 6 and resolve_top_h("published", (5, 10)) == 1
    assert resolve_top_h("published", (256, 1, 3, 3)) == 9  # depthwise: clipped to the row
    for bad in (0, -1, 0.0, 1.5, "tenth", True, None):
        with pytest.raises(InputError, match="expected top_h"):
            resolve_top_h(bad, (4, 5))


def test_choices_are_checked_before_anything_runs() -> None:
    def never(model: nn.Module, batch: Any) -> torch.Tensor:
        raise AssertionError("the model ran")

    for bad in (
        {"preset": "papers"},
        {"granularity": "layer"},
        {"aggregate": "median"},
        {"policy": "half"},
        {"criterion": "fisher"},
        {"top_h": 0},
        {"budget": 2},
    ):
        with pytest.raises(InputError, match="expected"):
            delfast.localize(cases.SmallNet(), cases.image_batches(), loss_fn=never, **bad)


def test_scores_refuse_to_select_after_theta_changed() -> None:
    model = cases.SmallNet()
    scores = delfast.score(model, cases.image_batches())
    mask = scores.select(0.3)
    delfast.reset_(model, mask, init=cases.SmallNet)
    with pytest.raises(InputError, match=r"has changed since it was scored; call score\(\) again"):
        scores.select(0.3)


@pytest.mark.parametrize("granularity", ["channel", "param"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradients_name_the_parameter(granularity: Any, bad: float) -> None:
    model = cases.SmallNet()
    scores = delfast.score(model, cases.image_batches())
    assert scores.gradients is not None
    scores.gradients["features.3.weight"][5, 2, 1, 1] = bad
    with pytest.raises(InputError, match=r"NaN or infinity for 'features.3.weight'"):
        scores.select(0.3, granularity=granularity)


def test_bad_sets() -> None:
    model = cases.SmallNet()
    with pytest.raises(InputError, match="forget set of at least one example, got none"):
        delfast.localize(model, [])
    with pytest.raises(InputError, match=r"labels in \[0, 10\), got 3 to 12"):
        delfast.localize(model, [(torch.randn(2, 3, 8, 8), torch.tensor([3, 12]))])
    with pytest.raises(InputError, match="expected a forget set for criterion 'grad'"):
        delfast.score(model, criterion="grad")
    with pytest.raises(InputError, match="expected batches"):
        delfast.localize(model, [{"input": torch.randn(2, 3, 8, 8)}])
    with pytest.raises(InputError, match="trainable parameters, got none"):
        delfast.score(nn.ReLU(), cases.image_batches())


def test_loaders_that_hide_examples_draw_a_warning() -> None:
    from torch.utils.data import DataLoader, TensorDataset

    images, targets = cases.image_batches(examples=8, batch_size=8)[0]
    dataset = TensorDataset(images, targets)
    with pytest.warns(UserWarning, match="drops its last short batch"):
        delfast.score(cases.SmallNet(), DataLoader(dataset, batch_size=4, drop_last=True))

    class RandomFlip:
        def __call__(self, x: Any) -> Any:
            return x

    dataset.transform = RandomFlip()
    with pytest.warns(UserWarning, match=r"augments at random \(RandomFlip\)"):
        delfast.score(cases.SmallNet(), DataLoader(dataset, batch_size=4))
    del dataset.transform
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delfast.score(cases.SmallNet(), DataLoader(dataset, batch_size=3))


def test_custom_loss_and_indexed_and_dict_batches_agree() -> None:
    model, batches = cases.SmallNet(), cases.image_batches()
    expected = delfast.localize(model, batches).digest
    indexed = [(torch.arange(len(y)), x, y) for x, y in batches]
    assert delfast.localize(model, indexed).digest == expected

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch["image"]), batch["label"], reduction="none")

    dicts = [{"image": x, "label": y} for x, y in batches]
    assert delfast.localize(model, dicts, loss_fn=loss_fn).digest == expected
    with pytest.raises(InputError, match=r"per-example losses \(N,\), got \(\)"):
        delfast.localize(model, dicts, loss_fn=lambda m, b: loss_fn(m, b).mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_accumulate_in_float32(dtype: torch.dtype) -> None:
    model = cases.SmallNet().to(dtype)
    batches = [(x.to(dtype), y) for x, y in cases.image_batches()]
    scores = delfast.score(model, batches)
    assert scores.gradients is not None and all(g.dtype == torch.float32 for g in scores.gradients.values())
    assert 0 < scores.select(0.3).selected <= 0.3 * scores.total
    assert scores.select(0.3, "param").selected == int(0.3 * scores.total)


def test_channels_last_model_gives_the_same_masks() -> None:
    model = cases.SmallNet()
    scores = delfast.score(model, cases.image_batches())
    assert scores.gradients is not None
    last = model.to(memory_format=torch.channels_last)
    other = Scores(dict(last.named_parameters()), scores.gradients, "weighted_grad", scores.examples)
    assert other.parameters["features.3.weight"].is_contiguous(memory_format=torch.channels_last)
    again = delfast.score(model, cases.image_batches())
    assert again.select(0.3, "param").jaccard(other.select(0.3, "param")) >= 0.999
    assert other.select(0.3).jaccard(again.select(0.3)) == 1.0
