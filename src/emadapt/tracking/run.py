"""A run as MLflow is to have it: plain data and paths, kept in a file until MLflow has it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from emadapt.files import checkout_of, file_md5, write_text
from emadapt.tracking.redact import redact

FOLDER = Path("scratch/track")
"""Runs that MLflow does not have yet, or that go on."""
MODEL = "model"
"""Name of a run's model in MLflow. Artifacts below it are the model's files."""
IN_MEMORY = Field(exclude=True)
"""Of what the file of a run leaves out."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A dataset that a run has read."""

    name: str
    digest: str  # of its content, at most 36 characters (MLflow's limit), as an md5
    source: str  # where it is
    context: str  # what it was read for, such as "training" or "test"


@dataclass(frozen=True)
class Model:
    """How MLflow opens a run's model, whose files are the run's artifacts in `model/`."""

    loader: str  # a module whose `_load_pyfunc(folder)` gives the model
    voxel_nm: list[float]  # what its `predict` takes for the voxel size (z, y, x) if not told


@dataclass
class Run:
    """What MLflow is to have of a unit, a sweep or a trial."""

    study: str  # MLflow's experiment
    name: str  # of the run
    # say what the run is. On a run that is there already, they are added if missing
    tags: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)  # settings; nested ones get dotted names
    # numbers by step; an epoch is a step
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    times: dict[int, int] = field(default_factory=dict)  # of a step's first numbers, as `began`
    # tags that say what came out; they replace what is there
    results: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Path] = field(default_factory=dict)  # files, by their path in the run
    # with a model, numbers of step 0 are the model's, too, each on the dataset that it is named for
    model: Model | None = None
    datasets: list[Dataset] = field(default_factory=list)  # that were read
    # tags by whose values a run is found that this one goes on with; empty for a new run
    same: tuple[str, ...] = ()
    # tag of a run that had to be created: "restored" for a model from DVC's cache
    origin: str = "trained"
    # tags of the run that this one is shown under
    parent: dict[str, str] = field(default_factory=dict)
    status: str = "FINISHED"  # FINISHED, FAILED, KILLED, or RUNNING while it is live
    began: int = field(default_factory=lambda: now())  # milliseconds since 1970
    ended: int = 0  # milliseconds since 1970
    # its own name, by which it is found again
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    digests: dict[str, str] = field(default_factory=dict)  # md5 of each artifact
    # the checkout's
    root: Annotated[Path, IN_MEMORY] = field(default_factory=lambda: checkout_of(Path()))
    # publish nothing, as in all but the first of several processes
    muted: Annotated[bool, IN_MEMORY] = False
    # while it is live, MLflow measures GPUs, CPU, memory and disk
    watched: Annotated[bool, IN_MEMORY] = False
    known: Annotated[Any, IN_MEMORY] = None  # what MLflow is known to have; see `publish`

    def log(self, values: Mapping[str, float], step: int = 0) -> None:
        """Add numbers of a step. Infinite ones and NaN become the tag `nonfinite` instead."""
        good = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        bad = {name: value for name, value in values.items() if name not in good}
        if bad:
            text = ", ".join(f"{name}={value}" for name, value in bad.items())
            self.results["nonfinite"] = f"{text} at step {step}"
            log.warning("tracking: %s: not logged: %s at step %s", self.name, text, step)
        self.metrics.setdefault(step, {}).update(good)
        self.ended = now()
        self.times.setdefault(step, self.ended)

    @property
    def file(self) -> Path:
        """Where the run is kept until MLflow has it."""
        return self.root / FOLDER / f"{self.name}-{self.key[:8]}.json"

    @cached_property
    def lock(self) -> FileLock:
        """Held by the process that the run lives in, as often as it likes."""
        return FileLock(self.file.with_suffix(".lock"))

    def save(self) -> None:
        """Write the run's file, without passwords."""
        files = {name: path.absolute() for name, path in self.artifacts.items()}
        self.digests |= {name: file_md5(path) for name, path in files.items() if path.is_file()}
        kept = dataclasses.replace(
            self,
            tags=texts(self.tags),
            params=texts(flat(self.params)),
            results=texts(self.results),
            artifacts=files,
            datasets=[Dataset(**texts(dataclasses.asdict(one))) for one in self.datasets],
        )
        write_text(self.file, TypeAdapter(Run).dump_json(kept, indent=1).decode())

    def remove(self) -> None:
        """Remove the file: MLflow has it all."""
        with contextlib.suppress(OSError):
            self.file.unlink(missing_ok=True)
            self.file.with_suffix(".lock").unlink(missing_ok=True)


def load_run(root: Path, file: Path) -> Run:
    """A run from its file.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    kept = TypeAdapter(Run).validate_json(file.read_bytes())
    return dataclasses.replace(kept, root=root)


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested to dotted: {"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as MLflow keeps them: text of at most 5000 characters, no passwords, no None."""
    said = {name: str(value) for name, value in values.items() if value is not None}
    said |= {name: said[name].lower() for name, value in values.items() if isinstance(value, bool)}
    return {name: redact(text)[:5000] for name, text in said.items()}


def settings_digest(params: Mapping[str, Any]) -> str:
    """Of all settings but the seed: runs that differ in nothing else have the same."""
    common = {name: text for name, text in texts(flat(params)).items() if name != "unit.seed"}
    return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:12]
