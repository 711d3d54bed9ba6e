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


def starved(verb: str, states: str, share: str) -> int:
    """With room for `share` of what the verb needs, then with enough; -1: a read-only disk."""
    words, written = VERBS[verb]
    before, after = (Path(states) / f"{when}-{verb}" for when in ("before", "after"))
    expected, log = harness.content(after, *written), Path(os.environ["FAULTS_LOG"])
    at = Path.cwd() / "disk"
    at.mkdir()
    with harness.small_disk(at, 2**28) as remount:
        shutil.copytree(before, at / "root")
        needs = max(disk_usage(after) - disk_usage(before), 8192)
        if float(share) < 0:
            remount("ro")
        else:
            free = os.statvfs(at).f_bavail * os.statvfs(at).f_frsize
            with (at / "filler").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(4096, free - int(float(share) * needs)))
        os.chdir(at / "root")
        code, said = harness.emadapt(*words), log.read_text()
        assert code == 2, f"{verb} ended with {code}: {said}"
        assert "error: " in said
        assert "Traceback" not in said
        whole = [pattern for pattern in written if "scratch" not in pattern and pattern != "out*"]
        found = harness.content(at / "root", *whole)
        assert found.items() <= expected.items(), "half-written"
        if float(share) < 0:
            remount("rw")
        else:
            (at / "filler").unlink()
        assert harness.emadapt(*words) == 0, log.read_text()
        assert harness.content(at / "root", *written) == expected
    return 0


@pytest.mark.parametrize("share", [0.0, 0.5, -1.0], ids=["full", "half full", "read-only"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_takes_no_more(verb, share, states, tmp_path):
    (tmp_path / "try").mkdir()
    if not harness.may_mount(tmp_path / "try"):
        pytest.skip("this user may not mount a small disk")
    (tmp_path / "root").mkdir()
    ended = harness.run(tmp_path / "root", verb, str(states), str(share), inside=starved)
    assert ended.code == 0, ended.output
