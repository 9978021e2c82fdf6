"""Precision, memory format and CUDA graphs: every function that passes batches through a network takes all three."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import delfast
from delfast import InputError, TrainingOptions
from delfast.evaluation import accuracy_and_loss, evaluate, predictions
from delfast.execution import Execution
from delfast.unlearning import METHODS, train

BF16_ROUNDING = 2**-8  # of one value, relative; each of the network's five layers rounds its inputs and its output
MAX_DIFFERENCE = 10 * BF16_ROUNDING  # relative to the norm of the float32 result
LAYOUT_ROUNDING = 1e-5  # float32 sums in another order
OVERLAP = 0.9


class Recorder(nn.Module):
    """Record the memory format and the dtype of every input, and return the input."""

    def __init__(self) -> None:
        super().__init__()
        self.formats: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            self.formats.add("channels-last" if x.is_contiguous(memory_format=torch.channels_last) else "default")
        self.dtypes.add(x.dtype)
        return x


def make_model(channels_last: bool = False) -> nn.Sequential:
    """Return a network of mixed modes that records what enters it, and the dtype before its last layer."""
    torch.manual_seed(3)
    model = nn.Sequential(
        Recorder(), nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 4), Recorder(),
    )  # fmt: skip
    model[2].running_mean.normal_()  # type: ignore[operator, union-attr]
    model.train()[2].eval()
    return model.to(memory_format=torch.channels_last) if channels_last else model  # type: ignore[call-overload, no-any-return]


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(6, 3, 6, 6, generator=generator), torch.randint(4, (6,), generator=generator))] + [
        (torch.randn(5, 3, 6, 6, generator=generator), torch.randint(4, (5,), generator=generator))
        for _ in range(count - 1)
    ]


def dataset() -> TensorDataset:
    return TensorDataset(*(torch.cat(parts) for parts in zip(*batches(), strict=True)))


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def scored(model: nn.Module, **options: Any) -> Tensor:
    return flat(delfast.score(model, batches(), **options).gradients.values())  # type: ignore[union-attr]


def trained(model: nn.Module, **options: Any) -> Tensor:
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = train(model, batches(), optimizer, epochs=2, **options).losses
    return flat([*model.parameters(), torch.tensor(losses)])


@functools.cache
def kept_mask() -> delfast.Mask:
    return delfast.localize(make_model(), batches(), 0.3)


def unlearned(model: nn.Module, method: str = "del", **options: Any) -> Tensor:
    result = delfast.unlearn(
        model,
        retain=batches(),
        forget=batches(2),
        mask=None if method == "retrain" else kept_mask(),
        init=make_model,
        method=method,
        seed=1,
        training=TrainingOptions(**options),
        epochs=2,
    )
    return flat([*model.parameters(), torch.tensor(result.losses)])


READING: dict[str, Callable[..., Tensor]] = {
    "score": scored,
    "score, |g|": lambda model, **options: scored(model, criterion="grad", per_example=True, **options),
    "score, g²": lambda model, **options: scored(model, criterion="squared_grad", per_example=True, **options),
    "signed_channels": lambda model, **options: torch.from_numpy(
        delfast.signed_channels(model, batches(), **options).matrix
    ).double(),
    "predictions": lambda model, **options: predictions(model, batches(), **options)[0].double(),
    "accuracy_and_loss": lambda model, **options: torch.tensor(accuracy_and_loss(model, batches(), **options).loss),
    "evaluate": lambda model, **options: torch.tensor(
        [
            value
            for name, value in evaluate(model, batches(), batches(2), batches(1), mia=False, **options)
            .as_dict()
            .items()
            if name.endswith("_loss")
        ]
    ),
}
MASKS: dict[str, Callable[..., delfast.Mask]] = {
    "localize": lambda model, **options: delfast.localize(model, batches(), 0.3, **options),
    "localize, per example": lambda model, **options: delfast.localize(
        model, batches(), 0.3, per_example=True, **options
    ),
    "localize, anytime": lambda model, **options: delfast.localize(
        model, dataset(), 0.3, stop_when_stable=0.8, batch_size=3, **options
    ),
}
SEARCH: dict[str, Callable[..., Any]] = {
    "critmem": lambda model, **options: flat(delfast.critmem(model, batches(), **options).counts.values()),
}
TRAINING: dict[str, Callable[..., Tensor]] = {"train": trained, "unlearn": unlearned}
ALL: dict[str, Callable[..., Any]] = {**READING, **MASKS, **SEARCH, **TRAINING}


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return what no function may change, of values, layout and modes."""
    state: dict[str, Any] = {name: (t.clone(), t.stride(), t.dtype) for name, t in model.state_dict().items()}
    state["modes"] = [module.training for module in model.modules()]
    state["gradients"] = [(p.requires_grad, p.grad) for p in model.parameters()]
    state["hooks"] = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return state


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = snapshot(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, tuple):
            assert torch.equal(value[0], after[name][0]) and value[1:] == after[name][1:], name
        else:
            assert value == after[name], name


