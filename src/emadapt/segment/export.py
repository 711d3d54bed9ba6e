"""`emadapt export`: a trained model as a file for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from emadapt.segment.bioimage import write_package
from emadapt.segment.model import open_model
from emadapt.segment.new_file import check_new_file
from emadapt.segment.onnx_graph import write_onnx


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
    check_new_file(output, (".onnx", ".zip"), overwrite)
    opened = open_model(model)
    if output.suffix == ".onnx":
        return write_onnx(opened, output)
    return write_package(opened, output, authors)
