"""The model behind `mlflow models serve` and `mlflow.pyfunc.load_model`.

MLflow keeps a copy of this file with the adapter and runs it to load the model ("models from
code"), so nothing is pickled.
"""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel


class Served(PythonModel):
    """Foreground probabilities of a stack of slices, as of `emadapt.api.segment`."""

    def load_context(self, context: Any) -> None:
        """Load the model from MLflow's artifacts."""
        from emadapt.segment.model import open_model

        self.model = open_model(context.artifacts["model"])

    # With types MLflow would derive a schema from them.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """(Z, Y, X) uint8 grey values and params["voxel_nm"] -> (Z, Y, X) float32 in [0, 1]."""
        from emadapt.segment.runner import array_runner

        stack = np.asarray(model_input, np.uint8)
        runner = array_runner(stack, self.model, params["voxel_nm"])
        return np.stack([probability for _, probability in runner.slices()])


mlflow.models.set_model(Served())
