"""evaluate for language models: means over tokens, and the attack on each example's loss."""

from __future__ import annotations

import math
from collections import UserDict
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import delfast
from delfast.errors import InputError
from delfast.evaluation import Metrics, accuracy_and_loss, gaps, membership_inference, predictions

WORDS = 11


class Bigrams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WORDS)
        self.drop = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.drop(self.table(input_ids))


@pytest.fixture
def model() -> Bigrams:
    torch.manual_seed(0)
    return Bigrams()


def batches(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Return ``count`` sequences of 2 to 9 tokens, in batches of up to 4."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (count, 1), generator=generator)
    ids = torch.randint(WORDS, (count, 9), generator=generator)
    attended = (torch.arange(9) < lengths).long()
    return [{"input_ids": a, "attention_mask": b} for a, b in zip(ids.split(4), attended.split(4), strict=True)]


def by_hand(model: Bigrams, loader: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[bool]]:
    """Return the losses of the tokens of each example, and whether each token is predicted."""
    losses, right = [], []
    for batch in loader:
        for ids, attended in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[: int(attended.sum())]
            logits = model.table(ids[:-1]).detach().double()
            losses.append(functional.cross_entropy(logits, ids[1:], reduction="none"))
            right += (logits.argmax(1) == ids[1:]).tolist()
    return losses, right


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_they_are_means_over_tokens(model: Bigrams, kind: Any) -> None:
    loader = batches(10, seed=1)
    losses, right = by_hand(model, loader)
    result = accuracy_and_loss(model, [kind(batch) for batch in loader])
    assert result.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.accuracy == pytest.approx(100 * sum(right) / len(right))
    each = torch.stack([loss.mean() for loss in losses]).float()
    assert result.losses is not None
    torch.testing.assert_close(result.losses, each)
    torch.testing.assert_close(result.confidences, (-each).exp())


def test_labels_decide_what_counts(model: Bigrams) -> None:
    loader = batches(10, seed=1)
    labelled = [
        {"input_ids": b["input_ids"], "labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)}
        for b in loader
    ]
    assert accuracy_and_loss(model, labelled).loss == accuracy_and_loss(model, loader).loss


def test_three_sets_and_the_attack_on_losses(model: Bigrams) -> None:
    forget, retain, test = (batches(count, seed) for count, seed in ((9, 1), (30, 2), (20, 3)))
    metrics = delfast.evaluate(model, forget, retain, test)
    results = [accuracy_and_loss(model, each) for each in (forget, retain, test)]
    assert (metrics.forget_loss, metrics.retain_loss, metrics.test_loss) == tuple(each.loss for each in results)
    assert (metrics.forget_acc, metrics.retain_acc, metrics.test_acc) == tuple(each.accuracy for each in results)
    perplexities = metrics.forget_perplexity, metrics.retain_perplexity, metrics.test_perplexity
    assert perplexities == tuple(each.perplexity for each in results)
    losses = [each.losses for each in results]
    assert metrics.mia == membership_inference(losses[1], losses[2], losses[0])
    assert gaps(metrics, metrics) == {"delta_forget": 0, "delta_mia": 0, "delta_test": 0}
    assert set(metrics.as_dict()) == set(asdict(metrics)) - {"delta_forget", "delta_mia", "delta_test"}


def test_the_attack_finds_members_by_their_loss() -> None:
    model = Bigrams()
    with torch.no_grad():
        model.table.weight.copy_(5 * torch.eye(WORDS).roll(1, 1))  # the successor is likely
    known = [{"input_ids": (torch.arange(4)[:, None] + torch.arange(6)) % WORDS} for _ in range(6)]
    unknown = [{"input_ids": batch["input_ids"].flip(1)} for batch in known]
    assert delfast.evaluate(model, [*known], known, unknown).mia == 0
    assert delfast.evaluate(model, [*unknown], known, unknown).mia == 100


def test_classifiers_have_no_perplexity() -> None:
    pairs = [(torch.eye(2), torch.tensor([0, 1]))]
    metrics = delfast.evaluate(nn.Linear(2, 2), pairs, [*pairs], [*pairs], mia=False)
    assert metrics.forget_perplexity is None and "forget_perplexity" not in metrics.as_dict()
    result = accuracy_and_loss(nn.Linear(2, 2), pairs)
    assert result.losses is None and result.perplexity is None


def test_a_loss_beyond_floats_has_an_infinite_perplexity(model: Bigrams) -> None:
    with torch.no_grad():
        model.table.weight.copy_(-2000 * torch.eye(WORDS))
    assert accuracy_and_loss(model, [{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}]).perplexity == math.inf


def test_the_model_is_left_as_it_was(model: Bigrams) -> None:
    before = model.table.weight.clone()
    accuracy_and_loss(model, batches(4, seed=1))
    assert model.training and model.drop.training and torch.equal(model.table.weight, before)


def test_what_cannot_be_measured_is_refused(model: Bigrams) -> None:
    good, pairs = batches(4, seed=1), [(torch.eye(2), torch.tensor([0, 1]))]
    empty = {name: value[:1] for name, value in good[0].items()} | {"labels": torch.full((1, 9), -100)}
    with pytest.raises(InputError, match="data set: expected a counted token in every example"):
        accuracy_and_loss(model, [*good, empty])
    with pytest.raises(InputError, match="retain set: expected batches"):
        delfast.evaluate(model, good, [{"pixel_values": torch.eye(2)}], [*good])
    with pytest.raises(InputError, match="data set: expected at least one example"):
        accuracy_and_loss(model, [])
    with pytest.raises(InputError, match="data set: expected all batches with 'input_ids' or none"):
        accuracy_and_loss(_Either(model), [*good, *pairs])
    with pytest.raises(InputError, match="expected three sets of one form"):
        delfast.evaluate(_Either(model), good, [*good], pairs, mia=False)
    with pytest.raises(InputError, match=r"test set: expected labels in \[0, 11\), got 11 to 11"):
        bad = {"input_ids": good[0]["input_ids"], "labels": torch.full((4, 9), WORDS)}
        delfast.evaluate(model, good, [*good], [bad])
    with pytest.raises(InputError, match="expected batches"):
        predictions(model, good)
    with torch.no_grad():
        model.table.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="data set: expected finite losses"):
        accuracy_and_loss(model, batches(20, seed=1))


class _Either(nn.Module):
    """A model of tokens and of vectors."""

    def __init__(self, tokens: nn.Module) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, x: Tensor | None = None, **inputs: Tensor) -> Tensor:
        return self.tokens(**inputs) if x is None else x


def test_metrics_of_both_kinds_have_the_same_fields() -> None:
    assert Metrics(90.0, 99.0, 80.0, 0.3, 0.1, 0.6).as_dict().keys() == {
        *("forget_acc", "retain_acc", "test_acc", "forget_loss", "retain_loss", "test_loss")
    }
