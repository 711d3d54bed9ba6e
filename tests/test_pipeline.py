"""End to end: the verbs one after the other, the reference's protocol in small, and DVC around it all."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from emadapt.cli import main
from emadapt.config import Study, load_study
from emadapt.model_card import EVALUATED
from tiny import blobs, make_study, settings, under_dvc, write_stack

ROOT = Path(__file__).parents[1]


def emadapt(*words: str) -> str:
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return str(result.output)


def run_all(study: Study) -> dict:
    """What `dvc repro` runs, in its order."""
    for dataset in study.datasets:
        emadapt("ingest", dataset)
    for backbone in study.backbones:
        emadapt("reference", backbone)
        for dataset in study.datasets:
            emadapt("tokens", backbone, dataset)
        for train_set in study.train_sets:
            emadapt("trainset", backbone, train_set)
    for regime in study.regimes:
        emadapt("start", regime)
    for unit in study.units():
        emadapt("train", unit.name)
        emadapt("evaluate", unit.name)
    for backbone in study.backbones:
        for regime in study.regimes:
            emadapt("diagnose", backbone, regime)
    emadapt("report")
    return dict(json.loads(Path("reports/summary.json").read_text()))


def check_summary(summary: dict, study: Study) -> None:
    seeds = len(study.seeds)
    found = {(u["backbone"], u["regime"], u["train_set"], u["test_set"]) for u in summary["units"]}
    assert found == {(u.backbone, u.regime, u.train_set, d) for u in study.units() for d in study.datasets}
    for unit in summary["units"]:
        assert unit["n"] > 0
        assert unit["trainable_params"] > 0
        assert unit["seconds"] > 0
        assert unit["peak_mb"] > 0
        for metric in ("iou", "dice", "boundary_iou"):
            assert len(unit[metric]["values"]) == seeds
            assert all(0 <= v <= 1 for v in unit[metric]["values"])
            assert unit[metric]["mean"] == pytest.approx(np.mean(unit[metric]["values"]), abs=1e-5)
            assert unit[metric]["ci95"][0] <= unit[metric]["mean"] + 1e-6


def test_the_verbs_one_after_the_other_with_the_lab_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = make_study(tmp_path, ingested=False)
    emadapt("check")
    check_summary(run_all(study), study)
    from mlflow import MlflowClient

    from emadapt.tracking import tracking_uri

    client = MlflowClient(tracking_uri(tmp_path))
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(r.data.tags["unit"] for r in runs) == sorted(u.name for u in study.units())
    for run in runs:
        assert {"train/loss", "val/iou", "test/iou.a", "test/iou.b", "domain/frechet.a__b"} <= run.data.metrics.keys()
        for name, scores in json.loads((EVALUATED / run.data.tags["unit"] / "metrics.json").read_text())["test"].items():
            beside = {"ap50": scores["instances"]["ap50"], "pq": scores["instances"]["pq"], "iou_tuned": scores["tuned"]["iou"]}
            assert {key: run.data.metrics[f"test/{key}.{name}"] for key in beside} == beside
        tags = {
            "backbone",
            "regime",
            "train_set",
            "seed",
            "study",
            "params.sha256",
            "model.md5",
            "weights.source",
            "weights.sha256",
        }
        assert tags <= run.data.tags.keys()
        assert run.info.status == "FINISHED"
        artifacts = [
            a.path for f in client.list_artifacts(run.info.run_id) for a in client.list_artifacts(run.info.run_id, f.path)
        ]
        assert {"model/model.safetensors", "model/model.json", "overlays/overlay-a.png", "domain/pca.png"} <= set(artifacts)
        curve = client.get_metric_history(run.info.run_id, "val/iou")
        assert [m.step for m in curve] == [3, 6]


def test_baselines_in_the_same_grid_leaderboard_and_lab_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ridge and kNN on cached tokens and a U-Net without a backbone, beside a frozen one."""
    monkeypatch.chdir(tmp_path)
    kinds = ("frozen", "ridge", "knn", "unet2d")
    monkeypatch.setattr("emadapt.models.unet2d.FEATURES", (8, 8, 16, 32, 64, 8))
    params = settings(epochs=1, steps_per_epoch=1)
    params["diagnose"] |= {"controls": False, "permutations": 3, "replicates": 2}
    params["regimes"] = {kind: {"kind": kind} for kind in kinds}
    params["study"] |= {"regimes": list(kinds), "train_sets": ["a", "b"]}
    params["train_sets"]["b"] = ["b"]
    study = make_study(tmp_path, params, ingested=False)
    emadapt("check")
    summary = run_all(study)
    found = {(u["regime"], u["train_set"], u["test_set"]): u for u in summary["units"]}
    assert set(found) == {(kind, a, b) for kind in kinds for a in "ab" for b in "ab"}
    assert {kind: found[kind, "a", "a"]["trainable_params"] > 0 for kind in kinds} == {**dict.fromkeys(kinds, True), "knn": False}
    board, page = Path("reports/leaderboard.md").read_text(), Path("reports/index.html").read_text()
    ranks = board.partition("## In domain against unseen")[0].partition("## Objects")[0]
    assert all(ranks.count(f"| {kind} |") == 4 for kind in kinds)
    assert "ridge works on the tokens of the pretrained backbone: what is said of t, frozen holds for it." in page
    assert "unet2d has no backbone, so there are no tokens to compare." in page
    assert "weights of t</dt><dd>none: no pretrained weights" in page
    domain = {kind: json.loads(Path(f"reports/domain/t-{kind}.json").read_text()) for kind in kinds}
    assert [bool(domain[kind]["pairs"]) for kind in kinds] == [True, False, False, False]
    assert [domain[kind].get("same_as") for kind in kinds] == [None, "frozen", "frozen", None]
    assert all(Path(f"reports/domain/t-{kind}").is_dir() for kind in kinds)
    points = json.loads(Path("reports/domain-vs-iou.json").read_text())["points"]
    distances = {point["regime"]: point["distances"] for point in points if point["a"] == "a"}
    assert distances["ridge"] == distances["knn"] == distances["frozen"]
    assert set(distances["unet2d"].values()) == {None}
    from mlflow import MlflowClient

    from emadapt.tracking import tracking_uri

    client = MlflowClient(tracking_uri(tmp_path))
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = {r.data.tags["unit"]: r for r in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {u.name for u in study.units()}
    own = {"ridge": "ridge/strength", "knn": "knn/k", "unet2d": "train/loss", "frozen": "train/loss"}
    for run in runs.values():
        kind = run.data.tags["regime"]
        assert {own[kind], "val/iou", "val/best_iou", "test/iou.a", "test/iou.b"} <= run.data.metrics.keys()
        assert run.data.params["train.head"] == {"ridge": "linear", "frozen": "pyramid"}.get(kind, kind)
        assert run.data.tags["weights.source"] == ("none" if kind == "unet2d" else "random")


@pytest.mark.slow
def test_the_papers_protocol_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """studies/paper.yaml with tiny random backbones of its three families, one epoch and one seed; all else as it stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
    params = yaml.safe_load((ROOT / "studies/paper.yaml").read_text())
    params["study"]["seeds"] = [0]
    params["train"] = {"preset": "paper", "epochs": 1}
    params["diagnose"] = {"blocks": 4, "tokens": 200, "permutations": 3, "replicates": 2, "slices": 4}
    for spec, arch in zip(params["backbones"].values(), ("tiny_dinov2_reg", "tiny_dinov3", "tiny_openclip"), strict=True):
        spec |= {"arch": arch, "source": "random", "longest_edge": 84}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    write_reference_layouts(tmp_path / "data", slices=4)
    study = load_study()
    emadapt("check")
    check_summary(run_all(study), study)
    card = json.loads((tmp_path / "build/units/openclip_l14-lora-paired-0/model.json").read_text())
    assert card["head"] == "deconv"
    assert card["settings"]["backbone"]["normalisation"] == "imagenet"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["collapse", "collapse_paper"])
def test_the_crossing_of_pairing_and_joint_training_in_small(tmp_path: Path, monkeypatch, name: str) -> None:
    """The shipped studies with a tiny random backbone, two regimes, one epoch and one seed; all else as it stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
    params = yaml.safe_load((ROOT / f"studies/{name}.yaml").read_text())
    paper = name == "collapse_paper"
    two = params["study"]["regimes"][:2]  # others are crossed with other training sets elsewhere
    params["study"] |= {"seeds": [0], "backbones": params["study"]["backbones"][:1], "regimes": two}
    params["train"] = {"preset": "paper", "epochs": 1} if paper else {"epochs": 1, "steps_per_epoch": 2}
    params["diagnose"] = {"blocks": 4, "tokens": 200, "permutations": 3, "replicates": 2, "slices": 4, "controls": False}
    for regime in params["regimes"].values():
        regime.pop("epochs", None)
    for spec in params["backbones"].values():
        spec |= {"arch": "tiny_dinov2_reg", "source": "random"} | ({"longest_edge": 84} if paper else {"tile": 56})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    write_reference_layouts(tmp_path / "data", slices=12)
    from PIL import Image

    empty = tmp_path / "data/lucchi/Test_Out/10.png"  # in lists sorted by name the label of slice 2
    Image.fromarray(np.zeros((72, 96), np.uint8)).save(empty)
    study = load_study()
    emadapt("check")
    summary = run_all(study)
    check_summary(summary, study)
    assert {(fit["test_set"], fit["seeds"]) for fit in summary["fits"]} == {("lucchi", 1), ("vnc", 1)}
    assert 0 < summary["ceiling"]["lucchi_lex"] < 1
    factors = {c["term"] for c in summary["contrasts"]}
    assert factors - {"mispaired, lexicographic_165"} == {"several datasets", "mispaired, lexicographic", "drawn by size"}
    page = Path("reports/index.html").read_text()
    assert "What each factor does" in page
    assert page.count("linear model over") == 2 + 1  # a table a test dataset, and how to read them


@pytest.mark.slow
def test_the_headline_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """studies/headline.yaml with a tiny random backbone, one epoch and one seed; all else as it stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
    params = yaml.safe_load((ROOT / "studies/headline.yaml").read_text())
    params["study"]["seeds"] = [0]
    params["train"] |= {"epochs": 1, "steps_per_epoch": 2}
    params["diagnose"] = {"blocks": 4, "tokens": 200, "permutations": 3, "replicates": 2, "slices": 4, "controls": False}
    for regime in params["regimes"].values():
        regime.pop("epochs", None)
    params["backbones"]["dinov2_s"] |= {"arch": "tiny_dinov2_reg", "source": "random", "tile": 56}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    write_reference_layouts(tmp_path / "data", slices=16)
    study = load_study()
    emadapt("check")
    summary = run_all(study)
    check_summary(summary, study)
    assert {row["regime"] for row in summary["units"]} == {"frozen", "lora", "unet2d"}
    card = json.loads((tmp_path / "build/units/dinov2_s-lora-lucchi-0/model.json").read_text())
    assert card["settings"]["regime"]["init_from"] == "frozen"


def write_reference_layouts(data: Path, slices: int, sections: int = 10) -> None:
    """Lucchi and VNC in their public layouts, small: Lucchi 72 x 96, VNC 80 x 80, as their real shapes relate."""
    from PIL import Image

    from tiny import blobs

    for seed, part in enumerate(("Train", "Test")):
        image, label = blobs((slices, 72, 96), seed)
        for folder, name, stack in ((f"{part}_In", "mask{:04d}.png", image), (f"{part}_Out", "{}.png", label * 255)):
            (data / "lucchi" / folder).mkdir(parents=True)
            for z, plane in enumerate(stack):
                Image.fromarray(plane).save(data / "lucchi" / folder / name.format(z))
    image, label = blobs((sections, 80, 80), 2)
    for folder, name, stack in (("raw", "{:02d}.tif", image), ("mitochondria", "{:02d}.png", label * 255)):
        (data / "vnc" / folder).mkdir(parents=True)
        for z, plane in enumerate(stack):
            Image.fromarray(plane).save(data / "vnc" / folder / name.format(z))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "studies").glob("*.yaml")))
def test_check_finds_nothing_wrong_in_shipped_studies_but_what_is_not_here(tmp_path: Path, monkeypatch, name: str) -> None:
    """Settings pass; data is given in small; a hub that cannot be reached is said, once per backbone, and nothing else."""
    monkeypatch.chdir(tmp_path)
    write_reference_layouts(tmp_path / "data", slices=16, sections=14)
    study = ROOT / "studies" / f"{name}.yaml"
    for seed, dataset in enumerate(d for d in load_study(study).datasets if d.startswith(("phantom", "dialled"))):
        from tiny import blobs

        for part in ("train", "test"):
            write_stack(tmp_path / "data" / dataset / part, *blobs((16, 72, 96), seed))
    result = CliRunner().invoke(main, ["check", "--study", str(study)])
    lines = [line for line in result.output.splitlines() if line.startswith("error")]
    if name.endswith("paper"):
        assert result.exit_code == 2, result.output
        assert len(lines) == len(load_study(study).backbones)
        assert all("hub" in line.lower() or "reach" in line for line in lines)
    else:
        assert result.exit_code == 0, result.output
        assert not lines


def test_use_selects_a_study_and_refuses_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "studies", tmp_path / "studies")
    assert "study 'cpu' now: 6 units" in emadapt("use", "cpu")
    assert (tmp_path / "params.yaml").read_text() == (tmp_path / "studies/cpu.yaml").read_text()
    result = CliRunner().invoke(main, ["use", "nothing"])
    assert result.exit_code == 2
    assert (
        "there are: adapt, collapse, collapse_frozen, collapse_paper, cpu, demo, dose, few_shot, "
        "few_shot_lucchi, headline, paper, trade, transfer, "
        "transfer3d" in result.output
    )
    (tmp_path / "studies/bad.yaml").write_text("study: {}")
    assert CliRunner().invoke(main, ["use", "bad"]).exit_code == 2
    assert load_study().name == "cpu"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "t-frozen-a-7"], "is not in study 'tiny'"),
        (["ingest", "c"], "'c' is not in study.datasets"),
        (["tokens", "t", "c"], "'c' is not in study.datasets"),
        (["evaluate", "t-frozen-a-0"], "dvc repro train@"),
    ],
)
def test_wrong_words_end_with_2_and_one_line(tmp_path: Path, monkeypatch, words: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    make_study(tmp_path, ingested=False)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.parametrize(
    ("verb", "said", "heavy"),
    [
        ("--help", "evaluate", ("torch", "mlflow", "timm", "dvc", "numpy", "albumentations")),
        ("check", "in order", ("torch", "mlflow", "timm", "dvc", "scipy", "albumentations")),
    ],
)
def test_quick_answers_need_no_heavy_import(tmp_path: Path, verb: str, said: str, heavy: tuple[str, ...]) -> None:
    make_study(tmp_path, ingested=False)
    code = f"import sys; sys.argv = ['emadapt', {verb!r}]\nfrom emadapt.cli import main\ntry:\n main()\nexcept SystemExit: pass\n"
    code += f"print('HEAVY', [m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "HEAVY []" in out
    assert said in out


@pytest.mark.slow
def test_dvc_runs_the_pipeline_in_parallel_then_has_nothing_to_do(tmp_path: Path) -> None:
    """The real dvc.yaml around the tiny study: two stages at a time, a second run that does nothing, one setting changed."""
    make_study(tmp_path, ingested=False)
    sh = under_dvc(tmp_path)
    out = sh("emadapt", "repro", "--jobs", "2")
    assert (tmp_path / "reports/summary.json").is_file()
    assert "failed" not in out
    assert "up to date" in sh("dvc", "repro")
    with (tmp_path / "data/a/image.tif").open("ab") as file:
        file.write(b" ")
    assert "not what data.dvc records" in sh("emadapt", "repro", code=2)
    sh("dvc", "checkout", "--force", "data.dvc")
    text = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("rank: 2", "rank: 3"))
    ran = [line for line in sh("dvc", "repro").splitlines() if line.startswith("Running stage")]
    assert {line.split("'")[1].split("@")[0] for line in ran} == {"start", "train", "evaluate", "diagnose", "report"}
    # `start` looks at all settings and writes the same bytes again, so that nothing follows from it. The frozen diagnosis looks
    # at build/units as a whole; what it computed once it only reads again.
    assert all(any(word in line for word in ("lora", "start", "diagnose", "report")) for line in ran)


@pytest.mark.slow
def test_dvc_ingests_a_twin_of_another_datasets_folder_and_sees_it_change(tmp_path: Path) -> None:
    params = settings()
    params["study"]["datasets"] += ["twin"]
    params["datasets"]["twin"] = {**params["datasets"]["a"], "path": "data/a"}
    make_study(tmp_path, params, ingested=False)
    sh = under_dvc(tmp_path)
    sh("dvc", "repro", "ingest@twin", "ingest@a")
    assert "up to date" in sh("dvc", "repro", "ingest@twin", "ingest@a")
    write_stack(tmp_path / "data/other", *blobs((10, 90, 100), 5))
    for name in ("image.tif", "label.tif"):
        (tmp_path / "data/other" / name).replace(tmp_path / "data/a" / name)
    sh("dvc", "add", "-q", "data")
    before = (tmp_path / "build/ingest/twin/manifest.json").read_text()
    sh("dvc", "repro", "ingest@twin")
    assert (tmp_path / "build/ingest/twin/manifest.json").read_text() != before


def test_check_names_sections_that_dvc_needs_and_volumes_too_thin_to_diagnose(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    params = settings()
    params["diagnose"]["blocks"] = 9
    del params["split"]
    make_study(tmp_path, params, ingested=False)
    result = CliRunner().invoke(main, ["check"])
    assert result.exit_code == 2
    assert "params.yaml: section 'split' is missing, which dvc.yaml needs; write `split: default`" in result.output
    assert "data/a: found 8 slices in train, val and test; expected at least 9" in result.output


def test_check_catches_regimes_and_strides_that_do_not_fit_the_backbone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    params = settings()
    params["regimes"] |= {"deep": {"kind": "lora_last_k", "k": 3}, "wide": {"kind": "dora", "rank": 65}}
    params["study"]["regimes"] += ["deep", "wide"]
    params["backbones"] |= {"short": {**params["backbones"]["t"], "blocks": [1, 2]},
                            "odd": {**params["backbones"]["t"], "stride": 4}}  # fmt: skip
    params["study"]["backbones"] += ["short", "odd"]
    make_study(tmp_path, params, ingested=False)
    result = CliRunner().invoke(main, ["check"])
    assert result.exit_code == 2
    lines = [line for line in result.output.splitlines() if line.startswith("error")]
    assert "params.yaml: regimes.deep.k: found 3; expected at most 2, the blocks of short that run" in result.output
    assert result.output.count("regimes.wide.rank: found 65; expected at most 64, the width of") == 2
    assert "backbones.odd: stride of tiny_dinov2: found 4; expected a divisor of the patch, 14, or 0" in result.output
    assert len(lines) == 4
