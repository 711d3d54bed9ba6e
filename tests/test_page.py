"""The page: every number and picture is there, and nothing comes from outside."""

import base64
import io
import itertools
import json
import re

import pytest
from PIL import Image

from emadapt.report import page
from emadapt.report.report import build_report
from fakes import FEW, TRAIN_SETS, a_study
from pages import Reader, make


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make(tmp_path_factory.mktemp("page"), a_study(train_sets={**FEW, **TRAIN_SETS}))


@pytest.fixture(scope="module")
def read(index):
    return Reader(index.read_text())


def test_tags_nest_and_links_lead_somewhere(read):
    assert read.open == []
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch(r"h[1-6]", tag)]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"] for attributes in read.all("a")}
    assert links == {f"#{a['aria-labelledby']}" for a in read.all("section")}
    expected = {"leaderboard", "regime", "union", "labels", "curves", "domain", "provenance"}
    assert {f"#{name}" for name in expected} < links


def test_nothing_comes_from_outside(index, read):
    for tag, attributes in read.tags:
        for name, value in attributes.items():
            if name in ("src", "srcset", "action", "poster") or (name == "href" and tag != "a"):
                assert str(value).startswith("data:"), (tag, name, value)
    assert not re.findall(r"@import|url\(|fetch\(|XMLHttpRequest|https?://", index.read_text())
    assert "default-src 'none'" in str(read.all("meta"))


def test_every_picture_can_be_read_and_is_described(read):
    pictures = read.all("img")
    assert len(pictures) > 8
    for attributes in pictures:
        with Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",")[1]))) as picture:
            size = str(picture.width), str(picture.height)
            assert size == (attributes["width"], attributes["height"])
            assert picture.width <= page.WIDEST
        assert len(attributes["alt"]) > 20


def test_every_number_of_the_summary_is_shown(index, read):
    summary = json.loads((index.parent / "summary.json").read_text())
    cells = read.text["td"]
    assert len(read.all("table")) == len(read.all("caption"))
    for entry in summary["units"]:
        if entry["few"] and entry["relation"] != "in-domain":
            continue  # neither in the leaderboard nor on a curve
        low, high = entry["iou"]["ci95"]
        assert f"{entry['iou']['mean']:.3f}{low:.3f} to {high:.3f}" in cells
    for row in summary["contrasts"]:
        if row["factor"] != "best":
            low, high = (f"{end:+.3f}" for end in row["ci95"])
            shown = f"{row['difference']:+.3f}{low} to {high}".replace("-", "−")
            assert shown in cells
    provenance = " ".join(read.text["dd"])
    assert summary["params_sha256"] in provenance
    assert "dc75" * 16 in provenance


def test_text_from_files_is_escaped(index):
    assert "a &lt;name&gt; &amp; more" in index.read_text()


def test_one_seed_without_diagnostics_models_or_overlays(tmp_path, plain_pictures):
    study = a_study(seeds=(0,))
    index = make(tmp_path, study, diagnosed=False)
    for file in [*tmp_path.rglob("overlay-*.png"), *tmp_path.rglob("model.json")]:
        file.unlink()
    build_report(tmp_path, study)
    page = Reader(index.read_text())
    assert page.open == []
    assert len(page.all("img")) < 4
