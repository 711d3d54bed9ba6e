"""Verbs for a user's own volume. As in `emadapt.cli`, heavy imports happen inside."""

from __future__ import annotations

import sys
from typing import Any

import click

MODEL = click.option(
    "--model",
    required=True,
    help="a folder that `train` wrote, a trained unit's name, or models:/NAME@ALIAS",
)
SCALE = click.option(
    "--scale",
    default=0,
    type=click.IntRange(0),
    help="of an OME-Zarr image  [default: 0, the finest]",
)
VOXEL = click.option(
    "--voxel-nm",
    nargs=3,
    type=float,
    metavar="Z Y X",
    help="voxel size  [default: what INPUT says]",
)
WINDOW = click.option(
    "--window",
    nargs=2,
    type=float,
    metavar="LOW HIGH",
    help="grey values for black and white  [default: of 8 bits 0 255, else percentiles of INPUT]",
)


@click.command()
@click.argument("input_", metavar="INPUT")
@click.argument("output")
@MODEL
@SCALE
@click.option(
    "--probabilities", is_flag=True, help="write them, too, as OUTPUT-probabilities; 255 is 1"
)
@click.option(
    "--instances",
    is_flag=True,
    help="number connected components in OUTPUT-instances, with a table of them as CSV",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    help="foreground has a higher probability  [default: the model's]",
)
@click.option(
    "--flips",
    is_flag=True,
    help="mean over mirrored tiles: four times the work; a model with flips: true always does",
)
@VOXEL
@WINDOW
@click.option(
    "--dask",
    default="",
    help="share the work: local:N processes here, or the address of a scheduler",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="replace OUTPUT, and what a stopped run of other settings left",
)
def segment(input_: str, output: str, **options: Any) -> None:
    """Segment INPUT (TIFF, folder of slices, file.h5:/dataset, Zarr, OME-Zarr, NIfTI) into OUTPUT (.tif or .zarr).

    Stopped, the same command goes on where it was: what is done lies in OUTPUT.partial.
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
@click.option("--overwrite", is_flag=True, help="replace the page")
def preview(input_: str, output: str, **options: Any) -> None:
    """Segment three places of INPUT for a look, and say whether it is like the data that the model was trained on."""
    from emadapt.segment.job import Order
    from emadapt.segment.preview import LABEL
    from emadapt.segment.preview import preview as run

    domain = run(Order(input_, output, **options))
    click.echo(f"preview: {output}")
    if domain is not None:
        click.echo(f"preview: {domain.words()}")
        if domain.verdict == "unlike":
            click.echo(
                f"preview: label {LABEL} slices and fine-tune, see docs/your-own-data.md", err=True
            )


@click.command()
@click.argument("input_", metavar="MASK")
@click.argument("output", metavar="OUT")
@click.option(
    "--label",
    default=0,
    type=click.IntRange(0),
    help="value whose surface it is  [default: all that is not 0]",
)
@click.option(
    "--smooth",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 10),
    help="sd in voxels of a Gaussian over MASK",
)
@click.option(
    "--step",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="voxels of the shortest side taken as one",
)
@SCALE
@VOXEL
@click.option("--overwrite", is_flag=True, help="replace OUT")
def mesh(input_: str, output: str, **options: Any) -> None:
    """Write the surface of MASK (as `segment` writes and reads it) as OUT: .ply, .obj or .stl; x, y, z in nm."""
    from emadapt.segment.mesh import mesh_volume

    mesh_volume(input_, output, **options)
