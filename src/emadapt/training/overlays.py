"""A test slice as a picture: image, label, prediction and errors side by side."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emadapt.files import write_figure

FALSE_POSITIVE, FALSE_NEGATIVE, ANOTHER = "#E69F00", "#0072B2", "#D55E00"
"""Orange, blue and red of Okabe and Ito, which the colour-blind can tell apart."""
CLASSES = ("#009E73", "#F0E442", "#CC79A7", "#56B4E9", "#D55E00", "#0072B2", "#E69F00")
"""Colours of classes, of the same palette; more than seven begin anew."""
PANEL, GAP, TOP, BOTTOM = 420, 8, 52, 34
"""Pixels: the longer side of a panel, between panels, above and below them."""

Pixels = npt.NDArray[np.float32]


def overlay_png(
    path: Path,
    image: npt.NDArray[np.uint8],
    label: npt.NDArray[np.generic],
    prediction: npt.NDArray[np.generic],
    title: str,
    classes: Sequence[str] = ("foreground",),
) -> None:
    """Write four panels: image, label, prediction, and errors by kind.

    The same input gives the same bytes.

    Args:
        path: the PNG to write.
        image: (Y, X) grey values.
        label: (Y, X) class ids from 1 on, 0 in the background.
        prediction: likewise.
        title: one line above the panels.
        classes: their names.
    """
    from matplotlib.figure import Figure  # takes half a second
    from matplotlib.patches import Patch

    step = max(1, max(image.shape) // (4 * PANEL))  # of huge slices every n-th pixel is plenty
    grey = np.repeat(image[::step, ::step, None], 3, axis=2).astype(np.float32)
    true, said = (np.asarray(ids)[::step, ::step] for ids in (label, prediction))
    colours = dict(zip(classes, itertools.cycle(CLASSES), strict=False))
    tints = [
        [(colour, ids == number) for number, colour in enumerate(colours.values(), 1)]
        for ids in (true, said)
    ]
    errors = [
        (FALSE_POSITIVE, (said != 0) & (true == 0)),
        (FALSE_NEGATIVE, (said == 0) & (true != 0)),
    ]
    kinds = ["false positive", "false negative"]
    if len(classes) > 1:
        errors.append((ANOTHER, (said != 0) & (true != 0) & (said != true)))
        kinds.append("another class")
    panels = {
        "image": grey,
        "label": _tint(grey, tints[0]),
        "prediction": _tint(grey, tints[1]),
        "errors": _tint(0.6 * grey + 60, errors, 0.85),
    }
    high, wide = (max(1, round(side * PANEL / max(true.shape))) for side in true.shape)
    width, height = 4 * wide + 5 * GAP, TOP + high + BOTTOM
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    figure.text(GAP / width, 1 - 8 / height, title, va="top", fontsize=10, weight="bold")
    figure.subplots_adjust(
        GAP / width, BOTTOM / height, 1 - GAP / width, 1 - TOP / height, wspace=GAP / wide
    )
    axes = figure.subplots(1, 4)
    for axis, (name, panel) in zip(axes, panels.items(), strict=True):
        axis.imshow(panel.clip(0, 255).astype(np.uint8), aspect="auto")
        axis.set_title(name, fontsize=9, pad=3)
        axis.set_axis_off()
    handles = [Patch(color=colour, alpha=0.6, label=name) for name, colour in colours.items()]
    for kind, (colour, mask) in zip(kinds, errors, strict=True):
        handles.append(Patch(color=colour, label=f"{kind} ({100 * mask.mean():.1f} % of pixels)"))
    plain = {"fontsize": 9, "frameon": False, "borderaxespad": 0.3}
    figure.legend(handles=handles, loc="lower right", ncols=len(handles), **plain)
    write_figure(path, figure)


def _tint(
    grey: Pixels, masks: Sequence[tuple[str, npt.NDArray[np.bool_]]], share: float = 0.45
) -> Pixels:
    """(Y, X, 3) picture of 0 to 255, with `share` of a colour in each mask."""
    from matplotlib.colors import to_rgb

    picture = grey.copy()
    for colour, mask in masks:
        rgb = 255 * np.array(to_rgb(colour), np.float32)
        picture[mask] = (1 - share) * picture[mask] + share * rgb
    return picture