# Precision


@pytest.mark.parametrize("name", [*READING, *TRAINING])
def test_bf16_computes_in_bfloat16_and_is_near_float32(name: str) -> None:
    run = ALL[name]
    expected = run(model := make_model())
    assert model[-1].dtypes == {torch.float32}
    found = run(model := make_model(), precision="bf16")
    # unlearn checks a batch before the training
    assert torch.bfloat16 in model[-1].dtypes and (name == "unlearn" or model[-1].dtypes == {torch.bfloat16})
    assert found.shape == expected.shape and 0 < distance(found, expected) <= MAX_DIFFERENCE
    assert {t.dtype for t in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_bf16_overlap_with_float32s_and_record_the_precision(name: str, tmp_path: Path) -> None:
    expected = MASKS[name](make_model())
    found = MASKS[name](model := make_model(), precision="bf16")
    assert model[-1].dtypes == {torch.bfloat16}
    assert found.jaccard(expected) >= OVERLAP
    assert expected.metadata["precision"] == "fp32"
    found.save(tmp_path / "mask.safetensors")
    assert delfast.Mask.load(tmp_path / "mask.safetensors").metadata["precision"] == "bf16"


def test_a_mask_of_a_criterion_without_a_pass_names_no_precision() -> None:
    for criterion in ("weight", "random"):
        options: Any = {"criterion": criterion, "budget": 0.3}
        mask = delfast.localize(make_model(), None, precision="bf16", **options)
        assert "precision" not in mask.metadata
        assert mask.jaccard(delfast.localize(make_model(), None, **options)) == 1


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_a_mask_records_a_callers_autocast(dtype: torch.dtype, name: str) -> None:
    for run in MASKS.values():
        with torch.autocast("cpu", dtype):
            mask = run(make_model())
        assert mask.metadata["precision"] == name
        assert delfast.localize(make_model(), batches()).metadata["precision"] == "fp32"


def test_critmem_of_bf16_searches_in_bfloat16() -> None:
    expected = delfast.critmem(make_model(), batches(), max_channels=4)
    found = delfast.critmem(model := make_model(), batches(), max_channels=4, precision="bf16")
    assert model[-1].dtypes == {torch.bfloat16}
    assert 0 < distance(flat(found.first.values()), flat(expected.first.values())) <= MAX_DIFFERENCE
    counts = zip(found.counts.values(), expected.counts.values(), strict=True)
    same = sum(int(torch.minimum(a, b).sum()) for a, b in counts)
    assert same >= OVERLAP * sum(int(count.sum()) for count in expected.counts.values())


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sums_are_float32_and_keep_small_contributions(per_example: bool, precision: Any) -> None:
    """Contributions of 2⁻¹⁰ beside a first one of 1/2: a bfloat16 sum would keep none of them, a float32 one all."""
    model = nn.Linear(1, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    loader = [(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64))]
    loader += [(torch.full((1, 1), 2.0**-9), torch.zeros(1, dtype=torch.int64))] * 200
    scores = delfast.score(model, loader, "grad", per_example=per_example, precision=precision)
    assert scores.gradients is not None and all(t.dtype == torch.float32 for t in scores.gradients.values())
    total = scores.gradients["weight"].abs() * scores.examples  # both classes have the probability 1/2
    torch.testing.assert_close(total, torch.full((2, 1), (1 + 200 * 2.0**-9) / 2), rtol=1e-5, atol=0)


def test_losses_are_summed_in_float32_or_wider() -> None:
    """The loss of one example is 16, of the others 2⁻⁶: they would be lost in a sum of bfloat16 values."""
    model = nn.Linear(1, 2, bias=False)
    model.weight.data.copy_(torch.tensor([[16.0], [0.0]]))
    targets = torch.tensor([1] + [0] * 255)
    loader = [(torch.tensor([[1.0]] + [[0.25]] * 255), targets)]
    loss = accuracy_and_loss(model, loader, precision="bf16").loss
    expected = nn.functional.cross_entropy(model(loader[0][0]).double(), targets).item()
    assert abs(loss - expected) <= 1e-4 * expected
    assert expected > 1.1 * 16 / 256


@pytest.mark.parametrize("name", [*READING, *TRAINING])
def test_a_callers_autocast_stays_in_effect_with_fp32(name: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = ALL[name](model := make_model(), precision="fp32")
    assert torch.bfloat16 in model[-1].dtypes
    # training's too: autocast's cache would keep the weights of the first step
    assert torch.equal(found, ALL[name](make_model(), precision="bf16"))
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert distance(ALL[name](make_model()), ALL[name](make_model())) == 0


def test_autocast_of_bf16_replaces_a_callers_and_ends() -> None:
    linear, x = nn.Linear(2, 2), torch.ones(1, 2)
    with torch.autocast("cpu", torch.float16):
        with Execution("bf16").autocast(torch.device("cpu")):
            assert linear(x).dtype == torch.bfloat16 and not torch.is_autocast_cache_enabled()
        assert linear(x).dtype == torch.float16 and torch.is_autocast_cache_enabled()


# Memory format


@pytest.mark.parametrize("name", ALL)
def test_inputs_are_laid_out_as_asked(name: str) -> None:
    """Batches come in the default layout: "auto" follows the convolutions' weights, True and False do not."""
    results = {}
    for network_is_channels_last in (False, True):
        for option in ("auto", True, False):
            model = make_model(network_is_channels_last)
            result = ALL[name](model, channels_last=option)
            wanted = network_is_channels_last if option == "auto" else option
            expected = {"channels-last" if wanted else "default"}
            # unlearn localizes on a copy of the options' defaults, and checks a first batch as it comes
            if name == "unlearn":  # which checks a first batch as it comes
                assert model[0].formats - {"default"} == expected - {"default"}
            else:
                assert model[0].formats == expected
            results[network_is_channels_last, option] = result
    reference = results[False, False]
    for found in results.values():
        if isinstance(reference, delfast.Mask):
            assert found.jaccard(reference) >= OVERLAP
        else:
            assert distance(found, reference) <= LAYOUT_ROUNDING


DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 4), min_size=0, max_size=5),
    st.sampled_from(DTYPES),
    st.sampled_from(["auto", True, False]),
    st.booleans(),
)
def test_laid_out_changes_no_value_and_only_images(
    shape: list[int], dtype: torch.dtype, option: Any, network_is_channels_last: bool
) -> None:
    inputs = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    found = Execution(channels_last=option).laid_out(inputs, make_model(network_is_channels_last))
    assert found.dtype == dtype and torch.equal(found, inputs)
    wanted = network_is_channels_last if option == "auto" else option
    if wanted and len(shape) == 4 and dtype.is_floating_point:
        assert found.is_contiguous(memory_format=torch.channels_last)
    else:
        assert found is inputs


