"""Networks that write their state as they run, and RNNs: what delfast.eval_mode.evaluating leaves as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import delfast
from delfast import InputError
from delfast.eval_mode import evaluating
from delfast.evaluation import accuracy_and_loss, kl_to_oracle, predictions
from delfast.localization import signed_channels
from delfast.unlearning import METHODS
from delfast.unlearning.head import find_head
from tests import cases
from tests.networks import Recurrent, Tokens

X, Y = cases.EIGHT


class Written(nn.Module):
    """Writes a buffer, puts another tensor into the place of a second one, and adds a third."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(2))
        self.register_buffer("empty", None)
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        self.cache = ids.float().mean(1).detach()
        self.empty = torch.ones(3)
        self.register_buffer("added", torch.ones(1))
        return self.head(self.hidden(self.norm(self.embedding(ids).mean(1))))


class MaxNorm(Written):
    def __init__(self, bag: bool = False) -> None:
        super().__init__()
        self.bag = bag
        self.embedding = (nn.EmbeddingBag if bag else nn.Embedding)(11, 6, max_norm=0.1)  # type: ignore[operator]

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.embedding(ids)
        return self.head(rows if self.bag else rows.mean(1))


IDS, LABELS = torch.arange(20).reshape(4, 5) % 11, torch.arange(4) % 3


SETS: Any = {"forget": [(IDS, LABELS)], "retain": [(IDS + 0, (LABELS + 1) % 3)] * 12}


def entries(model: nn.Module, make: Any) -> dict[str, Callable[[], object]]:
    """Every public function that runs the model or trains it."""
    forget, retain = SETS["forget"], SETS["retain"]
    dataset = TensorDataset(IDS, LABELS)
    full = delfast.score(model, criterion="weight").select(1.0)
    calls: dict[str, Callable[[], object]] = {
        "score": lambda: delfast.score(model, forget),
        "per example": lambda: delfast.score(model, forget, per_example=True),
        "critmem": lambda: delfast.critmem(model, forget),
        "signed_channels": lambda: signed_channels(model, forget),
        "localize": lambda: delfast.localize(model, forget),
        "anytime": lambda: delfast.localize(model, dataset, stop_when_stable=0.9, batch_size=1),
        "evaluate": lambda: delfast.evaluate(model, forget, retain, [*forget], mia=False),
        "accuracy_and_loss": lambda: accuracy_and_loss(model, forget),
        "predictions": lambda: predictions(model, forget),
        "kl_to_oracle": lambda: kl_to_oracle(copy.deepcopy(model), model, forget),
        "find_head": lambda: find_head(model, forget[0]),
    }
    training: dict[str, Callable[[], object]] = {
        "compact": lambda: delfast.compact(model, full).undo(),
    }
    needs = {"del": {"init": make, "mask": full}, "retrain": {"init": make}, "finetune": {"mask": full}}
    for method in METHODS:
        settings: Any = {**needs.get(method, {}), **({} if method in ("ssd", "influence") else {"epochs": 1})}
        training[f"unlearn, {method}"] = lambda m=method, s=settings: delfast.unlearn(model, method=m, **SETS, **s)
    return {**calls, **{f"trains: {name}": call for name, call in training.items()}}


@pytest.mark.parametrize("bag", [False, True])
def test_layers_that_write_their_weights_are_refused_by_name_everywhere(bag: bool) -> None:
    model = MaxNorm(bag)
    before = copy.deepcopy(model.state_dict())
    for name, call in entries(model, lambda: MaxNorm(bag)).items():
        with pytest.raises(InputError, match=r"'embedding.weight' changes its weights as it reads them \(max_norm\)"):
            call()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name
        assert model.training


def test_the_advice_for_max_norm_leaves_the_network_what_it_computed() -> None:
    model = MaxNorm()
    changed = copy.deepcopy(model)
    with pytest.raises(InputError, match=r"weight.data.renorm_\(2, 0, 0.1\), and set the layer's max_norm to None"):
        delfast.localize(changed, SETS["forget"])
    changed.embedding.weight.data.renorm_(2, 0, 0.1)
    changed.embedding.max_norm = None
    torch.testing.assert_close(changed(IDS), model(IDS), rtol=0, atol=1e-6)
    delfast.localize(changed, SETS["forget"])


def test_buffers_that_a_forward_pass_writes_are_put_back() -> None:
    model = Written()
    buffers = dict(model._buffers)
    before = copy.deepcopy(model.state_dict())
    for name, call in entries(model, Written).items():
        if name.startswith("trains: "):
            continue  # in training, buffers move
        call()
        assert dict(model._buffers).keys() == buffers.keys() and model.empty is None, name
        assert all(model._buffers[key] is value for key, value in buffers.items()), name
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name


class Clamped(Tokens):
    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            self.head.weight.clamp_(-0.01, 0.01)
        return super().forward(ids)


def test_other_parameters_that_a_forward_pass_writes_are_named() -> None:
    for name, call in entries(Clamped(), Clamped).items():
        if name.startswith("trains: "):
            continue
        with pytest.raises(InputError, match=r"'head.weight' (was written in it|is used where gradients are switched)"):
            call()


