"""Call every public name where the extras' packages are missing: ``python -m tests.packaging.core_install``.

Each call works, or raises ImportError in one line that names the package and the extra that brings it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

MISSING = {
    "sklearn", "scipy", "torchvision", "vit_pytorch", "einops", "matplotlib", "typer", "rich", "tomli", "PIL",
    "datasets", "transformers",
}  # fmt: skip


class Without(MetaPathFinder):
    """Python's own finders, which do not find the extras' packages."""

    def __init__(self, finders: list[Any]) -> None:
        self.finders = finders

    def find_spec(self, name: str, *arguments: Any) -> Any:
        if name.partition(".")[0] in MISSING:
            return None
        found = (finder.find_spec(name, *arguments) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)

    find_distributions = staticmethod(PathFinder.find_distributions)


sys.meta_path[:] = [Without([*sys.meta_path])]

import torch  # noqa: E402

import delfast  # noqa: E402
from delfast.localization import critmem, localize, score, signed_channels  # noqa: E402
from tests.cases import SmallNet, image_batches  # noqa: E402

(X, Y), *_ = BATCHES = image_batches(24, 8)
torch.manual_seed(0)  # a process of its own, without conftest's; CritMem needs an example that the network gets right
MODEL = SmallNet()
MASK = localize(MODEL, BATCHES)
LOGITS = MODEL(X).detach().log_softmax(1)
SHADOWS = torch.randn(4, 6)
STATE = MODEL.state_dict()
HOME = Path(mkdtemp())
SETS: Any = {"forget": BATCHES[:1], "retain": BATCHES[1:] * 6}
EVALUATE: Any = importlib.import_module("delfast.evaluation")
UNLEARN: Any = importlib.import_module("delfast.unlearning")
METRICS = delfast.evaluate(MODEL, **SETS, test=BATCHES, mia=False)
UPPER_FLOORS = [name for name in sys.modules if name.startswith(("delfast.experiments", "delfast.cli"))]
assert not UPPER_FLOORS, f"the core has imported {UPPER_FLOORS}"


for part in ("train", "test"):
    (HOME / part / "a").mkdir(parents=True)
    (HOME / part / "a" / "1.png").touch()


class Registered(torch.nn.Linear):
    pass


class TokenModel(torch.nn.Linear):
    """Tokens (N, T) -> logits (N, T, 7)."""

    def __init__(self) -> None:
        super().__init__(1, 7)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids[..., None].float())


TOKENS = {"input_ids": torch.arange(6).view(2, 3)}


def loss(model: Any, batch: Any) -> Any:
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def trained(method: str) -> Any:
    init: Any = {"del": {"init": SmallNet, "mask": MASK}, "retrain": {"init": SmallNet}}.get(method, {})
    epochs = {} if method in ("ssd", "influence") else {"epochs": 1}
    return delfast.unlearn(SmallNet(), method=method, **SETS, **init, **epochs)


def stepped(optimizer: Any) -> None:
    loss(MODEL, BATCHES[0]).mean().backward()
    optimizer.step()


Call = tuple[Callable[[], object], str | None]  # and the package without which it cannot work


def works(call: Callable[[], object]) -> Call:
    return call, None


def methods() -> dict[str, Call]:
    return {kind.__name__: works(lambda name=name: trained(name)) for name, kind in UNLEARN.METHODS.items()}


def calls() -> dict[str, dict[str, Call]]:
    """Module -> public name -> a call of it."""
    import delfast.experiments.datasets as data

    images = data.ImageData("x", X.byte(), Y, X.byte(), Y, 10, torch.zeros(3), torch.ones(3))
    batches = data.Batches(images.train_images, Y, images.mean, images.std, batch_size=4)
    early = UNLEARN.EarlyStop(BATCHES, 1, None)
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.01)
    evaluation = {
        "Audit": works(lambda: EVALUATE.Audit({}, None, {}, None, None, {}, {}).as_dict()),
        "Figure": works(lambda: EVALUATE.Figure(1.0, 0.5, 1.5)),
        "LiraFigures": works(lambda: EVALUATE.LiraFigures(None, None, 0, 1)),
        "Metrics": works(METRICS.as_dict),
        "Reference": works(lambda: EVALUATE.Reference(MODEL, {"forget": torch.ones(4, dtype=torch.bool)})),
        "Relearning": works(lambda: EVALUATE.Relearning(steps=2).measured_at),
        "RelearningCurve": works(lambda: EVALUATE.RelearningCurve([0], [50.0], [0.7], [], 0, 4)),
        "SetFigures": works(lambda: EVALUATE.SetFigures(4, None, EVALUATE.Figure(0.7, 0.5, 0.9))),
        "SetResult": works(lambda: EVALUATE.SetResult(1.0, 1.0, Y)),
        "ULira": works(lambda: EVALUATE.ULira(1.0, 1.0, 1.0, Y, Y)),
        "accuracy_and_loss": works(lambda: EVALUATE.accuracy_and_loss(MODEL, BATCHES)),
        "audit": works(
            lambda: EVALUATE.audit(
                MODEL, **SETS, test=BATCHES, never_seen=[SmallNet()], relearn=EVALUATE.Relearning(steps=2, batch_size=2)
            )
        ),
        "changed_fraction": works(lambda: EVALUATE.changed_fraction(STATE, STATE, ["head.bias"])),
        "evaluate": (lambda: EVALUATE.evaluate(MODEL, **SETS, test=BATCHES), "sklearn"),
        "gaps": works(lambda: EVALUATE.gaps(METRICS, METRICS)),
        "kl_divergence": works(lambda: EVALUATE.kl_divergence(LOGITS, LOGITS)),
        "kl_to_oracle": works(lambda: EVALUATE.kl_to_oracle(MODEL, SmallNet(), BATCHES)),
        "logit_confidences": works(lambda: EVALUATE.logit_confidences(LOGITS, Y)),
        "membership_inference": (lambda: EVALUATE.membership_inference(*[torch.rand(5)] * 3), "sklearn"),
        "modified_entropy": works(lambda: EVALUATE.modified_entropy(LOGITS, Y)),
        "offline_lira": works(lambda: EVALUATE.offline_lira(SHADOWS[0], SHADOWS)),
        "predictions": works(lambda: EVALUATE.predictions(MODEL, BATCHES)),
        "relative_time": works(lambda: EVALUATE.relative_time(1.0, 2.0)),
        "svc_attacks": (lambda: EVALUATE.svc_attacks(*[(LOGITS, Y)] * 3), "sklearn"),
        "threshold_attack": works(lambda: EVALUATE.threshold_attack(SHADOWS[0], SHADOWS[1])),
        "tpr_at_fpr": works(lambda: EVALUATE.tpr_at_fpr(SHADOWS, SHADOWS, 10.0)),
        "u_lira": works(lambda: EVALUATE.u_lira(SHADOWS, SHADOWS, SHADOWS[0], SHADOWS[0])),
        "u_lira_leave_one_out": works(lambda: EVALUATE.u_lira_leave_one_out(SHADOWS, SHADOWS)),
    }
    localization = {
        "STRATEGIES": works(lambda: [localize(MODEL, BATCHES, **s) for s in delfast.STRATEGIES.values()]),
        "CriticalChannels": works(lambda: critmem(MODEL, BATCHES).unit_scores()),
        "Scores": works(lambda: score(MODEL, BATCHES).select(0.3)),
        "SignedChannels": works(lambda: delfast.SignedChannels.load(HOME / "signed")),
        "critmem": works(lambda: critmem(MODEL, BATCHES)),
        "localize": works(lambda: localize(MODEL, BATCHES)),
        "score": works(lambda: score(MODEL, BATCHES, per_example=True)),
        "signed_channels": works(lambda: signed_channels(MODEL, BATCHES)),
    }
    signed_channels(MODEL, BATCHES, path=HOME / "signed")
    choices = {name: works(lambda: None) for name in ("Aggregate", "Criterion", "Granularity", "Policy", "Preset")}
    return {
        "delfast": {
            **localization,
            "InputError": works(lambda: delfast.InputError("x")),
            "Mask": works(lambda: (MASK.save(HOME / "mask.safetensors"), delfast.Mask.load(HOME / "mask.safetensors"))),
            "__version__": works(lambda: delfast.__version__),
            "causal_lm_loss": works(lambda: delfast.causal_lm_loss(TokenModel(), TOKENS)),
            "tokens_per_example": works(lambda: delfast.tokens_per_example([TOKENS])),
            "compact": works(lambda: delfast.compact(MODEL, MASK).undo()),
            "evaluate": works(lambda: delfast.evaluate(MODEL, **SETS, test=BATCHES, mia=False)),
            "register_layer": works(lambda: delfast.register_layer(Registered, output_dim=0)),
            "optim": works(lambda: delfast.optim.MaskedSGD(MODEL.named_parameters(), MASK)),
            "reset_": works(lambda: delfast.reset_(MODEL, MASK, SmallNet, seed=1)),
            "status": works(delfast.status),
            "TrainingOptions": works(delfast.TrainingOptions),
            "unlearn": works(lambda: delfast.unlearn(SmallNet(), **SETS, init=SmallNet, epochs=1)),
        },
        "delfast.evaluation": evaluation,
        "delfast.localization": {
            **localization,
            **choices,
            "BUDGET": works(lambda: None),
            "WHOLE_TRAINING_SET": works(lambda: None),
            "CriticalExample": works(lambda: critmem(MODEL, BATCHES).examples[0].channels),
            "check_localize": works(lambda: sys.modules["delfast.localization"].check_localize(0.3)),
            "check_selection": works(lambda: sys.modules["delfast.localization"].check_selection(0.3)),
            "preset_settings": works(lambda: sys.modules["delfast.localization"].preset_settings("paper")),
        },
        "delfast.unlearning": {
            **methods(),
            "METHODS": works(lambda: None),
            "TrainingOptions": works(delfast.TrainingOptions),
            "Diverged": works(lambda: UNLEARN.Diverged("x")),
            "EarlyStop": works(lambda: early.update(MODEL)),
            "Method": works(lambda: UNLEARN.Method().check()),
            "UnlearnResult": works(lambda: trained("del").losses),
            "make_method": works(lambda: UNLEARN.make_method("del", {})),
            "train": works(lambda: UNLEARN.train(MODEL, BATCHES, optimizer, epochs=1)),
            "unlearn": works(lambda: trained("finetune")),
        },
        "delfast.compaction": {
            "Compact": works(lambda: delfast.compact(MODEL, MASK).undo()),
            "Mode": works(lambda: None),
            "compact": works(lambda: delfast.compact(MODEL, MASK).undo()),
        },
        "delfast.experiments.datasets": {
            "Batches": works(lambda: list(batches)),
            "Examples": works(lambda: data.Examples(batches)[0]),
            "ForgetSet": works(lambda: data.choose("iid", 0.5, Y, 10, 0).retain),
            "ImageData": works(lambda: images.digest),
            "check_source": works(lambda: data.check_source("cifar10")),
            "choose": works(lambda: data.choose("iid", 0.5, Y, 10, 0)),
            "load": (lambda: data.load("digits"), "sklearn"),
            "parse_forget": works(lambda: data.parse_forget("iid")),
            "resident": works(lambda: data.resident(X, torch.device("cpu"))),
            "subset": works(lambda: data.subset(images, 4, 4)),
        },
    }


# Calls of packages without a list of public names, and other uses
MORE: dict[str, Call] = {
    "MaskedSGD": works(lambda: stepped(delfast.optim.MaskedSGD(MODEL.named_parameters(), MASK, lr=0.1))),
    "MaskedAdamW": works(lambda: stepped(delfast.optim.MaskedAdamW(MODEL.named_parameters(), MASK))),
    "evaluate with a full oracle": works(
        lambda: delfast.evaluate(MODEL, **SETS, test=BATCHES, mia=False, oracle=EVALUATE.Metrics(*[1.0] * 7))
    ),
    "load cifar10": (lambda: sys.modules["delfast.experiments.datasets"].load("cifar10", HOME), "torchvision"),
    "load folder": (lambda: sys.modules["delfast.experiments.datasets"].load(f"folder:{HOME}"), "PIL"),
    "load hub": (lambda: sys.modules["delfast.experiments.datasets"].load("hub:a/b", HOME), "datasets"),
    "import delfast.experiments.networks": (
        lambda: importlib.import_module("delfast.experiments.networks"),
        "torchvision",
    ),
    "import delfast.experiments.reports": (lambda: importlib.import_module("delfast.experiments.reports"), "rich"),
}


def check(name: str, call: Callable[[], object], package: str | None) -> None:
    try:
        call()
    except (ImportError, delfast.InputError) as error:
        assert package is not None, f"{name}: {error}"
        text = str(error)
        extra = "delfast[hub]" if package == "datasets" else "delfast[experiments]"
        assert "\n" not in text and f"'{package}'" in text and f"pip install '{extra}'" in text, f"{name}: {text}"
    else:
        assert package is None, f"{name}: worked without {package}"


def main() -> None:
    count = 0
    for module, table in calls().items():
        assert set(table) == set(sys.modules[module].__all__), (module, set(table) ^ set(sys.modules[module].__all__))
        for name, (call, package) in table.items():
            check(f"{module}.{name}", call, package)
            count += 1
    for name, (call, package) in MORE.items():
        check(name, call, package)
    from delfast.cli import main as command_line

    assert command_line(["doctor"]) == 1
    assert not {name.partition(".")[0] for name in sys.modules} & MISSING
    print(f"{count} public names")


if __name__ == "__main__":
    main()
