"""`emadapt preview`: a page with three places segmented, and figures beside the training data."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.files import check_new_file, write_text
from emadapt.report.html import render
from emadapt.segment.domain import INVERTED, Domain, domain_of_volume
from emadapt.segment.job import Order, prepare
from emadapt.segment.pictures import overlay, picture
from emadapt.segment.runner import Runner, open_runner
from emadapt.volumes.opening import check_apart

FIELDS = 3
SIDE = 2
"""Tiles along each side of a field, at most."""
LABEL = 10
"""Slices that the page advises to label first."""


def preview(order: Order) -> Domain:
    """Write the page `order.output`; returns how the volume compares with the training data."""
    output = Path(order.output)
    check_new_file(output, (".html",), order.overwrite)
    check_apart(output, order.input)
    runner = open_runner(prepare(order))
    fields = [field(runner, k) for k in range(min(FIELDS, runner.job.shape[0]))]
    domain = domain_of_volume(runner)
    write_text(output, page(order, runner, fields, domain))
    return domain


def field(runner: Runner, number: int) -> dict[str, Any]:
    """Segment one of the places on the diagonal of the volume, for the template."""
    job, geo = runner.job, runner.geo
    sides = zip(geo.native, geo.tile, geo.resized, strict=True)
    height, width = (min(n, math.ceil(SIDE * tile * n / r)) for n, tile, r in sides)
    places = min(FIELDS, job.shape[0])
    z, y, x = (
        round((n - side) * (number + 0.5) / places)
        for n, side in zip(job.shape, (1, height, width), strict=True)
    )
    probability = runner.part(z, slice(y, y + height), slice(x, x + width))
    image = runner.grey(runner.source.read(z, z + 1, y, y + height)[0][:, x : x + width])
    mask = runner.ids(probability) > 0
    probability = probability.reshape(-1, *mask.shape).sum(0)  # of any class
    return {
        "z": z,
        "y": y,
        "x": x,
        "share": float(mask.mean()),
        "image": picture(image),
        "overlay": picture(overlay(image, mask)),
        "probability": picture(np.rint(probability * 255).astype(np.uint8)),
    }


def page(order: Order, runner: Runner, fields: list[dict[str, Any]], domain: Domain) -> str:
    """The HTML; the same input gives the same text."""
    job = runner.job
    zoomed = f"in plane by {job.zoom[0]:g} x {job.zoom[1]:g}, as {job.dataset}"
    if job.second_zoom:
        zoomed += f"; and once more by {job.second_zoom[0]:g} x {job.second_zoom[1]:g}"
    facts = {
        "volume": f"{order.input}, {' x '.join(map(str, job.shape))} voxels",
        "resampled": "no" if job.zoom == (1.0, 1.0) else zoomed,
        "grey window": f"{job.window[0]:g} to {job.window[1]:g} become 0 to 255",
        "model": f"{job.unit}, foreground above {job.threshold:g}",
    }
    return render(
        "segment",
        "preview.html.jinja",
        facts=facts,
        fields=fields,
        domain=domain,
        inverted=INVERTED,
        slices=LABEL,
        command=command(order),
    )


def command(order: Order) -> str:
    """The command that segments all of the volume, for a shell."""
    words = ["emadapt", "segment", order.input, "mask.tif", "--model", order.model]
    if order.scale:
        words += ["--scale", str(order.scale)]
    for option, values in (("--voxel-nm", order.voxel_nm), ("--window", order.window)):
        if values:
            words += [option, *(f"{value:g}" for value in values)]
    return shlex.join(words)
