"""The `trainset` stage, which needs no torch and so takes no time."""

from __future__ import annotations

import json
from pathlib import Path

from emadapt.config import Study
from emadapt.files import write_json


def record_train_set(study: Study, backbone_name: str, train_set: str, root: Path = Path("build")) -> Path:
    """Write what a training set consists of: its members' data and tokens, and nothing of other datasets.

    DVC cannot name a list of dependencies per training set; this small file, whose bytes change only with its own members,
    stands for them.
    """
    members = {}
    for name in study.train_set_specs[train_set]:
        manifest = json.loads((root / "tokens" / backbone_name / f"{name}.json").read_text())
        members[name] = {k: manifest[k] for k in ("data_md5", "entries", "weights")}
    path = root / "trainsets" / backbone_name / f"{train_set}.json"
    write_json(path, members)
    return path
