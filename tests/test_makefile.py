"""`make clean` keeps what nobody can make again."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_clean_removes_what_is_made_again(tmp_path):
    kept = ["scratch/sweeps/journal.log", "scratch/track/unit.json", "scratch/mitonet.pt"]
    for name in (*kept, "scratch/tokens/key/tokens.npy", "build/plan/a.json", "src/a", "tests/b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / "Makefile", tmp_path)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*kept, "src/a", "tests/b", "Makefile"}
