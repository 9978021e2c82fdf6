"""causal_lm_loss: its two weightings, its batches, what it refuses."""

from __future__ import annotations

from collections import UserDict
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler
from transformers import BatchEncoding

import delfast
from delfast import causal_lm_loss, tokens_per_example
from delfast.errors import InputError
from tests.language import models


class Bigrams(nn.Module):
    """Logits by a table; ``form`` makes the output of them."""

    def __init__(self, form: Any = lambda logits: logits) -> None:
        super().__init__()
        self.table = nn.Embedding(models.VOCABULARY, models.VOCABULARY, dtype=torch.float64)
        self.form = form

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.form(self.table(input_ids))


def by_hand(model: nn.Module, ids: Tensor, labels: Tensor) -> list[list[Tensor]]:
    """Return the losses of the counted tokens of each example, one by one."""
    logits = model(input_ids=ids)
    logits = logits if isinstance(logits, Tensor) else logits.logits
    return [
        [
            functional.cross_entropy(logits[n, t], labels[n, t + 1])
            for t in range(ids.shape[1] - 1)
            if labels[n, t + 1] != -100
        ]
        for n in range(len(ids))
    ]


@pytest.fixture
def labelled() -> dict[str, Tensor]:
    ids = models.batch((12, 12, 12, 12))["input_ids"]
    labels = ids.clone()
    labels[0, 5:] = labels[1, ::2] = labels[2, :11] = -100
    return {"input_ids": ids, "labels": labels}


def test_it_is_the_mean_over_each_examples_counted_tokens(labelled: dict[str, Tensor]) -> None:
    model = Bigrams()
    expected = [torch.stack(each).mean() for each in by_hand(model, **_ids_and_labels(labelled))]
    torch.testing.assert_close(causal_lm_loss(model, labelled), torch.stack(expected))


def test_per_token_makes_the_mean_over_the_set_the_mean_over_its_tokens(labelled: dict[str, Tensor]) -> None:
    model = Bigrams()
    tokens = [token for each in by_hand(model, **_ids_and_labels(labelled)) for token in each]
    batches = [{name: value[rows] for name, value in labelled.items()} for rows in (slice(0, 3), slice(3, 4))]
    assert tokens_per_example(batches) == len(tokens) / 4
    loss_fn = partial(causal_lm_loss, per_token=tokens_per_example(batches))
    losses = torch.cat([loss_fn(model, batch) for batch in batches])  # cut unevenly
    torch.testing.assert_close(losses.mean(), torch.stack(tokens).mean())


def _ids_and_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"ids": batch["input_ids"], "labels": batch["labels"]}


def test_per_token_is_the_loss_that_transformers_computes(labelled: dict[str, Tensor]) -> None:
    model = models.gpt2().eval()
    losses = causal_lm_loss(model, labelled, per_token=tokens_per_example([labelled]))
    torch.testing.assert_close(losses.mean(), model(**labelled).loss)


def test_the_weightings_select_different_masks_unless_all_examples_are_equally_long() -> None:
    model = models.gpt2()
    for lengths, same in (((12, 3, 4, 12), False), ((8, 8, 8, 8), True)):
        forget = [models.batch(lengths)]
        weighted = partial(causal_lm_loss, per_token=tokens_per_example(forget))
        masks = [delfast.localize(model, forget, 0.2, loss_fn=loss_fn) for loss_fn in (causal_lm_loss, weighted)]
        assert (masks[0].digest == masks[1].digest) is same


def test_scores_do_not_depend_on_how_the_set_is_cut() -> None:
    model, whole = models.gpt2().double(), models.batch((12, 3, 7, 2))
    cuts = [
        [{name: value[rows] for name, value in whole.items()} for rows in cut] for cut in ([slice(4)], [[0], [1, 2, 3]])
    ]
    for per_token in (None, tokens_per_example([whole])):
        loss_fn = partial(causal_lm_loss, per_token=per_token)
        one, two = (delfast.score(model, cut, loss_fn=loss_fn).gradients for cut in cuts)
        torch.testing.assert_close(one, two)


def test_without_labels_padding_is_ignored() -> None:
    model = Bigrams()
    padded = models.batch((12, 5, 2))
    losses = causal_lm_loss(model, padded)
    for n, length in enumerate((12, 5, 2)):
        alone = {"input_ids": padded["input_ids"][n : n + 1, :length]}
        torch.testing.assert_close(losses[n : n + 1], causal_lm_loss(model, alone))


def test_padding_on_the_left_predicts_nothing() -> None:
    model = Bigrams()
    right = models.batch((5,))
    left = {"input_ids": right["input_ids"].roll(7, 1), "attention_mask": right["attention_mask"].flip(1)}
    torch.testing.assert_close(causal_lm_loss(model, left), causal_lm_loss(model, right))


@pytest.mark.parametrize("lengths", [(12, 0, 1), (0,), (1, 1)])
def test_an_example_without_a_counted_token_has_the_loss_and_gradient_0(lengths: tuple[int, ...]) -> None:
    model = models.gpt2()
    for labels in ({}, {"labels": torch.full((len(lengths), 12), -100)}):
        losses = causal_lm_loss(model, {**models.batch(lengths), **labels})
        empty = [n for n, length in enumerate(lengths) if length < 2 or labels]
        assert losses[empty].tolist() == [0] * len(empty) and losses.requires_grad
        losses[empty].sum().backward()
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_one_token_is_no_error() -> None:
    assert causal_lm_loss(Bigrams(), {"input_ids": torch.zeros(2, 1, dtype=torch.int64)}).tolist() == [0, 0]


class Output(dict):  # type: ignore[type-arg]
    pass


