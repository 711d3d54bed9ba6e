"""The verbs of this room. Heavy imports happen inside, so that `--help` answers at once."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

A_PATH = click.Path(path_type=Path)
MODEL = click.option(
    "--model",
    default="starter",
    show_default=True,
    help="A folder that `train`, `tune` or `adapt` wrote, the name of a trained unit, "
    "models:/NAME@ALIAS, or a model that ships with emadapt (see `emadapt models`).",
)
SCALE = click.option(
    "--scale",
    default=0,
    type=click.IntRange(0),
    help="Scale of an OME-Zarr image.  [default: 0, the finest]",
)
VOXEL = click.option(
    "--voxel-nm",
    nargs=3,
    type=float,
    metavar="Z Y X",
    help="Voxel size in nm.  [default: what the file says]",
)
WINDOW = click.option(
    "--window",
    nargs=2,
    type=float,
    metavar="LOW HIGH",
    help="Grey values of black and white.  [default: percentiles of INPUT; all of 8 bits]",
)
MIN_VOXELS = click.option(
    "--min-voxels",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Leave out smaller objects.",
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace the output.")


@click.command()
@click.argument("input_", metavar="INPUT")
@click.argument("output")
@MODEL
@SCALE
@click.option("--probabilities", is_flag=True, help="Also write OUTPUT-probabilities; 255 is 1.")
@click.option(
    "--instances",
    is_flag=True,
    help="Also write OUTPUT-instances, numbered connected components, with a table as CSV.",
)
@MIN_VOXELS
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    help="Foreground has a higher probability.  [default: the model's]",
)
@click.option(
    "--fast",
    is_flag=True,
    help="Look at INPUT once. `starter`, and what is tuned from it, looks twice, at pixels of two "
    "sizes.",
)
@VOXEL
@WINDOW
@click.option(
    "--dask",
    default="",
    help="Share the work: local:N processes here, or the address of a scheduler.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace OUTPUT, and what a run of other settings left."
)
def segment(input_: str, output: str, **options: Any) -> None:
    """Segment INPUT into OUTPUT: .tif for Fiji, .ome.tif or .zarr.

    INPUT is a TIFF, a folder of slices, HDF5, Zarr, OME-Zarr or NIfTI. FILE:/NAME chooses one of
    several images in it, FILE:/c=0 a channel. If the command is stopped, repeat it to go on;
    OUTPUT.partial holds what is done.
    """
    from emadapt.segment.job import Order
    from emadapt.segment.run import segment_volume

    try:
        segment_volume(Order(input_, output, **options))
    except KeyboardInterrupt:
        click.echo("segment: stopped; repeat the command to go on", err=True)
        sys.exit(130)


@click.command()
@click.argument("input_", metavar="INPUT")
@click.argument("output", metavar="PAGE.html")
@MODEL
@SCALE
@VOXEL
@WINDOW
@OVERWRITE
def preview(input_: str, output: str, **options: Any) -> None:
    """Segment three places of INPUT, and compare INPUT with the training data."""
    from emadapt.segment.job import Order
    from emadapt.segment.preview import preview as run
    from emadapt.volumes.source import tell

    domain = run(Order(input_, output, **options))
    click.echo(f"preview: {output}")
    tell("preview", domain.words().splitlines())


@click.command()
def models() -> None:
    """List the models that ship with emadapt: scores, weights, terms."""
    from emadapt.segment.shipped import listing

    for line in listing():
        click.echo(line)


@click.command()
@click.argument("volume")
@MODEL
@click.option("-o", "--output", type=A_PATH, help="The new model.  [default: VOLUME-adapted]")
@SCALE
@VOXEL
@WINDOW
@OVERWRITE
def adapt(volume: str, **options: Any) -> None:
    """Fit a model of mitochondria to VOLUME without labels: it learns from what it finds itself.

    Beside VOLUME it sees synthetic EM with labels of mitochondria; for anything else use `tune`.
    If the command is stopped, repeat it to go on.
    """
    from emadapt.segment.adapt import adapt as run

    own = _own(volume, "adapted", **options)
    if odd := run(own):
        words = f"{odd}. Something went wrong: compare it with {own.model} by `emadapt preview`"
        click.echo(f"adapt: {words}", err=True)
    _say_next("adapt", own)


@click.command()
@click.argument("volume")
@click.argument("labels", type=A_PATH)
@MODEL
@click.option("-o", "--output", type=A_PATH, help="The new model.  [default: VOLUME-tuned]")
@click.option("--foreground", default=">0", show_default=True, help="Label values to segment: >N.")
@click.option(
    "--slice",
    "slices",
    multiple=True,
    type=click.IntRange(0),
    help="A labelled slice of a stack, counted from 0; repeat it.  [default: all with a label]",
)
@SCALE
@VOXEL
@WINDOW
@OVERWRITE
def tune(
    volume: str, labels: Path, foreground: str, slices: tuple[int, ...], **options: Any
) -> None:
    """Fit a model to VOLUME with LABELS of two or more slices.

    LABELS is a stack as large as VOLUME, such as a corrected mask, or a folder of slices. There the
    last number in a file's name says its slice, counted from 0; if VOLUME is a folder of slices, it
    is the number in the slice's name. For a model of several classes, labels have the class ids of
    its masks. If the command is stopped, repeat it to go on.
    """
    from emadapt.segment.adapt import tune as run

    own = _own(volume, "tuned", **options)
    click.echo(f"tune: {run(own, labels, foreground, slices)}")
    _say_next("tune", own)


def _own(volume: str, how: str, output: Path | None, **options: Any) -> Any:
    from emadapt.segment.adapt import Own

    stem = Path(volume.partition(":")[0]).name.partition(".")[0]
    return Own(volume, output=output or Path(f"{stem}-{how}"), **options)


def _say_next(verb: str, own: Any) -> None:
    from emadapt.segment.job import Order
    from emadapt.segment.preview import command

    stated = {"scale": own.scale, "voxel_nm": own.voxel_nm, "window": own.window}
    order = Order(own.volume, "mask.tif", str(own.output), **stated)
    click.echo(f"{verb}: {own.output}; next: {command(order)}")


@click.command()
@click.argument("input_", metavar="MASK")
@click.argument("output", metavar="OUT")
@click.option(
    "--label",
    default=0,
    type=click.IntRange(0),
    help="Value whose surface it is.  [default: everything that is not 0]",
)
@click.option(
    "--smooth",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 10),
    help="Standard deviation of a Gaussian over MASK, in voxels.",
)
@click.option(
    "--step",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Voxels of the shortest side that are taken as one.",
)
@SCALE
@VOXEL
@OVERWRITE
def mesh(input_: str, output: str, **options: Any) -> None:
    """Write the surface of MASK as OUT (.ply, .obj or .stl), in nm.

    MASK is an output of `segment`, or any volume that `segment` reads.
    """
    from emadapt.segment.mesh import mesh_volume

    mesh_volume(input_, output, **options)


@click.command()
@click.argument("objects", metavar="OBJECTS")
@click.argument("output", metavar="TABLE.csv|TABLE.parquet")
@click.option("--image", default="", help="Grey volume of the same shape, for intensities.")
@click.option("--to", default="", help="Mask of a second class, for the distance to it.")
@click.option(
    "--probabilities",
    default="",
    help="As `segment --probabilities` writes them, for the objects that are most likely wrong.",
)
@MIN_VOXELS
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Processes.")
@VOXEL
@OVERWRITE
def measure(objects: str, output: str, **options: Any) -> None:
    """Measure each object of OBJECTS: volume, surface, length, width, neighbours, and more.

    OBJECTS holds numbered objects, as `segment --instances` writes them, or it is a mask with one
    value: then TABLE-instances numbers its connected components. Beside the table come a summary of
    the volume (.json) and a page with histograms and pictures (.html).
    """
    from emadapt.segment.measure import Asked, measure_volume

    table = measure_volume(Asked(objects, output, **options))
    click.echo(f"measure: {len(table)} objects, {output}, and a page beside it")


@click.command()
@click.argument("model")
@click.argument("output", metavar="OUT.onnx|OUT.zip", type=click.Path(path_type=Path))
@click.option("--author", "authors", multiple=True, help="Of the package; repeat it for several.")
@OVERWRITE
def export(model: str, output: Path, authors: tuple[str, ...], overwrite: bool) -> None:
    """Write MODEL for other programs: OUT.onnx, or OUT.zip, a package for bioimage.io.

    MODEL is what `segment` takes as a model.
    """
    from emadapt.files import check_new_file
    from emadapt.segment.bioimage import write_package
    from emadapt.segment.export import write_onnx
    from emadapt.segment.model import open_model

    check_new_file(output, (".onnx", ".zip"), overwrite)
    started, opened = time.perf_counter(), open_model(model)
    if output.suffix.lower() == ".zip":
        found = write_package(opened, output, authors)
    else:
        found = write_onnx(opened, output)
    size, seconds = output.stat().st_size / 2**20, time.perf_counter() - started
    said = ", ".join(f"{away:.1e} at {shape}" for shape, away in found.items())
    click.echo(f"export: {output}, {size:.0f} MB, {seconds:.0f} s")
    click.echo(f"export: largest difference of a probability from the model's: {said}")


@click.command()
@click.argument("model")
@click.option("--name", default="emadapt", show_default=True, help="In the registry.")
@click.option("--alias", default="", help="Let it point to this version, e.g. champion.")
def register(model: str, name: str, alias: str) -> None:
    """Add MODEL (a folder that `train` wrote, or a trained unit) to MLflow's registry."""
    from emadapt.segment.model import open_model
    from emadapt.segment.registry import register as run

    opened = open_model(model)
    version = run(Path(), opened.folder, opened.card, name, alias)
    said = f", models:/{name}@{alias}" if alias else ""
    click.echo(f"register: models:/{name}/{version}{said}")
