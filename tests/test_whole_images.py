"""Whole images with a class each, from files to scores."""

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml
from numpy.testing import assert_allclose
from PIL import Image

from emadapt import api
from emadapt.data.images import find_images, read_image, split_images
from emadapt.data.ingest import ingest, open_volume
from emadapt.data.labelled import few_slices
from emadapt.errors import InputError
from emadapt.metrics import classification
from emadapt.models.backbones import Pooled, pretrained
from emadapt.models.classifier import Votes
from emadapt.models.tokens import plain_view
from emadapt.report.report import build_report
from emadapt.study.backbones import BackboneSettings
from emadapt.study.datasets import SplitSettings, TrainSetSettings
from emadapt.study.loading import load_study
from emadapt.study.study import Study
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.plan import write_plans
from emadapt.training.regimes import regime_of
from emadapt.training.train import train_unit
from tiny import settings

CLASSES = ("bright", "dark", "striped")


def draw(kind: int, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A noisy image of a class."""
    level = np.full(size, (190.0, 60.0, 125.0)[kind])
    if kind == 2:
        level[::6] += 90
    return np.clip(rng.normal(level, 20), 0, 255).astype(np.uint8)


def write_folders(root: Path, per_class: int = 12) -> None:
    """CLASS/*.png, of two sizes."""
    rng = np.random.default_rng(0)
    for kind, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for n in range(per_class):
            size = (40, 40) if n % 2 else (50, 36)
            Image.fromarray(draw(kind, rng, size)).save(root / name / f"{n}.png")


def params(**regimes: Any) -> dict[str, Any]:
    own = settings(batch=4)
    own["study"] |= {"datasets": ["x"], "train_sets": ["x"], "regimes": list(regimes)}
    own["datasets"] = {"x": {"task": "classification", "layout": "images", "side": 48}}
    own["train_sets"] = {"x": ["x"], "few": {"datasets": ["x"], "slices": 2}}
    own["backbones"] = {"t": {"arch": "tiny_dinov2_reg", "source": "random", "tile": 48}}
    return own | {"regimes": regimes}


def make(root: Path, own: dict[str, Any]) -> Study:
    (root / "params.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    return load_study(root / "params.yaml")


ALL = {
    "frozen": {"kind": "frozen"},
    "knn": {"kind": "knn"},
    "lora": {"kind": "lora", "rank": 2, "alpha": 4, "warm_start": "frozen"},
}


def test_from_files_to_a_report(tmp_path: Path, tracking_off: None) -> None:
    write_folders(tmp_path / "data/x")
    study = make(tmp_path, params(**ALL))
    ingest(study, "x")
    write_plans(study)
    scores = {}
    for unit in study.units():
        train_unit(study, unit)
        metrics = json.loads(evaluate_unit(study, unit).read_text())
        scores[unit.name] = metrics["test"]["x"]["auroc"]
    assert scores["t-frozen-x-0"] > 0.9
    assert scores["t-lora-x-0"] > 0.8
    summary = json.loads(build_report(tmp_path, study).read_text())
    found = {(e["regime"], e["train_set"]): e["auroc"]["mean"] for e in summary["units"]}
    assert found["frozen", "x"] == pytest.approx(scores["t-frozen-x-0"], abs=1e-6)
    files = sorted((tmp_path / "data/x").glob("*/*.png"))
    shown = api.classify([read_image(file) for file in files], "build/units/t-frozen-x-0")
    guessed = np.array(list(shown))[np.argmax(list(shown.values()), 0)]
    assert np.mean(guessed == [file.parent.name for file in files]) > 0.8
    assert found.keys() == {(regime, "x") for regime in ALL}


@pytest.mark.parametrize("dtype", ["<u2", ">u2", ">f4"])
def test_a_grey_tiff_is_read_as_it_is_and_a_stack_is_refused(tmp_path: Path, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 65535, (2, 20, 30)).astype(dtype)
    one, stack = tmp_path / "one.tif", tmp_path / "stack.tif"
    for file, data in ((one, values[0]), (stack, values)):
        tifffile.imwrite(file, data, byteorder="<" if dtype[0] == "<" else ">")
    np.testing.assert_array_equal(read_image(one), values[0].astype(dtype[1:]), strict=True)
    with pytest.raises(InputError, match="2 images"):
        read_image(stack)


@pytest.mark.parametrize("official", [False, True])
def test_groups_stay_together_and_an_official_split_is_kept(tmp_path: Path, official: bool) -> None:
    rng = np.random.default_rng(1)
    rows = [("file", "label", "group", "split")]
    for n in range(90):
        kind, part = n % 3, ("train", "test")[n >= 60] if official else ""
        Image.fromarray(draw(kind, rng, (12, 12))).save(tmp_path / f"{n}.png")
        rows.append((f"{n}.png", CLASSES[kind], f"patient {kind}-{n // 6}", part))
    with (tmp_path / "images.csv").open("w", newline="", encoding="utf-8-sig") as opened:
        csv.writer(opened).writerows(rows)  # as Excel writes them
    images = find_images(tmp_path)
    split = split_images(images, SplitSettings(), tmp_path)
    assert sorted(itertools.chain(*split.values())) == list(range(90))
    groups = {part: {images[n].group for n in numbers} for part, numbers in split.items()}
    assert sum(map(len, groups.values())) == len(set().union(*groups.values()))
    assert all({images[n].label for n in numbers} == set(CLASSES) for numbers in split.values())
    if official:
        assert split["test"] == list(range(60, 90))


def test_hidden_files_and_folders_are_no_images(tmp_path: Path) -> None:
    write_folders(tmp_path, per_class=2)
    before = find_images(tmp_path)
    for name in (".ipynb_checkpoints/0-checkpoint.png", "dark/._0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_images(tmp_path) == before


def test_an_image_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    write_folders(tmp_path / "elsewhere", per_class=1)
    (tmp_path / "x").mkdir()
    rows = [f"{file},a" for file in (tmp_path / "elsewhere").glob("*/*.png")]
    (tmp_path / "x/images.csv").write_text("\n".join(["file,label", *rows]))
    with pytest.raises(InputError, match="outside of the dataset's folder"):
        find_images(tmp_path / "x")


@pytest.mark.parametrize("label", ["a", "b"])
def test_an_image_listed_twice_is_refused(tmp_path: Path, label: str) -> None:
    for n in range(2):
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / f"{n}.png")
    rows = ["file,label", "0.png,a", "1.png,b", f"0.png,{label}"]
    (tmp_path / "images.csv").write_text("\n".join(rows))
    with pytest.raises(InputError, match="which line 2 has as well"):
        find_images(tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    pixels = np.ones((9, 9), np.float32)
    pixels[4, 4] = np.nan
    Image.fromarray(pixels).save(tmp_path / "0.tif")
    with pytest.raises(InputError, match="1 NaN or infinite values"):
        read_image(tmp_path / "0.tif")


def test_a_group_in_two_parts_is_refused(tmp_path: Path) -> None:
    for n in range(4):
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / f"{n}.png")
    rows = ["0.png,a,p,train", "1.png,b,q,train", "2.png,a,p,test", "3.png,b,r,test"]
    (tmp_path / "images.csv").write_text("\n".join(["file,label,group,split", *rows]))
    with pytest.raises(InputError, match="group p in parts 'train' and 'test'"):
        split_images(find_images(tmp_path), SplitSettings(), tmp_path)


def test_few_shot_draws_so_many_of_each_class_and_more_keep_the_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folders(tmp_path / "data/x")
    volume = open_volume("x", ingest(make(tmp_path, params(**ALL)), "x").parent)
    drawn = [
        few_slices(volume, TrainSetSettings(datasets=("x",), slices=n), seed=3).split["train"]
        for n in (1, 2, 4)
    ]
    for n, images in zip((1, 2, 4), drawn, strict=True):
        assert np.bincount(volume.label[images].ravel()).tolist() == [n] * 3
    assert set(drawn[0]) < set(drawn[1]) < set(drawn[2]) < set(volume.split["train"])


@pytest.mark.parametrize("n_classes", [2, 4])
def test_auroc_counts_pairs(n_classes: int) -> None:
    rng = np.random.default_rng(n_classes)
    truth = rng.permutation(np.arange(60) % n_classes)
    probability = rng.random((60, n_classes)).round(1) + np.eye(n_classes)[truth]
    probability /= probability.sum(1, keepdims=True)
    areas = []
    for kind in range(n_classes):
        own, rest = probability[truth == kind, kind], probability[truth != kind, kind]
        areas.append(((own[:, None] > rest) + (own[:, None] == rest) / 2).mean())
    assert classification.auroc(truth, probability)[0] == pytest.approx(np.mean(areas))


@pytest.mark.parametrize("score", classification.SCORES)
def test_intervals_are_as_wide_as_a_bootstrap_over_groups(score: str) -> None:
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(100), 3)  # three near copies each
    truth = np.repeat(rng.integers(0, 2, 100), 3)
    own = np.clip(np.repeat(rng.normal(0.35 + 0.3 * truth[::3], 0.2), 3), 0, 1)
    probability = np.stack([1 - own, own], 1)
    found = classification.summarise(truth, probability, groups.tolist())
    values = []
    for _ in range(400):
        chosen = (3 * rng.integers(0, 100, 100)[:, None] + np.arange(3)).ravel()
        values.append(classification.SCORES[score](truth[chosen], probability[chosen])[0])
    low, high = found[f"{score}_ci95"]
    assert (high - low) / (2 * 1.98 * np.std(values)) == pytest.approx(1, abs=0.15)


