"""A test slice as a picture: image, label, prediction and errors side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from emadapt.files import whole_file

FALSE_POSITIVE, FALSE_NEGATIVE, FOREGROUND = "#E69F00", "#0072B2", "#009E73"
"""Orange, blue and green of Okabe and Ito, which the colour-blind can tell apart."""
PANEL, GAP, TOP, BOTTOM = 420, 8, 52, 34
"""Pixels: the longer side of a panel, between panels, above and below them."""

Pixels = npt.NDArray[np.float32]


def overlay_png(
    path: Path,
    image: npt.NDArray[np.uint8],
    label: npt.NDArray[np.generic],
    prediction: npt.NDArray[np.generic],
    title: str,
) -> None:
    """Write four panels: image, label, prediction, and errors in two colours.

    The same input gives the same bytes.

    Args:
        path: the PNG to write.
        image: (Y, X) grey values.
        label: (Y, X), not 0 in the foreground.
        prediction: (Y, X), not 0 in the foreground.
        title: one line above the panels.
    """
    from matplotlib.figure import Figure  # takes half a second
    from matplotlib.patches import Patch

    step = max(1, max(image.shape) // (4 * PANEL))  # of huge slices every n-th pixel is plenty
    grey = np.repeat(image[::step, ::step, None], 3, axis=2).astype(np.float32)
    true, said = (np.asarray(mask)[::step, ::step] != 0 for mask in (label, prediction))
    errors = {FALSE_POSITIVE: said & ~true, FALSE_NEGATIVE: true & ~said}
    panels = {
        "image": grey,
        "label": _tint(grey, {FOREGROUND: true}),
        "prediction": _tint(grey, {FOREGROUND: said}),
        "errors": _tint(0.6 * grey + 60, errors, 0.85),
    }
    scale = PANEL / max(grey.shape)
    high, wide = (max(1, round(side * scale)) for side in grey.shape[:2])
    total = (4 * wide + 5 * GAP, TOP + high + BOTTOM)
    figure = Figure(figsize=(total[0] / 100, total[1] / 100), dpi=100)
    figure.text(GAP / total[0], 1 - 8 / total[1], title, va="top", fontsize=10, weight="bold")
    for number, (name, panel) in enumerate(panels.items()):
        left = GAP + number * (wide + GAP)
        place = (left / total[0], BOTTOM / total[1], wide / total[0], high / total[1])
        axes = figure.add_axes(place)
        picture = Image.fromarray(panel.clip(0, 255).astype(np.uint8))
        small = picture.resize((wide, high), Image.Resampling.BOX)
        axes.imshow(np.asarray(small), interpolation="nearest", aspect="auto")
        axes.set_title(name, fontsize=9, pad=3)
        axes.set_axis_off()
    share = {colour: 100 * mask.mean() for colour, mask in errors.items()}
    handles = [
        Patch(color=FOREGROUND, alpha=0.6, label="foreground"),
        *(
            Patch(color=colour, label=f"false {name} ({share[colour]:.1f} % of pixels)")
            for colour, name in ((FALSE_POSITIVE, "positive"), (FALSE_NEGATIVE, "negative"))
        ),
    ]
    figure.legend(
        handles=handles,
        loc="lower right",
        ncols=3,
        fontsize=9,
        frameon=False,
        borderaxespad=0.3,
    )
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _tint(grey: Pixels, masks: Mapping[str, npt.NDArray[np.bool_]], share: float = 0.45) -> Pixels:
    """(Y, X, 3) picture of 0 to 255, with `share` of a colour in each mask."""
    picture = grey.copy()
    for colour, mask in masks.items():
        rgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)], np.float32)
        picture[mask] = (1 - share) * picture[mask] + share * rgb
    return picture
