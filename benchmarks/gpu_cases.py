"""The cases of benchmarks.gpu: every op on a network's parameters, its expected result, and its baselines.

Runs on any device, so that tests/docs/test_gpu_benchmark.py can run it where there is no GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import delfast
from benchmarks.baselines import channel_scores, double_argsort, element_scores, expanded
from delfast.compaction.layers import ROWS
from delfast.localization.criteria import resolve_top_h
from delfast.localization.scores import Scores
from delfast.optim import MaskedAdamW, MaskedSGD

NATIVE = torch.ops.delfast
BUDGET = 0.3
PER_EXAMPLE, STEP = 32, 128  # images of a batch: of per-example scores, of a training step


@dataclass(frozen=True)
class Case:
    """``ours``: the call. ``others``: baselines by name. ``moved``: the bytes that ours has to read and write.

    ``verify`` raises AssertionError unless ours computes what it should; it may be called once, before timing.
    """

    name: str
    setting: str
    ours: Callable[[], Any]
    others: Mapping[str, Callable[[], Any]]
    moved: int
    verify: Callable[[], None]
    compiles: Mapping[str, Callable[[], Any]] = field(default_factory=dict)  # of others: to run under torch.compile


def cases(name: str, network: nn.Module, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Return all cases on this network's parameters in this dtype, with float32 gradients as in localization."""
    model = copy.deepcopy(network).to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    gradients = {n: torch.randn(p.shape, generator=generator).to(device) * 1e-3 for n, p in model.named_parameters()}
    setting = f"{name}, {str(dtype).removeprefix('torch.')}"
    scores = Scores(dict(model.named_parameters()), gradients, "weighted_grad", 1)
    yield from _localization(setting, scores, gradients)
    yield from _per_example(setting, copy.deepcopy(model).eval(), dtype, device)
    mask = scores.select(BUDGET)
    yield from _step(setting, model, mask, device)
    yield from _updates(setting, model, gradients, mask)


# ---- criticality and selection


def _localization(setting: str, scores: Scores, gradients: dict[str, Tensor]) -> Iterator[Case]:
    theta, grad = list(scores.parameters.values()), list(gradients.values())
    h, k = [resolve_top_h(0.1, t.shape) for t in theta], int(BUDGET * scores.total)
    read = sum(t.nbytes + g.nbytes for t, g in zip(theta, grad, strict=True))
    on_host = [[t.cpu() for t in tensors] for tensors in (theta, grad)]

    def channels() -> Tensor:
        return NATIVE.criticality(theta, grad, "weighted_grad", "topk_mean", h)

    def means() -> Tensor:
        return NATIVE.criticality(theta, grad, "weighted_grad", "mean", h)

    def elements() -> tuple[Tensor, Tensor]:
        return NATIVE.select_elements(theta, grad, "weighted_grad", k)

    def eager_channels() -> list[Tensor]:
        return channel_scores(theta, grad, h)

    def eager_means() -> list[Tensor]:
        return [s.flatten(1).mean(dim=1) if s.ndim > 1 else s for s in element_scores(theta, grad)]

    def same_as_on_the_cpu(op: Any, *arguments: Any) -> Callable[[], None]:
        def verify() -> None:
            result, expected = op(theta, grad, *arguments), op(*on_host, *arguments)
            for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (result, expected)), strict=True):
                assert torch.equal(a.cpu(), b), f"{op} differs from the CPU kernels"

        return verify

    units = channels().nbytes
    yield Case(
        *("criticality, mean of the top tenth", setting, channels, {"eager": eager_channels}, read + units),
        same_as_on_the_cpu(NATIVE.criticality, "weighted_grad", "topk_mean", h),
        {"compile": eager_channels},
    )
    yield Case(
        *("criticality, mean", setting, means, {"eager": eager_means}, read + units),
        same_as_on_the_cpu(NATIVE.criticality, "weighted_grad", "mean", h),
        {"compile": eager_means},
    )
    yield Case(
        *("selection of elements", setting, elements),
        {"double argsort": lambda: double_argsort(element_scores(theta, grad), k)},
        4 * read + elements()[0].nbytes,  # three radix passes and the marking
        same_as_on_the_cpu(NATIVE.select_elements, "weighted_grad", k),
    )

    def verify_mask() -> None:
        parameters, host_gradients = ({n: t.cpu() for n, t in d.items()} for d in (scores.parameters, gradients))
        expected = Scores(parameters, host_gradients, "weighted_grad", 1).select(BUDGET)
        assert scores.select(BUDGET).digest == expected.digest, "the mask differs from the CPU's"

    yield Case(
        *("a channel mask, whole call", setting, lambda: scores.select(BUDGET)),
        {"double argsort": lambda: double_argsort(expanded(channel_scores(theta, grad, h), theta), k)},
        read + units,
        verify_mask,
    )


