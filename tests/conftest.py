"""Settings and fixtures for all tests.

Environment variables are set before anything imports what reads them.
"""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

# No test may write to somebody's real runs or sweeps, or run on their GPUs.
for name in ("MLFLOW_TRACKING_URI", "EMADAPT_SWEEP_STORAGE", "EMADAPT_DEVICES", "EMADAPT_TRACKING"):
    os.environ.pop(name, None)
os.environ.update(
    DVC_NO_ANALYTICS="1",
    HF_ENDPOINT="http://127.0.0.1:9",  # nothing listens there: a download fails at once
    HF_HUB_DISABLE_TELEMETRY="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
    MPLBACKEND="Agg",
    NO_ALBUMENTATIONS_UPDATE="1",
    OMP_NUM_THREADS="1",  # more threads make tiny models slower on a busy machine
)

settings.register_profile("emadapt", deadline=None)  # a busy machine is no failure
settings.load_profile("emadapt")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with `lucchi/` and `vnc/` in their public layouts, for the marker `real_data`."""
    folder = (ROOT / os.environ.get("EMADAPT_REAL_DATA", "../shared/data")).resolve()
    missing = [name for name in ("lucchi", "vnc") if not (folder / name).is_dir()]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} in {folder}: set EMADAPT_REAL_DATA")
    return folder


@pytest.fixture
def plain_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn as grey squares, in whole pipelines of which drawing is a half."""

    def save(figure: object, path: Path, **_: object) -> None:
        Image.new("RGB", (9, 9), "grey").save(path, "PNG")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)


@pytest.fixture(scope="session")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tests in faults/: folders `before-VERB` and `after-VERB` of a tiny study."""
    from studies import make_states  # beside them, and slow to import

    return make_states(tmp_path_factory.mktemp("states"))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """One database for all tests, copied into each root: creating one takes seconds."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    from emadapt.tracking import store as mlflow_store  # slow to import

    root = tmp_path_factory.mktemp("empty")
    mlflow_store.client(root)
    return root / "mlflow.db"


@pytest.fixture
def root(tmp_path, empty_store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it for the process
    monkeypatch.delenv("EMADAPT_TRACKING", raising=False)  # after `tracking_off` of a whole file
    root = tmp_path / "project"
    root.mkdir()
    shutil.copy(empty_store, root / "mlflow.db")
    return root


@pytest.fixture
def tracking_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the test's own to work in, and no tracking."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
