"""The commands of an unlearning run: train, oracle, localize, unlearn, evaluate."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from delfast.cli.console import print_mask, print_methods
from delfast.cli.names import BUDGET, CRITERIA, METHODS, NETWORKS, STRATEGIES
from delfast.cli.options import (
    DataDir,
    Device,
    Graphs,
    JobFile,
    OptionalOutputDir,
    OutputDir,
    PassPrecision,
    RunDir,
    Seed,
    StepSeed,
    channels_last_for,
    cuda_graphs_for,
    executing,
    hyperparameters,
    localization,
    refuse_beside_job,
    resolved,
)
from delfast.errors import InputError


def train(
    output_dir: OutputDir,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, fashion-mnist, cifar10, cifar100, svhn, folder:PATH or hub:NAME  [default: digits]",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"{', '.join(NETWORKS)}  [default: resnet18-thin]", show_default=False)
    ] = None,
    job: JobFile = None,
    trained: Annotated[
        Path | None,
        typer.Option(help="with --job: a network that is trained already, a file that the job's load(path) reads"),
    ] = None,
    forget: Annotated[
        str | None,
        typer.Option(
            help="iid, non-iid:2,5 (the classes), mislabelled or file:PATH (indices; a job's identifiers, one a line)  "
            "[default: non-iid:2,5; with --job iid]",
            show_default=False,
        ),
    ] = None,
    forget_ratio: Annotated[float, typer.Option(help="fraction of the training set to forget, in (0, 1]")] = 0.1,
    epochs: Annotated[int | None, typer.Option(help="default: the job's, or as published for data and model")] = None,
    lr: Annotated[float | None, typer.Option(help="default: the job's, or as published for data and model")] = None,
    batch_size: Annotated[int | None, typer.Option(help="default: the job's, or 128")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="default: the job's, or 0")] = None,
    image_size: Annotated[int | None, typer.Option(help="side in pixels, only for folder:PATH and hub:NAME")] = None,
    train_examples: Annotated[int | None, typer.Option(help="number of training images to use (default: all)")] = None,
    test_examples: Annotated[int | None, typer.Option(help="number of test images to use (default: all)")] = None,
    precision: PassPrecision = "fp32",
    channels_last: Annotated[
        str, typer.Option(help="on, off, or auto: channels-last memory format for networks of convolutions")
    ] = "auto",
    data_dir: DataDir = None,
    device: Device = "auto",
    cuda_graphs: Graphs = "auto",
    seed: Seed = 0,
) -> None:
    """Train a network on the whole training set, forget set included, and write a run directory.

    With --trained, write the run directory of a network that is trained already.
    """
    from delfast.experiments import pipeline
    from delfast.experiments.config import Config, job_config
    from delfast.experiments.recipes import recipe
    from delfast.experiments.run import choose_device, data_of, start

    pictures: dict[str, object] = {
        "data": data,
        "model": model,
        "image-size": image_size,
        "train-examples": train_examples,
    }
    pictures |= {"test-examples": test_examples, "data-dir": data_dir}
    if job is not None:
        refuse_beside_job(pictures)
    elif trained is not None:
        raise InputError("expected --trained with --job, got no job; the job file defines the network")
    with executing(job) as opened:
        if opened is None:
            source, network = data or "digits", model or "resnet18-thin"
            defaults = {
                "data": resolved(source),
                "model": network,
                "batch_size": 128,
                **asdict(recipe(source, network)),
            }
        else:
            network, defaults = "job", job_config(opened)
        given = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "weight_decay": weight_decay}
        config = Config(
            **(defaults | {name: value for name, value in given.items() if value is not None}),
            forget=resolved(forget or ("non-iid:2,5" if opened is None else "iid")),
            forget_ratio=forget_ratio,
            seed=seed,
            data_dir=None if data_dir is None else os.path.realpath(data_dir),
            image_size=image_size,
            train_examples=train_examples,
            test_examples=test_examples,
            precision=precision,
            channels_last=channels_last_for(channels_last, network),
        )
        run = start(config, choose_device(device), data_of(opened), cuda_graphs_for(cuda_graphs))
        if opened is not None and trained is not None:
            result = pipeline.adopt(run, opened.load(trained), output_dir, trained)
        else:
            result = pipeline.train(run, output_dir)
    print_methods("trained", {"original": {**result.metrics.as_dict(), "seconds": result.seconds}})


def oracle(
    run_dir: RunDir,
    output_dir: OutputDir,
    job: JobFile = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    cuda_graphs: Graphs = "auto",
    seed: StepSeed = None,
) -> None:
    """Train a newly initialized network on the run's retain set only, and write a run directory."""
    from delfast.experiments import pipeline
    from delfast.experiments.run import check_own_directory, choose_device, open_run

    check_own_directory(output_dir, run_dir)
    with executing(job) as own:
        opened = open_run(run_dir, choose_device(device), data_dir, cuda_graphs_for(cuda_graphs), own)
        result = pipeline.oracle(opened, output_dir, seed)
    print_methods("oracle", {"oracle": {**result.metrics.as_dict(), "seconds": result.seconds}})


