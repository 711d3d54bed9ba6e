"""A GPU whose memory is too small, played by models that refuse batches above a size."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from emadapt.cli import main
from emadapt.errors import EmadaptError
from emadapt.models.backbones import Backbone
from emadapt.models.device import Fitting
from emadapt.models.segmenter import Segmenter
from emadapt.study.study import Unit
from emadapt.training.objective import Objective
from emadapt.training.train import train_unit
from tiny import make_study, settings, write_3d_model, write_model


def small_memory(patch: pytest.MonkeyPatch, model: type, method: str, most: int) -> list[int]:
    """Refuse batches of more than `most`; gives the list of sizes that were tried."""
    original, tried = getattr(model, method), []

    def refusing(self: Any, batch: Any, *given: Any) -> Any:
        tried.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, batch, *given)

    patch.setattr(model, method, refusing)
    return tried


@pytest.mark.parametrize("write", [write_model, write_3d_model])
def test_segment_goes_on_with_smaller_batches(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    volume = np.random.default_rng(0).integers(0, 256, (5, 90, 100), dtype=np.uint8)
    tifffile.imwrite("in.tif", volume, photometric="minisblack")
    command = ["--model", str(write(tmp_path / "model")), "--voxel-nm", "30", "5", "5"]
    main(["segment", "in.tif", "all.tif", *command], standalone_mode=False)
    tried = small_memory(monkeypatch, Segmenter, "forward", 3)
    main(["segment", "in.tif", "few.tif", *command], standalone_mode=False)
    assert "tiles at once: 2 from now on" in capsys.readouterr().err
    assert max(tried[2:]) <= 3, "what did not fit is not tried again"
    masks = [tifffile.imread(name) for name in ("all.tif", "few.tif")]
    assert (masks[0] != masks[1]).mean() < 0.001


def test_tokens_are_the_same_in_smaller_batches(tmp_path, tracking_off, monkeypatch):
    study, unit = make_study(tmp_path), Unit("t", "frozen", "a", 0)
    train_unit(study, unit)
    tokens = Path("scratch/tokens")
    tokens.rename("all")
    Path("scratch/units").rename("gone")
    small_memory(monkeypatch, Backbone, "forward", 3)
    train_unit(study, unit)
    for file in tokens.glob("*/tokens.npy"):
        few, all_ = (np.load(f) for f in (file, Path("all", file.parent.name, file.name)))
        np.testing.assert_allclose(few, all_, atol=0.02, rtol=0.01)


def test_a_single_tile_that_does_not_fit_and_a_training_step_end_with_advice(
    tmp_path, tracking_off, monkeypatch
):
    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(EmadaptError, match="single tile: CUDA out of memory"):
        Fitting()(full, torch.zeros(5))
    monkeypatch.setattr(Objective, "backward", full)
    with pytest.raises(EmadaptError, match=r"unit t-frozen-a-0: .*lower `batch`, which is 2"):
        train_unit(make_study(tmp_path, settings()), Unit("t", "frozen", "a", 0))


def test_a_process_does_not_count_the_memory_of_who_started_it() -> None:
    held = np.ones(2**27)
    code = "from emadapt.models.device import peak_resident_mb; print(peak_resident_mb())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50 < float(run.stdout) < held.nbytes / 2**20
