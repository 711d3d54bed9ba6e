"""Every study in studies/: its settings hold, and the whole of it runs in small."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from emadapt.cli import main
from emadapt.study.study import load_study
from shipped import STUDIES, emadapt, in_small, run_small, write_reference_layouts
from tiny import blobs, write_stack

NAMES = sorted(path.stem for path in STUDIES.glob("*.yaml"))
SHORT = {"epochs": 1, "steps_per_epoch": 2}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
    return tmp_path


@pytest.mark.slow
def test_the_papers_protocol(here: Path) -> None:
    params = in_small("paper", {"preset": "paper", "epochs": 1}, longest_edge=84)
    for spec, arch in zip(
        params["backbones"].values(),
        ("tiny_dinov2_reg", "tiny_dinov3", "tiny_openclip"),
        strict=True,
    ):
        spec["arch"] = arch
    write_reference_layouts(here / "data", slices=4)
    run_small(params)
    card = json.loads((here / "build/units/openclip_l14-lora-paired-0/model.json").read_text())
    assert card["head"] == "deconv"
    assert card["settings"]["backbone"]["normalisation"] == "imagenet"


@pytest.mark.slow
def test_pairing_and_joint_training_crossed(here: Path) -> None:
    params = in_small("collapse_paper", {"preset": "paper", "epochs": 1}, longest_edge=84)
    params["study"] |= {
        "backbones": params["study"]["backbones"][:1],
        "regimes": params["study"]["regimes"][:1],
        "seeds": [0, 1],
    }
    write_reference_layouts(here / "data", slices=12)
    empty = here / "data/lucchi/Test_Out/10.png"  # in lists sorted by name the label of slice 2
    Image.fromarray(np.zeros((72, 96), np.uint8)).save(empty)
    summary = run_small(params)
    assert {(fit["test_set"], fit["seeds"]) for fit in summary["fits"]} == {
        ("lucchi", 2),
        ("vnc", 2),
    }
    assert 0 < summary["ceiling"]["lucchi_lex"] < 1
    factors = {c["term"] for c in summary["contrasts"]}
    assert factors == {"several datasets", "mispaired, lexicographic", "drawn by size"}
    page = Path("reports/index.html").read_text()
    assert "What each factor does" in page
    assert page.count("linear model over") == 2 + 1  # a table a test dataset, and how to read them


@pytest.mark.slow
def test_pairing_crossed_with_regimes(here: Path) -> None:
    write_reference_layouts(here / "data", slices=12)
    params = in_small("collapse", SHORT, tile=56)
    params["study"] |= {
        "regimes": ["frozen", "frozen_bn"]
    }  # adapters and a U-Net are in `trade` and `headline`
    params["study"]["seeds"] = [0, 1]  # with one there would be as many terms as units
    summary = run_small(params)
    terms = {fit["test_set"]: [term["term"] for term in fit["terms"]] for fit in summary["fits"]}
    crossed = (
        "mispaired, lexicographic_165",
        "mispaired, lexicographic_165, under frozen_bn",
    )
    assert all(term in terms[dataset] for term in crossed for dataset in ("lucchi", "vnc"))
    assert all(
        "several datasets, under frozen_bn" in terms[dataset] for dataset in ("lucchi", "vnc")
    )
    both = "several datasets and mispaired, lexicographic_165"  # of VNC no labels are mispaired, so there one term says both
    assert (both in terms["lucchi"], both in terms["vnc"]) == (True, False)
    apart = {(c["term"], c["regime"], c["train_set"], c["against"]) for c in summary["contrasts"]}
    for regime in ("frozen", "frozen_bn"):
        wrong = {row[2:] for row in apart if row[:2] == (crossed[0], regime)}
        assert wrong == {("lucchi_far", "lucchi"), ("paired_far", "paired")}
        assert {row[2:] for row in apart if row[:2] == ("drawn by size", regime)} == {
            ("paired_by_size", "paired")
        }
    heads = {
        r: json.loads((here / f"build/units/dinov2_s-{r}-paired-0/model.json").read_text())["head"]
        for r in ("frozen", "frozen_bn")
    }
    assert heads == {"frozen": "pyramid", "frozen_bn": "pyramid_bn"}


@pytest.mark.slow
def test_the_headline(here: Path) -> None:
    write_reference_layouts(here / "data", slices=16)
    summary = run_small(in_small("headline", SHORT | {"average": 0.99}, tile=56))
    assert {row["regime"] for row in summary["units"]} == {"frozen", "lora", "unet2d"}
    card = json.loads((here / "build/units/dinov2_s-lora-lucchi-0/model.json").read_text())
    assert card["settings"]["regime"]["init_from"] == "frozen"


@pytest.mark.slow
def test_slices_aligned_in_every_way(here: Path) -> None:
    write_reference_layouts(here / "data", slices=12, sections=12)
    params = in_small("align", SHORT, tile=56)
    summary = run_small(params)
    cells = {
        (row["backbone"], row["regime"], row["train_set"], row["test_set"]): row["iou"]["mean"]
        for row in summary["units"]
    }
    assert len(cells) == len(params["backbones"]) * 2 * 2
    for name in (
        "histogram",
        "fda",
        "voxel",
    ):  # the reference stays as it is, and so does its own model, tested on it
        assert (
            cells[name, "frozen", "lucchi", "lucchi"]
            == cells["dinov2_s", "frozen", "lucchi", "lucchi"]
        )
    assert (
        cells["histogram", "frozen", "lucchi", "vnc"]
        != cells["dinov2_s", "frozen", "lucchi", "vnc"]
    )
    rows = {(row["align"], row["train_set"], row["test_set"]) for row in summary["aligned"]}
    assert ("histogram", "lucchi", "vnc") in rows
    assert ("histogram", "lucchi", "lucchi") not in rows


@pytest.mark.slow
def test_one_labelled_slice_beside_another_dataset(here: Path) -> None:
    write_reference_layouts(here / "data", slices=12, sections=12)
    summary = run_small(in_small("new_data", SHORT, tile=56))
    rows = {
        (row["backbone"], row["train_set"], row["against"], row["test_set"])
        for row in summary["unions"]
    }
    assert rows == {
        (backbone, *names)
        for backbone in ("dinov2_s", "histogram")
        for names in (
            ("lucchi_and_vnc_1", "lucchi", "lucchi"),
            ("lucchi_and_vnc_1", "vnc_1", "vnc"),
            ("vnc_and_lucchi_1", "vnc", "vnc"),
            ("vnc_and_lucchi_1", "lucchi_1", "lucchi"),
        )
    }
    labelled = {row["train_set"]: row["labelled"]["slices"][0] for row in summary["units"]}
    assert labelled["lucchi_and_vnc_1"] == labelled["lucchi"] + 1


@pytest.mark.slow
def test_ways_to_bring_two_datasets_together(here: Path) -> None:
    write_reference_layouts(here / "data", slices=12, sections=12)
    params = in_small("joint", SHORT, tile=56)
    summary = run_small(params)
    rows = {(row["regime"], row["test_set"]) for row in summary["units"]}
    assert rows == {
        (regime, dataset) for regime in params["regimes"] for dataset in ("lucchi", "vnc")
    }


@pytest.mark.slow
def test_images_without_labels_of_the_dataset_to_come(here: Path) -> None:
    write_reference_layouts(here / "data", slices=12, sections=12)
    summary = run_small(in_small("unseen", SHORT, tile=56))
    compared = {
        (c["regime"], c["train_set"], c["test_set"]): c["difference"]
        for c in summary["comparisons"]
    }
    assert compared.keys() == {
        (regime, name, dataset)
        for regime in ("coral", "adversarial")
        for name in ("to_vnc", "to_lucchi")
        for dataset in ("lucchi", "vnc")
    }
    assert all(compared[regime, "to_vnc", "vnc"] for regime in ("coral", "adversarial")), (
        "the penalty changes the model"
    )


@pytest.mark.slow
def test_few_labels_of_one_dataset(here: Path) -> None:
    write_reference_layouts(here / "data", slices=32, sections=12)
    summary = run_small(in_small("few_shot_lucchi", SHORT, tile=56))
    curves = {
        (c["regime"], c["test_set"]): [p["n"] for p in c["points"]] for c in summary["few_shot"]
    }
    assert {regime for regime, _ in curves} == {"frozen", "ridge", "lora"}
    assert all(n[:3] == [1, 4, 16] and n[3] > 16 for n in curves.values())


@pytest.mark.slow
def test_pretraining_in_3d(here: Path) -> None:
    params = in_small(
        "transfer3d",
        {"epochs": 1, "steps_per_epoch": 1, "batch": 1},
        arch="tiny_dinov2",
        scale=1.0,
        tile=64,
    )
    for regime in params["regimes"].values():
        regime |= {"channels": [2] * 5, "patch": [5, 32, 32]}
    for name, spec in params["train_sets"].items():
        spec["crops"] = 2 if name.endswith("_10") else 5
    write_reference_layouts(here / "data", slices=14, sections=14)
    write_stack(here / "data/phantom_fib", *blobs((36, 72, 96), 5))
    summary = run_small(params)
    compared = {(c["source"], c["target"]) for c in summary["transfer"] if "difference" in c}
    assert compared == {
        (f"{source}_100", f"{target}_{n}")
        for source in ("lucchi", "phantom")
        for n in (10, 100)
        for target in ("lucchi", "vnc", "phantom")
        if source != target or n == 100
    }
    assert {c["labelled"]["crops"][0] for c in summary["transfer"]} == {2, 5}
    assert "random values (scratch)" in Path("reports/leaderboard.md").read_text()
    assert (
        "scratch has no backbone, so there are no tokens to compare."
        in Path("reports/index.html").read_text()
    )


def write_organelles(folder: Path) -> None:
    """A volume whose discs are mitochondria (1) in some places, and ER, lipid droplets and neurites (2 to 4) in others."""
    image, label = blobs((36, 72, 96), 5)
    rows = np.arange(72)[None, :, None]
    write_stack(folder, image, label * (1 + rows // 4 % 4).astype(np.uint8))


@pytest.mark.slow
def test_pretraining_on_another_organelle(here: Path) -> None:
    params = in_small(
        "organelles",
        {"epochs": 1, "steps_per_epoch": 1, "batch": 1},
        arch="tiny_dinov2",
        scale=1.0,
        tile=64,
    )
    for regime in params["regimes"].values():
        regime |= {"channels": [2] * 5, "patch": [5, 32, 32]}
    for name in ("lucchi_10", "vnc_10"):
        params["train_sets"][name]["crops"] = 2
    write_reference_layouts(here / "data", slices=14, sections=14)
    write_organelles(here / "data/organelles_5nm")
    summary = run_small(params)
    compared = {(c["source"], c["target"]) for c in summary["transfer"] if "difference" in c}
    assert compared == {
        (source, target) for source in ("mito", "lipid") for target in params["train_sets"]
    }
    manifests = {
        task: json.loads((here / f"build/ingest/{task}/manifest.json").read_text())
        for task in ("mito", "lipid")
    }
    assert [manifests[task]["organelle"] for task in ("mito", "lipid")] == [
        "mitochondria",
        "lipid_droplets",
    ]


@pytest.mark.slow
def test_in_domain_against_unseen(here: Path) -> None:
    write_reference_layouts(here / "data", slices=12, sections=12)
    params = in_small(
        "trade",
        {"epochs": 1, "steps_per_epoch": 1, "warmup_steps": 1, "batch": 2},
        tile=56,
        views=1,
    )
    summary = run_small(params)
    sides = [("lucchi", "vnc", "frozen"), ("vnc", "lucchi", "frozen")]
    assert [(t["a"], t["b"], t["frozen"]) for t in summary["pareto"]] == sides
    regimes, train_sets = params["study"]["regimes"], params["study"]["train_sets"]
    assert all({p["regime"] for p in t["points"]} == set(regimes) for t in summary["pareto"])
    seconds = {(e["regime"], e["train_set"]): e["seconds"] for e in summary["units"]}
    assert all(seconds["wise50", t] == seconds["lora", t] for t in train_sets)


@pytest.mark.parametrize("name", NAMES)
def test_check_finds_nothing_wrong_but_what_is_not_here(here: Path, name: str) -> None:
    """Settings pass; data is given in small; a hub that cannot be reached is said, once per backbone, and nothing else."""
    write_reference_layouts(here / "data", slices=32, sections=20)
    study = STUDIES / f"{name}.yaml"
    for seed, dataset in enumerate(
        d for d in load_study(study).datasets if d.startswith(("phantom", "dialled"))
    ):
        for part in ("train", "test"):
            write_stack(here / "data" / dataset / part, *blobs((16, 72, 96), seed))
    write_organelles(here / "data/organelles_5nm")
    result = CliRunner().invoke(main, ["check", "--study", str(study)])
    lines = [line for line in result.output.splitlines() if line.startswith("error")]
    if name.endswith("paper"):
        assert result.exit_code == 2, result.output
        assert len(lines) == len(load_study(study).backbones)
        assert all("hub" in line.lower() or "reach" in line for line in lines)
    else:
        assert result.exit_code == 0, result.output
        assert not lines


def test_use_selects_a_study_and_refuses_others(here: Path) -> None:
    shutil.copytree(STUDIES, here / "studies")
    assert "study 'cpu' now: 6 units" in emadapt("use", "cpu")
    assert (here / "params.yaml").read_text() == (here / "studies/cpu.yaml").read_text()
    result = CliRunner().invoke(main, ["use", "nothing"])
    assert result.exit_code == 2
    assert f"there are: {', '.join(NAMES)}" in result.output
    (here / "studies/bad.yaml").write_text("study: {}")
    assert CliRunner().invoke(main, ["use", "bad"]).exit_code == 2
    assert load_study().name == "cpu"
