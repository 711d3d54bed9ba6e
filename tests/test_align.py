"""Alignment: each method against an independent oracle, keys, and the way through the pipeline."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skimage.exposure import match_histograms
from skimage.filters import gaussian

from emadapt.data.align import aligner_of, described, statistics
from emadapt.data.crops import CropDataset, Draw
from emadapt.data.ingest import Volume, open_volume
from emadapt.data.labelled import few_slices
from emadapt.data.tiles import geometry_of, label_to_input, to_input
from emadapt.errors import InputError
from emadapt.models.backbones import pretrained
from emadapt.models.predict import predict_slices
from emadapt.models.tokens import Entry, token_views
from emadapt.study.backbones import BackboneSettings
from emadapt.study.datasets import TrainSetSettings
from emadapt.study.loading import load_study
from tiny import blobs, build_model

pytestmark = pytest.mark.usefixtures("tracking_off")

ROOT = Path(__file__).parents[1]
FROZEN = load_study(ROOT / "studies/demo/study.yaml").regime_settings["frozen"]
SPLIT = {"train": [0, 1, 2, 3, 4], "val": [6], "test": [8, 9]}
HOW = {
    "histogram": lambda reference: {"align": "histogram", "reference": reference},
    "percentiles": lambda _: {"align": "percentiles"},
    "voxel": lambda reference: {"pixel_nm": {"b": 5.0, "c": 6.0}[reference]},
}
Images = np.ndarray[Any, np.dtype[np.uint8]]


def spec_of(method: str = "", reference: str = "b", **how: Any) -> BackboneSettings:
    own = {"tile": 56, "overlap": 0.25, "views": 1, "precision": "fp32", "blocks": (2, 4)}
    aligned = HOW[method](reference) if method else {}
    return BackboneSettings(arch="tiny_dinov2", source="random", **own | aligned | how)  # type: ignore[arg-type]


def put(name: str, image: Images, label: Images | None = None, pixel_nm: float = 5.0) -> Volume:
    """As `ingest` leaves a dataset, in a moment."""
    folder = Path("build/ingest", name)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "image.npy", image)
    np.save(folder / "label.npy", np.zeros_like(image) if label is None else label)
    manifest: dict[str, Any] = {"voxel_nm": [50.0, pixel_nm, pixel_nm], "split": SPLIT}
    content = image.tobytes() + json.dumps(manifest).encode()
    manifest["md5"] = hashlib.md5(content, usedforsecurity=False).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return open_volume(name)


def texture(seed: int, mean: float = 120.0, deviation: float = 20.0) -> Images:
    """(10, 90, 100) blurred noise with slow shading, well inside 0..255."""
    field = gaussian(np.random.default_rng(seed).standard_normal((10, 90, 100)), (0, 2, 2))
    field += 0.5 * field.std() * np.sin(np.linspace(0, 3 + seed, 100))
    values = mean + deviation * (field - field.mean()) / field.std()
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def test_histogram_is_what_skimage_gives_for_whole_training_volumes() -> None:
    a = put("a", texture(0, 90, 15))
    b = put("b", texture(1, 130, 30) // 3 * 3)  # with gaps between the grey values
    train = SPLIT["train"]
    align = aligner_of(a, spec_of("histogram"))
    expected = match_histograms(a.image[train], b.image[train])
    np.testing.assert_allclose(np.stack([align(a.image[z]) for z in train]), expected, atol=0.5)
    for value in np.unique(a.image[train]):  # test slices go through the same table
        wanted = expected[a.image[train] == value][0]
        assert (np.abs(align(a.image[8])[a.image[8] == value] - wanted) <= 0.5).all()


def test_pixel_sizes_and_grey_values_go_together_and_a_model_folder_is_a_reference() -> None:
    a, b = put("a", texture(0, 90, 15), pixel_nm=10.0), put("b", texture(1, 150, 30))
    spec = spec_of("histogram", pixel_nm=5.0)
    both = aligner_of(a, spec)
    assert both.zoom == (2.0, 2.0)
    np.testing.assert_array_equal(both.table, aligner_of(a, spec_of("histogram")).table)
    Path("m").mkdir()
    Path("m/model.json").write_text(json.dumps({"align": described([a, b], spec)}))
    assert aligner_of(a, spec_of("histogram", "m/", pixel_nm=5.0)).facts == both.facts
    Path("m/model.json").write_text("{}")
    with pytest.raises(InputError, match="no statistics of a reference"):
        aligner_of(a, spec_of("histogram", "m/"))


def test_percentiles_give_the_grey_values_that_ingest_gives_16_bits() -> None:
    image = texture(3, 100, 12)
    align = aligner_of(put("a", image), spec_of("percentiles"))
    train = image[SPLIT["train"]].astype(float)
    low, high = np.percentile(train, (0.5, 99.5), method="inverted_cdf")
    expected = np.clip((image - low) / (high - low), 0, 1) * 255
    np.testing.assert_allclose(align(image), expected, atol=0.51)


def test_voxel_halves_a_dataset_of_half_the_pixel_size_and_labels_and_predictions_follow() -> None:
    image, label = blobs((10, 180, 200), 0)
    fine = put("a", 255 * label, label, pixel_nm=2.5)
    put("b", image[:, :90, :100], pixel_nm=5.0)
    spec = spec_of("voxel")
    geo = geometry_of(fine, spec, 14)
    assert (geo.native, geo.resized) == ((180, 200), (90, 100))
    twice = spec_of("voxel", scale=2.0)
    assert geometry_of(fine, twice, 14).resized == (180, 200)  # scale acts on top
    seen, seen_label = to_input(fine.image[0], geo), label_to_input(fine.label[0], geo)
    assert seen_label[:90, :100].mean() == pytest.approx(label[0].mean(), rel=0.05)
    assert ((seen > 127) == seen_label).mean() > 0.99
    segmenter = build_model(spec, FROZEN, "pyramid", seed=0).eval()
    for view in (None, token_views(segmenter.backbone, spec, fine, range(1))[0]):
        for _, probability in predict_slices(segmenter, fine, [6, 9], view):
            assert probability.shape == (180, 200)
    drawn, drawn_label = CropDataset([fine], spec, 14, augmented=False)[Draw(0, 0, 3)]
    assert ((drawn[0] > 0.5) == drawn_label).float().mean() > 0.98


def test_statistics_come_from_training_slices_labelled_or_not() -> None:
    image = texture(7)
    few = few_slices(put("a", image), TrainSetSettings(datasets=("a",), slices=2), seed=0)
    assert len(few.split["train"]) == 2
    first = statistics(few)
    assert first.histogram == np.bincount(image[:5].ravel(), minlength=256).tolist()
    image[5:] = 255 - image[5:]  # validation and test
    assert statistics(put("a", image)).histogram == first.histogram
    canvas = np.pad(image, ((0, 0), (0, 30), (0, 20)))
    assert statistics(put("a", canvas)).histogram == first.histogram


def test_token_keys_follow_what_alignment_uses() -> None:
    put("a", texture(0), pixel_nm=4.0)
    put("b", texture(1, 150, 30))
    put("c", texture(2, 100, 35), pixel_nm=6.0)

    def keys(spec: BackboneSettings) -> list[str]:
        backbone = pretrained(spec)
        return [Entry(backbone, spec, open_volume(name), 0).key for name in ("a", "b")]

    plain, by_method = keys(spec_of()), {m: keys(spec_of(m)) for m in HOW}
    others = [keys(spec_of(method, "c")) for method in HOW]
    assert len({found[0] for found in (plain, *by_method.values(), *others)}) == 6
    for method in ("histogram", "voxel"):
        # the reference shares the tokens of the plain backbone
        assert by_method[method][1] == plain[1]
    changed = texture(1, 150, 30)
    changed[2, 5, 5] += 1  # a pixel of one of the reference's training slices
    put("b", changed)
    assert keys(spec_of("histogram"))[0] != by_method["histogram"][0]


@pytest.mark.parametrize("method", HOW)
def test_cache_and_loop_see_the_same_aligned_slices(method: str) -> None:
    a = put("a", *blobs((10, 90, 100), 0), pixel_nm=4.0)
    put("b", texture(1, 150, 30))
    spec = spec_of(method)
    segmenter = build_model(spec, FROZEN, "pyramid", seed=0).eval()
    [view] = token_views(segmenter.backbone, spec, a, range(1))
    shown = to_input(a.image[6], geometry_of(a, spec, 14))
    assert not np.array_equal(shown, to_input(a.image[6], geometry_of(a, spec_of(), 14)))
    online = dict(predict_slices(segmenter, a, [6, 8]))
    for z, cached in predict_slices(segmenter, a, [6, 8], view):
        np.testing.assert_allclose(cached, online[z], atol=3e-3)
