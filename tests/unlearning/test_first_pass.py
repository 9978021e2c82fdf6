"""Bad input changes nothing: one pass over the first batches, before the reset."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import delfast
from delfast import InputError, TrainingOptions
from delfast.batches import per_example_losses
from delfast.evaluation.metrics import accuracy_and_loss
from delfast.loaders import batch_sizes
from delfast.mask import Mask
from delfast.unlearning import METHODS, make_method, train
from delfast.unlearning.api import full_mask
from tests import cases

INTEGERS = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batches(*sizes: int, seed: int = 0, labels: torch.dtype = torch.int64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator).to(labels))
        for n in sizes
    ]


def run(model: nn.Module, method: str, **changes: Any) -> Any:
    """Unlearn for one epoch, within a mask of everything, so that no localization can fail."""
    small = {"ssd": {"alpha": 1.0}, "influence": {}}.get(method, {"epochs": 1})
    options: dict[str, Any] = {"retain": batches(5, 4), "forget": batches(4, 3, seed=1), "init": make_model}
    if method != "retrain":
        options["mask"] = full_mask(model)
    return delfast.unlearn(model, **{**options, **changes}, method=make_method(method, small))


def everything(model: nn.Module) -> dict[str, Any]:
    """Return the state, modes and gradients of a model, and the states of the global generators."""
    return {
        "state": copy.deepcopy(model.state_dict()),
        "modes": [module.training for module in model.modules()],
        "grads": [parameter.grad for parameter in model.parameters()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": numpy.random.get_state()[1].tolist(),
        "python": random.getstate(),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Return whether two results of ``everything`` are equal to the bit."""
    states = zip(before["state"].values(), after["state"].values(), strict=True)
    rest = [name for name in before if name not in ("state", "torch")]
    return (
        all(torch.equal(a, b) for a, b in states)
        and torch.equal(before["torch"], after["torch"])
        and all(before[name] == after[name] for name in rest)
    )


# ---- labels


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_integer_type_are_those_of_int64(dtype: torch.dtype) -> None:
    model = make_model()
    for method in ("del", "relabel", "scrub", "ssd"):
        ends = []
        for labels in (torch.int64, dtype):
            network = copy.deepcopy(model)
            sets = {"retain": batches(5, 4, labels=labels), "forget": batches(4, 3, seed=1, labels=labels)}
            run(network, method, **sets, seed=3)
            ends.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
        assert torch.equal(*ends), method
    kinds = [batches(5, 4, labels=labels) for labels in (torch.int64, dtype)]
    results = [accuracy_and_loss(model, loader) for loader in kinds]
    assert results[0].accuracy == results[1].accuracy and results[0].loss == results[1].loss
    found = [delfast.critmem(model, loader) for loader in kinds]
    assert found[0].examples == found[1].examples
    masks = [delfast.localize(model, loader, 0.5) for loader in kinds]
    assert masks[0].digest == masks[1].digest


# ---- faults that the first batch shows


