"""Label values that a rule would misread are refused, and odd ones are said."""

import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import zoom

from emadapt.data.label_values import LabelValues
from emadapt.errors import InputError
from emadapt.study.datasets import DatasetSettings

DISCS = np.add.outer(np.arange(-30, 34) ** 2, np.arange(-30, 34) ** 2) < 500
"""A disc in the middle of 64 x 64 pixels."""


def looked_at(label: np.ndarray, **settings: Any) -> list[str]:
    spec = DatasetSettings(layout="stack", voxel_nm=(30.0, 5.0, 5.0), **settings)
    values = LabelValues(spec)
    for z in np.atleast_3d(label.T).T:
        values.add(z)
    return values.check("labels")


def of(*values: float, dtype: Any = np.int64) -> np.ndarray:
    """(4, 30, 30) with these values, as many of each."""
    return np.resize(np.asarray(values, dtype), (4, 30, 30))


def as_jpeg(label: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(label).save(file, "JPEG", quality=90)
    return np.asarray(Image.open(file))


@pytest.mark.parametrize(
    ("label", "settings", "words"),
    [
        (of(0, 100, 200).astype(np.int8), {"foreground": (100,)}, r"negative label values: -56"),
        (of(0, 1, -1), {"foreground": ">0"}, r"-1 \(33.3 %\).*`ignore`"),
        (of(32_768, 32_769), {"foreground": ">0"}, "signed values with 32768 added"),
        (of(128, 129, 130), {"foreground": ">0"}, "signed values with 128 added"),
        (of(1, 2), {"foreground": ">0"}, r"no background: 1 \(50 %\), 2 \(50 %\)"),
        (of(7), {"foreground": (7,)}, "no background"),
        (of(0, 1, 255), {"foreground": ">0"}, r"255 \(33.3 %\).*ignore: \[255\]"),
        (of(0, 1, 255), {}, "what 255 means"),
        (of(0, 1, 2, 65_535), {"foreground": ">0"}, "what 65535 means"),
        (of(0, 128, 255), {}, r"128 \(33.3 %\).*what 128 means"),
    ],
)
def test_values_that_the_rule_would_misread_are_refused(
    label: np.ndarray, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        looked_at(label, **settings)


@pytest.mark.parametrize(
    ("label", "settings", "lines"),
    [
        (of(0, 255), {}, []),
        (of(0, 1), {"foreground": ">0"}, []),
        (of(*range(300)), {"foreground": ">0"}, ["foreground is 99.7 % of the labelled voxels"]),
        (of(*range(300)), {"foreground": (100,)}, ["background by your settings: label values"]),
        (of(0, 1, 255), {"foreground": ">0", "ignore": (255,)}, []),
        (of(0, 1, -1), {"foreground": ">0", "ignore": (-1,)}, []),
        (of(0, 1), {"foreground": ">0", "ignore": (9,)}, [r"no voxel has the values \[9\]"]),
        (of(0, 1, 2, 3), {"foreground": (1,)}, [r"2 \(25 %\), 3 \(25 %\)"]),
        (of(0, 0.2, 0.7, 0.9, dtype=float), {"foreground": ">0.5"}, []),
        (zoom(DISCS * np.uint8(255), 3, order=1), {}, []),
        (as_jpeg(DISCS * np.uint8(255)), {}, []),
        (DISCS, {}, []),
        (of(*[0] * 5000, 1, *[255] * 500), {}, []),
    ],
)
def test_values_that_can_be_meant_are_not(
    label: np.ndarray, settings: dict[str, Any], lines: list[str]
) -> None:
    found = looked_at(label, **settings)
    assert len(found) == len(lines)
    for line, words in zip(found, lines, strict=True):
        assert re.search(words, line), line
