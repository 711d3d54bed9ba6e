"""A full or a read-only disk: a clear error, nothing half-written, finished work is kept."""

import os
import shutil
from pathlib import Path

import harness
import pytest

from studies import VERBS

pytestmark = pytest.mark.slow


def disk_usage(root: Path) -> int:
    return sum(f.stat().st_blocks * 512 for f in root.rglob("*"))


def starved(verb: str, states: str, share: float) -> None:
    """With room for `share` of what the verb needs, then with enough; -1: a read-only disk."""
    words, written = VERBS[verb]
    before, after, at = (
        Path(states) / f"before-{verb}",
        Path(states) / f"after-{verb}",
        Path.cwd() / "disk",
    )
    expected, log = harness.content(after, *written), Path(os.environ["FAULTS_LOG"])
    at.mkdir()
    with harness.small_disk(at, 2**28) as remount:
        shutil.copytree(before, at / "root")
        needs = max(disk_usage(after) - disk_usage(before), 8192)
        os.chdir(at / "root")
        if share < 0:
            os.chdir("/")  # or the folder is in use
            remount("ro")
            os.chdir(at / "root")
        else:
            free = os.statvfs(at).f_bavail * os.statvfs(at).f_frsize
            with (at / "filler").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(4096, free - int(share * needs)))
        code, said = harness.emadapt(*words), log.read_text()
        assert code == 2, f"{verb} ended with {code}: {said}"
        assert "error: " in said
        assert "Traceback" not in said
        found = harness.content(
            at / "root", *[p for p in written if "scratch" not in p and p != "out*"]
        )
        assert found.items() <= expected.items(), "half-written"
        if share < 0:
            remount("rw")
        else:
            (at / "filler").unlink()
        code = harness.emadapt(*words)
        assert code == 0, log.read_text()
        assert harness.content(at / "root", *written) == expected


@pytest.mark.parametrize("share", [0.0, 0.5, -1.0], ids=["full", "half full", "read-only"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_takes_no_more(verb: str, share: float, states: Path, tmp_path: Path) -> None:
    (tmp_path / "try").mkdir()
    if not harness.may_mount(tmp_path / "try"):
        pytest.skip("this user may not mount a small disk")
    (tmp_path / "root").mkdir()
    ended = harness.run(tmp_path / "root", verb, str(states), str(share), inside=_starved)
    assert ended.code == 0, ended.output


def _starved(verb: str, states: str, share: str) -> None:
    starved(verb, states, float(share))