class WithLogits:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize("form", [lambda logits: {"logits": logits}, WithLogits])
def test_logits_come_in_any_of_three_forms(form: Any, labelled: dict[str, Tensor]) -> None:
    model, other = Bigrams(), Bigrams(form)
    other.load_state_dict(model.state_dict())
    assert torch.equal(causal_lm_loss(model, labelled), causal_lm_loss(other, labelled))


@pytest.mark.parametrize("kind", [dict, UserDict, BatchEncoding])
def test_batches_are_any_mapping_and_stay_as_they_are(kind: Any, labelled: dict[str, Tensor]) -> None:
    batch = kind({**labelled, "labels": labelled["labels"].int()})
    names = list(batch)
    losses = causal_lm_loss(models.gpt2(), batch)
    assert losses.shape == (4,) and list(batch) == names and batch["labels"].dtype is torch.int32


def test_the_loss_of_bfloat16_logits_is_computed_in_float32(labelled: dict[str, Tensor]) -> None:
    model = Bigrams().bfloat16()
    losses = causal_lm_loss(model, labelled)
    assert losses.dtype is torch.float32
    torch.testing.assert_close(losses, causal_lm_loss(model.float(), labelled))


class Allocations(TorchDispatchMode):
    """Records the names of operations whose output is a new tensor of at least ``size`` numbers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {each.data_ptr() for each in args if isinstance(each, Tensor)}
        if isinstance(result, Tensor) and result.numel() >= self.size and result.data_ptr() not in known:
            self.names.append(func.overloadpacket.__name__)
        return result


def test_it_allocates_what_cross_entropy_needs(labelled: dict[str, Tensor]) -> None:
    model = Bigrams().float()
    with Allocations(4 * 12 * models.VOCABULARY) as allocations:
        causal_lm_loss(model, labelled)
    assert allocations.names == ["embedding", "_log_softmax"]  # the model's logits, and their logarithms


def test_the_model_keeps_no_keys_and_values_for_a_generation(labelled: dict[str, Tensor]) -> None:
    model, outputs = models.llama(), list[Any]()
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    causal_lm_loss(model, labelled)
    causal_lm_loss(model, {**labelled, "use_cache": True})
    assert [output.past_key_values is None for output in outputs] == [True, False]


IDS = torch.zeros(2, 3, dtype=torch.int64)
REFUSED = {
    "no mapping": ((IDS, IDS), "expected batches as mappings with 'input_ids', got tuple"),
    "another mapping": ({"pixel_values": IDS}, "expected batches as mappings with 'input_ids', got dict"),
    "one example": ({"input_ids": IDS[0]}, r"expected input_ids as integers \(N, T\), got torch.int64 \(3,\)"),
    "lists": ({"input_ids": [[0, 1]]}, r"expected input_ids as integers \(N, T\), got list"),
    "no position": ({"input_ids": IDS[:, :0]}, r"expected input_ids as integers \(N, T\), got torch.int64 \(2, 0\)"),
    "embeddings": ({"input_ids": IDS.float()}, r"expected input_ids as integers \(N, T\), got torch.float32"),
    "class labels": ({"input_ids": IDS, "labels": IDS[:, 0]}, r"expected labels as integers \(2, 3\).*got .*\(2,\)"),
    "shifted": ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"expected labels as integers \(2, 3\).*not shifted"),
    "soft labels": ({"input_ids": IDS, "labels": IDS.float()}, r"expected labels as integers \(2, 3\).*float32"),
    "a wide mask": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 3, 3)},
        r"expected an attention_mask \(2, 3\).*got torch.float32 \(2, 1, 3, 3\); pass labels",
    ),
    "a label": ({"input_ids": IDS, "labels": IDS + 61}, r"expected labels in \[0, 61\), got 61 to 61"),
    "a negative label": ({"input_ids": IDS, "labels": IDS - 1}, r"expected labels in \[0, 61\), got -1 to -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_batches_of_another_form_are_refused(name: str) -> None:
    batch, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        causal_lm_loss(Bigrams(), batch)


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (lambda logits: (logits,), "a tuple without them"),
        (lambda logits: logits[:, :-1], r"\(2, 2, 61\)"),
        (lambda logits: logits.sum(1), r"\(2, 61\)"),
        (lambda logits: {"scores": logits}, "a dict without them"),
    ],
)
def test_outputs_of_another_form_are_refused(form: Any, found: str) -> None:
    with pytest.raises(InputError, match=rf"expected the model to return logits \(2, 3, V\).*got {found}"):
        causal_lm_loss(Bigrams(form), {"input_ids": IDS})


@pytest.mark.parametrize("per_token", [True, 0, -1.0, float("nan"), float("inf"), "10"])
def test_per_token_is_a_positive_number(per_token: Any) -> None:
    with pytest.raises(InputError, match="expected per_token to be"):
        causal_lm_loss(Bigrams(), {"input_ids": IDS}, per_token=per_token)


def test_sets_without_tokens_have_no_mean() -> None:
    for loader in ([], [{"input_ids": IDS, "labels": IDS - 100}]):
        with pytest.raises(InputError, match="expected a set with counted tokens"):
            tokens_per_example(loader)
    with pytest.raises(InputError, match="expected batches as mappings"):
        tokens_per_example([(IDS, IDS)])


def test_the_share_of_one_process_has_no_mean_number_of_tokens() -> None:
    data = [{"input_ids": torch.arange(3)} for _ in range(4)]
    loader = DataLoader(data, sampler=DistributedSampler(data, 2, 0))
    with pytest.raises(InputError, match="yields the share of rank 0 of 2"):
        delfast.tokens_per_example(loader)
