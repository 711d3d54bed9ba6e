"""The model behind `mlflow models serve` and `mlflow.pyfunc.load_model`.

MLflow keeps a copy of this file beside the adapter and runs it to load the model ("models from code"), so nothing is pickled.
"""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel


class Served(PythonModel):
    """Foreground probabilities of a stack of slices, those of `emadapt.api.segment`."""

    def load_context(self, context: Any) -> None:
        from emadapt import api

        self.model = api.load_model(context.artifacts["model"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow would take types for a schema
        """(Z, Y, X) uint8 grey values -> (Z, Y, X) float32 in [0, 1].

        Args:
            context: MLflow's.
            model_input: the stack.
            params: `voxel_nm`, (z, y, x) of the stack.
        """
        from emadapt import api

        z, y, x = (params or {})["voxel_nm"]
        return api.segment(
            np.asarray(model_input, np.uint8),
            self.model,
            (float(z), float(y), float(x)),
            probabilities=True,
        )


mlflow.models.set_model(Served())
