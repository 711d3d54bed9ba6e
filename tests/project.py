"""What pyproject.toml and the lock files say."""

import re
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SAFE_SETTINGS = {
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked(*kinds: str) -> list[Requirement]:
    """All lines of the lock files requirementsKIND.lock; each is pinned, with hashes."""
    text = "".join((ROOT / f"requirements{kind}.lock").read_text() for kind in kinds)
    lines = re.findall(
        r"^([\w.-]+==[^*\\\n]+)\\\n(?: +--hash=sha256:[0-9a-f]{64}.*\n)+", text, re.M
    )
    assert len(lines) == len(re.findall(r"^[^#\s]", text, re.M)), "a line that is not pinned"
    return [Requirement(line) for line in lines]
