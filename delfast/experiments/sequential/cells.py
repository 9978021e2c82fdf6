"""Serve the requests one after the other by each sequence, and measure after every request what holds.

A record that exists is not computed again, so a run that was stopped goes on where it was. Records are files of JSON,
``cells/SEED-SEQUENCE-NUMBER.json`` and, after the last request, ``-relearning.json``. ``networks/`` has the original,
the controls, and each sequence's newest network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from delfast.errors import InputError, one_line
from delfast.evaluation import Audit, audit
from delfast.experiments import localizing, pipeline
from delfast.experiments.config import Config
from delfast.experiments.data import EVALUATION_BATCH
from delfast.experiments.run import SUMMARY, Run, choose_device, commit, load_model, read_summary
from delfast.experiments.sequential.definition import ORIGINAL, Definition, Sequence
from delfast.experiments.sequential.stream import Stream
from delfast.files import load_state, make_output_dir, read_json, save_state, write_json
from delfast.provenance import digest_state, provenance
from delfast.unlearning import Diverged

CELLS, NETWORKS = "cells", "networks"
Watch = Callable[[str], None]


def run_definition(definition: Definition, directory: Path, device: str, watch: Watch) -> None:
    """Compute what ``directory`` lacks, one seed after the other. ``watch`` gets a line for each record."""
    commit()
    for folder in (CELLS, NETWORKS):
        make_output_dir(directory / folder)
    _check_records(definition, directory)
    chosen = choose_device(device)
    for config in definition.configs:
        stream = Stream.load(config, definition.requests, chosen)
        found = [read_json(path).get("data") for path in (directory / CELLS).glob("*.json")]
        check_data(directory, config, stream.data.digests()["data"], found)
        _Seed(definition, stream, directory, watch).run()


def check_data(directory: Path, config: Config, digest: str, found: Iterable[str | None]) -> None:
    """Raise InputError unless all digests that were ``found`` in records are that of the data of ``config``."""
    if any(each != digest for each in found):
        raise InputError(
            f"expected '{directory}' to hold records of the data that '{config.data_name}' holds now, it holds records "
            "of others, or without a digest; pass the same data, or choose another --output-dir"
        )


def cell_path(directory: Path, config: Config, name: str, number: int) -> Path:
    """The file of the record of a sequence after a request; number 0: of the original."""
    return directory / CELLS / f"{config.seed}-{name}-{number:02d}.json"


def relearning_path(directory: Path, config: Config, name: str) -> Path:
    """The file of the record of relearning after a sequence's last request."""
    return directory / CELLS / f"{config.seed}-{name}-relearning.json"


def _check_records(definition: Definition, directory: Path) -> None:
    """Raise InputError for a record of other settings than the definition's."""
    for config in definition.configs:
        for sequence in (None, *definition.sequences):
            name = ORIGINAL if sequence is None else sequence.name
            paths = {
                cell_path(directory, config, name, number): False for number in range(len(definition.requests) + 1)
            }
            for path, relearning in (paths | {relearning_path(directory, config, name): True}).items():
                wanted = definition.digest(config, sequence, relearning=relearning)
                if path.is_file() and read_json(path).get("definition") != wanted:
                    raise InputError(f"'{path}' is of other settings than the definition; choose another --output-dir")


