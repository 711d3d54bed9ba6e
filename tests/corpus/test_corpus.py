"""Hostile files end in a clear error, soon and small; nothing in them runs or leaves its folder."""

from pathlib import Path

import pytest
from nifti import EXTENDED
from readers import CASES, MEGABYTES, SECONDS, meet, source

SLOW = {name for name in CASES if "bomb" in name}


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder with its content, links and pipes unread."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() and not p.is_symlink() else None
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    write, reads = CASES[name]
    argument = write(folder)
    before = tree(tmp_path)
    for read in reads:
        outcome = meet(read, argument, folder)
        assert outcome.clear, f"{read.__name__}: {outcome}"
        assert "MemoryError" not in outcome.message, outcome
        assert len(outcome.message.replace(str(argument), "")) < 2000, outcome
        assert outcome.seconds < SECONDS, outcome
        assert outcome.megabytes < MEGABYTES, outcome
        assert tree(tmp_path) == before, f"{read.__name__} wrote"


@pytest.mark.slow
@pytest.mark.parametrize("name", EXTENDED)
def test_what_is_not_needed_is_not_unpacked(name: str, tmp_path: Path) -> None:
    outcome = meet(source, EXTENDED[name](tmp_path), tmp_path)
    assert outcome.error == "", outcome
    assert outcome.seconds < SECONDS, outcome
    assert outcome.megabytes < 100, outcome
