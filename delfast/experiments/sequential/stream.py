"""The requests of one seed: disjoint sets of training examples, and a run for each request."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from delfast.errors import InputError
from delfast.experiments.config import Config
from delfast.experiments.data import Pictures
from delfast.experiments.datasets import ForgetSet, choose, load
from delfast.experiments.run import Run
from delfast.experiments.sequential.definition import Request


@dataclass(frozen=True)
class RequestedSet(ForgetSet):
    """The examples of a request. ``erased``: those of the requests before it, which are retained no more."""

    erased: Tensor

    @property
    def retain(self) -> Tensor:
        """The sorted positions that neither this request nor one before it names."""
        keep = torch.ones(self.count, dtype=torch.bool)
        keep[self.indices] = False
        keep[self.erased] = False
        return keep.nonzero().flatten()

    @property
    def accumulated(self) -> RequestedSet:
        """This set and all before it as one, to localize on."""
        every = torch.cat([self.indices, self.erased]).sort().values
        return replace(self, indices=every, erased=self.erased[:0])


@dataclass(frozen=True)
class Stream:
    """The requests of one seed."""

    config: Config
    data: Pictures
    requests: tuple[Request, ...]
    device: torch.device

    @classmethod
    def load(cls, config: Config, requests: tuple[Request, ...], device: torch.device) -> Stream:
        """Load the data of the configuration."""
        directory = Path(config.data_dir) if config.data_dir else None
        images = load(config.data, directory, config.image_size, config.train_examples, config.test_examples)
        return cls(config, Pictures(images), requests, device)

    @cached_property
    def sets(self) -> list[RequestedSet]:
        """The examples of each request, chosen among those that no request before it names.

        All of them have the same targets: the networks are trained with the wrong labels of every mislabelled request.
        """
        given, classes = self.data.images.train_targets, self.data.images.num_classes
        count, targets, left = len(given), given.clone(), torch.arange(len(given))
        chosen: list[Tensor] = []
        for number, request in enumerate(self.requests):
            wanted = request.share * count / len(left)
            own = choose(request.forget, wanted, given[left], classes, self.config.seed + number)
            assert own.targets is not None
            if len(own.indices) != round(request.share * count):
                raise InputError(
                    f"request {number + 1} finds {len(own.indices)} examples of {request.forget}, its share is "
                    f"{round(request.share * count)}; lower its share"
                )
            chosen.append(left[own.indices])
            targets[chosen[-1]] = own.targets[own.indices]
            left = left[own.retain]
        return [
            RequestedSet(
                request.forget, request.share, self.config.seed, indices, targets, count, _joined(chosen[:number])
            )
            for number, (request, indices) in enumerate(zip(self.requests, chosen, strict=True))
        ]

    def run(self, number: int) -> Run:
        """Return the run of a request, from 1."""
        return Run(self.config, self.data, self.sets[number - 1], self.device)


def _joined(chosen: list[Tensor]) -> Tensor:
    return torch.cat(chosen).sort().values if chosen else torch.empty(0, dtype=torch.int64)
