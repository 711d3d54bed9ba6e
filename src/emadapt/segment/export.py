"""`emadapt export`: a trained model as a file for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from emadapt.errors import InputError
from emadapt.segment.bioimage import write_package
from emadapt.segment.model import open_model
from emadapt.segment.onnx_graph import write_onnx

SUFFIXES = (".onnx", ".zip")


def export_model(
    model: str, output: Path, authors: Sequence[str] = (), overwrite: bool = False
) -> dict[str, float]:
    """Write a model as ONNX, or as a package for bioimage.io.

    Args:
        model: see `find_model`.
        output: FILE.onnx or FILE.zip.
        authors: of the package.
        overwrite: replace the output.

    Returns:
        Largest difference of a probability from the model's, by the size of the image.

    Raises:
        InputError: the output exists or has another name, or the model cannot be exported.
    """
    if output.suffix not in SUFFIXES or not output.resolve().parent.is_dir():
        raise InputError(
            output,
            found="a name that nothing can be exported to",
            expected="FILE.onnx or FILE.zip in a folder that exists",
            do="Choose another name.",
        )
    if output.exists() and not overwrite:
        raise InputError(
            output, found="a file of that name", expected="none", do="Replace it with --overwrite."
        )
    opened = open_model(model)
    if output.suffix == ".onnx":
        return write_onnx(opened, output)
    return write_package(opened, output, authors)
