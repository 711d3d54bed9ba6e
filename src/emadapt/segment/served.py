"""The model behind `mlflow models serve` and `mlflow.pyfunc.load_model`.

MLflow finds this module by its name and gives it the model's folder, so nothing is pickled.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from emadapt.models.segmenter import Probability
from emadapt.segment.model import Model, open_model
from emadapt.segment.runner import array_runner


class Served:
    """Foreground probabilities of a stack of slices, as of `emadapt.api.segment`."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, stack: Any, params: dict[str, Any]) -> Probability:
        """(Z, Y, X) uint8 grey values and params["voxel_nm"] -> (Z, Y, X) float32 in [0, 1]."""
        runner = array_runner(np.asarray(stack, np.uint8), self.model, params["voxel_nm"])
        return np.stack([probability for _, probability in runner.slices()])


def _load_pyfunc(folder: str) -> Served:
    """What MLflow calls."""
    return Served(open_model(folder))
