"""The unlearning methods that change the network in one stroke, and train nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from delfast.batches import cut, evaluating, examples_in, per_example_losses, warn_about_loader
from delfast.errors import InputError
from delfast.localization.gradient import MeanGradient, add_all
from delfast.localization.per_example import PerExampleGradients
from delfast.naming import trainable_parameters
from delfast.unlearning.methods import Method, UnlearningTask, require
from delfast.unlearning.steps import Step

MAX_BYTES = 8 * 2**30  # of per-example gradients that influence holds at once


@dataclass(frozen=True, kw_only=True)
class OneShotMethod(Method):
    """A method without epochs: ``prepare`` is all of it."""

    epochs: int = 0

    def check(self) -> None:
        require(self, "epochs", self.epochs == 0, "= 0")

    def loss(self, task: UnlearningTask, step: Step) -> Tensor:
        """The loss of a batch of either set, which is tried before anything changes."""
        return task.loss(step["retain"] if "retain" in step else step["forget"])


@dataclass(frozen=True, kw_only=True)
class Dampening(OneShotMethod):
    """SSD, selective synaptic dampening (Foster et al., AAAI 2024, equations 4 to 6). With I the mean over examples of
    g_j(x)², on the forget set S and on all training data D: where I_S > alpha I_D, θ_j is multiplied by
    min(dampening I_D / I_S, 1). Defaults: alpha 10, dampening 1 (their lambda), as there for ResNet-18.

    D contains S, hence I_D >= I_S |S| / |D|: from alpha = |D| / |S| on nothing can be dampened, which is refused. So
    the default serves forget sets below a tenth of the data; for larger ones alpha must be lower.

    I here is of each example's own gradient, in eval mode, so that it does not depend on batches.
    """

    name: ClassVar[str] = "ssd"
    needs: ClassVar[frozenset[str]] = frozenset({"forget"})
    alpha: float = 10.0
    dampening: float = 1.0

    def check(self) -> None:
        super().check()
        require(self, "alpha", self.alpha > 0, "> 0")
        require(self, "dampening", self.dampening > 0, "> 0")

    def prepare(self, task: UnlearningTask) -> None:
        parameters = {name: parameter for name, parameter, _ in _masked(task)}
        sums, counts = {}, {}
        for what, loader in (("forget set", task.forget), ("retain set", task.retain)):
            warn_about_loader(loader, what)
            squares = PerExampleGradients(task.network, parameters, task.loss_fn, "square")
            counts[what] = add_all(squares, task.network, loader, what)
            sums[what] = squares.mean(1)
        forgotten, everything = counts["forget set"], sum(counts.values())
        if self.alpha * forgotten >= everything:
            raise InputError(
                f"expected alpha below {everything / forgotten:g} for '{self.name}', where {forgotten} of {everything} "
                f"examples are to be forgotten, got {self.alpha:g}, with which nothing can be dampened; lower alpha"
            )
        for name, parameter, chosen in _masked(task):
            of_forget = sums["forget set"][name] / forgotten
            of_all = (sums["forget set"][name] + sums["retain set"][name]) / everything
            dampened = chosen & (of_forget > self.alpha * of_all)
            factor = (self.dampening * of_all / of_forget.clamp_min(torch.finfo(of_forget.dtype).tiny)).clamp_max(1)
            with torch.no_grad():
                parameter.copy_(torch.where(dampened, parameter * factor.to(parameter.dtype), parameter))


@dataclass(frozen=True, kw_only=True)
class Influence(OneShotMethod):
    """The influence of leaving S out, as one Newton step (Koh & Liang, ICML 2017; for unlearning Jia et al., NeurIPS
    2023, equation 3): θ + alpha F⁻¹ v, v = ∇L(1/N - w), where L(w) = Σ w_i ℓ_i over all N examples and w is 1/|R| on R
    and 0 on S: v = |S|/N (mean of ∇ℓ over S - mean of ∇ℓ over R). F is the WoodFisher estimate (Singh & Alistarh,
    NeurIPS 2020, equation 4), damping I + (1/n) Σ g(x) g(x)ᵀ over n = ``samples`` examples of R, the first ones that
    its loader gives.

    F⁻¹ v is solved for exactly, by Woodbury's identity with the n gradients at hand; Jia et al.'s code keeps one vector
    of the recursion instead. Within a mask F is that of the masked entries. Defaults: 1,000 samples, as in that code,
    whose recursion begins with damping 1; alpha 1, in their range [1, 20]. 8 GiB hold 1,000 gradients of 2 million
    parameters; InputError, with the most that fit, above that.
    """

    name: ClassVar[str] = "influence"
    needs: ClassVar[frozenset[str]] = frozenset({"forget"})
    alpha: float = 1.0
    damping: float = 1.0
    samples: int = 1000

    def check(self) -> None:
        super().check()
        require(self, "damping", self.damping > 0, "> 0")
        require(self, "samples", self.samples >= 1, ">= 1")

    def prepare(self, task: UnlearningTask) -> None:
        masked = list(_masked(task))
        parameters = {name: parameter for name, parameter, _ in masked}
        chosen = torch.cat([flags.flatten() for _, _, flags in masked])
        size = int(chosen.sum())

        def flat(gradients: Iterable[Tensor]) -> Tensor:
            return torch.cat([gradient.flatten() for gradient in gradients])[chosen]

        means, counts = [], []
        for loader, what in ((task.forget, "forget set"), (task.retain, "retain set")):
            warn_about_loader(loader, what)
            sums = MeanGradient(task.network, parameters, task.loss_fn)
            counts.append(add_all(sums, task.network, loader, what))
            means.append(flat(sums.mean(counts[-1]).values()))
        v = counts[0] / sum(counts) * (means[0] - means[1])
        samples, max_samples = min(self.samples, counts[1]), MAX_BYTES // (size * v.element_size())
        if samples > max_samples:
            raise InputError(
                f"'{self.name}' would hold {samples} gradients of {size} parameters, more than "
                f"{MAX_BYTES / 2**30:g} GiB; set samples to {max_samples} at most, or lower the mask's budget"
            )
        gradients = v.new_empty(samples, size)
        used = 0
        with evaluating(task.network, gradients=True):
            for batch in task.retain:
                for loss in self._losses(task, batch, len(gradients) - used):
                    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                    present = zip(found, parameters.values(), strict=True)
                    gradients[used] = flat(torch.zeros_like(p) if g is None else g for g, p in present)
                    used += 1
                if used == len(gradients):
                    break
        if used < len(gradients):
            raise InputError(
                f"expected the retain set's loader to give its {counts[1]} examples a second time, got {used}; pass "
                "one that can be iterated over again"
            )
        moved = self.alpha * self.inverse_product(gradients, v)
        step = torch.zeros_like(chosen, dtype=v.dtype)
        step[chosen] = moved
        parts = torch.split(step, [parameter.numel() for parameter in parameters.values()])
        with torch.no_grad():
            for (_, parameter, flags), part in zip(masked, parts, strict=True):
                shifted = (parameter + part.view_as(parameter)).to(parameter.dtype)
                parameter.copy_(torch.where(flags, shifted, parameter))

    def inverse_product(self, gradients: Tensor, v: Tensor) -> Tensor:
        """F⁻¹ v, (P,), of gradients (N, P): (v - Gᵀ (N damping I + G Gᵀ)⁻¹ G v) / damping, solved in float64."""
        count = len(gradients)
        gram = (gradients @ gradients.T).double()
        gram.diagonal().add_(count * self.damping)
        solved = torch.linalg.solve(gram, (gradients @ v.to(gradients.dtype)).double())
        result: Tensor = (v - gradients.T @ solved.to(gradients.dtype)) / self.damping
        return result

    def _losses(self, task: UnlearningTask, batch: Any, limit: int) -> Iterator[Tensor]:
        """The losses of the batch's examples, one by one, ``most`` of them."""
        count = examples_in(batch, task.loss_fn)
        if count is None:
            raise InputError(f"'{self.name}' expects batches of tensors with the examples along dim 0, to take one out")
        for example in range(min(count, limit)):
            yield per_example_losses(task.network, cut(batch, [example], task.loss_fn), task.loss_fn).sum()


def _masked(task: UnlearningTask) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Plain name, parameter, and which of its entries may change, of those with any."""
    for name, parameter, part in task.mask.match(trainable_parameters(task.network)):
        yield name, parameter, part.dense().to(parameter.device)