class _Seed:
    """The networks and the sequences of one seed."""

    def __init__(self, definition: Definition, stream: Stream, directory: Path, watch: Watch) -> None:
        self.definition, self.stream, self.directory, self.watch = definition, stream, directory, watch
        self.config, self.seed = stream.config, stream.config.seed
        self.last = len(definition.requests)

    def run(self) -> None:
        """Train the original and the controls, then serve the requests by every sequence."""
        path = cell_path(self.directory, self.config, ORIGINAL, 0)
        if not path.is_file():
            model = self._trained(ORIGINAL)
            seconds = read_json(self._network_directory(ORIGINAL) / SUMMARY)["seconds"]
            write_json(path, {**self._origin(None, 0), "seconds": seconds, "audit": self._audit(model, self.last)})
            self.watch(f"seed {self.seed}: original")
        for sequence in self.definition.sequences:
            self._serve(sequence)

    def _serve(self, sequence: Sequence) -> None:
        for number in range(1, self.last + 1):
            path = cell_path(self.directory, self.config, sequence.name, number)
            if path.is_file():
                if "failed" in read_json(path):
                    return
                continue
            content = self._origin(sequence, number)
            model = self._model_after(sequence, number - 1)
            try:
                content |= self._unlearn(sequence, number, model)
            except (InputError, Diverged) as error:
                write_json(path, {**content, "failed": one_line(error)})
                self.watch(f"seed {self.seed}: {sequence.name}, request {number}: failed: {one_line(error)}")
                return
            content["audit"] = self._audit(model, number)
            save_state(self._state_path(sequence, number), model.state_dict())
            write_json(path, {**content, "model": digest_state(model.state_dict())})
            self._state_path(sequence, number - 1).unlink(missing_ok=True)
            self.watch(f"seed {self.seed}: {sequence.name}, request {number}: {sum(content['seconds'].values()):.1f} s")
        path = relearning_path(self.directory, self.config, sequence.name)
        if not path.is_file():
            model = self._model_after(sequence, self.last)
            origin = self._origin(sequence, self.last, relearning=True)
            write_json(path, {**origin, "relearning": self._relearning(model)})
            self.watch(f"seed {self.seed}: {sequence.name}, relearning")

    def _origin(self, sequence: Sequence | None, number: int, *, relearning: bool = False) -> dict[str, Any]:
        """Return the fields of a record that name what it was measured on, and with what."""
        content: dict[str, Any] = {
            "definition": self.definition.digest(self.config, sequence, relearning=relearning),
            "sequence": ORIGINAL if sequence is None else sequence.name,
            "seed": self.seed,
            "request": number,
            "data": self.stream.data.digests()["data"],
            **({} if sequence is None else {"settings": sequence.described()}),
            "provenance": provenance(device=str(self.stream.device), threads=torch.get_num_threads(), commit=commit()),
        }
        if number:
            content["forget"] = self.stream.run(number).describe_forget()
        return content

    # The networks

    def _network_directory(self, name: str) -> Path:
        return self.directory / NETWORKS / f"{self.seed}-{name}"

    def _state_path(self, sequence: Sequence, number: int) -> Path:
        return self.directory / NETWORKS / f"{self.seed}-{sequence.name}-{number:02d}.safetensors"

    def _trained(self, name: str, control: int = 0) -> nn.Module:
        """Return the original, trained on everything, or a control, trained without every request's examples."""
        run, path = self.stream.run(self.last), self._network_directory(name)
        if not (path / SUMMARY).is_file():
            options: dict[str, Any] = {"progress": False, "remedy": "another batch_size in [train]"}
            if name == ORIGINAL:
                return pipeline.train(run, path, **options).model
            return pipeline.oracle(run, path, shadow=control, **options).model
        if Config(**read_summary(path)["config"]).without_paths() != self.config.without_paths():
            raise InputError(f"'{path}' is of other settings than the definition; choose another --output-dir")
        return load_model(run, path)  # which compares the data

    def _model_after(self, sequence: Sequence, number: int) -> nn.Module:
        """Return the network after a request; number 0: the original."""
        if number == 0:
            return self._trained(ORIGINAL)
        path, run = self._state_path(sequence, number), self.stream.run(number)
        state = load_state(path)
        record = cell_path(self.directory, self.config, sequence.name, number)
        if digest_state(state) != read_json(record).get("model"):
            raise InputError(f"'{path}' is not the network of '{record}'; choose another --output-dir")
        model = run.factory()
        model.load_state_dict(state)
        return run.placed(model)

    # The work

    def _unlearn(self, sequence: Sequence, number: int, model: nn.Module) -> dict[str, Any]:
        """Serve a request, in place; return its seconds and the part of the parameters that may change."""
        run, mask, seconds = self.stream.run(number), None, {}
        seed = self.seed + pipeline.SHADOW_SEED * number  # another one for every request
        if sequence.strategy is not None and sequence.budget is not None:
            requested = self.stream.sets[number - 1]
            named = requested if sequence.localize_on == "new" else requested.accumulated
            mask, seconds["localize"] = localizing.find_mask(
                Run(run.config, run.data, named, run.device),
                model,
                budget=sequence.budget,
                batch_size=sequence.batch_size,
                seed=seed,
                strategy=sequence.strategy,
            )
        result = pipeline.run_method(
            run,
            model,
            mask,
            method=sequence.method,
            batch_size=sequence.batch_size,
            seed=seed + pipeline.UNLEARN_OFFSET,
            progress=False,
            remedy="another batch_size in [unlearn]",
        )
        changeable = result.mask.selected / sum(parameter.numel() for parameter in model.parameters())
        return {"seconds": {**seconds, **result.seconds}, "changeable": changeable, "losses": result.losses}

    def _audit(self, model: nn.Module, number: int) -> dict[str, Any]:
        """Audit the network after a request: that forget set, named "request NUMBER", and every earlier one."""
        run = self.stream.run(number)
        names = [f"request {k}" for k in range(1, number + 1)]
        indices = [each.indices for each in self.stream.sets[:number]]
        batches = partial(run.batches, batch_size=EVALUATION_BATCH)
        sets = run.sets()
        found = audit(
            model,
            forget=sets["forget"],
            retain=sets["retain"],
            test=sets["test"],
            earlier={name: batches(each) for name, each in zip(names[:-1], indices[:-1], strict=True)},
            relearn=None,
            seed=self.seed,
        )
        return _kept(found, names[-1], classes=number == self.last)

    def _relearning(self, model: nn.Module) -> dict[str, Any]:
        """Return how the first request's and the last one's examples come back, by the names of the requests."""
        run = self.stream.run(self.last)
        controls = [partial(self._trained, f"control{k}", k) for k in range(1, self.definition.controls + 1)]
        sets, found = run.sets(), {}
        for number in (1, self.last):
            measured = audit(
                model,
                forget=run.batches(self.stream.sets[number - 1].indices, EVALUATION_BATCH),
                retain=sets["retain"],
                test=sets["test"],
                never_seen=controls,
                relearn=self.definition.relearning,
                seed=self.seed,
            ).as_dict()
            found[f"request {number}"] = {"ratio": measured["relearn_ratio"], "curves": measured["relearning"]}
        return found


def _kept(found: Audit, last: str, classes: bool) -> dict[str, Any]:
    """Return the figures of an audit that are kept; "forget" has the name of its request."""
    values = found.as_dict()
    sets: Mapping[str, Mapping[str, Any]] = values["sets"]
    kept = {
        (last if name == "forget" else name): {
            key: figures[key] for key in ("count", "accuracy", "loss", "attack_advantage")
        }
        for name, figures in sets.items()
        if name != "control"
    }
    return {"sets": kept, **({"classes": values["classes"]} if classes else {})}
