"""The page in a browser: a phone shows it, headings sort, nothing is asked of a network."""

import json
import re
import shutil

import pytest

from fakes import transfer_study
from pages import Reader, asked, chromium, make


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def transferred(tmp_path_factory):
    return make(
        tmp_path_factory.mktemp("transferred"),
        diagnosed=False,
        objects="lora",
        study=transfer_study((0,)),
    )


# Opens the page in a frame of 390 px, as a phone would, uses it and reports what it finds.
PROBE = """<!DOCTYPE html><html><body><iframe id="f" style="width: 390px; height: 800px; border: 0" src="index.html"></iframe>
<pre id="found"></pre><script>
document.getElementById("f").addEventListener("load", ({target}) => {
  const page = target.contentDocument, view = target.contentWindow, root = page.documentElement;
  const column = (table, index) => [...table.tBodies[0].rows].map(row => row.cells[index].innerText);
  const click = button => { button.click(); return button.closest("th").getAttribute("aria-sort"); };
  const board = page.querySelector("table.sortable"), buttons = [...board.querySelectorAll("thead button")];
  const found = {width: view.innerWidth, images: page.images.length, sorts: []};
  found.broken = [...page.images].filter(image => image.naturalWidth === 0).length;
  found.over = [...page.querySelectorAll("body *")].filter(
    e => !e.closest(".scroll, .wide, .hidden") && e.getBoundingClientRect().right > 390.5).map(e => e.outerHTML.slice(0, 200));
  found.wider = root.scrollWidth - root.clientWidth;
  for (const button of buttons) {
    const index = button.closest("th").cellIndex, before = button.closest("th").getAttribute("aria-sort");
    const first = [click(button), column(board, index)], second = [click(button), column(board, index)];
    button.focus();
    found.sorts.push({name: button.innerText, before, first, second, focused: page.activeElement === button,
                      marked: board.querySelectorAll("th:not([aria-sort=none])[aria-sort]").length});
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script></body></html>
"""


@pytest.fixture(scope="module")
def shown(index, tmp_path_factory):
    """What the probe found, and what the browser wrote to its console."""
    folder = tmp_path_factory.mktemp("browser")
    shutil.copy(index, folder)
    (folder / "probe.html").write_text(PROBE)
    html, log = chromium(
        folder, folder / "probe.html", "--allow-file-access-from-files", "--dump-dom"
    )
    found = Reader(html).text["pre"][0]
    assert found, log
    return json.loads(found), log


@pytest.mark.browser
def test_a_phone_shows_every_picture_and_nothing_runs_over(shown):
    found, _ = shown
    assert found["width"] == 390
    assert (found["images"], found["broken"]) == (10, 0)
    assert (found["wider"], found["over"]) == (0, [])


@pytest.mark.browser
def test_a_phone_shows_wide_tables_too(transferred, tmp_path):
    shutil.copy(transferred, tmp_path / "index.html")
    (tmp_path / "probe.html").write_text(PROBE)
    html, log = chromium(
        tmp_path, tmp_path / "probe.html", "--allow-file-access-from-files", "--dump-dom"
    )
    found = json.loads(Reader(html).text["pre"][0])
    assert (found["wider"], found["over"], found["broken"]) == (0, [], 0)
    assert "CONSOLE" not in log


@pytest.mark.browser
def test_headings_sort(shown):
    found, _ = shown

    def number(text: str) -> float:
        return float(
            re.findall(r"^[−+]?[\d.\u202f]+", text)[0].replace("−", "-").replace("\u202f", "")
        )

    assert {"Trained on", "IoU", "Against frozen", "Seconds"} <= {
        sort["name"].strip() for sort in found["sorts"]
    }
    for sort in found["sorts"]:
        assert sort["focused"]
        assert sort["marked"] == 1
        for direction, cells in (sort["first"], sort["second"]):
            there = [cell for cell in cells if cell.strip() != "–"]
            assert (
                cells[: len(there)] == there
            )  # cells without a value are last, whatever the direction
            values = (
                [number(cell) for cell in there]
                if re.match(r"[−+]?\d", there[0])
                else [cell.casefold() for cell in there]
            )
            assert values == sorted(values, reverse=direction == "descending"), sort["name"]
        assert {sort["first"][0], sort["second"][0]} == {"ascending", "descending"}
        if sort["name"].strip() == "IoU":
            assert (sort["before"], sort["first"][0]) == ("none", "descending")


@pytest.mark.browser
def test_no_errors_and_no_requests(index, shown, tmp_path):
    assert "CONSOLE" not in shown[1]
    urls, log = asked(tmp_path, index)
    assert "CONSOLE" not in log
    assert {url for url in urls if not url.startswith("data:")} == set()


@pytest.mark.browser
def test_a_request_and_an_error_would_be_noticed(tmp_path):
    (tmp_path / "bad.html").write_text(
        '<img src="http://outside.invalid/a.png"><script>nothing.here</script>'
    )
    urls, log = asked(tmp_path, tmp_path / "bad.html")
    assert urls == {"http://outside.invalid/a.png"}
    assert "CONSOLE" in log


@pytest.mark.browser
def test_it_prints(index, tmp_path):
    pdf = tmp_path / "page.pdf"
    chromium(tmp_path, index, "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF")
    sizes = re.findall(rb"/MediaBox ?\[0 0 ([\d.]+) ([\d.]+)\]", content)
    assert sizes
    assert all(
        float(width) > float(height) for width, height in sizes
    )  # landscape, for wide tables
