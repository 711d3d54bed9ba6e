"""`emadapt measure`: a table of objects, and a page with histograms and pictures of some."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from emadapt.errors import InputError
from emadapt.files import check_new_file, whole_file, write_json, write_text
from emadapt.report.html import data_address, render
from emadapt.segment.objects import (
    Asked,
    Box,
    Measurer,
    measured,
    of_volume,
    opened,
    survey,
    with_nearest,
)
from emadapt.segment.pictures import overlay, picture
from emadapt.volumes.grey import to_uint8
from emadapt.volumes.opening import check_apart
from emadapt.volumes.source import tell
from emadapt.volumes.writing import WRITERS

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".parquet")
HISTOGRAMS = {
    "volume_nm3": ("volume, µm³", 1e9),
    "surface_nm2": ("surface, µm²", 1e6),
    "length_nm": ("length, nm", 1),
    "width_nm": ("width, nm", 1),
    "sphericity": ("sphericity", 1),
    "branches": ("branches", 1),
    "nearest_nm": ("distance to the nearest, nm", 1),
    "intensity_mean": ("mean grey value", 1),
    "to_nm": ("distance to the second class, nm", 1),
    "uncertainty": ("uncertainty", 1),
}
"""Columns that are drawn where the table has them; axis label, and what one unit of it is."""
COMPARED = ("volume_nm3", "length_nm", "width_nm", "sphericity")
"""What makes an object odd: how far these are from the median, in robust standard deviations."""
SHOWN = 4
"""The largest objects, and as many of the oddest others."""
UNCERTAIN = 20
"""Objects of which the model is least sure."""
AROUND_NM = 200.0
"""What is shown around an object of the image."""
SPECK = 100
"""Voxels; the shape of a smaller object says little."""
SIDE = 320
"""Pixels of a picture of an object."""


def measure_volume(asked: Asked) -> pd.DataFrame:
    """Write a table of the objects, and beside it a page (.html) and a summary (.json).

    Of a volume with one value beside 0, a mask, the objects are the connected components. They are
    numbered in a volume beside the table.

    Returns:
        A row for each object, with lengths in nm: `id`; `voxels`; `volume_nm3`; `surface_nm2`;
        `length_nm` and `branches` (see `metrics.shapes`); `width_nm`, the diameter of the largest
        ball inside; `sphericity`; `touching_nm2`, the area of the faces shared with other objects;
        `nearest_nm` and `nearest_id`, the distance to the nearest other object between the centres
        of voxels at their surfaces (of large objects, of `POINTS` of these voxels); `at_border`,
        whether the border of the volume cuts it; the box `z_min` to `x_max` and the centroid `z`,
        `y`, `x` in voxels from 0. With an image `intensity_mean` and `intensity_std`; with a second
        class `to_nm`, the distance to its nearest voxel, empty beyond REACH_NM; with probabilities
        `uncertainty`, 1 less their mean.

    Raises:
        InputError: a file cannot be read or written, the volumes do not fit, or there is no object.
    """
    import pandas as pd

    path = Path(asked.output)
    check_new_file(path, SUFFIXES, asked.overwrite)
    check_apart(path, asked.objects)
    for suffix in (".json", ".html"):
        check_new_file(path.with_suffix(suffix), (suffix,), asked.overwrite)
    measurer = opened(asked)
    for source in filter(None, measurer.sources):
        tell(source.name, source.notes)
    found = survey(measurer.objects)
    if found["voxels"].sum() == math.prod(measurer.objects.shape):
        note = "no voxel is 0, so all of the volume is objects; give 0 to the background, if any"
        tell(measurer.objects.name, [note])
    if len(found) == 1:
        asked = _numbered(asked, measurer)
        measurer = opened(asked)
        found = survey(measurer.objects)
    if (least := found["id"].min()) < 0:
        wrong, do = f"objects with the number {least}", "Give 0 to what is no object."
        raise InputError(asked.objects, found=wrong, expected="numbers above 0", do=do)
    boxes = found[found["voxels"] >= asked.min_voxels]
    if boxes.empty:
        raise InputError(
            asked.objects,
            found=f"{len(found)} objects, none of {asked.min_voxels} voxels or more",
            expected="numbered objects, as `emadapt segment --instances` writes them",
            do="Check the file, or lower --min-voxels.",
        )
    measures = pd.DataFrame(list(measured(asked, boxes)))
    table = boxes.merge(with_nearest(measures), on="id")
    summary = of_volume(table, measurer.objects.shape, measurer.voxel_nm)
    with whole_file(path) as temporary:
        if path.suffix.lower() == ".csv":
            table.to_csv(temporary, index=False, float_format="%.7g")
        else:
            table.to_parquet(temporary, index=False)
    write_json(path.with_suffix(".json"), summary)
    write_text(path.with_suffix(".html"), page(asked, measurer, table, summary))
    return table


def _numbered(asked: Asked, mask: Measurer) -> Asked:
    """The objects of a mask: its connected components, in a file beside the table."""
    from emadapt.segment.job import Order  # with torch, which objects do not need
    from emadapt.segment.outputs import check_output
    from emadapt.segment.run import number_mask

    suffix = next((end for end in WRITERS if asked.objects.lower().endswith(end)), ".zarr")
    output = f"{Path(asked.output).with_suffix('')}-instances{suffix}"
    order = Order(asked.objects, output, min_voxels=asked.min_voxels, overwrite=asked.overwrite)
    check_output(order, is_finished=False)
    n = number_mask(order, mask.objects, mask.voxel_nm)
    tell(asked.objects, [f"a mask: its {n} connected components are numbered in {output}"])
    return replace(asked, objects=output)


def page(asked: Asked, measurer: Measurer, table: pd.DataFrame, summary: dict[str, Any]) -> str:
    """The HTML; the same input gives the same text."""
    largest = table.nlargest(SHOWN, "voxels")
    sizeable = table[table["voxels"] >= SPECK]
    rest = sizeable.drop(largest.index, errors="ignore")
    oddest = rest.assign(odd=oddness(table).loc[rest.index]).nlargest(SHOWN, "odd")
    uncertain = sizeable.nlargest(UNCERTAIN, "uncertainty") if "uncertainty" in table else table[:0]
    return render(
        "segment",
        "measure.html.jinja",
        name=asked.objects,
        summary=summary,
        histograms=histograms(table),
        groups={
            "Most likely wrong": [outlined(measurer, row) for row in uncertain.to_dict("records")],
            "The largest": [shown(measurer, row) for row in largest.to_dict("records")],
            "The oddest of the others": [shown(measurer, row) for row in oddest.to_dict("records")],
        },
    )


def oddness(table: pd.DataFrame) -> pd.Series:
    """How unlike the others an object is: the largest of its robust z-scores (of logarithms)."""
    logs = np.log(table[list(COMPARED)])
    away = (logs - logs.median()).abs()
    return (away / (1.4826 * away.median() + 1e-9)).max(axis=1)


def shown(measurer: Measurer, row: dict[str, Any]) -> dict[str, Any]:
    """An object for the template: a picture seen along z, and what is known of it."""
    box = _box(row)
    own, _ = measurer.mask(box, 0)
    return {**row, "picture": picture(relief(own, measurer.cell_nm(box)))}


def outlined(measurer: Measurer, row: dict[str, Any]) -> dict[str, Any]:
    """As `shown`, of an image the slice that has most of the object."""
    if not measurer.image:
        return shown(measurer, row)
    box = _box(row)
    own, first = measurer.mask(box, AROUND_NM)
    k = int(own.sum((1, 2)).argmax())
    grey = measurer.cut(measurer.image, box, AROUND_NM)[0][k]
    image = overlay(to_uint8(grey, *np.percentile(grey, (1, 99))), own[k])
    return {**row, "slice": first[0] + k * measurer.step(box)[0], "picture": picture(image)}


def _box(row: dict[str, Any]) -> Box:
    return {k: v for k, v in row.items() if k == "id" or k.endswith(("_min", "_max"))}


def relief(mask: npt.NDArray[np.bool_], voxel_nm: tuple[float, ...]) -> npt.NDArray[np.uint8]:
    """(SIDE, SIDE) picture of an object from above, lit from the upper left."""
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    height = np.where(mask.any(0), mask.shape[0] - mask.argmax(0), 0) * voxel_nm[0]
    sides = [n * v for n, v in zip(height.shape, voxel_nm[1:], strict=True)]
    size = [max(1, round(0.9 * SIDE * side / max(sides))) for side in sides]
    image = Image.fromarray(height.astype(np.float32))
    high = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    step = max(sides) / (0.9 * SIDE)
    steep = np.gradient(gaussian_filter(high, 1.5) / step)
    up = 1 / np.sqrt(1 + steep[0] ** 2 + steep[1] ** 2)
    light = np.clip(0.55 * up + 0.35 * (steep[0] + steep[1]) * up + 0.2, 0.05, 1)
    out = np.full((SIDE, SIDE), 255, np.uint8)
    y, x = ((SIDE - n) // 2 for n in size)
    inside = high > voxel_nm[0] / 2
    out[y : y + size[0], x : x + size[1]][inside] = (light[inside] * 225).astype(np.uint8)
    return out


def histograms(table: pd.DataFrame) -> str:
    """A PNG with one histogram for each measure, as a data address."""
    from matplotlib.figure import Figure

    columns = [name for name in HISTOGRAMS if name in table and table[name].notna().any()]
    rows = -(-len(columns) // 4)
    figure = Figure(figsize=(11, 2.3 * rows), dpi=100, layout="constrained")
    places = figure.subplots(rows, 4, squeeze=False).ravel()
    for axes, name in zip(places, columns, strict=False):
        label, unit = HISTOGRAMS[name]
        values = (table[name] / unit).dropna()
        bins = np.arange(-0.5, values.max() + 1.5) if name == "branches" else 30
        axes.hist(values, bins, color="#0072B2")
        axes.axvline(values.median(), color="#D55E00")
        axes.set_xlabel(f"{label} (median {values.median():.3g})")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in places[len(columns) :]:
        axes.axis("off")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return data_address(file.getvalue())
