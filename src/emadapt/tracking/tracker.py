"""The lab book: one MLflow run per unit, written so that nothing which happens to MLflow can stop or hang a training.

Every entry goes to a spool (scratch/track/<unit>-<key>/) first and is sent then. Entries carry their own time and the run
carries the spool's key, so sending one twice changes nothing: the same code serves the live run, the retry after an outage
and `emadapt track sync`.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from emadapt.tracking import store as mlflow_store
from emadapt.tracking.store import find_run, moved, redact, relocate, tracking_uri

__all__ = [
    "NullTracker",
    "Tracker",
    "find_run",
    "moved",
    "open_run",
    "provenance_tags",
    "relocate",
    "sync",
    "tracking_uri",
]

log = logging.getLogger(__name__)

SPOOL = Path("scratch/track")
FIRST_WAIT, LONGEST_WAIT = (
    60.0,
    600.0,
)  # s between tries of a dead store: one that hangs costs at most 5 s in 60


NOT_CODE = [f":!{name}" for name in ("dvc.lock", "reports", "params.yaml", "data.dvc")]
"""What may differ from the commit that results name, as git's patterns."""


def provenance_tags(root: Path) -> dict[str, str]:
    """Tags for what a run was made from: git.commit, git.dirty, params.sha256, data.md5; a missing source leaves its tag out.

    dvc.lock and reports/ change with every stage that runs, so they do not make a commit dirty; nor do params.yaml and data.dvc,
    which the other two tags name: whoever selects a committed study or fetches public data has changed no code.
    """

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *args], cwd=root, capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    tags = {}
    if commit := git("rev-parse", "HEAD"):
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *NOT_CODE)
        tags = {
            "git.commit": commit,
            "git.dirty": "unknown" if changed is None else str(bool(changed)).lower(),
        }
    if (params := root / "params.yaml").is_file():
        tags["params.sha256"] = hashlib.sha256(params.read_bytes()).hexdigest()
    with contextlib.suppress(OSError, yaml.YAMLError, LookupError, TypeError):
        tags["data.md5"] = str(yaml.safe_load((root / "data.dvc").read_text())["outs"][0]["md5"])
    return tags


def open_run(
    root: Path,
    study_name: str,
    tags: Mapping[str, Any],
    params: Mapping[str, Any],
    *,
    resume_by: Iterable[str] = (),
    origin: str = "trained",
    parent: str | None = None,
) -> "Tracker":
    """Opens the run of a unit, or goes on with the one that is there. Never raises for want of MLflow.

    Args:
        root: the project root.
        study_name: the MLflow experiment.
        tags: must hold `unit`, which names the run; see "Run tags in MLflow" in the design.
        params: hyper-parameters; nested mappings become dotted names. A digest of all but the seed becomes the tag `settings`,
            by which MLflow's page averages over seeds and over nothing else.
        resume_by: names of tags. The latest run of the study whose values of these equal those of `tags` is continued: its
            own tags and params stay, missing ones are added. Empty, or a tag without a value: always a new run.
        origin: the tag `origin` of a run that had to be created ("restored" where no training ran, as after `dvc pull`).
        parent: id of the run that this one is shown under, as a trial under its sweep.

    Returns:
        A tracker; one that does nothing with EMADAPT_TRACKING=off, and one that leaves the sending to `sync` with
        EMADAPT_TRACKING=later, for nodes of a cluster that must not all write to one SQLite file on a shared disk.
    """
    mode = os.environ.get("EMADAPT_TRACKING", "").lower()
    if mode == "off":
        return NullTracker()
    key = uuid.uuid4().hex
    tracker = Tracker(root.resolve(), root.resolve() / SPOOL / f"{tags['unit']}-{key[:8]}")
    tracker.later = mode == "later"
    tracker._lock()
    own = {"settings": _settings(params), "mlflow.parentRunId": parent}
    head = {
        "study": study_name,
        "key": key,
        "tags": _texts(own | dict(tags)),
        "resume_by": list(resume_by),
        "origin": origin,
    }
    tracker._record("open", flush=not params, **head)
    if params:
        tracker.log_params(params)
    return tracker


