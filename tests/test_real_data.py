"""The real Lucchi and VNC volumes through the real study's settings."""

from pathlib import Path

import pytest

from emadapt.config import load_study
from emadapt.data.ingest import ingest, open_volume

pytestmark = pytest.mark.real_data
STUDY = Path(__file__).parents[1] / "studies/cpu.yaml"


def test_the_real_volumes_pass_ingest_with_the_split_that_the_study_states(tmp_path: Path, real_data: Path) -> None:
    study = load_study(STUDY)
    for name, shape, test in (("lucchi", [96, 768, 1024], list(range(64, 96))), ("vnc", [20, 1024, 1024], [16, 17, 18, 19])):
        ingest(study, name, real_data, tmp_path)
        volume = open_volume(name, tmp_path)
        assert volume.manifest["shape"] == shape
        assert volume.split["test"] == test
        assert all(0.03 < share < 0.1 for share in volume.manifest["foreground_fraction"].values())
