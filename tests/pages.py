"""A report page of fake scores, and what reads it."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from emadapt.report.report import build_report
from emadapt.study.study import Study
from fakes import a_study, write_domain, write_metrics, write_models

VOID = {"meta", "link", "img", "br", "path", "circle"}


class Reader(HTMLParser):
    """Tags in order, ids, text by tag, and whether tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.text[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def make(root: Path, study: Study | None = None, *, diagnosed: bool = True) -> Path:
    study = study or a_study()
    write_metrics(root, study)
    write_models(root, study)
    if diagnosed:
        write_domain(root, study)
    (root / "params.yaml").write_text("a: 1\n")
    build_report(root, study)
    return root / "reports/index.html"


def chromium(folder: Path, file: Path, *flags: str) -> tuple[str, str]:
    """(stdout, stderr) of a headless run without any network."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    offline = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
        --disable-background-networking --disable-component-update --enable-logging=stderr --v=0
        --virtual-time-budget=20000"""
    command = [program, *offline.split(), f"--user-data-dir={folder / 'profile'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", *flags, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout, done.stderr