class Tracker:
    """One run. Its methods record an entry and return: they do not raise for, nor wait on, a store that is down.

    Attributes:
        run_id: the MLflow run, None until the store has answered.
        later: send nothing; `sync` does.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder, self.later = root, folder, False
        self.run_id: str | None = None
        self._entries: list[dict[str, Any]] = []
        self._spooled = self._sent = 0  # how many of the entries are on disk, and in MLflow
        self._ended_before: int | None = None  # of a continued run, see mlflow_store.find_or_create
        self._fd = -1
        self._failed_at, self._wait = -math.inf, FIRST_WAIT
        self._said = set[str]()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if error is not None:
            self.set_tags({"error": f"{type(error).__name__}: {error}"[:500]})
        stopped = kind is not None and not issubclass(kind, Exception)  # Ctrl-C, SystemExit
        self.end("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Records numbers of one step; one call per epoch. NaN and infinite ones are left out, said, and tagged `nonfinite`."""
        good = {name: float(value) for name, value in values.items()}
        bad = {name: good.pop(name) for name in list(good) if not math.isfinite(good[name])}
        if bad:
            text = ", ".join(f"{name}={value}" for name, value in bad.items()) + f" at step {step}"
            self._say(f"nonfinite {sorted(bad)}", f"{self.folder.name}: not logged: {text}")
            self.set_tags({"nonfinite": text})
        if good:
            self._record("metrics", values=good, step=int(step))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Records hyper-parameters; nested mappings become dotted names. A param that is there already keeps its value."""
        self._record("params", values=_texts(_flat(params)))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Sets tags, over what they were; None values are left out."""
        self._record("tags", values=_texts(tags))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Records a file as it is now, under `folder` of the run's artifacts."""
        self._keep(
            f"{folder or '.'}/{Path(path).name}", lambda target: shutil.copyfile(path, target)
        )

    def log_figure(self, figure: Any, file: str) -> None:
        """Records a matplotlib figure as the artifact `file`, such as "figures/iou.png"."""
        self._keep(file, lambda target: figure.savefig(target))

    def log_dict(self, obj: Any, file: str) -> None:
        """Records an object as the JSON artifact `file`, such as "config.json"."""
        self._keep(
            file,
            lambda target: target.write_text(redact(json.dumps(obj, indent=2, default=str)) + "\n"),
        )

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Records a dataset that the run read. digest: at most 36 characters (MLflow's limit), context: "train" or "test"."""
        if len(digest) > 36:
            raise ValueError(
                f"dataset digest {digest!r} has {len(digest)} characters; MLflow takes 36, as of an md5"
            )
        self._record(
            "dataset", name=name, digest=digest, source=redact(str(source)), context=context
        )

    def end(self, status: str = "FINISHED") -> None:
        """Ends the run (FINISHED, FAILED, KILLED); the spool goes when all is sent, else a line says how to send the rest."""
        if not self._entries:
            return  # ended before
        self._record("end", flush=False, status=status, began=self._entries[0]["at"])
        self._flush(
            force=time.monotonic() - self._failed_at > 10
        )  # not into a time-out that was only just suffered
        if left := len(self._entries) - self._sent:
            where = (
                f"kept in {self.folder}: `emadapt track sync` logs them"
                if self._spooled
                else "and not kept: lost"
            )
            self._say("end", f"{left} entries of {self.folder.name} are not in MLflow, {where}")
        self._close(remove=not left)

    # ---- the spool

    def _lock(self) -> None:
        """Opens the spool file and holds it while this process lives, so that `sync` leaves it alone."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.folder / "entries.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except OSError as error:
            self._say(
                "spool", f"{self.folder} cannot be written ({error}): going on without a spool"
            )

    def _close(self, remove: bool) -> None:
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._entries, self._spooled, self._sent = -1, [], 0, 0

    def _record(self, do: str, *, flush: bool = True, **what: Any) -> None:
        self._entries.append({"do": do, "at": time.time_ns() // 1_000_000, **what})
        # From the first one that is not on disk: once a full disk has room again, nothing is missing in the spool.
        if self._append(self._entries[self._spooled :]):
            self._spooled = len(self._entries)
        if flush:
            self._flush()

    def _append(self, lines: list[dict[str, Any]]) -> bool:
        """Appends whole lines or nothing: a full disk must not leave half a line for the next one to be glued to."""
        if self._fd < 0:
            return False
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        size = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, data) == len(data):
                return True
            reason = "the disk is full"
        except OSError as error:
            reason = str(error)
        os.ftruncate(self._fd, size)
        self._say(
            "spool", f"{self.folder} cannot be written ({reason}): entries wait in memory only"
        )
        return False

    def _keep(self, file: str, write: Callable[[Path], object]) -> None:
        """Puts an artifact into the spool, where nobody overwrites it before it is sent."""
        target = self.folder / str(len(self._entries)) / Path(file).name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write(target)
        except OSError as error:
            self._say(file, f"{self.folder.name}: artifact {file} is not logged: {error}")
            return
        place = str(Path(file).parent)
        self._record(
            "artifact",
            path=str(target.relative_to(self.folder)),
            folder=None if place == "." else place,
        )

    def _say(self, once: str, text: str) -> None:
        if once not in self._said:
            self._said.add(once)
            log.warning("tracking: %s", redact(text))

    # ---- sending

    def _flush(self, force: bool = False) -> None:
        """Sends what is not sent; on an outage says so once and leaves the rest for later."""
        if (
            self.later
            or self._sent == len(self._entries)
            or (time.monotonic() - self._failed_at < self._wait and not force)
        ):
            return
        start = self._sent
        try:
            store = mlflow_store.client(self.root)
            while self._sent < len(self._entries):
                self._send_next(store)
        except (
            Exception
        ) as error:  # whatever a store, a driver or a proxy raises: it must not reach the training
            self._wait = (
                min(2 * self._wait, LONGEST_WAIT) if self._failed_at > -math.inf else FIRST_WAIT
            )
            self._failed_at = time.monotonic()
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            if "HTTPConnectionPool" in reason or "HTTPSConnectionPool" in reason:
                reason = "the server does not answer"
            kept = f"Entries are kept in {self.folder} and sent when it answers, or by `emadapt track sync`"
            self._say("outage", f"{tracking_uri(self.root)}: {reason}. Work goes on. {kept}")
        if self._sent > start:
            done = {
                "sent": min(self._sent, self._spooled),
                "run_id": self.run_id,
                "ended_before": self._ended_before,
            }
            self._append([done])

    def _send_next(self, store: Any) -> None:
        """Sends one entry, or a row of metrics in one batch. Raises on an outage; an entry that is refused is said and left."""
        batch = self._batch()
        do, patience = batch[0]["do"], mlflow_store.PATIENCE
        try:
            if do == "open":
                # What an earlier process of this unit left when it was killed goes first: its run may be the one to continue.
                if sync(self.root, batch[0]["tags"]["unit"])[1]:
                    raise ConnectionError("earlier entries of this unit could not be sent")
                found = mlflow_store.within(
                    patience, lambda: mlflow_store.find_or_create(store, self.root, batch[0])
                )
                self.run_id, self._ended_before = found
            else:
                if do == "artifact":
                    patience += (
                        self.folder / batch[0]["path"]
                    ).stat().st_size / 1e6  # at least 1 MB/s
                where = (self.run_id or "", self._ended_before, self.folder)
                mlflow_store.within(patience, lambda: mlflow_store.send(store, *where, batch))
        except Exception as error:
            code = getattr(error, "error_code", "")
            if code == "RESOURCE_DOES_NOT_EXIST" and do != "open" and "wiped" not in self._said:
                self._say(
                    "wiped",
                    f"{self.folder.name}: its run is no longer in MLflow: logging it again from the start",
                )
                self._sent = 0
                return
            if do == "open" or (
                code not in mlflow_store.REFUSALS and not isinstance(error, FileNotFoundError)
            ):
                raise
            self._say(
                f"refused {self._sent}",
                f"{self.folder.name}: {len(batch)} entries ({do}) refused: {error}",
            )
        self._sent += len(batch)

    def _batch(self) -> list[dict[str, Any]]:
        """The next entry, with the metrics entries that follow it if it is one: after an outage there may be hundreds."""
        batch = [self._entries[self._sent]]
        size = len(batch[0].get("values", ()))
        for entry in self._entries[self._sent + 1 :]:
            size += len(entry.get("values", ()))
            if not batch[0]["do"] == entry["do"] == "metrics" or size > 1000:  # MLflow's limit
                break
            batch.append(entry)
        return batch


class NullTracker(Tracker):
    """Tracks nothing: what open_run gives with EMADAPT_TRACKING=off, and what the other processes of a GPU job hold."""

    def __init__(self) -> None:
        super().__init__(Path(), Path())

    def _record(self, do: str, *, flush: bool = True, **what: Any) -> None:
        pass

    def _keep(self, file: str, write: Callable[[Path], object]) -> None:
        pass


def sync(root: Path, unit: str | None = None) -> tuple[int, int]:
    """Logs what was not logged by processes that are no longer there: `emadapt track sync`. Twice is as good as once.

    A run whose process died without ending it ends as KILLED, at the time of its last entry.

    Args:
        root: the project root.
        unit: only this unit's spools.

    Returns:
        The numbers of entries sent, and of entries that remain because the store does not answer.
    """
    sent = remaining = 0
    pattern = re.compile(f"{re.escape(unit)}-[0-9a-f]{{8}}" if unit else ".*")
    files = [
        f
        for f in (root.resolve() / SPOOL).glob("*/entries.jsonl")
        if pattern.fullmatch(f.parent.name)
    ]
    trackers = [tracker for file in files if (tracker := _left_over(root.resolve(), file))]
    for tracker in sorted(trackers, key=lambda tracker: tracker._entries[0]["at"]):
        before = tracker._sent
        if not remaining:
            tracker._flush(force=True)
        left = len(tracker._entries) - tracker._sent
        sent, remaining = sent + tracker._sent - before, remaining + left
        tracker._close(remove=not left)
    return sent, remaining


def _left_over(root: Path, file: Path) -> Tracker | None:
    """The tracker of a spool whose process is gone, with what it had recorded; None where it lives or recorded nothing."""
    tracker = Tracker(root, file.parent)
    try:
        tracker._fd = os.open(file, os.O_RDWR | os.O_APPEND)
        fcntl.flock(tracker._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by a living process, or removed by it just now
        tracker._close(remove=False)
        return None
    for line in file.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break  # cut off when the machine crashed
        if "sent" in entry:
            tracker._sent, tracker.run_id, tracker._ended_before = (
                entry["sent"],
                entry["run_id"],
                entry["ended_before"],
            )
        else:
            tracker._entries.append(entry)
    if not tracker._entries:
        tracker._close(remove=False)
        return None
    began, last = tracker._entries[0]["at"], tracker._entries[-1]
    if last["do"] != "end":
        tracker._entries.append(
            {"do": "end", "at": last["at"], "status": "KILLED", "began": began, "lost": True}
        )
    tracker._spooled = len(tracker._entries)
    return tracker


def _settings(params: Mapping[str, Any]) -> str | None:
    """Digest of what runs that differ in their seed only have in common."""
    common = {name: value for name, value in _flat(params).items() if name != "unit.seed"}
    return (
        hashlib.sha256(json.dumps(common, sort_keys=True, default=str).encode()).hexdigest()[:12]
        if common
        else None
    )


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested to dotted: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        flat |= (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{name}": value}
        )
    return flat


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as MLflow stores them: text, at most 5000 characters, no passwords; no None, booleans as in YAML."""
    said = {
        k: str(v).lower() if isinstance(v, bool) else str(v)
        for k, v in values.items()
        if v is not None
    }
    return {name: redact(text)[:5000] for name, text in said.items()}
