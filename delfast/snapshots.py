"""The state from which the runs before a capture begin, and the numbers by which their results are compared."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from delfast.batches import tensors_of

State = dict[Hashable, Tensor]

# Maximum difference of a replay, relative to the norm of the change that the run makes: far above the rounding of
# kernels that add in any order, far below the effect of a step that is missing
MAX_DIFFERENCE = 2**-6
ROUNDING = 2**-20  # relative to the norm of the values, whose rounding a small change has too
SUMS = 14  # interleaved sums of a change that are compared
PLAIN = (bool, int, float, str, type(None))  # types of attributes that Python code of a module may change


class Snapshot:
    """Copies of the tensors of a state, and what else a run may change: generators, plain attributes of modules."""

    def __init__(self, state: State, device: torch.device, modules: Iterable[nn.Module] = ()) -> None:
        self.device = device
        self.values = {name: tensor.detach().clone() for name, tensor in state.items()}
        self._versions = {name: (tensor, tensor._version) for name, tensor in state.items()}
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._host = (random.getstate(), numpy.random.get_state(legacy=False))
        self._attributes = [(module, plain_attributes(module)) for module in modules]
        held = {id(v): v for module, _ in self._attributes for v in vars(module).values()}
        self._generators = [(v, v.get_state()) for v in held.values() if isinstance(v, torch.Generator)]

    def restore(self, state: State) -> None:
        """Put all values back; fill with zeros what the state has more. Version counters do not move."""
        for name, tensor in state.items():
            if name in self.values:
                tensor.data.copy_(self.values[name])
            else:
                tensor.data.zero_()
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self.device)
        random.setstate(self._host[0])
        numpy.random.set_state(self._host[1])
        for module, attributes in self._attributes:
            vars(module).update(attributes)
        for generator, drawn in self._generators:
            generator.set_state(drawn)

    def moved(self, state: State) -> list[Tensor]:
        """Return the tensors of ``state`` that were written since, as autograd's version counters have it."""
        known = self._versions
        same = {name for name, t in state.items() if name in known and known[name][0] is t}
        return [t for name, t in state.items() if name not in same or known[name][1] != t._version]

    def changed_on_the_host(self) -> str | None:
        """Return what a run has changed that no replay changes, as text; None if there is nothing."""
        drawn, numpys = self._host
        if random.getstate() != drawn or repr(numpy.random.get_state(legacy=False)) != repr(numpys):
            return "it draws from Python's or numpy's generator"
        for module, attributes in self._attributes:
            now = plain_attributes(module)
            if now != attributes:
                name = min(name for name in now | attributes if now.get(name) != attributes.get(name))
                return f"it changes the attribute '{name}' of a {type(module).__name__}"
        if any(not torch.equal(generator.get_state(), drawn) for generator, drawn in self._generators):
            return "it draws from a module's generator"
        return None


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the numbers, flags and texts among a module's attributes. delfast's own layers keep theirs themselves."""
    if type(module).__module__.startswith("delfast."):
        return {}
    return {name: value for name, value in vars(module).items() if type(value) in PLAIN}


class Fingerprint:
    """A few numbers for each tensor of a result and of a state: enough to distinguish a wrong replay from a right one.

    Copies of all tensors to compare would raise the peak of memory. Changes of the state are measured from a snapshot,
    so that a replay which changes nothing differs.
    """

    def __init__(self, result: Any, before: Snapshot, state: State) -> None:
        with torch.no_grad():
            parts = [_digest(tensor) for tensor in tensors_of(result)]
            parts += [_digest(tensor, before.values.get(name)) for name, tensor in state.items()]
            self.names = tuple(state)
            self.numbers = torch.cat([part.to(before.device) for part in parts]) if parts else torch.zeros(0)

    def is_near(self, other: Fingerprint) -> bool:
        """Return whether the numbers of ``other``, which repeats this run, differ by rounding alone."""
        if self.names != other.names or self.numbers.shape != other.numbers.shape:
            return False
        own, others = self.numbers.view(-1, 2 + SUMS), other.numbers.view(-1, 2 + SUMS)
        limit = MAX_DIFFERENCE * own[:, 0] + ROUNDING * own[:, 1]
        differences = (own[:, 2:] - others[:, 2:]).norm(dim=1), (own[:, 0] - others[:, 0]).abs()
        return bool(torch.stack([each <= limit for each in differences]).all())  # NaN counts as different


def _digest(tensor: Tensor, start: Tensor | None = None) -> Tensor:
    """Return the norm of the change from ``start``, the norm of the value, and SUMS sums of the change: float64."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    value = tensor.detach().to(wide).flatten()
    change = value if start is None else value - start.to(wide).flatten()
    padded = functional.pad(change, [0, -len(change) % SUMS]).view(-1, SUMS)
    return torch.cat([torch.stack([change.norm(), value.norm()]).double(), padded.sum(dim=0, dtype=torch.float64)])