def test_inputs_that_are_no_tensor_stay_as_they_are() -> None:
    for inputs in ({"images": torch.zeros(1, 3, 2, 2)}, [torch.zeros(1, 3, 2, 2)], None, "text"):
        assert Execution(channels_last=True).laid_out(inputs, make_model()) is inputs


def test_auto_reads_a_weight_that_has_two_layouts() -> None:
    """A 1x1 convolution, and one of single-channel filters, have the same strides in both."""
    inputs = torch.zeros(1, 3, 2, 2)
    last = torch.channels_last
    ambiguous = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, groups=3)).to(memory_format=last)  # type: ignore[call-overload]
    auto = Execution()
    assert auto.laid_out(inputs, ambiguous) is inputs
    ambiguous.append(nn.Conv2d(3, 3, 3).to(memory_format=last))  # type: ignore[call-overload]
    assert auto.laid_out(inputs, ambiguous).is_contiguous(memory_format=last)
    assert auto.laid_out(inputs, nn.Linear(2, 2)) is inputs and auto.laid_out(inputs, nn.ReLU()) is inputs


# Errors, and what no option changes


class Unread:
    """A loader that must not be read."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the loader was read before the arguments were checked")


BAD: list[tuple[str, Any, str]] = [
    *(("precision", value, "precision") for value in ("fp16", "float32", 32, None, torch.bfloat16, True, ["bf16"])),
    *(("channels_last", value, "channels_last") for value in ("on", "yes", 1, 0, None, torch.channels_last)),
    *(("cuda_graphs", value, "cuda_graphs") for value in ("on", "never", 1, 0, None)),
    ("cuda_graphs", True, "CUDA device"),  # of a model on the CPU
]
CHECKED: dict[str, Callable[..., Any]] = {
    "score": lambda model, **options: delfast.score(model, Unread(), **options),
    "score, per example": lambda model, **options: delfast.score(model, Unread(), per_example=True, **options),
    "localize": lambda model, **options: delfast.localize(model, Unread(), **options),
    "localize, anytime": lambda model, **options: delfast.localize(model, dataset(), stop_when_stable=0.9, **options),
    "signed_channels": lambda model, **options: delfast.signed_channels(model, Unread(), **options),
    "critmem": lambda model, **options: delfast.critmem(model, Unread(), **options),
    "predictions": lambda model, **options: predictions(model, Unread(), **options),
    "accuracy_and_loss": lambda model, **options: accuracy_and_loss(model, Unread(), **options),
    "evaluate": lambda model, **options: evaluate(model, Unread(), Unread(), Unread(), mia=False, **options),
    "train": lambda model, **options: train(
        model, Unread(), torch.optim.SGD(model.parameters(), 0.1), epochs=1, **options
    ),
    **{
        f"unlearn, {method}": lambda model, method=method, **options: unlearned(model, method, **options)
        for method in sorted(name for name, each in METHODS.items() if each().epochs)
    },
}


@pytest.mark.parametrize("name", CHECKED)
def test_bad_options_are_refused_by_name_before_anything_changes(name: str) -> None:
    for option, value, named in BAD:
        if name == "critmem" and option == "cuda_graphs":
            continue  # it has no such option
        model = make_model()
        before, generator = snapshot(model), torch.get_rng_state()
        with pytest.raises(InputError, match=named) as caught:
            CHECKED[name](model, **{option: value})
        assert "\n" not in str(caught.value) and ";" in str(caught.value)
        assert_unchanged(before, model)
        assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"channels_last": True}, {"channels_last": False}])
@pytest.mark.parametrize("name", ALL)
def test_no_option_changes_what_a_function_leaves(name: str, options: dict[str, Any]) -> None:
    model = make_model(channels_last=options.get("channels_last") is False)
    before = snapshot(model)
    ALL[name](model, **options)
    if name not in TRAINING:
        assert_unchanged(before, model)
        return
    after = snapshot(model)
    assert before["modes"] == after["modes"] and before["hooks"] == after["hooks"]
    for key, value in before.items():
        if isinstance(value, tuple):
            assert value[1:] == after[key][1:], key


def test_an_error_in_a_pass_leaves_autocast_and_modes_as_they_were() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    model = nn.Sequential(*make_model(), Broken())
    before = snapshot(model)
    for name in READING:
        with contextlib.suppress(ZeroDivisionError):
            READING[name](model, precision="bf16")
            raise AssertionError("expected an error")
        assert not torch.is_autocast_enabled("cpu")
        assert_unchanged(before, model)


def test_copies_of_a_network_give_the_same_in_every_precision() -> None:
    model = make_model()
    for precision in ("fp32", "bf16"):
        assert torch.equal(scored(model, precision=precision), scored(copy.deepcopy(model), precision=precision))
