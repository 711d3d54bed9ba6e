"""The page in a browser without a network: a phone shows it, and headings sort."""

import json
import re
import shutil

import pytest

from fakes import FEW, TRAIN_SETS, a_study
from pages import Reader, chromium, make

pytestmark = pytest.mark.browser

# Opens the page in a frame as wide as a phone, uses it and reports what it finds.
PROBE = """<!DOCTYPE html><html><body>
<iframe id="f" style="width: 390px; height: 800px; border: 0" src="index.html"></iframe>
<pre id="found"></pre><script>
document.getElementById("f").addEventListener("load", ({target}) => {
  const page = target.contentDocument, root = page.documentElement;
  const column = (table, index) =>
    [...table.tBodies[0].rows].map(row => row.cells[index].innerText);
  const click = button => {
    button.click();
    return button.closest("th").getAttribute("aria-sort");
  };
  const board = page.querySelector("table"), found = {sorts: []};
  found.broken = [...page.images].filter(image => image.naturalWidth === 0).length;
  found.over = [...page.querySelectorAll("body *")].filter(
    e => !e.closest(".scroll, .paper") && e.getBoundingClientRect().right > 390.5)
    .map(e => e.outerHTML.slice(0, 200));
  found.wider = root.scrollWidth - root.clientWidth;
  for (const button of board.querySelectorAll("thead button")) {
    const index = button.closest("th").cellIndex;
    const [first, second] = [0, 1].map(() => [click(button), column(board, index)]);
    const marked = board.querySelectorAll("th:not([aria-sort=none])").length;
    found.sorts.push({name: button.innerText.trim(), first, second, marked});
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script></body></html>
"""


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make(tmp_path_factory.mktemp("page"), a_study((0,), train_sets={**FEW, **TRAIN_SETS}))


@pytest.fixture(scope="module")
def shown(index, tmp_path_factory):
    """What the probe found, and what the browser wrote to its console."""
    folder = tmp_path_factory.mktemp("browser")
    shutil.copy(index, folder)
    (folder / "probe.html").write_text(PROBE)
    flags = ("--allow-file-access-from-files", "--dump-dom")
    html, log = chromium(folder, folder / "probe.html", *flags)
    found = Reader(html).text["pre"][0]
    assert found, log
    return json.loads(found), log


def test_a_phone_shows_every_picture_and_nothing_runs_over(shown):
    found, log = shown
    assert "CONSOLE" not in log
    assert (found["broken"], found["wider"], found["over"]) == (0, 0, [])


def test_headings_sort(shown):
    def number(text: str) -> float:
        value = re.findall(r"^[−+]?[\d.\u202f]+", text)[0]
        return float(value.replace("−", "-").replace("\u202f", ""))

    found, _ = shown
    assert {"Trained on", "IoU", "Seconds"} <= {sort["name"] for sort in found["sorts"]}
    for sort in found["sorts"]:
        assert sort["marked"] == 1
        assert {sort["first"][0], sort["second"][0]} == {"ascending", "descending"}
        for direction, cells in (sort["first"], sort["second"]):
            numeric = re.match(r"[−+]?\d", cells[0])
            values = [number(cell) if numeric else cell.casefold() for cell in cells]
            assert values == sorted(values, reverse=direction == "descending"), sort["name"]
