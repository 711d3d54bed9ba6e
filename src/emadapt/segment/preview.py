"""`emadapt preview`: three places of a volume segmented, and whether the volume is like the training data, as one HTML file."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from emadapt.data.align import AS_IT_IS
from emadapt.data.tiles import Grey
from emadapt.errors import InputError
from emadapt.segment.domain import Domain, domain_of_volume
from emadapt.segment.job import Block, Order, Runner, grey_rows_of, open_runner, prepare, spread
from emadapt.segment.model import Model, geometry_for, said
from emadapt.segment.rows import predict_rows
from emadapt.segment.rows3d import predict_rows_3d
from emadapt.training.overlays import FOREGROUND

FIELDS = 3
SIDE = 2
"""Tiles above and beside each other in a field, at most."""
LABEL = 10
"""Slices to label that the page speaks of first."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A part of a slice.

    Attributes:
        z: the slice; (y, x) the upper left corner.
        image: (h, w) uint8, as the model sees it.
        probability: (h, w) in [0, 1].
    """

    z: int
    y: int
    x: int
    image: Grey
    probability: npt.NDArray[np.float32]


def preview(order: Order) -> Domain | None:
    """Write the page.

    Args:
        order: `output` is the page; flags for other outputs do not count.

    Returns:
        How far the volume is from the training data; None where the model does not say what these are like.

    Raises:
        InputError: as `segment`, and the page is there already.
    """
    output = Path(order.output)
    if output.suffix != ".html" or not output.resolve().parent.is_dir():
        raise InputError(
            output,
            found="a name that no page can have",
            expected="FILE.html in a folder that is there",
            do="Choose another name.",
        )
    if output.exists() and not order.overwrite:
        raise InputError(
            output, found="a file of that name", expected="none", do="Replace it with --overwrite."
        )
    runner = open_runner(prepare(order))
    fields = [field(runner, k) for k in range(min(FIELDS, runner.job.shape[0]))]
    domain = domain_of_volume(runner) if runner.model.card.get("tokens") else None
    temporary = output.with_name(f".{output.name}.part")
    temporary.write_text(page(order, runner, fields, domain), encoding="utf-8")
    temporary.replace(output)
    return domain


def field(runner: Runner, number: int) -> Field:
    """Segment one of the places: they lie on the diagonal of the volume, from corner to corner."""
    job, geo = runner.job, runner.geo
    side = [
        min(n, math.ceil(SIDE * t * n / r))
        for n, t, r in zip(geo.native, geo.tile, geo.resized, strict=True)
    ]
    places = min(FIELDS, job.shape[0])
    z = spread(job.shape[0], places)[number]
    y, x = (round((n - s) * (number + 0.5) / places) for n, s in zip(geo.native, side, strict=True))
    segmenter, context = runner.model.segmenter, runner.model.segmenter.spec.context
    own = geometry_for(
        runner.model, (side[0], side[1]), job.dataset, dataclasses.replace(AS_IT_IS, zoom=job.zoom)
    )

    def shown(k: int) -> Grey:
        rows = grey_rows_of(runner.source, job.window, geo, context, k, y, y + side[0])
        return np.ascontiguousarray(rows[:, x : x + side[1]])

    image = shown(z)
    if segmenter.regime.is_3d:  # the slices of one window around it
        deep = min(segmenter.regime.patch[0], job.shape[0])
        first = min(max(z - deep // 2, 0), job.shape[0] - deep)
        near = [image if k == z else shown(k) for k in range(first, first + deep)]
        block = Block(z - first, z - first + 1, 0, side[0])
        rows = predict_rows_3d(segmenter, lambda k, a, b: near[k][a:b], own, block, deep, job.flips)
        return Field(z, y, x, image, np.concatenate([found for _, found in rows]))
    found = predict_rows(segmenter, lambda a, b: image[a:b], own, 0, side[0], job.flips)
    return Field(z, y, x, image[..., 1] if context else image, np.concatenate(list(found)))


def page(order: Order, runner: Runner, fields: list[Field], domain: Domain | None) -> str:
    """The HTML; the same input gives the same text."""
    from jinja2 import Environment, StrictUndefined

    job = runner.job
    shown = [
        {
            "z": f.z,
            "y": f.y,
            "x": f.x,
            "share": float((f.probability > job.threshold).mean()),
            "image": picture(f.image),
            "overlay": picture(overlay(f.image, f.probability > job.threshold)),
            "probability": picture(np.rint(f.probability * 255).astype(np.uint8)),
        }
        for f in fields
    ]
    facts = {
        "volume": f"{order.input}, {' x '.join(map(str, job.shape))} voxels of {job.dtype}",
        "voxel size": f"{said(job.voxel_nm)} nm (z y x)",
        "trained at": "; ".join(
            f"{said(v)} nm ({name})" for name, v in runner.model.voxels.items()
        ),
        "resampled": "no"
        if job.zoom == (1.0, 1.0)
        else f"in plane by {job.zoom[0]:g} x {job.zoom[1]:g}, as {job.dataset}",
        "grey values": f"{job.window[0]:g} to {job.window[1]:g} become 0 to 255",
        "model": f"{job.unit}, foreground above {job.threshold:g}",
    }
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        resources.files("emadapt.segment")
        .joinpath("preview.html.jinja")
        .read_text(encoding="utf-8")
    )
    return template.render(
        facts=facts,
        fields=shown,
        domain=domain,
        slices=LABEL,
        folder=job.model,
        regime=regime_to_tune(runner.model),
        command=command(order),
    )


def regime_to_tune(model: Model) -> str:
    """Settings of a regime that can start from the model: its own kind, or an adapter on top of its head; "" where none can."""
    regime, head = model.segmenter.regime, model.segmenter.head_name
    if regime.kind == "knn" or regime.outside or regime.per_dataset:
        return ""
    if regime.is_3d:
        return (
            f"kind: {regime.kind}, patch: {list(regime.patch)}, channels: {list(regime.channels)}"
        )
    if regime.from_scratch:
        return f"kind: {regime.kind}"
    kind = "lora" if regime.pretrained_tokens else regime.kind
    settings: dict[str, Any] = {"kind": kind}
    settings |= (
        {"rank": regime.rank, "alpha": regime.alpha} if kind not in ("bitfit", "full") else {}
    )
    settings |= {"k": regime.k} if regime.kind == "lora_last_k" else {}
    return ", ".join(f"{key}: {value}" for key, value in {**settings, "head": head}.items())


def command(order: Order) -> str:
    """What segments all of the volume."""
    voxel = f" --voxel-nm {' '.join(f'{v:g}' for v in order.voxel_nm)}" if order.voxel_nm else ""
    window = f" --window {order.window[0]:g} {order.window[1]:g}" if order.window else ""
    scale = f" --scale {order.scale}" if order.scale else ""
    return f"emadapt segment {order.input} mask.tif --model {order.model}{scale}{voxel}{window}"


def overlay(image: Grey, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """(h, w, 3): the image with the mask tinted and its outline drawn."""
    from scipy.ndimage import binary_erosion

    colour = np.array([int(FOREGROUND[i : i + 2], 16) for i in (1, 3, 5)], np.float32)
    out = np.repeat(image[..., None], 3, 2).astype(np.float32)
    out[mask] = 0.65 * out[mask] + 0.35 * colour
    out[mask & ~binary_erosion(mask, iterations=2, border_value=1)] = colour
    return out.astype(np.uint8)


def picture(array: npt.NDArray[Any]) -> str:
    """A PNG as the text of an address."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