class Returns(nn.Module):
    """A classifier whose output is wrapped by a function."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.fc, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.fc(x))


class Tokens(nn.Module):
    """A classifier of tokens with a sparse gradient of its embedding, a module or a function."""

    def __init__(self, sparse: bool, functional: bool = False) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(7, 4, sparse=sparse and not functional), nn.Linear(4, 3)
        self.functional, self.is_sparse = functional, sparse

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, :2].abs().long().clamp(max=6)
        if self.functional:
            return self.fc(functional.embedding(tokens, self.embedding.weight, sparse=self.is_sparse).mean(1))
        return self.fc(self.embedding(tokens).mean(1))


def soft(size: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 4), torch.softmax(torch.randn(size, 3), 1))]


BAD = {
    "tuple output": (Returns(lambda y: (y, y)), {}, "the model to return logits as a tensor, got tuple; pass loss_fn"),
    "dict output": (Returns(lambda y: {"logits": y}), {}, "as a tensor, got dict; pass loss_fn"),
    "object output": (Returns(lambda y: SimpleNamespace(logits=y)), {}, "got SimpleNamespace; pass loss_fn"),
    "output per position": (Returns(lambda y: y[:, None]), {}, r"expected logits \(N, classes\) .* got \(\d, 1, 3\)"),
    "soft labels": (make_model(), {"retain": soft(4)}, r"got \(4, 3\) and torch.float32 \(4, 3\); pass loss_fn"),
    "float labels": (make_model(), {"retain": [(torch.randn(4, 4), torch.ones(4))]}, "torch.float32"),
    "complex labels": (make_model(), {"retain": [(torch.randn(1, 4), torch.ones(1) * 1j)]}, "torch.complex64"),
    "labels as a list": (make_model(), {"retain": [(torch.randn(4, 4), [0, 1, 2, 0])]}, "got list; pass loss_fn"),
    "labels as numpy": (make_model(), {"retain": [(torch.randn(1, 4), numpy.zeros(1))]}, "got ndarray; pass loss_fn"),
    "too many classes": (make_model(), {"retain": [(torch.randn(2, 4), torch.tensor([0, 3]))]}, r"labels in \[0, 3\)"),
    "another form": (make_model(), {"retain": [{"x": torch.randn(4, 4)}]}, "got dict; pass loss_fn"),
    "no gradient": (
        make_model(), {"loss_fn": lambda m, b: functional.cross_entropy(m(b[0]), b[1], reduction="none").detach()},
        "losses that depend on the model's trainable parameters, got losses without a gradient",
    ),
    "one loss": (
        make_model(), {"loss_fn": lambda m, b: functional.cross_entropy(m(b[0]), b[1])}, "use reduction='none'",
    ),
    "an iterator": (make_model(), {"retain": type("Once", (), {
        "__iter__": lambda s: s, "__next__": lambda s: batches(4)[0]})()},
        "a retain set with a length",
    ),
    "sparse embedding": (Tokens(True), {}, "a dense gradient for 'embedding.weight', got a sparse one"),
    "sparse function": (Tokens(True, functional=True), {}, "a dense gradient for 'embedding.weight', got a sparse one"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "case"),
    [
        (method, case)
        for method in ("del", "finetune", "retrain", "neggrad+", "relabel", "scrub", "l1-sparse")
        for case, (_, changes, _) in BAD.items()
        if "loss_fn" not in changes or "logits" not in METHODS[method].needs
    ],
)
def test_what_the_first_batch_shows_changes_nothing(case: str, method: str) -> None:
    model, changes, message = BAD[case]
    before = everything(model)
    with pytest.raises(InputError, match=message):
        run(model, method, **changes, init=copy.deepcopy(model), head="fc" if hasattr(model, "fc") else None)
    assert same(before, everything(model))


@pytest.mark.parametrize(
    ("method", "which"),
    [
        *((method, "forget") for method in ("gradient-ascent", "neggrad+", "relabel", "scrub", "ssd", "influence")),
        *((method, "validation") for method in ("finetune", "gradient-ascent", "scrub")),
    ],
)
def test_the_forget_set_and_the_validation_set_are_checked_too(method: str, which: str) -> None:
    model, changes = make_model(), {which: soft(4)}
    if which == "validation":
        changes = {"training": TrainingOptions(validation=soft(4), patience=1)}
    before = everything(model)
    with pytest.raises(InputError, match=r"got \(4, 3\) and torch.float32 \(4, 3\); pass loss_fn"):
        run(model, method, **changes)
    assert same(before, everything(model))


def test_a_forget_set_that_is_not_used_is_not_checked() -> None:
    run(make_model(), "finetune", forget=soft(4))


def test_one_shot_methods_refuse_an_iterator_whose_first_batch_would_be_lost() -> None:
    with pytest.raises(InputError, match="a forget set that can be iterated over again, got generator"):
        run(make_model(), "ssd", forget=(batch for batch in batches(4)))


def test_a_sparse_embedding_outside_the_mask_and_a_dense_one_are_served() -> None:
    model = Tokens(True)
    result = run(model, "finetune", mask=Mask({"fc.weight": full_mask(model)["fc.weight"]}))
    assert len(result.losses) == 1
    run(Tokens(False), "finetune")


def test_compact_refuses_a_sparse_embedding_before_it_changes_the_model() -> None:
    model = Tokens(True)
    some = {"embedding.weight": torch.tensor([[1] * 4, [0] * 4] * 3 + [[0] * 4]).bool()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(InputError, match="got a sparse one; make its Embedding sparse=False"):
        delfast.compact(model, Mask.from_dense(some))
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    with delfast.compact(model, full_mask(model)):  # selected in full, no guard: torch's SGD accepts sparse gradients
        per_example_losses(model, batches(4)[0], None).mean().backward()  # type: ignore[no-untyped-call]
        assert model.embedding.weight.grad.is_sparse


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind().epochs])
@pytest.mark.parametrize("own", [True, False])
def test_the_first_pass_moves_no_generator(method: str, own: bool) -> None:
    """Training starts with the first batch of a loader that nothing has read."""
    inputs, targets = batches(12)[0]
    seen: list[list[int]] = []

    class Seen(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.append([int((inputs == row).all(1).nonzero()) for row in x])
            elif not seen:  # scrub's teacher runs later
                numpy.random.rand(), random.random(), torch.rand(1)
            return super().forward(x)

    def loader() -> Any:
        generator = torch.Generator().manual_seed(3) if own else None
        torch.manual_seed(4)
        return DataLoader(TensorDataset(inputs, targets), 5, shuffle=True, generator=generator)

    expected = [[int((inputs == row).all(1).nonzero()) for row in x] for x, _ in loader()]
    which = "forget" if METHODS[method].step_plan == "forget" else "retain"
    other = [(inputs[:1].expand(2, 4), targets[:2])]
    state = random.getstate()
    model = Seen(*make_model())
    run(model, method, **{"retain": other, "forget": [*other], which: loader()}, head="2", init=copy.deepcopy(model))
    assert [numbers for numbers in seen if numbers != [0, 0]] == expected
    assert random.getstate() == state


def test_the_first_pass_leaves_the_generators_of_other_threads_alone() -> None:
    """Lists of batches draw nothing: only another thread, here started by the hook, draws from torch's generator."""
    torch.manual_seed(5)
    numbers = [torch.rand(1) for _ in range(2)]
    model, drawn = make_model(), []

    def draw() -> None:
        drawn.append(torch.rand(1))

    def in_another_thread(*_: Any) -> None:
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()

    torch.manual_seed(5)
    handle = model.register_forward_hook(in_another_thread)
    run(model, "finetune", retain=batches(4))
    assert drawn == numbers  # one in the first pass, one in training
    torch.manual_seed(5)
    run(model, "relabel", retain=batches(4), forget=batches(4))  # which draws labels from a generator of its own
    handle.remove()
    assert drawn[2:4] == numbers and len({float(number) for number in drawn[2:]}) == 4

    torch.manual_seed(5)
    model.register_forward_hook(lambda *_: draw())
    run(model, "finetune", retain=batches(4))
    assert drawn[-2:] == [numbers[0], numbers[0]]  # the draw of this thread is restored