# ---- per example


def _per_example(setting: str, model: nn.Module, dtype: torch.dtype, device: str) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(PER_EXAMPLE, 3, 32, 32, generator=generator).to(device, dtype)
    batch = images, torch.randint(0, 10, (PER_EXAMPLE,), generator=generator).to(device)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    moved = 2 * sum(p.nbytes for p in parameters.values())  # the least: as a forward and a backward pass

    def backward() -> None:
        loss = nn.functional.cross_entropy(model(batch[0]).float(), batch[1], reduction="sum")
        torch.autograd.grad(loss, list(model.parameters()))

    def vmap() -> dict[str, Tensor]:
        def loss(values: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
            logits = torch.func.functional_call(model, values, (image[None],))
            return nn.functional.cross_entropy(logits.float(), target[None])

        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, *batch)
        return {name: gradient.abs().mean(dim=0) for name, gradient in gradients.items()}

    def mean_gradients() -> Mapping[str, Tensor]:
        found = delfast.score(model, [batch], "grad", per_example=True).gradients
        assert found is not None
        return found

    def channels() -> delfast.SignedChannels:
        return delfast.signed_channels(model, [batch])

    bound = 1e-4 if dtype == torch.float32 else 5e-2  # 16 bits round the activations between the layers

    def verify_gradients() -> None:
        expected = vmap()
        for name, result in mean_gradients().items():
            difference = float((result - expected[name]).norm() / expected[name].norm().clamp_min(1e-30))
            assert difference <= bound, f"'{name}' is off by {difference:.2g}"

    def verify_channels() -> None:
        """Compare a weighted sum over the examples with autograd's, of the same forward pass.

        Alone or in float64 an example may have a ReLU on its other side, which changes gradients by more than rounding.
        """
        weights = torch.rand(PER_EXAMPLE, generator=generator).to(device)
        expected = _channel_sums(model, batch, weights)
        found = weights.to("cpu", torch.float32) @ torch.as_tensor(channels().matrix)
        difference = float((found.to(expected) - expected).norm() / expected.norm())
        assert difference <= bound, f"a weighted sum over the examples is off by {difference:.2g}"

    yield Case(
        *("per-example scores, whole call", setting, mean_gradients, {"batched backward": backward, "vmap": vmap}),
        moved,
        verify_gradients,
    )
    yield Case("signed channels, whole call", setting, channels, {"batched backward": backward}, moved, verify_channels)


def _channel_sums(model: nn.Module, batch: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    """Return sum_j theta_ij g_ij for every channel i, by autograd; float32 (channels,).

    g is the gradient of the examples' losses, weighted and summed. ``weights``: (N,).
    """
    values = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    losses = nn.functional.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")
    gradients = torch.autograd.grad((losses * weights).sum(), values)
    products = [value.detach().float() * gradient.float() for value, gradient in zip(values, gradients, strict=True)]
    return torch.cat([product.flatten(1).sum(dim=1) for product in products])


# ---- compact training


def _step(setting: str, model: nn.Module, mask: delfast.Mask, device: str) -> Iterator[Case]:
    dtype = next(model.parameters()).dtype
    images = torch.randn(STEP, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    targets = torch.arange(STEP, device=device) % 10
    compact, dense = copy.deepcopy(model), copy.deepcopy(model)
    handle = delfast.compact(compact, mask)

    def stepper(network: nn.Module, parameters: Iterator[nn.Parameter]) -> Callable[[], None]:
        optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images).float(), targets).backward()
            optimizer.step()

        return step

    ours, other = stepper(compact, handle.parameters()), stepper(dense, dense.parameters())
    bound = 1e-4 if dtype == torch.float32 else 5e-2

    def verify() -> None:
        ours()
        other()
        found = {name: p.grad for name, p in handle.named_parameters()}
        for name, p in dense.named_parameters():
            part = mask.parameters[name]
            if handle.modes[name] == "frozen":
                continue
            if handle.modes[name] == "rows":
                result, expected = found[name.removesuffix("weight") + ROWS], p.grad[part.flags.to(device)]
            else:
                inside = part.dense().to(device)
                result, expected = found[name][inside], p.grad[inside]
            difference = float((result - expected).norm() / expected.norm().clamp_min(1e-30))
            assert difference <= bound, f"the gradient of '{name}' is off by {difference:.2g}"

    moved = 2 * sum(p.nbytes for p in model.parameters())  # the least: as a forward and a backward pass
    yield Case("compact training step, whole call", setting, ours, {"dense step": other}, moved, verify)
    handle.undo()  # or its hooks would be in the steps of the cases to come


