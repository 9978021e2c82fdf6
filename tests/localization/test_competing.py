"""include and exclude: which parameters compete, by the patterns of their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import delfast
from delfast.errors import InputError


class Network(nn.Module):
    """Tokens (N, T) -> logits (N, 7): embedding and head are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(6, 6), "mlp": nn.Linear(6, 6)}) for _ in range(2))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mean(1)
        for block in self.blocks:
            x = x + block["mlp"](block["attn"](x).tanh())
        return self.head(x)


@pytest.fixture
def model() -> Network:
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def forget() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(7, (n, 5), generator=generator), torch.randint(7, (n,), generator=generator)) for n in (6, 3)
    ]


MLP = [f"blocks.{number}.mlp.{kind}" for number in (0, 1) for kind in ("weight", "bias")]
ATTENTION = [name.replace("mlp", "attn") for name in MLP]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ({"include": "*.mlp.*"}, MLP),
        ({"include": ["*.mlp.*"], "exclude": ["*.bias"]}, MLP[::2]),
        ({"include": ("blocks.0.*", "blocks.1.mlp.??????")}, [*ATTENTION[:2], *MLP[:2], MLP[2]]),
        ({"exclude": ["embed.*"]}, None),
        ({"exclude": "head.weight"}, None),
        ({"include": "head.*"}, ["embed.weight"]),
        ({"include": ["*"], "exclude": []}, ["embed.weight", None]),
    ],
)
def test_the_mask_has_what_competes(
    model: Network, forget: Any, patterns: dict[str, Any], names: list[str | None] | None
) -> None:
    every = [name for name, _ in model.named_parameters()]
    if names is None:
        names = every[1:]
    elif names[-1] is None:
        names = every
    mask = delfast.localize(model, forget, 0.4, **patterns)
    assert sorted(mask.names) == sorted(names) and mask.names == [name for name in every if name in names]
    assert mask.fraction <= 0.4 and mask.total == sum(p.numel() for n, p in model.named_parameters() if n in names)
    for name, given in patterns.items():
        assert mask.metadata[name] == ([given] if isinstance(given, str) else list(given))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"criterion": "random"},
        {"criterion": "weight", "granularity": "param"},
        {"criterion": "deepest"},
        {"per_example": True},
        {"policy": "exact"},
    ],
    ids=str,
)
def test_what_does_not_compete_is_as_if_frozen(model: Network, forget: Any, options: dict[str, Any]) -> None:
    mask = delfast.localize(model, forget, 0.3, exclude=["head.*", "*.attn.*"], **options)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    assert mask.digest == delfast.localize(model, forget, 0.3, **options).digest


def test_no_gradient_of_them_is_computed(model: Network, forget: Any) -> None:
    computed = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: computed.append(name))
    delfast.score(model, forget[:1], include="*.mlp.weight")
    assert sorted(computed) == MLP[::2] and all(p.grad is None for p in model.parameters())


def test_anytime_localization_has_them_too(model: Network, forget: Any) -> None:
    examples = [(tokens, int(label)) for batch in forget for tokens, label in zip(*batch, strict=True)]
    mask = delfast.localize(model, examples, stop_when_stable=0.5, batch_size=2, include=["*.mlp.*"])
    assert mask.names == MLP and mask.metadata["include"] == ["*.mlp.*"]


def test_names_are_plain(model: Network, forget: Any) -> None:
    wrapped = nn.DataParallel(model) if not torch.cuda.is_available() else model
    assert delfast.localize(wrapped, forget, include="blocks.0.*").names == [*ATTENTION[:2], *MLP[:2]]


def test_a_mask_keeps_its_patterns(model: Network, forget: Any, tmp_path: Any) -> None:
    masks = [delfast.localize(model, forget, budget, include="*.mlp.*") for budget in (0.2, 0.4)]
    masks[0].save(tmp_path / "mask.safetensors")
    assert delfast.Mask.load(tmp_path / "mask.safetensors").metadata["include"] == ["*.mlp.*"]
    assert masks[0].union(masks[1]).metadata["include"] == ["*.mlp.*"]


@pytest.mark.parametrize("combined", [False, True])
def test_unlearn_leaves_what_did_not_compete(model: Network, forget: Any, combined: bool) -> None:
    mask = delfast.localize(model, forget, exclude="head.*")
    mask = mask.union(mask) if combined else mask
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = delfast.unlearn(model, retain=forget, mask=mask, init=Network, seed=1, epochs=2, lr=0.1)
    assert result.head == "head" and result.mask.names == mask.names
    after, flags = model.state_dict(), mask.to_dense()
    assert torch.equal(after["head.weight"], before["head.weight"])
    for name, selected in flags.items():
        assert torch.equal(after[name][~selected], before[name][~selected])
        assert not selected.any() or not torch.equal(after[name], before[name])


def test_a_head_that_competes_is_trained_in_full(model: Network, forget: Any) -> None:
    mask = delfast.localize(model, forget, exclude="*.attn.*")
    result = delfast.unlearn(model, retain=forget, mask=mask, init=Network, seed=1, epochs=1)
    assert result.mask["embed.weight"].selected == 42


def test_compact_trains_the_mask_alone(model: Network, forget: Any) -> None:
    mask = delfast.localize(model, forget, include="*.mlp.*")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with delfast.compact(model, mask):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        for inputs, targets in forget:
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed and set(changed) <= {name for name in MLP if mask[name].selected}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"include": "*.mpl.*"},
            r"expected include to match names of parameters.*got '\*\.mpl\.\*', which matches none",
        ),
        ({"exclude": ["*.mlp.*", "Head.*"]}, r"expected exclude to match.*got 'Head\.\*'"),
        ({"include": "*.mlp.*", "exclude": "blocks.*"}, "expected include and exclude to leave a trainable parameter"),
        ({"include": []}, "expected include and exclude to leave a trainable parameter"),
        ({"include": 5}, "expected include to be a pattern of parameter names or a list of patterns, got 5"),
        ({"exclude": ["*", 5]}, "expected exclude to be a pattern of parameter names"),
        ({"exclude": {"*"}}, "expected exclude to be a pattern of parameter names"),
        ({"include": "*", "criterion": "critmem"}, "expected no include and no exclude for criterion 'critmem'"),
    ],
)
def test_bad_patterns_are_refused(model: Network, forget: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        delfast.localize(model, forget, **options)
    with pytest.raises(InputError, match=message):
        delfast.score(model, forget, **options)


def test_a_pattern_may_match_frozen_parameters_alone(model: Network, forget: Any) -> None:
    model.embed.weight.requires_grad_(False)
    assert len(delfast.localize(model, forget, exclude=["embed.*"]).names) == 8
    with pytest.raises(InputError, match="leave a trainable parameter"):
        delfast.localize(model, forget, include=["embed.*"])
