import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import yaml

from emadapt import api
from emadapt.data.ingest import Volume
from emadapt.errors import InputError
from emadapt.models.token_statistics import token_facts
from emadapt.segment.job import Order
from emadapt.segment.run import segment_volume
from emadapt.study.backbones import BackboneSettings
from emadapt.study.regimes import regime_settings
from emadapt.training.model_files import load_model, save_model
from emadapt.training.regimes import IMAGE_REGIMES
from tiny import blobs, settings, write_model

IMAGE, LABEL = blobs((3, 90, 100), 1)
VOXEL = (30.0, 5.0, 5.0)
NAMES = [
    name
    for name, function in inspect.getmembers(api, inspect.isfunction)
    if function.__module__ == api.__name__ and name[0] != "_"
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model, a volume and a study."""
    monkeypatch.chdir(tmp_path)
    write_model(Path("model"))
    segmenter, _ = load_model(Path("model"))
    noisy = np.concatenate([IMAGE, IMAGE[:, ::-1]])
    own = Volume(
        "a",
        noisy,
        noisy,
        {"split": {"train": [0, 1, 2], "val": [3, 4, 5], "test": []}, "md5": "", "voxel_nm": VOXEL},
    )
    write_model(Path("model"), facts={"tokens": token_facts(segmenter, [own], [])})
    spec = BackboneSettings(arch="tiny_dinov2", source="random", tile=56)
    regime = IMAGE_REGIMES["frozen"](regime_settings(kind="frozen"), spec, "probe")
    classifier = regime.build(0, ("nothing", "synapse"))
    save_model(classifier, regime, Path("classifier"), {"shape": {"tiles": [9, 48, 48]}})
    meta = {
        "axes": "ZYX",
        **{f"PhysicalSize{a}": v / 1e3 for a, v in zip("ZYX", VOXEL, strict=True)},
    }
    tifffile.imwrite("volume.ome.tif", IMAGE, photometric="minisblack", metadata=meta)
    Path("studies/demo").mkdir(parents=True)
    study = settings()
    study["study"] |= {"name": "demo", "train_sets": ["a", "b", "paired"]}
    study["train_sets"]["b"] = ["b"]
    Path("studies/demo/study.yaml").write_text(yaml.safe_dump(study))
    return tmp_path


def test_the_examples_run(here):
    """In the order in which they stand, each with what those before it have made."""
    known: dict[str, object] = {}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for name in sorted(NAMES, key=lambda name: inspect.getsourcelines(getattr(api, name))[1]):
        text = inspect.getdoc(getattr(api, name)) or ""
        example = doctest.DocTestParser().get_doctest(text, {}, name, "api.py", 0)
        assert example.examples, f"{name} has no example"
        example.globs = known
        runner.run(example, clear_globs=False)
    assert runner.summarize().failed == 0


def test_importing_the_package_is_cheap():
    heavy = "torch", "numpy", "zarr", "dask"
    code = f"import sys, emadapt; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_arrays_give_what_files_give(here):
    model = api.load_model("model")
    volume, voxel = api.read_volume("volume.ome.tif")
    assert voxel == VOXEL
    segment_volume(Order("volume.ome.tif", "mask.tif", "model", probabilities=True, instances=True))
    mask = api.segment(volume, model, VOXEL)
    np.testing.assert_array_equal(tifffile.imread("mask.tif"), np.where(mask, 255, 0))
    probability = api.segment(volume, model, VOXEL, probabilities=True)
    np.testing.assert_array_equal(
        tifffile.imread("mask-probabilities.tif"), np.rint(255 * probability)
    )
    labels, table = api.find_instances(mask, VOXEL)
    np.testing.assert_array_equal(tifffile.imread("mask-instances.tif"), labels)
    written = pd.read_csv("mask-instances.csv")
    np.testing.assert_allclose(written, table, rtol=1e-10)
    np.testing.assert_array_equal(
        api.segment(volume, model, VOXEL, threshold=0.6), probability > 0.6
    )
    with pytest.raises(InputError, match="voxel size"):
        api.segment(volume, model, None)