# ---- masked updates


def _updates(setting: str, model: nn.Module, gradients: dict[str, Tensor], mask: delfast.Mask) -> Iterator[Case]:
    dense = {name: part.dense().to(gradients[name].device) for name, part in mask.parameters.items()}
    names = [name for name, part in mask.parameters.items() if part.selected]
    ours = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    theirs = [nn.Parameter(dict(model.named_parameters())[name].detach().clone()) for name in names]
    masks = [dense[name].to(p.dtype) for name, p in zip(names, theirs, strict=True)]
    for name, p in ours.items():
        p.grad = gradients[name].to(p.dtype)
    for name, p in zip(names, theirs, strict=True):
        p.grad = gradients[name].to(p.dtype, copy=True)  # which the baselines multiply by the mask
    entry = sum(mask.parameters[name].selected * ours[name].element_size() for name in names)
    elements = sum(mask.parameters[name].selected for name in names)

    fresh = {name: torch.randn_like(p) for name, p in ours.items()}
    arguments = (
        [ours[name] for name in names],
        [fresh[name] for name in names],
        torch.cat([mask.parameters[name].bits.to(theirs[0].device) for name in names]),
        [mask.parameters[name].by_row for name in names],
    )

    @torch.no_grad()
    def reset() -> None:
        NATIVE.masked_reset_(*arguments)

    @torch.no_grad()
    def where() -> None:
        for name, p in zip(names, theirs, strict=True):
            p.copy_(torch.where(dense[name], fresh[name], p))

    def same_everywhere(step: Callable[[], Any], other: Callable[[], Any], **near: float) -> Callable[[], None]:
        def verify() -> None:
            before = {name: p.detach().clone() for name, p in ours.items()}
            with torch.no_grad():  # the cases before this one have not stepped both sides equally often
                for name, p in zip(names, theirs, strict=True):
                    p.copy_(ours[name])
            step()
            other()
            for name, p in zip(names, theirs, strict=True):
                torch.testing.assert_close(ours[name], p, **near)
            for name, p in ours.items():
                assert torch.equal(p[~dense[name]], before[name][~dense[name]]), f"'{name}' moved outside the mask"

        return verify

    yield Case(
        *("masked reset", setting, reset, {"eager": where}, 2 * entry),
        same_everywhere(reset, where, rtol=0, atol=0),
        {"compile": where},
    )
    # no weight decay: with it the baselines would move what they must not
    kinds: list[tuple[str, Any, Any, int, dict[str, Any]]] = [
        ("masked SGD with momentum", MaskedSGD, torch.optim.SGD, 1, {"momentum": 0.9}),
        ("masked AdamW", MaskedAdamW, torch.optim.AdamW, 2, {"weight_decay": 0.0}),
    ]
    for name, masked_class, dense_class, states, settings in kinds:
        optimizer = masked_class(ours.items(), mask=mask, lr=1e-4, **settings)
        foreach, fused = (dense_class(theirs, lr=1e-4, **settings, **{how: True}) for how in ("foreach", "fused"))

        def masked_then(other: torch.optim.Optimizer) -> Callable[[], None]:
            def step() -> None:
                torch._foreach_mul_([p.grad for p in theirs], masks)
                other.step()

            return step

        eps = torch.finfo(theirs[0].dtype).eps
        yield Case(
            *(name, setting, optimizer.step, {"foreach": masked_then(foreach), "fused": masked_then(fused)}),
            3 * entry + 8 * states * elements,
            same_everywhere(optimizer.step, masked_then(foreach), rtol=4 * eps, atol=1e-6),
        )