def test_spectral_norm_of_either_kind_leaves_its_power_iteration_alone() -> None:
    for wrap in (nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm):
        model = nn.Sequential(wrap(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 3))
        model.train()(torch.randn(4, 5)).sum().backward()
        before = copy.deepcopy(model.state_dict())
        delfast.localize(model, [(torch.randn(4, 5), LABELS)])
        predictions(model, [(torch.randn(4, 5), LABELS)])
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_lazy_modules_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 3))
    with pytest.raises(InputError, match=r"'0.weight' to have a shape, its module is lazy; run a forward pass first"):
        predictions(model, [(torch.randn(4, 5), LABELS)])


def test_a_compact_model_can_be_evaluated_between_steps() -> None:
    """Its forward pass puts the trained rows into the weights, which is no writing by the network."""
    model = cases.SmallNet()
    mask = delfast.localize(model, [(X, Y)])
    with delfast.compact(model, mask) as handle:
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
        for _ in range(2):
            functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
            accuracy_and_loss(model, [(X, Y)])


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("training", [False, True])
def test_where_gradients_are_taken_rnns_compute_as_in_eval_mode(kind: type[nn.RNNBase], training: bool) -> None:
    model = Recurrent(kind).train(training)
    x, y = torch.randn(7, 4, 6), torch.arange(7) % 3

    def outputs_and_gradients() -> list[Tensor]:
        logits = model(x)
        gradients = torch.autograd.grad(functional.cross_entropy(logits, y), list(model.parameters()))
        return [logits.detach(), *gradients]

    with evaluating(model):
        expected = outputs_and_gradients()
    with evaluating(model, gradients=True):
        found = outputs_and_gradients()
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    assert model.modes == [(False, False, 0.5), (True, False, 0.0)]
    assert model.rnn.dropout == 0.5 and model.rnn.training is training and model.dropout.training is training


def test_rnns_are_in_training_mode_only_where_gradients_are_taken() -> None:
    model = Recurrent(nn.LSTM)
    batches: Any = [(torch.randn(7, 4, 6), torch.arange(7) % 3)]
    dataset = TensorDataset(*batches[0])
    sets: Any = {"forget": batches, "retain": batches * 12}
    for gradients, call in (
        (True, lambda: delfast.score(model, batches)),
        (True, lambda: delfast.score(model, batches, per_example=True)),
        (True, lambda: delfast.critmem(model, batches)),
        (True, lambda: signed_channels(model, batches)),
        (True, lambda: delfast.localize(model, dataset, stop_when_stable=0.9)),
        (True, lambda: delfast.unlearn(model, method="influence", **sets)),
        (True, lambda: delfast.unlearn(model, method="ssd", **sets)),
        (False, lambda: delfast.evaluate(model, batches, [*batches], [*batches], mia=False)),
        (False, lambda: predictions(model, batches)),
        (False, lambda: kl_to_oracle(model, copy.deepcopy(model), batches)),
        (False, lambda: find_head(model, batches[0])),
    ):
        model.modes.clear()
        call()
        assert set(model.modes) == {(gradients, False, 0.0 if gradients else 0.5)}


def test_an_rnn_with_a_forward_pass_of_its_own_stays_in_eval_mode() -> None:
    class Dropped(nn.LSTM):
        def forward(self, x: Any, *arguments: Any) -> Any:
            return super().forward(functional.dropout(x, 0.5, self.training), *arguments)

    model = Dropped(6, 5)
    with evaluating(model, gradients=True):
        assert not model.training


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_script_modules_are_evaluated_localized_and_unlearned() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    scripted, x = torch.jit.script(copy.deepcopy(model)), torch.randn(8, 4)
    pairs = [(x, Y % 3)]
    assert torch.equal(predictions(scripted, pairs)[0], predictions(model, pairs)[0])
    assert delfast.localize(scripted, pairs).digest == delfast.localize(model, pairs).digest
    mask = delfast.localize(model, pairs)
    for each in (scripted, model):
        delfast.unlearn(each, retain=pairs, mask=mask, method="finetune", epochs=1)
    torch.testing.assert_close([*scripted.parameters()], [*model.parameters()])


class Codebook(nn.Module):
    """A parameter that its forward pass moves in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.book = nn.Linear(4, 3), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.book.mul_(0.9)
        return self.fc(x * self.book)


def test_unlearn_refuses_parameters_outside_the_mask_that_move_in_training_mode() -> None:
    pairs = [(torch.randn(8, 4), Y % 3)] * 2
    model = Codebook()
    mask = delfast.Mask({}).widen(["fc.weight"], {"fc.weight": (3, 4)})
    with pytest.raises(InputError, match="'book' was written in it"):
        delfast.unlearn(model, retain=pairs, mask=mask, method="finetune", epochs=1)
    delfast.unlearn(model, retain=pairs, method="finetune", epochs=1)  # everything may change
