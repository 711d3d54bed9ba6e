"""`emadapt sweep run|status|promote`. Heavy imports happen inside: `--help` answers at once."""

from __future__ import annotations

import sys

import click

from emadapt.study.loading import load_study


@click.group()
def sweep() -> None:
    """Search the settings of a regime for the best validation score."""


_STORAGE = click.option(
    "--storage",
    default="",
    envvar="EMADAPT_SWEEP_STORAGE",
    help="postgresql://... for several machines  [default: a journal in scratch/sweeps]",
)
_BACKBONE = click.option("--backbone", required=True, help="of params.yaml")
_TRAIN_SET = click.option("--train-set", required=True, help="of params.yaml")


@sweep.command("run")
@_BACKBONE
@_TRAIN_SET
@click.option("--regime", default="lora", show_default=True, help="of params.yaml")
@click.option(
    "--trials",
    required=True,
    type=click.IntRange(1),
    help="finished or pruned trials that are enough, those of earlier runs included",
)
@click.option(
    "--workers",
    default=0,
    type=click.IntRange(0),
    help="processes on this machine  [default: one a GPU, or one]",
)
@click.option("--gpus", default="", help="GPUs that they share, e.g. 0,1")
@_STORAGE
@click.option(
    "--name",
    default="",
    help="of the sweep  [default: after study, backbone, regime and training set]",
)
def sweep_run(
    backbone: str,
    train_set: str,
    regime: str,
    trials: int,
    workers: int,
    gpus: str,
    storage: str,
    name: str,
) -> None:
    """Begin a sweep, resume it, or help another machine with it: always the same command."""
    study = load_study()
    from emadapt.sweep.crew import Order
    from emadapt.sweep.run import run_sweep
    from emadapt.sweep.space import Target
    from emadapt.training.devices import parse_devices

    devices = tuple(parse_devices(gpus))
    target = Target(backbone, regime, train_set)
    order = Order(target, trials, workers or len(devices) or 1, devices, storage, name)
    try:
        done = run_sweep(study, order)
    except KeyboardInterrupt:
        click.echo("sweep: stopped; run it again to go on", err=True)
        sys.exit(130)
    _print_status(storage, done)
    click.echo(f"next: emadapt sweep promote --name {done}")


@sweep.command("status")
@_STORAGE
@click.option("--name", default="", help="one sweep, with its best trials")
def sweep_status(storage: str, name: str) -> None:
    """Show how far sweeps are, and their best trials."""
    _print_status(storage, name)


@sweep.command("promote")
@_STORAGE
@click.option("--name", default="", help="of the sweep  [default: the only one]")
@click.option(
    "--as",
    "regime",
    default="",
    help="name of the new regime  [default: the swept one's with _tuned]",
)
def sweep_promote(storage: str, name: str, regime: str) -> None:
    """Write the best trial into params.yaml as a regime, which `emadapt repro` then trains."""
    from emadapt.sweep.promote import promote
    from emadapt.sweep.storage import find_study, open_store

    for line in promote(find_study(open_store(storage), name), regime):
        click.echo(line)


@sweep.command("worker", hidden=True)
@click.argument("name")
@click.argument("number", type=int)
@click.argument("trials", type=int)
@click.argument("parent", type=int)
@_STORAGE
def sweep_worker(name: str, number: int, trials: int, parent: int, storage: str) -> None:
    """What `run` starts: worker NUMBER of the sweep NAME, which ends with the process PARENT."""
    from emadapt.sweep.worker import work
    from emadapt.training.devices import die_with

    die_with(parent)
    work(load_study(), name, storage, number, trials)


def _print_status(storage: str, name: str) -> None:
    import optuna
    from rich.console import Console

    from emadapt.sweep.status import overview, ranking
    from emadapt.sweep.storage import find_study, open_store, study_names

    store, console = open_store(storage), Console()
    names = [find_study(store, name).study_name] if name else study_names(store)
    studies = [optuna.load_study(study_name=one, storage=store.storage) for one in names]
    if not studies:
        click.echo(f"no sweep yet in {store.words}")
        return
    console.print(overview(store.words, studies))
    if name:
        console.print(ranking(studies[0]))
