"""The command line: one thin function for each verb. Heavy imports are inside functions."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from emadapt import __version__
from emadapt.errors import EmadaptError
from emadapt.files import disk_error, share_scratch
from emadapt.segment.cli import (
    adapt,
    export,
    measure,
    mesh,
    models,
    preview,
    register,
    segment,
    tune,
)
from emadapt.study.loading import PARAMS, load_study
from emadapt.sweep.cli import sweep

A_PATH = click.Path(path_type=Path)


class _Group(click.Group):
    """Prints errors that a user can act on, a line each, and exits with 2."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except EmadaptError as error:
            _fail(str(error).splitlines())
        except Exception as error:
            if (told := disk_error(error)) is None:
                raise
            _fail([str(told)])

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the work, not of the alphabet


def _fail(problems: list[str]) -> NoReturn:
    for problem in problems:
        click.echo(f"error: {problem}", err=True)
    sys.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Adapt vision foundation models to electron microscopy, and compare how well that works.

    `emadapt segment VOLUME MASK` needs no training. To compare models: `emadapt check`, then
    `emadapt repro` runs the study in params.yaml; each of its stages is one verb here.
    """
    share_scratch()


@main.command()
@click.argument("folder", type=A_PATH)
def init(folder: Path) -> None:
    """Write a new project into FOLDER: the pipeline, the studies, and a study of your own data."""
    from emadapt.pipeline.new_project import new_project

    new_project(folder)
    click.echo(
        f"{folder} is a project now. Next: cd {folder} && git init && git add . && "
        "git commit -m 'New project'; then see params.yaml"
    )


@main.command()
@click.option("--study", type=A_PATH, default=PARAMS, show_default=True, help="Study to check.")
def check(study: Path) -> None:
    """Check settings, data and weights before anything runs."""
    from emadapt.pipeline.check import check_study

    if problems := check_study(study):
        _fail(problems)
    click.echo(f"{study}: settings, data and weights are in order")


@main.command()
@click.argument("name")
def use(name: str) -> None:
    """Select studies/NAME: copy its study.yaml to params.yaml."""
    from emadapt.pipeline.check import use_study

    study = use_study(name)
    click.echo(
        f"params.yaml is study {study.name!r} now: {len(study.units())} units. "
        "Next: emadapt check && emadapt repro"
    )


@main.command()
@click.argument("datasets", nargs=-1, required=True)
@click.option("--from", "folder", type=A_PATH, help="Copy from a folder in the public layout.")
@click.option("--force", is_flag=True, help="Replace what is there.")
def fetch(datasets: tuple[str, ...], folder: Path | None, force: bool) -> None:
    """Download public datasets into data/. Then run `dvc add data`."""
    from emadapt.data.fetch import fetch as fetch_one

    for name in datasets:
        fetch_one(name, from_dir=folder, force=force)
    click.echo("next: dvc add data")


@main.command()
@click.option("--fetch", is_flag=True, help="Download what is missing. Gated: set HF_TOKEN.")
def weights(fetch: bool) -> None:
    """List and verify the weights files of the study, and fetch what is missing."""
    from emadapt.models.inventory import inventory

    found = list(inventory(load_study(), fetch))
    for line, _ in found:
        click.echo(line)
    sys.exit(0 if all(good for _, good in found) else 2)


@main.command()
@click.argument("out", type=A_PATH)
@click.option("--domains", default=8, show_default=True, type=click.IntRange(1), help="Volumes.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Random seed.")
def synthesise(out: Path, domains: int, seed: int) -> None:
    """Write synthetic EM with labels of mitochondria: OUT/NNN/image.tif and label.tif.

    Each volume has a tissue, a stain, a microscope and a pixel size of its own.
    """
    from emadapt.data.synthetic import write_domains

    for file in write_domains(out, domains, seed):
        click.echo(f"synthesise: {file}")


@main.command()
@click.argument("dataset")
def ingest(dataset: str) -> None:
    """Read, pair, check and split DATASET into build/ingest/."""
    from emadapt.data.ingest import ingest as run

    study = load_study()
    _known(dataset, study.datasets)
    click.echo(f"ingest {dataset}: {run(study, dataset)}")


@main.command()
def plan() -> None:
    """Write build/plan/: all that each later stage depends on. DVC decides by it what to rerun."""
    from emadapt.training.plan import write_plans

    click.echo(f"plan: {write_plans(load_study())} plans")


@main.command()
@click.argument("backbone")
@click.argument("dataset")
def tokens(backbone: str, dataset: str) -> None:
    """Cache the tokens of DATASET under the frozen BACKBONE."""
    study = load_study()
    _known(backbone, study.backbones, "backbones")
    _known(dataset, study.datasets)
    from emadapt.models.tokens import run

    run(study, backbone, dataset)


@main.command()
@click.argument("unit")
@click.option("--devices", default="", envvar="EMADAPT_DEVICES", help="GPUs to share, e.g. 0,1.")
def train(unit: str, devices: str) -> None:
    """Train UNIT (BACKBONE-REGIME-TRAINSET-SEED), or resume its training."""
    study = load_study()
    chosen = study.unit(unit)
    from emadapt.training.devices import is_one_of_several, launch, parse_devices, visible

    if (names := parse_devices(devices)) and not is_one_of_several():
        os.environ |= {"EMADAPT_DEVICES": devices, **visible(names)}
        if len(names) > 1:
            from emadapt.training.prepare import check_processes
            from emadapt.training.regimes import regime_of

            check_processes(chosen, regime_of(study, chosen), len(names))
            launch(["train", unit], names)
            return
    from emadapt.training.train import train_unit

    train_unit(study, chosen)


@main.command()
@click.argument("unit")
def evaluate(unit: str) -> None:
    """Score UNIT on the test slices of every dataset of the study."""
    study = load_study()
    chosen = study.unit(unit)
    from emadapt.training.evaluate import evaluate_unit

    evaluate_unit(study, chosen)


@main.command()
@click.argument("backbone")
@click.argument("regime")
def diagnose(backbone: str, regime: str) -> None:
    """Measure how far apart the study's datasets are for BACKBONE under REGIME."""
    study = load_study()
    _known(backbone, study.backbones, "backbones")
    _known(regime, study.regimes, "regimes")
    from emadapt.domains.run import diagnose as run

    run(study, backbone, regime)


