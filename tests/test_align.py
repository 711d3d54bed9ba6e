"""Image-level alignment: each method against an independent oracle, keys, and the way through the pipeline."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml
from skimage.exposure import equalize_adapthist, match_histograms
from skimage.filters import gaussian

from emadapt.data import align
from emadapt.data.align import DEVIATION, MEAN, METHODS, aligner_of, statistics
from emadapt.data.crops import CropDataset, Draw, TokenDataset
from emadapt.data.ingest import Volume, ingest, open_volume
from emadapt.data.labelled import few_slices
from emadapt.data.tiles import geometry_of, label_to_input, to_input
from emadapt.domains.features import computed_features, pixel_features
from emadapt.domains.run import lower_contrast
from emadapt.errors import ConfigError, InputError
from emadapt.models.predict import predict_slices
from emadapt.models.segmenter import build_frozen, build_segmenter
from emadapt.models.tokens import run, token_key, token_views
from emadapt.study.rules import ALIGNMENTS
from emadapt.study.study import (
    BackboneSettings,
    DiagnoseSettings,
    TrainSetSettings,
    Unit,
    digest,
    load_study,
)
from emadapt.training.fit import Inputs
from emadapt.training.train import unit_key
from emadapt.training.trainset import record_reference, record_train_set
from tiny import alignment, blobs, make_study, settings

ROOT = Path(__file__).parents[1]
SPEC = BackboneSettings(
    "tiny_dinov2", "random", blocks=(2, 4), tile=56, overlap=0.25, views=1, precision="fp32"
)
SPLIT = {"train": [0, 1, 2, 3, 4], "val": [6], "test": [8, 9]}
REFERENCED = [name for name, needs in ALIGNMENTS.items() if needs]
Images = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")


def with_method(method: str, reference: str = "b") -> BackboneSettings:
    return dataclasses.replace(
        SPEC, align=method, reference=reference if ALIGNMENTS[method] else ""
    )


def put(name: str, image: Images, label: Images | None = None, pixel_nm: float = 5.0) -> Volume:
    """As `ingest` leaves a dataset, in a moment."""
    folder = Path("build/ingest", name)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "image.npy", image)
    np.save(folder / "label.npy", np.zeros_like(image) if label is None else label)
    manifest = {"voxel_nm": [50.0, pixel_nm, pixel_nm], "split": SPLIT}
    manifest["md5"] = hashlib.md5(
        image.tobytes() + json.dumps(manifest).encode(), usedforsecurity=False
    ).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return open_volume(name)


def texture(
    seed: int, mean: float = 120.0, deviation: float = 20.0, size: tuple[int, int] = (90, 100)
) -> Images:
    """(10, *size) blurred noise with slow shading, well inside 0..255."""
    rng = np.random.default_rng(seed)
    field = gaussian(rng.standard_normal((10, *size)), (0, 2, 2))
    field += 0.5 * field.std() * np.sin(np.linspace(0, 3 + seed, size[1]))
    return np.clip(np.rint(mean + deviation * (field - field.mean()) / field.std()), 0, 255).astype(
        np.uint8
    )


def aligned(volume: Volume, spec: BackboneSettings) -> Images:
    """All slices of a volume after alignment."""
    aligner = aligner_of(volume, spec)
    return np.stack([aligner(image) for image in volume.image])


# ---------------------------------------------------------------- the methods


def test_histogram_is_what_skimage_gives_for_whole_training_volumes() -> None:
    a, b = (
        put("a", texture(0, 90, 15)),
        put("b", texture(1, 150, 30) // 3 * 3),
    )  # with gaps between the grey values
    train = SPLIT["train"]
    table = aligner_of(a, with_method("histogram"))
    expected = match_histograms(a.image[train], b.image[train])
    np.testing.assert_allclose(np.stack([table(a.image[z]) for z in train]), expected, atol=0.5)
    pairs = {v: expected[a.image[train] == v][0] for v in np.unique(a.image[train])}
    for value, wanted in pairs.items():  # test slices go through the same table
        assert set(np.abs(table(a.image[8])[a.image[8] == value] - wanted) <= 0.5) <= {True}


def test_standardise_gives_the_mean_and_deviation_of_the_setting() -> None:
    rng = np.random.default_rng(0)
    for name, low, high in (("a", 60, 110), ("b", 90, 200)):
        volume = put(name, rng.integers(low, high, (10, 90, 100), dtype=np.uint8))
        out = aligned(volume, with_method("standardise"))[SPLIT["train"]]
        assert out.min() > 0 < 255 - out.max()  # nothing clips
        assert out.mean() == pytest.approx(MEAN, abs=0.3)
        assert out.std() == pytest.approx(DEVIATION, abs=0.3)
    bright = np.where(
        np.random.default_rng(0).random((10, 90, 100)) < 0.02, 255, texture(2, 60, 5)
    ).astype(np.uint8)
    assert (
        aligned(put("c", bright), with_method("standardise")).max() == 255
    )  # clipped, not wrapped


def test_fda_takes_low_amplitudes_from_the_reference_and_keeps_phases_and_the_rest() -> None:
    a, b = put("a", texture(3, 110, 15, (210, 230))), put("b", texture(4, 150, 12, (240, 220)))
    band = 2  # a hundredth of 220, whole cycles
    amplitude = np.mean(
        [
            np.abs(np.fft.fftshift(np.fft.fft2(b.image[z] / b.image[z].size)))
            for z in SPLIT["train"]
        ],
        0,
    )
    wanted = amplitude[120 - band : 120 + band + 1, 110 - band : 110 + band + 1]
    exchange = aligner_of(a, with_method("fda"))
    for z in (0, 9):
        out = exchange(a.image[z])
        before, after = (
            np.fft.fftshift(np.fft.fft2(image / image.size)) for image in (a.image[z], out)
        )
        low = np.zeros(before.shape, bool)
        low[105 - band : 105 + band + 1, 115 - band : 115 + band + 1] = True
        mixed = before.copy()
        mixed[low] = wanted.ravel() * np.exp(1j * np.angle(before[low]))
        oracle = np.rint(np.fft.ifft2(np.fft.ifftshift(mixed)).real * out.size)
        assert np.abs(out - oracle).max() <= 1
        assert (out != oracle).mean() < 0.001  # ties of rounding
        # So it is with coefficients, as far as rounding to whole grey values allows.
        assert (
            np.sort(np.abs(np.abs(before[low]) - wanted.ravel()))[-5] > 0.3
        )  # something to exchange, not the mean alone
        np.testing.assert_allclose(after[low], mixed[low], atol=0.03)
        np.testing.assert_allclose(after[~low], before[~low], atol=0.03)


def test_clahe_is_skimages_but_for_its_stretches_then_blurred() -> None:
    noise = np.random.default_rng(0).normal(0, 10, (10, 240, 320))
    image = np.clip(texture(5, 128, 40, (240, 320)) + noise, 0, 255).astype(np.uint8)
    image[:, 0, :2] = (
        0,
        255,
    )  # the whole range, so that scikit-image has nothing to stretch at first
    out = aligner_of(put("a", image), with_method("clahe"))(image[0]).astype(float)
    unblurred = equalize_adapthist(image[0])
    alike = [
        np.corrcoef(out.ravel(), oracle.ravel())[0, 1]
        for oracle in (gaussian(unblurred, align.BLUR), unblurred)
    ]
    assert alike[0] > 0.99 > alike[1]
    dull = texture(5, 100, 6, (240, 320))
    out = aligner_of(put("a", dull), with_method("clahe"))(dull[0]).astype(float)
    assert out.std() > 2 * gaussian(dull[0], align.BLUR, preserve_range=True).std()


def test_voxel_halves_a_dataset_of_half_the_pixel_size_and_labels_and_predictions_follow() -> None:
    image, label = blobs((10, 180, 200), 0)
    fine = put("a", 255 * label, label, pixel_nm=2.5)
    put("b", image[:, :90, :100], pixel_nm=5.0)
    spec = with_method("voxel")
    geo = geometry_of(fine, spec, 14)
    assert (geo.native, geo.resized) == ((180, 200), (90, 100))
    assert geometry_of(fine, dataclasses.replace(spec, scale=2.0), 14).resized == (
        180,
        200,
    )  # scale acts on top
    seen, seen_label = to_input(fine.image[0], geo), label_to_input(fine.label[0], geo)
    assert seen_label[:90, :100].mean() == pytest.approx(label[0].mean(), rel=0.05)
    assert ((seen > 127) == seen_label).mean() > 0.99
    segmenter = build_segmenter(spec, TINY_FROZEN, "pyramid", seed=0).eval()
    for view in (None, token_views(segmenter.backbone, spec, fine, range(1))[0]):
        for _, probability in predict_slices(segmenter, fine, [6, 9], view):
            assert probability.shape == (180, 200)
    with_crops = CropDataset([fine], spec, 14, augmented=False)[Draw(0, 0, 3)]
    assert ((with_crops[0][0] > 0.5) == with_crops[1]).float().mean() > 0.98


@pytest.mark.parametrize("method", ["standardise", "histogram"])
def test_a_copy_at_another_contrast_becomes_the_original(method: str) -> None:
    original = texture(6, 120, 25)
    a, b = put("a", np.rint(0.6 * original + 20).astype(np.uint8)), put("b", original)
    one, other = (aligned(v, with_method(method)).astype(float) for v in (a, b))
    assert np.abs(a.image - b.image.astype(float)).mean() > 20
    assert np.abs(one - other).mean() < 1.0
    assert (
        np.abs(one - other)[SPLIT["train"]].max() <= 2
    )  # test slices may have values that no training slice has


@pytest.mark.parametrize("method", REFERENCED)
def test_the_reference_stays_as_it_is(method: str) -> None:
    put("a", texture(0))
    reference = put("b", texture(1, 150, 40))
    assert aligner_of(reference, with_method(method)).facts == {}
    np.testing.assert_array_equal(aligned(reference, with_method(method)), reference.image)
    twin = put("c", texture(1, 150, 40))  # the same images under other labels
    twin = dataclasses.replace(twin, manifest=twin.manifest | {"md5": "of other labels"})
    assert aligner_of(twin, with_method(method)).facts == {}


def test_statistics_come_from_training_slices_labelled_or_not() -> None:
    image = texture(7)
    a = put("a", image)
    few = few_slices(a, TrainSetSettings(("a",), slices=2), seed=0)
    assert len(few.split["train"]) == 2
    first = statistics(few)  # first, so that nothing is kept yet
    shutil.rmtree("scratch")
    assert statistics(a) == first
    assert first.histogram == np.bincount(image[:5].ravel(), minlength=256).tolist()
    image[5:] = 255 - image[5:]  # validation and test
    later = statistics(put("a", image))
    assert (later.histogram, later.amplitude) == (first.histogram, first.amplitude)


# ---------------------------------------------------------------- keys


def token_keys(spec: BackboneSettings) -> list[str]:
    backbone = build_frozen(spec)
    return [
        token_key(backbone, spec, open_volume(name), view) for name in ("a", "b") for view in (0, 1)
    ]


def test_token_keys_follow_what_alignment_uses() -> None:
    put("a", texture(0), pixel_nm=4.0)
    put("b", texture(1, 150, 30))
    put("c", texture(2, 100, 35), pixel_nm=6.0)
    plain = token_keys(SPEC)
    by_method = {m: token_keys(with_method(m)) for m in ALIGNMENTS}
    other = {m: token_keys(with_method(m, "c")) for m in REFERENCED}
    first = [keys[0] for keys in (plain, *by_method.values(), *other.values())]
    assert len(set(first)) == len(first)
    for method in REFERENCED:
        assert (
            by_method[method][2:] == plain[2:]
        )  # the reference itself shares the entries of the plain backbone
    changed = texture(1, 150, 30)
    changed[2, 5, 5] += 1  # a pixel of one of the reference's training slices
    put("b", changed)
    after = {m: token_keys(with_method(m)) for m in ALIGNMENTS}
    assert {m for m in ALIGNMENTS if after[m][0] != by_method[m][0]} == set(REFERENCED)


def test_without_alignment_keys_are_those_of_the_version_before_it() -> None:
    volume, backbone = put("a", texture(0)), build_frozen(SPEC)
    fields = {
        "arch": "tiny_dinov2",
        "blocks": [2, 4],
        "scale": 1.0,
        "longest_edge": 0,
        "tile": 56,
        "overlap": 0.25,
        "stride": 14,
        "normalisation": "checkpoint",
        "precision": "fp32",
    }
    content = {
        "format": 2,
        "weights": backbone.provenance.sha256,
        "blocks": [2, 4],
        "settings": fields,
        "data": volume.md5,
        "view": 0,
        "cut": None,
    }
    assert token_key(backbone, SPEC, volume, 0) == digest(content)[:24]
    assert set(SPEC.described()) == {*fields, "source", "file", "views"}
    assert not Path("scratch/align").exists()  # nothing is computed, either


def test_unit_keys_follow_what_alignment_uses_also_without_a_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emadapt.models.unet2d.FEATURES", (8, 8, 16, 32, 64, 8))
    params = settings()
    plain = params["backbones"]["t"]
    params["backbones"] |= {m: plain | alignment(m) for m in ALIGNMENTS}
    params["datasets"]["b"]["voxel_nm"] = [50, 4, 4]
    params["regimes"] = {
        "frozen": {"kind": "frozen"},
        "unet2d": {"kind": "unet2d", "head": "unet2d"},
    }
    params["study"] |= {"backbones": list(params["backbones"]), "regimes": list(params["regimes"])}
    study = make_study(tmp_path, params)
    units = [Unit(b, r, "a", 0) for b in study.backbones for r in study.regimes]
    segmenters = [
        build_segmenter(
            study.backbone_settings[u.backbone],
            study.regime_settings[u.regime],
            study.head_of(u.regime),
            0,
        )
        for u in units
    ]

    def keys() -> dict[tuple[str, str], str]:
        volumes, nothing = [open_volume("a")], TokenDataset([])
        return {
            (u.backbone, u.regime): unit_key(study, u, Inputs(s, volumes, [], nothing))
            for u, s in zip(units, segmenters, strict=True)
        }

    before = keys()
    assert len(set(before.values())) == len(before)
    path = tmp_path / "data/b/image.tif"
    image = tifffile.imread(path)
    image[0, 3, 3] ^= 1
    tifffile.imwrite(path, image, photometric="minisblack")
    ingest(study, "b")
    after = keys()
    assert {name for name in before if before[name] != after[name]} == {
        (m, r) for m in REFERENCED for r in study.regimes
    }


def test_the_file_that_stands_for_the_reference_changes_with_it_alone(tmp_path: Path) -> None:
    params = settings()
    params["backbones"]["h"] = params["backbones"]["t"] | alignment("histogram")
    params["study"]["backbones"] = ["t", "h"]
    study = make_study(tmp_path, params)
    before = {name: record_reference(study, name).read_bytes() for name in study.backbones}
    assert json.loads(before["t"]) == {}
    assert json.loads(before["h"])["b"]["md5"] == open_volume("b").md5
    for dataset, same in (("a", True), ("b", False)):
        path = tmp_path / "data" / dataset / "image.tif"
        tifffile.imwrite(path, 255 - tifffile.imread(path), photometric="minisblack")
        ingest(study, dataset)
        assert (record_reference(study, "h").read_bytes() == before["h"]) == same
        assert record_reference(study, "t").read_bytes() == before["t"]


def test_without_a_backbone_training_depends_on_the_reference_all_the_same(tmp_path: Path) -> None:
    params = settings()
    params["backbones"]["t"] |= alignment("histogram")
    params["regimes"] = {"unet2d": {"kind": "unet2d"}}
    params["study"]["regimes"] = ["unet2d"]
    study = make_study(tmp_path, params)

    def recorded() -> str:
        run(study, "t", "a")
        return record_train_set(study, "t", "a").read_text()

    before = recorded()
    path = tmp_path / "data/b/image.tif"
    tifffile.imwrite(path, 255 - tifffile.imread(path), photometric="minisblack")
    ingest(study, "b")
    assert recorded() != before


# ---------------------------------------------------------------- settings


def test_methods_and_their_checks_are_the_same() -> None:
    assert list(METHODS) == list(ALIGNMENTS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"align": "histgram"},
            "backbones.t.align: found 'histgram'; expected one of standardise, clahe, histogram, fda, voxel",
        ),
        (
            {"align": "fda"},
            "backbones.t.reference: found nothing; align: fda needs one of study.datasets, a, b",
        ),
        (
            {"align": "fda", "reference": "c"},
            "backbones.t.reference: found c; align: fda needs one of study.datasets, a, b",
        ),
        (
            {"align": "clahe", "reference": "b"},
            "backbones.t.reference: found 'b'; align: clahe has none",
        ),
        (
            {"reference": "b"},
            "backbones.t.reference: found 'b'; a backbone without `align` has none",
        ),
        (
            {"align": "voxel", "reference": "b", "longest_edge": 98},
            "backbones.t: longest_edge gives every slice one size",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    params = settings()
    params["backbones"]["t"] |= change
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(ConfigError) as caught:
        load_study(tmp_path / "params.yaml")
    assert len(caught.value.problems) == 1
    assert said in str(caught.value)


def test_a_reference_that_is_not_ingested_is_named() -> None:
    with pytest.raises(
        InputError, match=r"align: fda, reference: b: found no ingested volume .*dvc repro ingest@b"
    ):
        aligner_of(put("a", texture(0)), with_method("fda"))


# ---------------------------------------------------------------- the way through


TINY_FROZEN = load_study(ROOT / "studies/demo/study.yaml").regime_settings["frozen"]


@pytest.mark.parametrize("method", ALIGNMENTS)
def test_cache_loop_and_diagnosis_see_the_same_aligned_slices(method: str) -> None:
    a = put("a", *blobs((10, 90, 100), 0), pixel_nm=4.0)
    put("b", texture(1, 150, 30))
    spec = with_method(method)
    segmenter = build_segmenter(spec, TINY_FROZEN, "pyramid", seed=0).eval()
    [view] = token_views(segmenter.backbone, spec, a, range(1))
    geo = geometry_of(a, spec, 14)
    shown = to_input(a.image[6], geo)
    assert not np.array_equal(shown, to_input(a.image[6], geometry_of(a, SPEC, 14)))
    assert view.images is not None
    for row in view.rows_of_slice(6):
        _, y, x = view.index[row]
        np.testing.assert_array_equal(view.images[row], shown[y : y + 56, x : x + 56])
    for (_, online), (_, cached) in zip(
        predict_slices(segmenter, a, [6, 8]),
        predict_slices(segmenter, a, [6, 8], view),
        strict=True,
    ):
        np.testing.assert_allclose(cached, online, atol=3e-3)
    whole = dataclasses.replace(spec, tile=0, views=0)
    drawn, _ = CropDataset([a], whole, 14, augmented=False)[Draw(0, 6, 0)]
    np.testing.assert_allclose(
        drawn[0].numpy(),
        to_input(a.image[6], geometry_of(a, whole, 14)) / np.float32(255),
        atol=1e-6,
    )


def test_diagnosis_measures_aligned_slices_and_statistics_of_changed_ones() -> None:
    """At half the contrast a dataset has its own statistics, and standardised it is nearly the original again."""
    volume, own, backbone = (
        put("a", texture(8, 120, 25)),
        DiagnoseSettings(blocks=4, slices=0, tokens=200),
        build_frozen(SPEC),
    )
    found: dict[tuple[str, ...], Any] = {}
    for method in ("", "standardise"):
        spec = dataclasses.replace(SPEC, align=method)
        for change, name in ((None, ""), (lower_contrast, "dull")):
            found[method, name] = pixel_features(spec, 14, volume, own, change, name).tokens
            found["tokens", method, name] = computed_features(
                backbone, spec, volume, own, "m", change, name
            ).tokens
    assert np.abs(found["", "dull"] - found["", ""]).mean() > 0.03
    assert np.abs(found["standardise", "dull"] - found["standardise", ""]).mean() < 0.005
    assert (
        np.abs(found["tokens", "standardise", ""] - found["tokens", "", ""]).mean() > 0.01
    )  # not what was kept of the other
