"""One-shot unlearning methods: they change the network once and train nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from delfast.batches import cut, device_of, examples_in, per_example_losses, warn_about_loader
from delfast.errors import InputError
from delfast.eval_mode import evaluating
from delfast.feeding import feed
from delfast.localization.gradient import MeanGradient, add_all
from delfast.localization.per_example import PerExampleGradients
from delfast.naming import trainable_parameters
from delfast.unlearning.method import Method, UnlearningTask, require
from delfast.unlearning.steps import Step

MAX_BYTES = 8 * 2**30  # of the per-example gradients that "influence" holds at once


@dataclass(frozen=True, kw_only=True)
class OneShotMethod(Method):
    """Base of the methods without epochs: ``prepare`` is the whole method."""

    epochs: int = 0

    def check(self) -> None:
        """Raise InputError for hyperparameters out of range."""
        require(self, "epochs", self.epochs == 0, "= 0")

    def loss(self, task: UnlearningTask, step: Step) -> Tensor:
        """Return the loss of a batch of either set: ``unlearn`` computes it before anything changes."""
        return task.loss(step["retain"] if "retain" in step else step["forget"])


@dataclass(frozen=True, kw_only=True)
class Dampening(OneShotMethod):
    """SSD, selective synaptic dampening: shrink the parameters that matter more to the forget set than to all data.

    I_S and I_D are the means of g_j(x)² over the examples of the forget set S and of all training data D, with g the
    gradient of each example's own loss, in eval mode: the result does not depend on batches. Where
    I_S > alpha I_D, θ_j is multiplied by min(dampening I_D / I_S, 1).

    D contains S, hence ``I_D >= I_S |S| / |D|``. With ``alpha >= |D| / |S|`` nothing can be dampened, which is refused:
    the default fits forget sets of less than a tenth of the data.

    Parameters
    ----------
    epochs : int, default 0
        Always 0: the method trains nothing.
    lr : float, default 0.01
        Not used, as ``momentum``, ``weight_decay`` and ``schedule``.
    momentum : float, default 0.9
        Not used.
    weight_decay : float, default 0.0
        Not used.
    schedule : {"cosine", "constant"}, default "cosine"
        Not used.
    alpha : float, default 10.0
        Threshold of the ratio I_S / I_D; the paper's for ResNet-18.
    dampening : float, default 1.0
        Factor of the multiplier, lambda in the paper; the paper's for ResNet-18.

    References
    ----------
    Foster et al., "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening", AAAI 2024,
    equations 4 to 6.

    Examples
    --------
    >>> from delfast.unlearning import Dampening
    >>> Dampening(alpha=5.0).alpha
    5.0
    """

    name: ClassVar[str] = "ssd"
    needs: ClassVar[frozenset[str]] = frozenset({"forget"})
    alpha: float = 10.0
    dampening: float = 1.0

    def check(self) -> None:
        """Raise InputError for hyperparameters out of range."""
        super().check()
        require(self, "alpha", self.alpha > 0, "> 0")
        require(self, "dampening", self.dampening > 0, "> 0")

    def prepare(self, task: UnlearningTask) -> None:
        """Dampen the masked elements. InputError, before anything changes, for an alpha with which none can be."""
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
    """Influence: estimate the effect of leaving the forget set out, as one Newton step θ + alpha F⁻¹ v.

    v = ∇L(1/N - w), where L(w) = Σ w_i ℓ_i over all N examples, and w is ``1/|R|`` on the retain set R and 0 on the
    forget set S: ``v = |S|/N (mean of ∇ℓ over S - mean of ∇ℓ over R)``. F is the WoodFisher estimate
    damping I + (1/n) Σ g(x) g(x)ᵀ over n = ``samples`` examples of R, the first that its loader yields. Within a mask,
    F is the Fisher matrix of the masked elements.

    F⁻¹ v is exact, by Woodbury's identity with the n gradients in memory; the code of Jia et al. keeps one vector of a
    recursion instead. 8 GiB hold 1,000 gradients of 2 million float32 parameters. A larger number is refused, with the
    largest number of samples that fits.

    Parameters
    ----------
    epochs : int, default 0
        Always 0: the method trains nothing.
    lr : float, default 0.01
        Not used, as ``momentum``, ``weight_decay`` and ``schedule``.
    momentum : float, default 0.9
        Not used.
    weight_decay : float, default 0.0
        Not used.
    schedule : {"cosine", "constant"}, default "cosine"
        Not used.
    alpha : float, default 1.0
        Length of the step, in the range [1, 20] of Jia et al.
    damping : float, default 1.0
        Multiple of the identity in F; the recursion in the code of Jia et al. begins with 1.
    samples : int, default 1000
        Number n of examples in F, at most all of R; the code of Jia et al.

    References
    ----------
    Koh and Liang, "Understanding Black-box Predictions via Influence Functions", ICML 2017. Jia et al., "Model Sparsity
    Can Simplify Machine Unlearning", NeurIPS 2023, equation 3. Singh and Alistarh, "WoodFisher: Efficient Second-Order
    Approximation for Neural Network Compression", NeurIPS 2020, equation 4.

    Examples
    --------
    >>> from delfast.unlearning import Influence
    >>> Influence(samples=200).samples
    200
    """

    name: ClassVar[str] = "influence"
    needs: ClassVar[frozenset[str]] = frozenset({"forget"})
    alpha: float = 1.0
    damping: float = 1.0
    samples: int = 1000

    def check(self) -> None:
        """Raise InputError for hyperparameters out of range."""
        super().check()
        require(self, "damping", self.damping > 0, "> 0")
        require(self, "samples", self.samples >= 1, ">= 1")

    def prepare(self, task: UnlearningTask) -> None:
        """Add alpha F⁻¹ v to the masked elements. InputError, before anything changes, if gradients do not fit."""
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
                f"expected gradients of at most {MAX_BYTES / 2**30:g} GiB for '{self.name}', got {samples} of {size} "
                f"parameters; set samples to {max_samples} at most, or lower the mask's budget"
            )
        gradients = v.new_empty(samples, size)
        used = 0
        with evaluating(task.network, gradients=True):
            for batch in feed(task.retain, device_of(task.network)):
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
        """Return F⁻¹ v (P,) for gradients G (N, P): (v - Gᵀ (N damping I + G Gᵀ)⁻¹ G v) / damping, solved in double."""
        count = len(gradients)
        gram = (gradients @ gradients.T).double()
        gram.diagonal().add_(count * self.damping)
        solved = torch.linalg.solve(gram, (gradients @ v.to(gradients.dtype)).double())
        result: Tensor = (v - gradients.T @ solved.to(gradients.dtype)) / self.damping
        return result

    def _losses(self, task: UnlearningTask, batch: Any, limit: int) -> Iterator[Tensor]:
        """Yield the losses of the batch's first examples, one by one, ``limit`` at most."""
        count = examples_in(batch, task.loss_fn)
        if count is None:
            raise InputError(
                f"expected batches of tensors with the examples along dim 0 for '{self.name}', which separates the "
                "examples, got another form; choose another method"
            )
        for example in range(min(count, limit)):
            yield per_example_losses(task.network, cut(batch, [example], task.loss_fn), task.loss_fn).sum()


def _masked(task: UnlearningTask) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, parameter and bool flags of the elements that may change, for parameters that have any."""
    for name, parameter, part in task.mask.match(trainable_parameters(task.network)):
        yield name, parameter, part.dense().to(parameter.device)
