"""`emadapt sweep run|status|promote`. Heavy imports happen inside, so that `--help` answers at once."""

from __future__ import annotations

import sys

import click

from emadapt.errors import EmadaptError
from emadapt.study.study import load_study


@click.group()
def sweep() -> None:
    """Search the settings of a regime for the best validation IoU."""


_STORAGE = click.option(
    "--storage",
    default="",
    envvar="EMADAPT_SWEEP_STORAGE",
    help="postgresql://... for several machines  [default: a journal in scratch/sweeps]",
)


@sweep.command("run")
@click.option("--backbone", required=True, help="of params.yaml")
@click.option("--train-set", required=True, help="of params.yaml")
@click.option("--regime", default="lora", show_default=True, help="of params.yaml")
@click.option(
    "--trials",
    required=True,
    type=int,
    help="finished or pruned ones that the sweep is to end with, in all",
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
@click.option("--join", is_flag=True, help="help a sweep that another machine has begun")
def sweep_run(
    backbone: str,
    train_set: str,
    regime: str,
    trials: int,
    workers: int,
    gpus: str,
    storage: str,
    name: str,
    join: bool,
) -> None:
    """Begin a sweep, or resume it: the same command again goes on where it was stopped."""
    study = load_study()
    from emadapt.sweep.run import Order, run_sweep
    from emadapt.sweep.space import Target
    from emadapt.training.launch import parse_devices

    devices = tuple(parse_devices(gpus))
    target = Target(backbone, regime, train_set)
    order = Order(target, trials, workers or len(devices) or 1, devices, storage, name, join)
    try:
        done = run_sweep(study, order)
    except KeyboardInterrupt:
        click.echo("sweep: stopped; run it again to go on", err=True)
        sys.exit(130)
    _print_status(storage, done)
    click.echo("next: emadapt sweep promote")


@sweep.command("status")
@_STORAGE
@click.option("--name", default="", help="one sweep, with its best trials")
def sweep_status(storage: str, name: str) -> None:
    """Say how far sweeps are, and how good."""
    _print_status(storage, name)


@sweep.command("promote")
@_STORAGE
@click.option("--name", default="", help="the sweep, where there are several")
@click.option(
    "--as",
    "regime",
    default="",
    help="name of the new regime  [default: the swept one's with _tuned]",
)
def sweep_promote(storage: str, name: str, regime: str) -> None:
    """Write the best trial into params.yaml as a regime, for `dvc repro` to train over the study's seeds."""
    from emadapt.sweep.promote import promote
    from emadapt.sweep.storage import open_store, sweep_names

    store = open_store(storage)
    names = sweep_names(store)
    if not name and len(names) != 1:
        raise EmadaptError(
            f"{store.words} has {len(names)} sweeps; choose one with --name: {', '.join(names) or 'none'}"
        )
    for line in promote(store, name or names[0], regime):
        click.echo(line)


@sweep.command("worker", hidden=True)
@click.argument("name")
@click.option("--backbone", required=True)
@click.option("--regime", required=True)
@click.option("--train-set", required=True)
@click.option("--owner", required=True)
@click.option("--parent", type=int, required=True)
@click.option("--since", type=int, required=True)
@_STORAGE
def sweep_worker(
    name: str,
    backbone: str,
    regime: str,
    train_set: str,
    owner: str,
    parent: int,
    since: int,
    storage: str,
) -> None:
    """What `run` starts."""
    from emadapt.sweep.space import Target
    from emadapt.sweep.worker import Job, work

    work(
        load_study(), Target(backbone, regime, train_set), Job(name, storage, owner, parent, since)
    )


def _print_status(storage: str, name: str) -> None:
    from rich.console import Console

    from emadapt.sweep.status import overview, ranking
    from emadapt.sweep.storage import find_sweep, open_store, sweep_names

    store, console = open_store(storage), Console()
    names = [find_sweep(store, name)] if name else sweep_names(store)
    if not names:
        click.echo(f"no sweep yet in {store.words}")
        return
    console.print(overview(store, names))
    if name:
        console.print(ranking(store, find_sweep(store, name)))