def localize(
    run_dir: RunDir,
    output_dir: OutputDir,
    budget: Annotated[float, typer.Option(help="fraction of all elements to select, in (0, 1]")] = BUDGET,
    preset: Annotated[str, typer.Option(help="paper or published-code")] = "paper",
    strategy: Annotated[
        str | None, typer.Option(help=f"criterion and granularity by name: {', '.join(STRATEGIES)}")
    ] = None,
    criterion: Annotated[str | None, typer.Option(help=", ".join(CRITERIA))] = None,
    granularity: Annotated[str | None, typer.Option(help="channel or param (default: the preset's)")] = None,
    aggregate: Annotated[str | None, typer.Option(help="topk_mean, mean, sum or max (default: the preset's)")] = None,
    top_h: Annotated[str | None, typer.Option(help="a count (16) or a fraction (0.1), for topk_mean")] = None,
    policy: Annotated[str | None, typer.Option(help="whole or exact (default: the preset's)")] = None,
    per_example: Annotated[
        bool, typer.Option("--per-example", help="score by the mean over examples of |θ g(x)| or |g(x)|")
    ] = False,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="parameters that compete, as layer4.*; repeatable")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="parameters that do not compete; repeatable")
    ] = None,
    stop_when_stable: Annotated[
        float | None, typer.Option(help="stop once the masks after n and 2n examples overlap by this, such as 0.99")
    ] = None,
    precision: PassPrecision = "fp32",
    job: JobFile = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    cuda_graphs: Graphs = "auto",
    seed: StepSeed = None,
) -> None:
    """Find the channels that hold what the network memorised of its forget set, and write mask.safetensors."""
    from delfast.execution import Precision
    from delfast.experiments import localizing
    from delfast.experiments.run import check_own_directory, choose_device, load_model, open_run

    options = localization(
        strategy, top_h, criterion=criterion, granularity=granularity, aggregate=aggregate, policy=policy
    )
    options |= {name: given for name, given in (("include", include), ("exclude", exclude)) if given}
    check_own_directory(output_dir, run_dir)
    with executing(job) as own:
        opened = open_run(run_dir, choose_device(device), data_dir, cuda_graphs_for(cuda_graphs), own)
        found = localizing.localize(
            opened,
            load_model(opened, run_dir),
            output_dir,
            budget=budget,
            strategy=strategy,
            preset=preset,
            per_example=per_example,
            stop_when_stable=stop_when_stable,
            precision=cast(Precision, precision),
            seed=seed,
            **options,
        )
    print_mask(found.mask)


