"""Every study in studies/: its settings hold, and a few run in small to the report."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from emadapt.cli import main
from emadapt.study.loading import load_study
from shipped import STUDIES, emadapt, in_small, run_small, write_reference_layouts
from test_many_volumes import write
from test_whole_images import write_folders
from tiny import blobs, write_stack

NAMES = sorted(path.parent.name for path in STUDIES.glob("*/study.yaml"))
SHORT = {"epochs": 1, "steps_per_epoch": 2}


@pytest.fixture
def here(tmp_path, tracking_off, plain_pictures):
    return tmp_path


def write_organelles(folder: Path) -> None:
    """Slices with four classes in the layout `folders`."""
    image, disc = blobs((16, 72, 96), 0)
    label = disc * np.arange(1, 5, dtype=np.uint8).repeat(24)
    for kind, array in (("images", image), ("labels", label)):
        (folder / kind).mkdir(parents=True)
        for z, values in enumerate(array):
            Image.fromarray(values).save(folder / kind / f"{z:04}.png")


@pytest.mark.parametrize("name", NAMES)
def test_check_finds_nothing_wrong_but_what_is_not_here(here, name):
    """Settings pass. The hub cannot be reached from here: that is one line per backbone."""
    write_reference_layouts(here / "data", slices=72, sections=20)
    (here / "src").symlink_to(STUDIES.parent / "src")  # for the model that ships
    path = STUDIES / name / "study.yaml"
    study = load_study(path)
    write_folders(here / "data/pneumonia", per_class=100)
    for part in ("train", "test"):
        for seed, dataset in enumerate(("phantom_fib", "phantom_tem")):
            write_stack(here / "data" / dataset / part, *blobs((16, 72, 96), seed))
        write_organelles(here / "data/lucchi_organelles" / part)
        for number in range(24):
            volume = np.arange(2 * 9 * 12, dtype=np.uint8).reshape(2, 9, 12)
            for kind, array in (("images", volume), ("labels", volume % 3)):
                write(here / "data/hippocampus" / part / kind, f"v{number}", array)
    result = CliRunner().invoke(main, ["check", "--study", str(path)])
    errors = [line for line in result.output.splitlines() if line.startswith("error")]
    hub = [b for b in study.backbones if study.backbone_settings[b].source == "hub"]
    assert len(errors) == len(hub), result.output
    assert all("hub" in line.lower() or "reach" in line for line in errors)
    assert result.exit_code == (2 if hub else 0)


@pytest.mark.parametrize("name", sorted(p.parent.name for p in STUDIES.glob("*/analyse.py")))
def test_tables_of_a_study_are_those_of_its_kept_report(tmp_path, capsys, name):
    shutil.copytree(STUDIES, tmp_path / "studies")
    figure = tmp_path / "studies" / name / "results/answer.png"
    figure.unlink()
    runpy.run_path(str(tmp_path / "studies" / name / "analyse.py"))
    pages = [path.read_text().splitlines() for path in STUDIES.glob("*/README.md")]
    assert set(capsys.readouterr().out.splitlines()) <= set().union(*pages)
    assert figure.is_file()


def test_use_selects_a_study_and_refuses_others(here):
    shutil.copytree(STUDIES, here / "studies")
    assert "study 'adapt'" in emadapt("use", "adapt")
    assert (here / "params.yaml").read_text() == (here / "studies/adapt/study.yaml").read_text()
    result = CliRunner().invoke(main, ["use", "nothing"])
    assert result.exit_code == 2
    assert ", ".join(NAMES) in result.output
    (here / "studies/bad").mkdir()
    (here / "studies/bad/study.yaml").write_text("study: {}")
    assert CliRunner().invoke(main, ["use", "bad"]).exit_code == 2
    assert load_study().name == "adapt"


@pytest.mark.slow
def test_the_papers_protocol(here):
    params = in_small("paper", {"preset": "paper", "epochs": 1}, longest_edge=84)
    params["study"]["train_sets"] = ["vnc", "paired"]
    archs = ("tiny_dinov2_reg", "tiny_dinov3", "tiny_openclip")
    for spec, arch in zip(params["backbones"].values(), archs, strict=True):
        spec["arch"] = arch
    write_reference_layouts(here / "data", slices=4)
    run_small(params)
    card = json.loads((here / "build/units/openclip_l14-lora-paired-0/model.json").read_text())
    assert card["head"] == "deconv"
    assert card["settings"]["backbone"]["normalisation"] == "imagenet"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["collapse", "headline", "unseen"])
def test_a_study_in_two_dimensions_runs_in_small(here, name):
    """Wrong pairing and a warm start; context and averaged weights; self-training."""
    write_reference_layouts(here / "data", slices=16, sections=12)
    params = in_small(name, params_train(name), tile=56)
    summary = run_small(params)
    assert {row["regime"] for row in summary["units"]} == set(params["study"]["regimes"])


@pytest.mark.slow
def test_pretraining_in_3d_runs_in_small(here):
    train = {"epochs": 1, "steps_per_epoch": 1, "batch": 1}
    params = in_small("transfer3d", train, arch="tiny_dinov2", scale=1.0, tile=64)
    for regime in params["regimes"].values():
        regime |= {"channels": [2] * 5, "patch": [5, 32, 32]}
    for target in ("lucchi", "vnc"):
        for share, crops in (("10", 2), ("100", 5)):
            params["train_sets"][f"{target}_{share}"]["crops"] = crops
    write_reference_layouts(here / "data", slices=14, sections=14)
    write_stack(here / "data/phantom_fib", *blobs((36, 72, 96), 5))
    summary = run_small(params)
    labelled = {row["train_set"]: row["labelled"]["crops"][0] for row in summary["units"]}
    assert labelled["lucchi_10"] == 2
    assert labelled["lucchi_100"] == 5


def params_train(name: str) -> dict[str, float]:
    """The section `train`, short; `headline` is about averaged weights."""
    return SHORT | ({"ema": 0.99} if name == "headline" else {})


@pytest.mark.slow
def test_the_starter_is_made_of_synthetic_domains_alone(here, monkeypatch):
    monkeypatch.setattr("emadapt.data.synthetic.SIDE", 64)
    (here / "data").mkdir()
    params = in_small("starter", SHORT | {"batch": 2}, tile=56)
    params["datasets"]["synthetic"]["domains"] = 12
    summary = run_small(params)
    assert [unit["test_set"] for unit in summary["units"]] == ["synthetic"]