def test_a_refused_first_pass_moves_no_generator() -> None:
    inputs, targets = batches(12)[0]
    own = torch.Generator().manual_seed(3)
    state, model = own.get_state(), make_model()
    before = everything(model)
    for generator in (own, None):
        loader = DataLoader(TensorDataset(inputs, targets.float()), 5, shuffle=True, generator=generator)
        with pytest.raises(InputError, match="pass loss_fn"):
            run(model, "del", retain=loader)
    assert same(before, everything(model)) and torch.equal(own.get_state(), state)


# ---- BatchNorm


def normed(pixels: int = 1) -> nn.Module:
    """Return a network of (N, 4) with a BatchNorm whose channels get ``pixels`` values from each example."""
    return nn.Sequential(
        nn.Unflatten(1, (4, 1, 1)), nn.Upsample(size=(1, pixels)), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.Flatten(),
        nn.Linear(5 * pixels, 3),
    )  # fmt: skip


def dataset(count: int) -> TensorDataset:
    return TensorDataset(*batches(count)[0])


FROZEN = TrainingOptions(batchnorm="frozen")
ONE = (
    r"more than one value a channel for the BatchNorm '3' to train on, got one from a batch of 1 example of the {} set"
)
BATCHES_OF_ONE = {
    "last batch": ("finetune", {"retain": lambda: DataLoader(dataset(9), 4)}, "retain"),
    "list": ("finetune", {"retain": lambda: batches(4, 1, 3)}, "retain"),
    "batch size": ("finetune", {"retain": lambda: DataLoader(dataset(3), 1)}, "retain"),
    "shuffled": ("del", {"retain": lambda: DataLoader(dataset(9), 4, shuffle=True)}, "retain"),
    "batch sampler": ("retrain", {"retain": lambda: DataLoader(dataset(5), batch_sampler=[[0, 1], [2]])}, "retain"),
    "forget set": ("gradient-ascent", {"forget": lambda: DataLoader(dataset(1), 4)}, "forget"),
    "pairs": ("neggrad+", {"forget": lambda: batches(1)}, "forget"),
    "mixed": ("relabel", {"forget": lambda: DataLoader(dataset(7), 6)}, "forget"),
    "forget first": ("scrub", {"forget": lambda: DataLoader(dataset(1), 1)}, "forget"),
}


