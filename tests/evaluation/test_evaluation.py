"""Accuracies, losses, membership inference, gaps."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from delfast.errors import InputError
from delfast.evaluation import (
    Metrics,
    accuracy_and_loss,
    evaluate,
    gaps,
    kl_to_oracle,
    membership_inference,
    predictions,
)


def loader(inputs, targets, batch_size=7):
    index = torch.arange(len(targets))
    return list(zip(index.split(batch_size), inputs.split(batch_size), targets.split(batch_size), strict=True))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))


@pytest.fixture
def examples():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(50, 5, generator=generator), torch.randint(0, 4, (50,), generator=generator)


def test_accuracy_loss_and_confidence_are_means_over_examples(model, examples):
    inputs, targets = examples
    result = accuracy_and_loss(model, loader(inputs, targets))
    logits = model.eval()(inputs).detach()
    assert result.accuracy == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())
    assert result.loss == pytest.approx(functional.cross_entropy(logits.double(), targets).item(), rel=1e-6)
    torch.testing.assert_close(result.confidences, logits.softmax(1)[torch.arange(50), targets])
    other = accuracy_and_loss(model, loader(inputs, targets, batch_size=50))
    assert other.accuracy == result.accuracy and other.loss == pytest.approx(result.loss, rel=1e-6)


def test_pairs_and_triples_measure_the_same(model, examples):
    triples = loader(*examples)
    pairs = [(inputs, targets) for _, inputs, targets in triples]
    assert accuracy_and_loss(model, pairs).loss == accuracy_and_loss(model, triples).loss


def test_the_share_of_one_of_several_processes_is_refused(model, examples):
    data = TensorDataset(*examples)
    share = DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    for call in (
        lambda: accuracy_and_loss(model, share),
        lambda: evaluate(model, share, [tuple(examples)], [tuple(examples)], mia=False),
        lambda: predictions(model, share),
        lambda: kl_to_oracle(model, model, share),
    ):
        with pytest.raises(InputError, match="DistributedSampler yields the share of rank 0 of 2; pass group="):
            call()


def test_a_group_requires_that_torch_distributed_is_initialized(model, examples):
    with pytest.raises(InputError, match="to be initialized for group, it is not"):
        accuracy_and_loss(model, loader(*examples), group="world")


def test_the_model_is_left_as_it_was(model, examples):
    model.train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accuracy_and_loss(model, loader(*examples))
    assert [module.training for module in model] == [True, False, True, True] and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_come_back_after_an_error(model, examples):
    inputs, targets = examples
    with pytest.raises(InputError):
        accuracy_and_loss(model.train(), loader(inputs, targets + 4))
    assert model.training and model[2].training


@pytest.mark.parametrize("label", [4, -1])
def test_labels_out_of_range_are_refused(model, examples, label):
    inputs, targets = examples
    targets[9] = label
    with pytest.raises(
        InputError, match=rf"data set: expected labels in \[0, 4\), got {'-1 to' if label < 0 else '. to 4'}"
    ):
        accuracy_and_loss(model, loader(inputs, targets))


def test_bad_sets_are_named(model, examples):
    inputs, targets = examples
    good, retain, test = (loader(inputs.clone(), targets) for _ in range(3))
    with pytest.raises(InputError, match="forget set: expected at least one example"):
        evaluate(model, [], good, test)
    with pytest.raises(InputError, match="test set: expected at least one example"):
        evaluate(model, good, retain, [(inputs[:0], targets[:0])])
    with pytest.raises(InputError, match="retain set: expected batches"):
        evaluate(model, good, [{"input": inputs}], test)
    with torch.no_grad():
        model[3].bias[0] = float("nan")
    with pytest.raises(InputError, match="forget set: expected finite outputs"):
        evaluate(model, good, retain, test)


def test_membership_inference_separates_what_can_be_separated():
    numbers = torch.Generator().manual_seed(0)
    members = 0.95 + 0.05 * torch.rand(300, generator=numbers)
    outsiders = 0.5 * torch.rand(100, generator=numbers)
    assert membership_inference(members, outsiders, torch.full((10,), 0.99)) == 0
    assert membership_inference(members, outsiders, torch.full((10,), 0.2)) == 100
    assert membership_inference(members, outsiders, torch.tensor([0.99, 0.2, 0.99, 0.99])) == 25


def test_membership_inference_is_the_described_classifier():
    """Equal numbers: nothing is subsampled, and a plain transcription gives the same figure."""
    from sklearn.svm import SVC

    numbers = torch.Generator().manual_seed(0)
    retain, test, forget = (torch.rand(60, generator=numbers) ** power for power in (0.3, 1.0, 0.6))
    attack = SVC(C=3, kernel="rbf", gamma="auto")
    attack.fit(torch.cat([retain, test])[:, None].numpy(), [1] * 60 + [0] * 60)
    expected = 100 * (1 - attack.predict(forget[:, None].numpy()).mean())
    assert 0 < expected < 100
    assert membership_inference(retain, test, forget) == pytest.approx(expected)


def test_membership_inference_balances_and_repeats():
    numbers = torch.Generator().manual_seed(0)
    # unbalanced, everything would be called a member; balanced, low confidence is not
    retain = 0.3 + 0.7 * torch.rand(2000, generator=numbers)
    test = 0.8 * torch.rand(100, generator=numbers)
    forget = torch.rand(200, generator=numbers)
    first = membership_inference(retain, test, forget, seed=1)
    assert first == membership_inference(retain, test, forget, seed=1)
    assert 30 < first < 70
    with pytest.raises(InputError, match="at least one forget example"):
        membership_inference(retain, test, forget[:0])


def test_gaps_are_oracle_minus_method(model, examples):
    oracle = Metrics(10.0, 90.0, 80.0, 1.0, 1.0, 1.0, mia=70.0)
    method = Metrics(35.0, 95.0, 78.0, 1.0, 1.0, 1.0, mia=50.0)
    assert gaps(method, oracle) == {"delta_forget": -25.0, "delta_mia": 20.0, "delta_test": 2.0}
    assert "delta_forget" not in method.as_dict() and method.as_dict()["mia"] == 50.0
    measured = evaluate(model, *(loader(*examples) for _ in range(3)), oracle=oracle)
    assert measured.delta_test == oracle.test_acc - measured.test_acc
    assert measured.as_dict()["delta_mia"] == oracle.mia - measured.mia