def test_knn_votes_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    bank, classes = rng.normal(size=(50, 8)), rng.integers(0, 3, 50)
    head = Votes(8, 3)
    head.fill(torch.from_numpy(bank), torch.from_numpy(classes))
    queries = rng.normal(size=(5, 8)).astype(np.float32)
    found = head([torch.from_numpy(queries)[..., None, None]], (1, 1)).softmax(1).flatten(1)
    for query, shares in zip(queries, found, strict=True):
        cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        votes = np.zeros(3)
        for k in np.argsort(-cosine)[:20]:
            votes[classes[k]] += np.exp(cosine[k] / 0.07)
        assert_allclose(shares, votes / votes.sum(), atol=2e-2)  # the bank is float16


@pytest.mark.parametrize("arch", ["tiny_dinov2", "tiny_dinov2_reg", "tiny_dinov3", "tiny_openclip"])
def test_vectors_are_the_class_token_and_the_mean_of_patches(arch: str) -> None:
    spec = BackboneSettings(arch=arch, source="random", tile=48, blocks=(2, 4))
    torch.manual_seed(0)
    pooled, backbone = pretrained(spec, Pooled), pretrained(spec)
    side = 3 * backbone.arch.patch
    images = torch.rand(2, 1, side, side)
    vectors = pooled(images)
    assert [tuple(v.shape) for v in vectors] == [(2, 64, 1, 1)] * 4
    assert_allclose(vectors[3].squeeze(), backbone(images)[1].mean((2, 3)), atol=1e-5)
    whole = backbone.vit.forward_features((images - backbone.mean) / backbone.std)
    assert_allclose(vectors[2].squeeze(), whole[:, 0], atol=1e-5)


def test_cached_vectors_classify_as_the_images_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folders(tmp_path / "data/x", per_class=6)
    study = make(tmp_path, params(frozen={"kind": "frozen"}))
    volume = open_volume("x", ingest(study, "x").parent)
    regime = regime_of(study, study.units()[0])
    model: Any = regime.build(0, volume.classes).eval()
    view = plain_view(model.backbone, model.spec, volume)
    numbers = volume.split["test"] + volume.split["train"]
    online, cached = (model.classify(volume, numbers, v) for v in (None, view))
    assert_allclose(online, cached, atol=5e-3)
    assert_allclose(online.sum(1), 1, atol=1e-5)