def unlearn(
    run_dir: RunDir,
    output_dir: OutputDir,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="directory of `delfast localize`, its mask.safetensors, or a dense .pt mask; default: the method del "
            "localizes, with any other everything may change"
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help=f"without --mask: fraction of all elements to select  [default: {BUDGET}]")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help=f"without --mask: {', '.join(STRATEGIES)}  [default: del]")
    ] = None,
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "del",
    epochs: Annotated[int | None, typer.Option(help="default: as published for the method")] = None,
    lr: Annotated[float | None, typer.Option(help="default: as published for the method")] = None,
    batch_size: Annotated[int | None, typer.Option(help="default: the run's")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="default: as published for the method")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="a hyperparameter of the method; repeatable")
    ] = None,
    head: Annotated[str | None, typer.Option(help="the classifier's module name (default: found)")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16 (default: the run's)")] = None,
    channels_last: Annotated[str | None, typer.Option(help="on, off or auto (default: the run's)")] = None,
    batchnorm: Annotated[str, typer.Option(help="train, or frozen: running statistics stay as they are")] = "train",
    patience: Annotated[
        int | None, typer.Option(min=1, help="stop after this many epochs without a lower loss on held-out examples")
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="fraction of the retain set to hold out, in (0, 1), with --patience")
    ] = 0.1,
    compile_model: Annotated[bool, typer.Option("--compile", help="train through torch.compile")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue from the checkpoint in the output directory")
    ] = False,
    job: JobFile = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    cuda_graphs: Graphs = "auto",
    seed: StepSeed = None,
) -> None:
    """Unlearn the run's forget set and write a run directory.

    By default localize, reset what the mask selects, then finetune it and the head on the retain set.
    """
    from delfast.experiments import pipeline
    from delfast.experiments.run import check_own_directory, choose_device, load_model, open_run
    from delfast.experiments.verification import load_mask
    from delfast.unlearning import make_method

    check_own_directory(output_dir, run_dir, *([] if mask is None else [mask if mask.is_dir() else mask.parent]))
    loaded = None if mask is None else load_mask(mask)
    with executing(job) as own:
        opened = open_run(run_dir, choose_device(device), data_dir, cuda_graphs_for(cuda_graphs), own)
        opened = opened.with_config(
            precision=opened.config.precision if precision is None else precision,
            channels_last=channels_last_for(channels_last, opened.config.model)
            if channels_last is not None
            else opened.config.channels_last,
        )
        changes = hyperparameters(method, settings or [])
        given = {"epochs": epochs, "lr": lr, "weight_decay": weight_decay}
        changes |= {name: value for name, value in given.items() if value is not None}
        chosen = make_method(method, opened.config.recipe(method) | changes)
        result = pipeline.unlearn(
            opened,
            load_model(opened, run_dir),
            loaded,
            output_dir,
            method=chosen,
            budget=budget,
            strategy=strategy,
            batch_size=opened.config.batch_size if batch_size is None else batch_size,
            head=head,
            seed=seed,
            batchnorm=batchnorm,
            patience=patience,
            held_out=held_out,
            compile_model=compile_model,
            resume=resume,
        )
    print_methods("unlearned", {method: {**result.metrics.as_dict(), "seconds": result.seconds}})


def evaluate(
    run_dir: RunDir,
    model_from: Annotated[Path | None, typer.Option(help="measure the network of this run directory instead")] = None,
    oracle: Annotated[
        Path | None, typer.Option(help="run directory of the oracle, for the gaps Δ = oracle - method")
    ] = None,
    output_dir: OptionalOutputDir = None,
    precision: PassPrecision = "fp32",
    job: JobFile = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    cuda_graphs: Graphs = "auto",
    seed: StepSeed = None,
) -> None:
    """Measure a network on the run's forget, retain and test sets, and its gaps to an oracle."""
    from delfast.arguments import check_choice
    from delfast.execution import Precision
    from delfast.experiments import pipeline
    from delfast.experiments.losses import gaps_between
    from delfast.experiments.run import check_own_directory, choose_device, load_model, open_run
    from delfast.files import make_output_dir

    check_choice("precision", precision, Precision)
    chosen = cast(Precision, precision)
    source = run_dir if model_from is None else model_from
    if output_dir is not None:
        check_own_directory(output_dir, run_dir, source, *([oracle] if oracle else []))
    with executing(job) as own:
        opened = open_run(run_dir, choose_device(device), data_dir, cuda_graphs_for(cuda_graphs), own)
        networks = {str(source): load_model(opened, source)}
        if oracle is not None:
            networks["oracle"] = load_model(opened, oracle)
        if output_dir is not None:
            make_output_dir(output_dir)
        measured = {name: opened.measure(network, seed, chosen) for name, network in networks.items()}
        methods: dict[str, dict[str, Any]] = {name: metrics.as_dict() for name, metrics in measured.items()}
        if oracle is not None:
            methods = {
                name: {**methods[name], **gaps_between(metrics, measured["oracle"])}
                for name, metrics in measured.items()
            }
        print_methods(f"{run_dir}", methods)
        if output_dir is not None:
            pipeline.write_evaluation(opened, output_dir, seed, chosen, methods)
