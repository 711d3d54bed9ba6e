"""Verbs for models that are passed on. As in `emadapt.cli`, heavy imports happen inside."""

from __future__ import annotations

import time
from pathlib import Path

import click


@click.command()
@click.argument("model")
@click.argument("output", metavar="OUT.onnx|OUT.zip", type=click.Path(path_type=Path))
@click.option("--author", "authors", multiple=True, help="of the package; may be repeated")
@click.option("--overwrite", is_flag=True, help="replace OUT")
def export(model: str, output: Path, authors: tuple[str, ...], overwrite: bool) -> None:
    """Write MODEL for other programs: OUT.onnx, an ONNX graph, or OUT.zip, a package for bioimage.io.

    MODEL is a folder that `train` wrote, a trained unit's name, or models:/NAME@ALIAS.
    """
    from emadapt.errors import InputError
    from emadapt.segment.model import open_model

    if output.suffix not in (".onnx", ".zip") or not output.resolve().parent.is_dir():
        raise InputError(
            output,
            found="a name that nothing can be exported to",
            expected="FILE.onnx or FILE.zip in a folder that is there",
            do="Choose another name.",
        )
    if output.exists() and not overwrite:
        raise InputError(
            output, found="a file of that name", expected="none", do="Replace it with --overwrite."
        )
    started = time.perf_counter()
    opened = open_model(model)
    if output.suffix == ".onnx":
        from emadapt.segment.onnx_graph import write_onnx

        found = write_onnx(opened, output)
    else:
        from emadapt.segment.bioimage import write_package

        found = write_package(opened, output, authors)
    said = ", ".join(f"{away:.1e} at {size}" for size, away in found.items())
    size, seconds = output.stat().st_size / 2**20, time.perf_counter() - started
    click.echo(f"export {opened.name}: {output}, {size:.0f} MB, {seconds:.0f} s")
    click.echo(f"export: largest difference of a probability between it and the model: {said}")


@click.command()
@click.argument("model")
@click.option("--name", default="emadapt", show_default=True, help="under which it is registered")
@click.option("--alias", help="let it point to this version, e.g. champion")
def register(model: str, name: str, alias: str | None) -> None:
    """Add MODEL (a folder that `train` wrote, or a trained unit's name) to MLflow's registry."""
    from emadapt.segment import registry
    from emadapt.segment.model import open_model

    version = registry.register(Path(), open_model(model), name)
    if alias:
        registry.promote(Path(), name, version, alias)
    click.echo(
        f"register: models:/{name}/{version}" + (f", models:/{name}@{alias}" if alias else "")
    )


@click.command()
@click.argument("name")
@click.argument("version", type=click.IntRange(1))
@click.option("--alias", default="champion", show_default=True)
def promote(name: str, version: int, alias: str) -> None:
    """Let an alias of the registered model NAME point to VERSION."""
    from emadapt.segment import registry

    registry.promote(Path(), name, version, alias)
    click.echo(f"promote: models:/{name}@{alias} is version {version} now")
