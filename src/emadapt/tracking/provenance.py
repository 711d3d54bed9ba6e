"""Tags that say what a run was made from: commit, data, settings."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import subprocess
from pathlib import Path

import yaml

log = logging.getLogger(__name__)

EXPERIMENT = "dvc.experiment"
NOT_CODE = [f":!{name}" for name in ("dvc.lock", "reports", "params.yaml", "data.dvc")]
"""What may differ from a commit without making it dirty, as git's patterns.

dvc.lock and reports/ change with every stage. params.yaml and data.dvc have tags of their own.
"""


def provenance_tags(root: Path) -> dict[str, str]:
    """Tags `git.commit`, `git.dirty`, `params.sha256` and `data.md5`, as far as they are known.

    In an experiment of DVC its name is the tag `dvc.experiment`.
    """
    name = os.environ.get("DVC_EXP_NAME")
    tags = {EXPERIMENT: name} if name else {}
    if commit := _git(root, "rev-parse", "HEAD"):
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *NOT_CODE)
        dirty = "unknown" if changed is None else str(bool(changed)).lower()
        tags |= {"git.commit": commit, "git.dirty": dirty}
    params = root / "params.yaml"
    if params.is_file():
        tags["params.sha256"] = hashlib.sha256(params.read_bytes()).hexdigest()
    with contextlib.suppress(OSError, yaml.YAMLError, LookupError, TypeError):
        data = yaml.safe_load((root / "data.dvc").read_text())
        tags["data.md5"] = str(data["outs"][0]["md5"])
    return tags


def _git(root: Path, *args: str) -> str | None:
    """What a git command prints; None outside a checkout, and where git refuses, which is said."""
    try:
        done = subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, timeout=20, check=False
        )
        refusal = done.stderr
    except (OSError, subprocess.SubprocessError) as error:
        refusal = str(error)
    else:
        if not done.returncode:
            return done.stdout.strip()
    if "not a git repository" not in refusal:
        log.warning("no commit is recorded, since git says: %s", " ".join(refusal.split()))
    return None