@pytest.mark.parametrize("case", BATCHES_OF_ONE)
def test_a_batch_of_one_under_batchnorm_is_refused_before_anything_changes(case: str) -> None:
    method, sets, which = BATCHES_OF_ONE[case]
    model = normed()
    before = everything(model)
    for mode in (True, False):  # train() puts a model in eval mode into training mode
        with pytest.raises(InputError, match=ONE.format(which) + r'; .* batchnorm="frozen"'):
            run(model.train(mode), method, init=normed, head="5", **{name: make() for name, make in sets.items()})
    assert same(before, everything(model.train()))
    options = {"init": normed, "head": "5", **{name: make() for name, make in sets.items()}}
    run(model, method, **options, training=FROZEN)  # the advice in the error
    model[3].eval()
    run(model, method, **options)  # frozen by hand
    run(normed(2), method, **{**options, "init": lambda: normed(2)})  # two pixels of one example are two values


def test_batches_that_are_large_enough_are_served() -> None:
    run(normed(), "finetune", retain=DataLoader(dataset(9), 4, drop_last=True))
    run(normed(), "neggrad+", retain=batches(5, 4), forget=batches(2))
    twice = DataLoader(dataset(9), 4, collate_fn=lambda b: [torch.stack([x[i] for x in b] * 2) for i in range(2)])
    run(normed(), "finetune", retain=twice)  # a batch of one gives two rows


