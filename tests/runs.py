"""What a test finds in MLflow."""

from pathlib import Path
from typing import Any

from emadapt.tracking import store


def runs_of(root: Path, study: str = "tiny") -> list[Any]:
    """MLflow's runs of a study, the latest first."""
    client = store.client(root)
    experiment = client.get_experiment_by_name(study)
    return list(client.search_runs([experiment.experiment_id], max_results=1000))
