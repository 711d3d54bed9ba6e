"""A model as a package for bioimage.io, which Fiji (deepImageJ), ilastik and QuPath read.

It holds the ONNX graph with axes, a test image, a cover, terms, citations and the model card. See
https://bioimage.io/docs. No network is needed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emadapt.data.foreground import most_probable
from emadapt.errors import EmadaptError, not_installed
from emadapt.segment.export import (
    INPUT,
    OPSET,
    OUTPUT,
    GreyToProbability,
    documentation,
    pixels_of,
    probe,
    write_onnx,
)
from emadapt.segment.model import Model
from emadapt.segment.pictures import overlay
from emadapt.training.model_card import FAMILIES, datasets_behind, family_of, terms_of

U_NET = (
    "Falk et al. 2019, U-Net: deep learning for cell counting, detection, and morphometry",
    "10.1038/s41592-018-0261-2",
)
"""What `unet2d`, MONAI's BasicUNet, follows."""
SIDE, SMALLEST = 18, 4
"""Patches on a side of the test image, and of the smallest image that users may pass."""


def write_package(model: Model, path: Path, authors: Sequence[str]) -> dict[str, float]:
    """Write a package as `path`, if `bioimageio.core` passes it; returns what `write_onnx` does.

    The test image is synthetic, so that no dataset's terms hold for it.
    """
    core, spec = _bioimageio()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as name:
        folder = Path(name)
        found = write_onnx(model, folder / "weights.onnx")
        _write_files(model, folder)
        packed = spec.save_bioimageio_package(
            _description(model, folder, authors), output_path=folder / "package.zip"
        )
        summary = core.test_model(packed, weight_format="onnx")
        if summary.status != "passed":
            wrong = "; ".join(f"{d.name}: {e.msg}" for d in summary.details for e in d.errors)
            raise EmadaptError(
                "bioimageio.core does not pass the package, and nothing was written. It says: "
                f"{wrong[:2000]}"
            )
        shutil.move(packed, path)
    return found


def _bioimageio() -> tuple[Any, Any]:
    try:
        import bioimageio.core
        import bioimageio.spec
    except ImportError as error:
        raise not_installed("bioimageio.core", "export") from error
    return bioimageio.core, bioimageio.spec


def _write_files(model: Model, folder: Path) -> None:
    """Test tensors, cover, documentation and terms."""
    from PIL import Image

    side = SIDE * model.segmenter.patch
    image = probe(1, side, side, 0)
    grey = image[0, 0].astype(np.uint8)
    whole, threshold = GreyToProbability(model.segmenter).eval().cpu(), model.card["threshold"]
    with torch.inference_mode():
        probability = whole(torch.from_numpy(image)).numpy()
    np.save(folder / "test-input.npy", image)
    np.save(folder / "test-output.npy", probability)
    several = len(model.segmenter.classes) > 1
    mask = most_probable(probability[0]) > 0 if several else probability[0, 0] > threshold
    found = overlay(grey, mask)
    Image.fromarray(np.hstack([np.stack([grey] * 3, -1), found])).save(folder / "cover.png")
    (folder / "README.md").write_text(documentation(model))
    terms = "\n".join(f"- {line}" for line in terms_of(model.card, with_backbone=True))
    text = f"# Terms of {model.name}\n\nAll of these hold:\n\n{terms}\n"
    (folder / "LICENSE.md").write_text(text)


def _description(model: Model, folder: Path, authors: Sequence[str]) -> Any:
    from bioimageio.spec.model import v0_5 as v

    patch = model.segmenter.patch
    pixel = next(iter(pixels_of(model).values()))
    # In steps of 1/1024 nm: bioimageio computes int(size * scale / scale), one less with 9.2.
    y, x = (round(1024 * nm) / 1024 for nm in pixel)
    sides = v.ParameterizedSize(min=SMALLEST * patch, step=patch)
    shown = v.InputTensorDescr(
        id=v.TensorId(INPUT),
        description="grey values, 0 is black and 255 white",
        axes=[
            v.BatchAxis(),
            v.ChannelAxis(channel_names=[v.Identifier("grey")]),
            v.SpaceInputAxis(id=v.AxisId("y"), size=sides, scale=y, unit="nanometer"),
            v.SpaceInputAxis(id=v.AxisId("x"), size=sides, scale=x, unit="nanometer"),
        ],
        data=v.IntervalOrRatioDataDescr(type="float32", range=(0.0, 255.0)),
        test_tensor=v.FileDescr(source=folder / "test-input.npy"),
    )
    size = {
        axis: v.SizeReference(tensor_id=v.TensorId(INPUT), axis_id=v.AxisId(axis)) for axis in "yx"
    }
    several = len(model.segmenter.classes) > 1
    one = f"probability of foreground; the threshold is {model.card['threshold']:g}"
    given = v.OutputTensorDescr(
        id=v.TensorId(OUTPUT),
        description="probability of each class; the rest to 1 is background" if several else one,
        axes=[
            v.BatchAxis(),
            v.ChannelAxis(channel_names=[v.Identifier(name) for name in model.segmenter.classes]),
            v.SpaceOutputAxis(id=v.AxisId("y"), size=size["y"], scale=y, unit="nanometer"),
            v.SpaceOutputAxis(id=v.AxisId("x"), size=size["x"], scale=x, unit="nanometer"),
        ],
        data=v.IntervalOrRatioDataDescr(type="float32", range=(0.0, 1.0)),
        test_tensor=v.FileDescr(source=folder / "test-output.npy"),
    )
    weights = v.OnnxWeightsDescr(source=folder / "weights.onnx", opset_version=OPSET)
    return v.ModelDescr(
        name=model.name,
        description="Probability of foreground in electron micrographs, slice by slice.",
        authors=[v.Author(name=name) for name in authors],
        cite=_citations(model, v),
        license=v.FileDescr(source=folder / "LICENSE.md"),
        documentation=v.FileDescr(source=folder / "README.md"),
        covers=[v.FileDescr(source=folder / "cover.png")],
        tags=["electron-microscopy", "segmentation", "2d"],
        inputs=[shown],
        outputs=[given],
        weights=v.WeightsDescr(onnx=weights),
    )


def _citations(model: Model, v: Any) -> list[Any]:
    """By DOI, as bioimageio looks addresses up in the network; its specification wants some."""
    sources = [data.source for data in datasets_behind(model.card)]
    cited = dict.fromkeys((s["citation"], s["doi"]) for s in sources if s)  # one's own data: none
    found = [v.CiteEntry(text=text, doi=v.Doi(doi)) for text, doi in cited]
    if model.card["regime"]["kind"] == "unet2d":
        text, doi = U_NET
        found.append(v.CiteEntry(text=text, doi=v.Doi(doi)))
    if family := family_of(model.card):
        _, text, number = FAMILIES[family]
        found.append(v.CiteEntry(text=text, doi=v.Doi(f"10.48550/arXiv.{number}")))
    return found