class Unknowable:
    """A loader whose batch sizes only iterating shows."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Any]:
        return iter(batches(4, 1))


def test_where_the_size_is_not_known_the_error_gives_the_same_advice() -> None:
    model = normed()
    with pytest.raises(InputError, match=r'too small for BatchNorm .*Expected more than 1.*batchnorm="frozen"'):
        run(model, "finetune", retain=Unknowable())
    with pytest.raises(InputError, match='batchnorm="frozen"'):
        train(model, Unknowable(), torch.optim.SGD(model.parameters(), lr=0.1), epochs=1)  # type: ignore[arg-type]
    run(model, "finetune", retain=Unknowable(), training=FROZEN)


def test_batch_norm_without_statistics_needs_the_batch_even_where_it_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3))
    with pytest.raises(InputError, match="the BatchNorm '1' to train on, got one"):
        run(model, "finetune", retain=batches(4, 1), training=FROZEN)


@pytest.mark.parametrize(
    "loader, sizes",
    [
        (batches(4, 2, 3), (4, 2)),
        ([], None),
        ([(["text"], torch.zeros(1))], None),
        (DataLoader(dataset(9), 4), (4, 1)),
        (DataLoader(dataset(9), 4, drop_last=True), (4, 4)),
        (DataLoader(dataset(3), 4), (3, 3)),
        (DataLoader(dataset(8), 4, shuffle=True), (4, 4)),
        (DataLoader(dataset(8), batch_size=None), None),
        (DataLoader(dataset(8), batch_sampler=[[0, 1], [3]]), (2, 1)),
        (Unknowable(), None),
    ],
)
def test_sizes_of_batches(loader: Any, sizes: tuple[int, int] | None) -> None:
    assert batch_sizes(loader) == sizes


def test_the_network_of_every_layer_is_served() -> None:
    sets = {"forget": cases.everything_batches(6), "retain": cases.everything_batches(10, seed=1)}
    assert delfast.unlearn(cases.Everything(), **sets, init=cases.Everything, epochs=1).head == "head"


# ---- cases that the first pass leaves to the training


class Auxiliary(nn.Module):
    """Two outputs in training mode, one in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.aux = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return (self.fc(x), self.aux(x)) if self.training else self.fc(x)


def test_a_loss_fn_that_needs_training_mode_is_served() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        out, aux = model(batch[0])
        return functional.cross_entropy(out + 0.3 * aux, batch[1], reduction="none")

    assert len(run(Auxiliary(), "finetune", loss_fn=loss).losses) == 1
    with pytest.raises(ValueError, match="too many values"):
        run(Auxiliary(), "ssd", loss_fn=loss)  # one-shot methods run in eval mode


class Rewinding:
    """An iterator that restarts at its end."""

    def __init__(self) -> None:
        self.batches, self.at = batches(5, 4), 0

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Rewinding:
        return self

    def __next__(self) -> Any:
        if self.at == 2:
            self.at = 0
            raise StopIteration
        self.at += 1
        return self.batches[self.at - 1]


def test_an_iterator_with_a_length_loses_no_batch() -> None:
    ends = []
    for retain in (Rewinding(), batches(5, 4)):
        torch.manual_seed(0)
        model = make_model()
        run(model, "finetune", retain=retain, epochs=2)
        ends.append(model[0].weight)
    assert torch.equal(*ends)
    with pytest.raises(InputError, match="the head's name"):
        run(make_model(), "del", retain=Rewinding())


def test_a_loss_fn_that_draws_moves_no_generator() -> None:
    drawn: list[tuple[float, ...]] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        torchs = torch.rand(1, generator=torch.default_generator)
        drawn.append((numpy.random.rand(), random.random(), float(torchs)))
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    run(make_model(), "finetune", retain=batches(4), loss_fn=loss)
    assert len(drawn) == 2 and drawn[0] == drawn[1]


def test_normalized_sequences_of_one_token_are_left_to_the_training() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3))
    sequences = [(torch.randn(4, 4, 1), torch.arange(4) % 3), (torch.randn(1, 4, 7), torch.zeros(1).long())]
    run(model, "finetune", retain=sequences)


def test_a_set_that_cannot_be_iterated_over_again_ends_with_an_error() -> None:
    class Once(list):  # type: ignore[type-arg]
        passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            return super().__iter__() if self.passes < 3 else iter([])

    class Short(list):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 9

    with pytest.raises(InputError, match="got no batch from another pass"):
        run(make_model(), "neggrad+", retain=batches(4, 4, 4), forget=Once(batches(4)))
    with pytest.raises(InputError, match="expected 9 batches of the forget set"):
        run(make_model(), "relabel", forget=Short(batches(4)))


def test_a_tensor_as_rate_and_no_retain_set_where_none_is_used() -> None:
    run_ = {"forget": batches(4), "method": "gradient-ascent", "epochs": 1}
    result = delfast.unlearn(make_model(), retain=None, lr=torch.tensor(0.25), **run_)
    assert result.method.lr == 0.25
    with pytest.raises(InputError, match="retain set"):
        delfast.unlearn(make_model(), retain=None, method="finetune")