@main.command()
def report() -> None:
    """Write reports/: index.html, summary.json, the leaderboard, figures and bars for DVC."""
    study = load_study()
    from emadapt.report.report import build_report

    click.echo(f"report: {build_report(Path(), study)}")


@main.command()
@click.option("--dataset", default="", help="Only for this dataset.  [default: all of the study]")
def recommend(dataset: str) -> None:
    """Recommend a model, a regime, a head and a number of labels, and say what is not known."""
    study = load_study()
    if dataset:
        _known(dataset, study.tested, "labelled datasets")
    from emadapt.report.recommend import recommend as run

    for line in run(Path(), study, (dataset,) if dataset else study.tested):
        click.echo(line)


@main.command()
@click.option(
    "--jobs",
    default=0,
    type=click.IntRange(0),
    help="Stages at once.  [default: one a GPU, else 1]",
)
@click.option("--gpus", default="", help="GPUs, e.g. 0,1; a stage gets one.")
def repro(jobs: int, gpus: str) -> None:
    """Run the study: all stages that are out of date, independent ones at once."""
    from emadapt.pipeline.repro import run_pipeline
    from emadapt.training.devices import parse_devices

    devices = parse_devices(gpus)
    sys.exit(run_pipeline(jobs or len(devices) or 1, devices))


for verb in (models, preview, segment, adapt, tune, measure, mesh, export, register, sweep):
    main.add_command(verb)


@main.group()
def track() -> None:
    """Look after the runs in MLflow."""


@track.command()
def sync() -> None:
    """Publish what MLflow does not have: runs of an outage, trained units from DVC's cache."""
    from emadapt.tracking import publish
    from emadapt.training.tracked import publish_units

    (done, left), units = publish.sync(Path()), 0
    if PARAMS.is_file() and not left:
        units, left = publish_units(load_study())
    click.echo(f"track sync: {done} runs published, {left} left; {units} units are in MLflow")
    sys.exit(1 if left else 0)


@track.command()
@click.argument("old_root")
def relocate(old_root: str) -> None:
    """Repair MLflow's database in a checkout that was moved here from OLD_ROOT."""
    from emadapt.tracking import relocate

    click.echo(f"track relocate: {relocate.relocate(Path(), old_root)} places changed")


def _known(name: str, names: tuple[str, ...], section: str = "datasets") -> None:
    if name not in names:
        has = ", ".join(names)
        raise EmadaptError(f"{name!r} is not in study.{section} of params.yaml, which has: {has}")
