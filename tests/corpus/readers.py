"""Each hostile file is given to what would meet it, in a process with limits."""

import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import images
import nifti
import texts
import volumes

from emadapt.errors import EmadaptError
from emadapt.volumes.opening import open_source

SECONDS, MEGABYTES = 5.0, 1024
"""Of the processor's time; what waits for something is ended after `PATIENCE` seconds."""
PATIENCE = 30.0
GUARD_MB = 6144
"""Address space on top of the process's own, so that no mistake brings the machine down."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case: error (or ""), message, seconds, MB on top of the process's own."""

    error: str
    clear: bool
    message: str
    seconds: float
    megabytes: float


def source(path: Path | str) -> None:
    """As `ingest` and `segment` read."""
    found = open_source(str(path))
    for z in {0, found.shape[0] - 1}:
        found.read(z, z + 1, 0, min(64, found.shape[1]))
    if math.prod(found.shape) < 2**26:
        list(found.slices(range(found.shape[0])))
    if found.voxel_nm is not None and not all(0 < v < 1e12 for v in found.voxel_nm):
        raise ValueError(f"a voxel of {found.voxel_nm}")


def study(path: Path) -> None:
    from emadapt.pipeline.check import check_study

    if problems := check_study(path, path.parent / "data"):
        raise EmadaptError("\n".join(problems))


def use(name: str) -> None:
    from emadapt.pipeline.check import use_study

    use_study(name)


def load(path: Path) -> None:
    from tiny import load_weights

    load_weights("tiny_dinov2", "file", path)


def look(path: Path) -> None:
    from emadapt.models.weights import check_source
    from tiny import weights_spec

    check_source(weights_spec("tiny_dinov2", "file", path))


def model(path: Path) -> None:
    from emadapt.training.model_files import load_model

    load_model(path)


def begin(path: Path) -> None:
    """As `warm_start` reads, which looks at a part of the card alone."""

    from emadapt.study.backbones import BackboneSettings
    from emadapt.study.regimes import regime_settings
    from emadapt.training.prepare import folder_state
    from emadapt.training.regimes import REGIMES

    spec = BackboneSettings(arch="tiny_dinov2", source="random")
    regime = REGIMES["frozen"](regime_settings(kind="frozen"), spec, "linear")
    segmenter = regime.build(0)
    segmenter.load_trained(folder_state(path, regime, segmenter))


GROUPS: list[tuple[dict[str, Any], tuple[Callable[[Any], None], ...]]] = [
    (images.TIFFS, (source,)),
    (images.PNGS, (source,)),
    (volumes.HDF5S, (source,)),
    (volumes.ZARRS, (source,)),
    (nifti.NIFTIS, (source,)),
    (volumes.PATHS, (source,)),
    (texts.STUDIES, (study,)),
    (texts.USED, (use,)),
    (texts.WEIGHTS, (load, look)),
    (texts.MODELS, (model,)),
    (texts.STARTS, (model, begin)),
]
CASES = {name: (write, reads) for group, reads in GROUPS for name, write in group.items()}


def meet(read: Callable[[Any], None], argument: Any, folder: Path) -> Outcome:
    """The error, time and memory of a forked child, which is ended when its time is over."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        try:
            os.chdir(folder)
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1), os.dup2(nothing.fileno(), 2)
                sys.stdout, sys.stderr = nothing, nothing
                os.write(into, json.dumps(_read(read, argument)).encode())
        finally:
            os._exit(0)
    os.close(into)
    timer = threading.Timer(PATIENCE, os.kill, (child, signal.SIGKILL))
    timer.start()
    with os.fdopen(out, "rb") as pipe:
        said = pipe.read()
    timer.cancel()
    status = os.waitpid(child, 0)[1]
    if not said:
        return Outcome(f"signal {os.WTERMSIG(status)}", False, "", PATIENCE, 0.0)
    return Outcome(**json.loads(said))


def _read(read: Callable[[Any], None], argument: Any) -> dict[str, Any]:
    own = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (own + GUARD_MB * 2**20,) * 2)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    error, clear, message = "", False, ""
    try:
        read(argument)
    except BaseException as problem:
        error, clear, message = (
            type(problem).__name__,
            isinstance(problem, EmadaptError),
            str(problem),
        )
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "error": error,
        "clear": clear,
        "message": message[:20000],
        "seconds": seconds,
        "megabytes": (peak - before) / 1024,
    }
